#include "pop-schema-limits.h"

#include "pop-limits.h"

#include "common.h"

#include <unordered_set>
#include <vector>

using json = common_json;

// The length of a property's name, in characters, where the schema allows other properties too.
static constexpr size_t MAX_KEY_LENGTH = 256;

void pop_schema_budget::spend(size_t cost) {
    if (cost > left) {
        throw std::invalid_argument(
            "the schema is too large: give it fewer or shorter names, fewer optional properties, or fewer references");
    }
    left -= cost;
}

// Characters that the name of a rule cannot have become "-". Where several rules then want the same name, upstream adds
// a number, and tries one number after the other.
void pop_schema_budget::add_rule(const std::string & name) {
    std::string rule;
    for (const char c : name) {
        const bool valid = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
        if (valid || rule.empty() || rule.back() != '-') {
            rule += valid ? c : '-';
        }
    }
    spend(name.size() + rules[rule]++ * rule.size());
}

enum schema_kind { NONE, REF, ANY_OF, TYPES, LITERALS, OBJECT, ALL_OF, ARRAY, STRING };

static json type_of(const json & schema) {
    return schema.is_object() && schema.contains("type") ? schema.at("type") : json();
}

// The order of these questions is that of common_chat_schema_builder::build_node(). Where a schema has a list of types,
// upstream treats it as one schema for each type, so the type is a parameter of its own.
static schema_kind kind_of(const json & schema, const json & type) {
    if (!schema.is_object()) {
        return NONE;
    }
    if (schema.contains("$ref")) {
        return schema.at("$ref").is_string() ? REF : NONE;
    }
    if (schema.contains("oneOf") || schema.contains("anyOf")) {
        return ANY_OF;
    }
    if (type.is_array()) {
        return TYPES;
    }
    if (schema.contains("const") || schema.contains("enum")) {
        return LITERALS;
    }
    const std::string name       = type.is_string() ? type.get<std::string>() : "";
    const bool        has_all_of = schema.contains("allOf");
    const bool has_properties = schema.contains("properties") ||
                                (schema.contains("additionalProperties") && schema.at("additionalProperties") != true);
    if (name.empty() ? has_properties : name == "object" && (has_properties || !has_all_of)) {
        return OBJECT;
    }
    if (has_all_of && (name.empty() || name == "object" || name == "string")) {
        return ALL_OF;
    }
    if (name.empty() ? schema.contains("items") || schema.contains("prefixItems") : name == "array") {
        return ARRAY;
    }
    return name.empty() || name == "string" ? STRING : NONE;
}

static const json & alternatives_of(const json & schema) {
    return schema.at(schema.contains("oneOf") ? "oneOf" : "anyOf");
}

static std::string prefix(const std::string & name) {
    return name.empty() ? "" : name + "-";
}

// Walks through a schema as upstream's code does, but only counts. There are two passes, because upstream makes two:
//   BUILD   as common_chat_schema_builder in common/json-schema.cpp
//   CONVERT as common_chat_schema_converter in common/json-schema-to-grammar.cpp
// The walk goes on where upstream would refuse a schema, because upstream writes the error.
class schema_walk {
public:
    enum walk_pass { BUILD, CONVERT };

    // With follows_types, the walk also counts what common_chat_schema::value_types() does for each schema.
    schema_walk(
        const json & root, const std::string & name, walk_pass pass, bool follows_types, pop_schema_budget & budget) :
        root(root), root_name(name), pass(pass), follows_types(follows_types), budget(budget) {}

    void run() { visit(root, type_of(root), root_name); }

private:
    struct level {
        explicit level(int & depth) : depth(depth) { pop_check_depth(++depth, "a schema is"); }
        ~level() { --depth; }
        int & depth;
    };

    const json &        root;
    const std::string   root_name;
    const walk_pass     pass;
    const bool          follows_types;
    pop_schema_budget & budget;

    int                                           depth = 0;
    std::unordered_map<std::string, const json *> targets; // by reference; nullptr for one that leads nowhere
    std::unordered_set<std::string>               visited; // references that were followed; upstream follows each once
    std::unordered_set<std::string>               open;    // references that follow_types() is inside

    void visit(const json & schema, const json & type, const std::string & name) {
        const level nested(depth);
        budget.spend(64 + schema.size());
        if (pass == CONVERT) {
            budget.add_rule(name);
        } else {
            budget.spend(name.size());
        }

        const schema_kind kind = kind_of(schema, type);
        if (follows_types && (kind == REF || kind == ANY_OF || kind == TYPES || kind == ALL_OF)) {
            follow(schema, type);
        }
        switch (kind) {
            case REF:
                {
                    const std::string ref    = schema.at("$ref").get<std::string>();
                    const json *      target = resolve(ref);
                    if (target && visited.insert(ref).second) {
                        visit(*target, type_of(*target), prefix(root_name) + "ref" + ref.substr(1));
                    }
                    break;
                }
            case ANY_OF:
                visit_all(alternatives_of(schema), prefix(name) + "alternative-");
                break;
            case TYPES:
                budget.spend(type.size() * schema.dump().size()); // upstream copies the schema for each type
                for (const auto & one : type) {
                    visit(schema, one, prefix(name) + "alternative-");
                }
                break;
            case LITERALS:
                spend_literals(schema);
                break;
            case OBJECT:
                visit_object(schema, name);
                break;
            case ALL_OF:
                if (pass == BUILD) {
                    visit_all(schema.at("allOf"), prefix(name));
                } else {
                    convert_all_of(schema.at("allOf"), name);
                }
                break;
            case ARRAY:
                {
                    const std::string key = schema.contains("items") ? "items" : "prefixItems";
                    if (schema.contains(key) && schema.at(key).is_array()) {
                        visit_all(schema.at(key), prefix(name) + "tuple-");
                    } else if (schema.contains(key)) {
                        visit(schema.at(key), type_of(schema.at(key)), prefix(name) + "item");
                    }
                    break;
                }
            case STRING:
                if (schema.contains("pattern") && schema.at("pattern").is_string()) {
                    budget.spend(schema.at("pattern").get<std::string>().size() +
                                 budget.rules.size()); // upstream copies all rules
                }
                break;
            case NONE:
                break;
        }
    }

    void visit_all(const json & schemas, const std::string & name) {
        if (schemas.is_array()) {
            size_t i = 0;
            for (const auto & schema : schemas) {
                visit(schema, type_of(schema), name + std::to_string(i++));
            }
        }
    }

    // This does what common_chat_schema_builder::resolve_ref() does. The members of an object are a list there, which
    // is searched.
    const json * resolve(const std::string & ref) {
        const auto known = targets.find(ref);
        if (known != targets.end()) {
            return known->second;
        }
        const json *                   target = ref.compare(0, 2, "#/") == 0 ? &root : nullptr;
        const std::vector<std::string> path   = string_split(target ? ref.substr(1) : "", "/");
        for (size_t i = 1; target && i < path.size(); ++i) {
            budget.spend(1 + target->size() / 16);
            if (target->is_object() && target->contains(path[i])) {
                target = &target->at(path[i]);
            } else if (target->is_array()) {
                size_t index = target->size();
                try {
                    index = std::stoull(path[i]);
                } catch (const std::logic_error &) {
                    // this is no number, and the reference leads nowhere
                }
                target = index < target->size() ? &target->at(index) : nullptr;
            } else {
                target = nullptr;
            }
        }
        return targets[ref] = target;
    }

    // This does what common_chat_schema::value_types() does, which follows a reference again wherever it meets it,
    // unless it is inside it.
    void follow(const json & schema, const json & type) {
        const level nested(depth);
        budget.spend(16);
        switch (kind_of(schema, type)) {
            case REF:
                {
                    const std::string ref    = schema.at("$ref").get<std::string>();
                    const json *      target = resolve(ref);
                    if (target && open.insert(ref).second) {
                        follow(*target, type_of(*target));
                        open.erase(ref);
                    }
                    break;
                }
            case ANY_OF:
                follow_all(alternatives_of(schema));
                break;
            case TYPES:
                for (const auto & one : type) {
                    follow(schema, one);
                }
                break;
            case ALL_OF:
                follow_all(schema.at("allOf"));
                break;
            default:
                break;
        }
    }

    void follow_all(const json & schemas) {
        if (schemas.is_array()) {
            for (const auto & schema : schemas) {
                follow(schema, type_of(schema));
            }
        }
    }

    void spend_literals(const json & schema) {
        for (const char * key : { "const", "enum" }) {
            if (schema.contains(key)) {
                budget.spend(schema.at(key).dump().size());
            }
        }
    }

    void visit_object(const json & schema, const std::string & name) {
        std::vector<std::string> names;
        visit_properties(schema, name, names);
        const json other      = schema.contains("additionalProperties") ? schema.at("additionalProperties") : json();
        const bool open_ended = other.is_object() || (other.is_boolean() && other.get<bool>());
        if (open_ended) {
            visit(other, type_of(other), prefix(name) + "additional-value");
            check_lengths(names);
        }

        std::unordered_set<std::string> required;
        if (schema.contains("required") && schema.at("required").is_array()) {
            for (const auto & key : schema.at("required")) {
                if (key.is_string()) {
                    required.insert(key.get<std::string>());
                }
            }
        }
        spend_optional(names, required, open_ended, name);
    }

    // Iterating over an object's members takes quadratic time in common_json.
    void visit_properties(const json & schema, const std::string & name, std::vector<std::string> & names) {
        if (!schema.contains("properties") || !schema.at("properties").is_object()) {
            return;
        }
        const json & properties = schema.at("properties");
        budget.spend(properties.size() * properties.size() / 64);
        for (const auto & [key, property] : properties.items()) {
            visit(property, type_of(property), prefix(name) + key);
            if (pass == CONVERT) {
                budget.add_rule(prefix(name) + key + "-kv");
                budget.spend(2 * (name.size() + key.size()));
            }
            names.push_back(key);
        }
    }

    // In the rule for all other names, each character of a name is a bracket inside that of the character before.
    static void check_lengths(const std::vector<std::string> & names) {
        for (const auto & name : names) {
            size_t length = 0;
            for (const char c : name) {
                length += (c & 0xc0) != 0x80; // the first byte of a character in UTF-8
            }
            if (length > MAX_KEY_LENGTH) {
                throw std::invalid_argument(
                    "the schema has a name of more than " + std::to_string(MAX_KEY_LENGTH) +
                    " characters beside which it allows other names: shorten it, or set additionalProperties to false");
            }
        }
    }

    // Each optional property may be the first one that is there. For each of them, upstream writes the rules of all
    // that follow it, and for each of these rules it copies the list of the names that follow.
    void spend_optional(const std::vector<std::string> &        names,
                        const std::unordered_set<std::string> & required,
                        bool                                    open_ended,
                        const std::string &                     name) {
        size_t n     = open_ended;
        size_t bytes = 0;
        for (const auto & key : names) {
            if (!required.count(key)) {
                n += 1;
                bytes += 3 * (name.size() + key.size());
            }
        }
        for (size_t i = 0; pass == CONVERT && i < n; ++i) {
            budget.spend((n - i) * (n - i) / 2 + bytes / 2);
        }
    }

    // This does what common_chat_schema_converter::_visit_all_of() does, which takes the properties of all components
    // together. It follows a reference to a component each time it meets it.
    void convert_all_of(const json & components, const std::string & name) {
        std::vector<std::string>        names;
        std::unordered_set<std::string> required;
        if (!components.is_array()) {
            return;
        }
        for (const auto & component : components) {
            const schema_kind kind = kind_of(component, type_of(component));
            if (kind == ANY_OF && alternatives_of(component).is_array()) {
                for (const auto & alternative : alternatives_of(component)) {
                    convert_component(alternative, name, names);
                }
            } else if (kind == TYPES) {
                budget.spend(component.at("type").size() * component.dump().size());
                for (size_t i = 0; i < component.at("type").size(); ++i) {
                    visit_properties(component, name, names);
                }
            } else {
                const size_t n_optional = names.size();
                convert_component(component, name, names);
                required.insert(names.begin() + n_optional, names.end());
            }
        }
        spend_optional(names, required, false, name);
    }

    void convert_component(const json & component, const std::string & name, std::vector<std::string> & names) {
        const level nested(depth);
        budget.spend(64);
        switch (kind_of(component, type_of(component))) {
            case REF:
                if (const json * target = resolve(component.at("$ref").get<std::string>())) {
                    convert_component(*target, name, names);
                }
                break;
            case OBJECT:
                visit_properties(component, name, names);
                break;
            case LITERALS:
                spend_literals(component);
                break;
            default:
                break;
        }
    }
};

void pop_check_schema(const json & schema, const std::string & name, bool is_tool, pop_schema_budget & budget) {
    schema_walk(schema, name, schema_walk::BUILD, is_tool, budget).run();
    schema_walk(schema, name, schema_walk::CONVERT, false, budget).run();
}

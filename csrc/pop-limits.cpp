#include "pop-limits.h"

#include "pop-schema-limits.h"

#include "common.h"
#include "json.h"

#include <stdexcept>

using json = common_json;

static constexpr size_t MAX_TRIGGER_BYTES = 1024;
static constexpr size_t MAX_PROMPTS       = 1024;
static constexpr int    MAX_LAST_TOKENS   = 1 << 20; // a sampler that looks back allocates memory for this many tokens

[[noreturn]] static void refuse(const std::string & why) {
    throw std::invalid_argument(why);
}

// The text need not be valid JSON.
static void check_json_nesting(const std::string & text) {
    int  depth  = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (quoted) {
            i += c == '\\';
            quoted = c != '"';
        } else if (c == '"') {
            quoted = true;
        } else if (c == '[' || c == '{') {
            pop_check_depth(++depth, "JSON is");
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
}

// Counts the brackets of a GBNF grammar as the parser in llama-grammar.cpp does, which recurses for each open one.
// Brackets in literals "(", in character classes [(], in tokens <(> and in comments do not count.
static void check_grammar_nesting(const std::string & grammar) {
    int  depth = 0;
    char end   = 0; // the character that ends the literal, class, token or comment that i is in
    for (size_t i = 0; i < grammar.size(); ++i) {
        const char c = grammar[i];
        if (end) {
            i += c == '\\' && (end == '"' || end == ']');
            end = c == end || (end == '\n' && c == '\r') ? 0 : end;
        } else if (c == '"' || c == '[' || c == '<' || c == '#') {
            end = c == '[' ? ']' : c == '<' ? '>' : c == '#' ? '\n' : c;
        } else if (c == '(') {
            pop_check_depth(++depth, "the grammar's brackets are");
        } else if (c == ')' && depth > 0) {
            --depth;
        }
    }
}

static const json * find(const json * object, const char * key) {
    return object && object->is_object() && object->contains(key) ? &object->at(key) : nullptr;
}

// Checks the schemas of a request, at every place where /completion, /v1/chat/completions and /v1/messages take one.
static void check_schemas(const json & body) {
    pop_schema_budget budget;
    const json *      format = find(&body, "response_format");
    for (const json * schema :
         { find(&body, "json_schema"), find(format, "schema"), find(find(format, "json_schema"), "schema") }) {
        if (schema) {
            pop_check_schema(*schema, "", false, budget);
        }
    }

    const json * tools = find(&body, "tools");
    if (!tools || !tools->is_array()) {
        return;
    }
    for (const auto & tool : *tools) {
        for (const json * holder : { &tool, find(&tool, "function") }) {
            const json * name = find(holder, "name");
            for (const json * schema : { find(holder, "parameters"), find(holder, "input_schema") }) {
                if (schema) {
                    pop_check_schema(*schema, name && name->is_string() ? name->get<std::string>() : "tool", true,
                                     budget);
                }
            }
        }
    }
}

// Arguments of tool calls are JSON in a text, which some templates parse.
static void check_arguments(const json & messages) {
    if (messages.is_object()) {
        for (const auto & [key, value] : messages.items()) {
            if (key == "arguments" && value.is_string()) {
                check_json_nesting(value.get<std::string>());
            }
            check_arguments(value);
        }
    } else if (messages.is_array()) {
        for (const auto & value : messages) {
            check_arguments(value);
        }
    }
}

static void check_triggers(const json & triggers) {
    if (!triggers.is_array()) {
        return;
    }
    for (const auto & trigger : triggers) {
        const json * type  = find(&trigger, "type");
        const json * value = find(&trigger, "value");
        if (!type || !type->is_number_integer() ||
            (*type != COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN && *type != COMMON_GRAMMAR_TRIGGER_TYPE_WORD)) {
            // the other types are regular expressions, which can take for ever or exhaust the stack
            refuse("a grammar trigger is neither a token (0) nor a word (1)");
        }
        if (value && value->is_string() && value->get<std::string>().size() > MAX_TRIGGER_BYTES) {
            refuse("a grammar trigger is longer than " + std::to_string(MAX_TRIGGER_BYTES) + " bytes");
        }
    }
}

// Numbers in a list are the tokens of one prompt. Objects without a prompt are the messages of OpenAI's /v1/responses.
static void check_prompts(const json & prompts) {
    if (!prompts.is_array()) {
        return;
    }
    size_t n = 0;
    for (const auto & prompt : prompts) {
        if (prompt.is_number()) {
            return;
        }
        n += prompt.is_string() || prompt.is_array() || find(&prompt, "prompt_string");
    }
    if (n > MAX_PROMPTS) {
        refuse(std::to_string(n) + " prompts in one request: give " + std::to_string(MAX_PROMPTS) + " at most");
    }
}

// Refuses what OpenAI's endpoints promise and llama-server would leave out without a word.
static void check_unserved(const json & body) {
    auto asks = [&](const char * key) { return body.contains(key) && !body.at(key).is_null(); };
    if (asks("prompt")) {
        if (asks("echo") && body.at("echo") != false) {
            refuse("\"echo\" is not served: PopLlama with logits_all=True scores the tokens of a prompt");
        }
        if (asks("suffix") && body.at("suffix") != "") {
            refuse("\"suffix\" is not served: send the text after the gap to /infill as \"input_suffix\"");
        }
        if (asks("best_of") && body.at("best_of") != (asks("n") ? body.at("n") : json(1))) {
            refuse("\"best_of\" is not served: ask for \"n\" answers and choose among them");
        }
    }
    if (asks("input") && asks("dimensions")) {
        refuse("\"dimensions\" is not served: embeddings have as many values as the model gives them");
    }
}

void pop_check_request(const std::string & text) {
    check_json_nesting(text);
    const json body = json::parse_no_throw(text);
    if (!body.is_object()) {
        return;
    }

    for (const char * key : { "messages", "input" }) {
        if (body.contains(key)) {
            check_arguments(body.at(key));
        }
    }
    check_unserved(body);
    check_schemas(body);
    if (body.contains("grammar") && body.at("grammar").is_string()) {
        check_grammar_nesting(body.at("grammar").get<std::string>());
    }
    if (body.contains("grammar_triggers")) {
        check_triggers(body.at("grammar_triggers"));
    }
    if (body.contains("chat_parser")) {
        // the server makes this field itself; a client's own parser could call itself without end
        refuse("\"chat_parser\" is not for clients");
    }
    for (const char * key : { "prompt", "input", "content" }) {
        if (body.contains(key)) {
            check_prompts(body.at(key));
        }
    }
    for (const char * key : { "repeat_last_n", "dry_penalty_last_n" }) {
        if (body.contains(key) && body.at(key).is_number() && body.at(key).get<double>() > MAX_LAST_TOKENS) {
            refuse(std::string("\"") + key + "\" is more than " + std::to_string(MAX_LAST_TOKENS));
        }
    }
}

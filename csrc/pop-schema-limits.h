// Limits on the JSON schemas of a request. pop-limits.cpp calls this file, which knows how llama.cpp turns a schema
// into a grammar.

#pragma once

#include "json.h"

#include <cstddef>
#include <string>
#include <unordered_map>

// A budget says what all schemas of one request may cost together. A unit is about one byte of a grammar, or one step
// of a search.
struct pop_schema_budget {
    size_t                                  left = 64 << 20;
    std::unordered_map<std::string, size_t> rules; // how many rules want each name

    // Throws std::invalid_argument when nothing is left.
    void spend(size_t cost);
    void add_rule(const std::string & name);
};

// Throws std::invalid_argument if the schema is nested too deep, has a name that is too long, or costs more than the
// budget has left. Rules are named after the name. For a tool, the parsers of its calls also ask for the types of its
// parameters, which is counted.
void pop_check_schema(const common_json & schema, const std::string & name, bool is_tool, pop_schema_budget & budget);

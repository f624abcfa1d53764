// How far a client's request may go where llama.cpp recurses: at the end of the stack the process ends. Patch 0010 asks in
// the server, in common/ and in the grammar parser.

#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

constexpr int    POP_MAX_NESTING       = 256;      // brackets of JSON and of a grammar; schemas, also by reference
constexpr int    POP_MAX_CHAIN         = 4096;     // grammar rules that begin with one another
constexpr int    POP_MAX_PARSERS       = 2048;     // parsers of a model's answer, about six for a bracket
constexpr size_t POP_MAX_SCHEMA        = 16 << 20; // bytes of names and rules made of it, of names tried, properties gone through
constexpr size_t POP_MAX_KEY_BYTES     = 1024;     // a name beside which a schema allows others
constexpr size_t POP_MAX_TRIGGER_BYTES = 1024;
constexpr size_t POP_MAX_PROMPTS       = 1024;     // in one request
constexpr int    POP_MAX_LAST_TOKENS   = 1 << 20;  // that samplers look back on, and keep memory for

// One level of a recursion, while it lives. Throws std::invalid_argument at one too many.
class pop_nesting {
public:
    pop_nesting(int & depth, const char * what, int limit = POP_MAX_NESTING) : depth(depth) {
        if (depth >= limit) {
            throw std::invalid_argument(std::string(what) + " nested deeper than " + std::to_string(limit));
        }
        ++depth;
    }
    ~pop_nesting() { --depth; }

    pop_nesting(const pop_nesting &) = delete;

private:
    int & depth;
};

// What one schema may cost. Throws std::invalid_argument.
class pop_budget {
public:
    void spend(size_t cost) {
        if (cost > left) {
            throw std::invalid_argument("the schema is too large: give it fewer or shorter names, or fewer that are not required");
        }
        left -= cost;
    }

private:
    size_t left = POP_MAX_SCHEMA;
};

// The name with one "-" for each run of characters that a grammar's rule cannot have. std::regex recurses for each of them.
inline std::string pop_rule_name(const std::string & name) {
    std::string rule;
    bool        other = false;
    for (const char c : name) {
        const bool allowed = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
        if (allowed || !other) {
            rule += allowed ? c : '-';
        }
        other = !allowed;
    }
    return rule;
}

// Throws std::invalid_argument. What is no JSON may pass: it is parsed afterwards.
inline void pop_check_nesting(const std::string & json) {
    int  depth  = 0;
    bool quoted = false;
    for (size_t i = 0; i < json.size(); ++i) {
        const char c = json[i];
        if (quoted) {
            i += c == '\\';
            quoted = c != '"';
        } else if (c == '"') {
            quoted = true;
        } else if (c == '[' || c == '{') {
            if (++depth > POP_MAX_NESTING) {
                throw std::invalid_argument("JSON is nested deeper than " + std::to_string(POP_MAX_NESTING));
            }
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
}

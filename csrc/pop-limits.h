// How far a client's request may go where llama.cpp recurses: at the end of the stack the process ends. Patch 0010 asks in
// the server, in common/ and in the grammar parser.

#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

constexpr int    POP_MAX_NESTING   = 256;  // brackets of JSON and of a grammar; schemas, also by reference
constexpr int    POP_MAX_CHAIN     = 4096; // grammar rules that begin with one another
constexpr size_t POP_MAX_KEY_BYTES = 1024; // a name beside which a schema allows others
constexpr size_t POP_MAX_PATTERN   = 1024; // a trigger, bytes
constexpr size_t POP_MAX_PROMPTS   = 1024; // in one request

// One level of a recursion, while it lives. Throws std::invalid_argument at one too many.
class pop_nesting {
public:
    pop_nesting(int & depth, const char * what) : depth(depth) {
        if (depth >= POP_MAX_NESTING) {
            throw std::invalid_argument(std::string(what) + " nested deeper than " + std::to_string(POP_MAX_NESTING));
        }
        ++depth;
    }
    ~pop_nesting() { --depth; }

    pop_nesting(const pop_nesting &) = delete;

private:
    int & depth;
};

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

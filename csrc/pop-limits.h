// Limits on what a request may ask of llama-server, and the fields that it does not serve. The wrapper of the server's
// handlers calls pop_check_request() for every request before any parser of llama.cpp sees it (patch upstream/0007).
// These parsers recurse, and a process whose stack is exhausted ends.

#pragma once

#include <stdexcept>
#include <string>

constexpr int POP_MAX_NESTING = 256; // brackets of JSON and of grammars; schemas in one another, also by reference

inline void pop_check_depth(int depth, const char * what) {
    if (depth > POP_MAX_NESTING) {
        throw std::invalid_argument(std::string(what) + " nested deeper than " + std::to_string(POP_MAX_NESTING));
    }
}

// Throws std::invalid_argument, whose text goes to the client, if the request exceeds a limit.
// A body that is not a JSON object passes: the endpoint answers it with an error of its own.
void pop_check_request(const std::string & body);

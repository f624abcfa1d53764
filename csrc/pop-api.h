// Helpers of all C functions of llama-pop.h, which refuse with a reason and let no exception out.

#pragma once

#include "llama.h"

#include <cstdint>
#include <exception>
#include <string>

namespace pop_api {

// Keeps the reason for llama_pop_last_error(), as one line, and returns false.
bool refuse(const char * why);

inline bool refuse(const std::string & why) {
    return refuse(why.c_str());
}

// Returns what work returns. An exception becomes the value that stands for failure.
template <typename result, typename function> result guarded(result failure, function work) {
    try {
        return work();
    } catch (const std::exception & e) {
        refuse(e.what());
    } catch (...) {
        refuse("unknown exception");
    }
    return failure;
}

// Returns false if an argument is NULL.
template <typename... pointers> bool given(const pointers *... arguments) {
    return ((arguments != nullptr) && ...) || refuse("an argument is NULL");
}

inline bool in_range(const char * name, int32_t value, int32_t low, int32_t high) {
    return (value >= low && value <= high) || refuse(std::string(name) + " is " + std::to_string(value) + ": give " +
                                                     std::to_string(low) + " to " + std::to_string(high));
}

inline bool has_memory(const llama_context * ctx) {
    return llama_get_memory(ctx) || refuse("this context has no cache to fill: there is no prefill to prune");
}

} // namespace pop_api

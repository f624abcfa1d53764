// Where ggml finds its CPU variants in a build with GGML_BACKEND_DL: beside itself. On its own it looks beside the running
// program, which is python, and in the working directory. CMakeLists.txt gives ggml-backend-reg.cpp this as GGML_BACKEND_DIR.

#pragma once

#include <string>

// directory of the ggml library, UTF-8; empty where the system does not tell
std::string pop_backend_dir();

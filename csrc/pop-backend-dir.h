// A build with GGML_BACKEND_DL finds the variants of ggml for several CPUs beside the ggml library itself. On its own
// ggml looks beside the running program, which is python, and in the working directory. CMakeLists.txt compiles
// ggml-backend-reg.cpp with pop_backend_dir() as its GGML_BACKEND_DIR.

#pragma once

#include <string>

// Returns the directory of the ggml library in UTF-8; empty if the system does not tell.
std::string pop_backend_dir();

# Compiles for macOS on arm64 on another machine, with the clang of PyPI's ziglang, which brings the interface of macOS
# but no framework of Apple's. So Metal and Accelerate are left out, and what was compiled cannot be run here.
# CMakePresets.json names this file in the preset "macos".
include("${CMAKE_CURRENT_LIST_DIR}/../../tools/wheel/toolchain.cmake")
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_C_COMPILER ${POP_ZIG} cc -target aarch64-macos)
set(CMAKE_CXX_COMPILER ${POP_ZIG} c++ -target aarch64-macos)
set(CMAKE_INSTALL_NAME_TOOL true) # CMake asks for this tool of Apple's, and building alone does not use it

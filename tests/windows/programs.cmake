# CMakePresets.json includes this file in the preset "windows".
include(CheckCXXSourceCompiles)
include("${CMAKE_CURRENT_LIST_DIR}/../programs/programs.cmake")

# GCC 12 takes the distance between two rows of a tile for a long, which has 32 bits on Windows, and the assembler then
# refuses its code for AMX.
function(pop_empty_kinds_with_amx)
    set(CMAKE_REQUIRED_FLAGS "-mamx-tile -mamx-int8")
    check_cxx_source_compiles("
        #include <immintrin.h>
        int main(int argc, char ** argv) { _tile_loadd(0, argv, argc); }" POP_COMPILER_HAS_AMX)
    if(NOT POP_COMPILER_HAS_AMX)
        pop_empty_kinds(ggml-cpu-sapphirerapids)
    endif()
endfunction()

cmake_language(DEFER CALL pop_empty_kinds_with_amx)

# The wheel carries parts of the compiler's libraries. These are the notices of Debian's packages.
foreach(package IN ITEMS gcc-mingw-w64-base mingw-w64-common)
    install(FILES "/usr/share/doc/${package}/copyright" DESTINATION pypop_gguf/_vendor/llama.cpp/licenses
        RENAME LICENSE-${package} COMPONENT pypop_gguf)
endforeach()

# CMakePresets.json includes this file in the preset "arm".
include(CheckCXXCompilerFlag)
include("${CMAKE_CURRENT_LIST_DIR}/../programs/programs.cmake")

# GCC knows the matrix instructions of Armv9 (SME) from version 14 on.
function(pop_empty_kinds_with_sme)
    check_cxx_compiler_flag(-march=armv9.2-a+sme POP_COMPILER_HAS_SME)
    if(NOT POP_COMPILER_HAS_SME)
        pop_empty_kinds(ggml-cpu-armv9.2_1 ggml-cpu-armv9.2_2)
    endif()
endfunction()

cmake_language(DEFER CALL pop_empty_kinds_with_sme)

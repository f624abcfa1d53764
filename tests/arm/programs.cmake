# CMakePresets.json includes this file in the preset "arm".
include(CheckCXXCompilerFlag)
include("${CMAKE_CURRENT_LIST_DIR}/../programs/programs.cmake")

# GCC knows the matrix instructions of Armv9 (SME) from version 14 on. An older one builds these CPU libraries empty, and
# ggml passes over them.
function(pop_empty_kinds_with_sme)
    check_cxx_compiler_flag(-march=armv9.2-a+sme POP_COMPILER_HAS_SME)
    if(NOT POP_COMPILER_HAS_SME)
        file(WRITE "${CMAKE_BINARY_DIR}/empty.cpp" "")
        set_target_properties(ggml-cpu-armv9.2_1 ggml-cpu-armv9.2_2 PROPERTIES
            SOURCES "${CMAKE_BINARY_DIR}/empty.cpp" COMPILE_OPTIONS "" LINK_LIBRARIES "")
    endif()
endfunction()

cmake_language(DEFER CALL pop_empty_kinds_with_sme)

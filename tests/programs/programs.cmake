# Adds programs that tests run in an emulator, beside the libraries: there they find ggml's CPU libraries, and on Windows
# all others too. The files programs.cmake of the presets "arm" and "windows" include this file.
function(pop_add_programs)
    add_executable(worker tests/programs/worker.cpp)
    target_include_directories(worker PRIVATE csrc)
    target_link_libraries(worker PRIVATE llama)
    add_executable(products tests/programs/products.cpp)
    target_link_libraries(products PRIVATE ggml)
    set_target_properties(worker products PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endfunction()

# Builds CPU libraries for kinds of processors that the compiler does not know empty, and ggml passes over them.
function(pop_empty_kinds)
    file(WRITE "${CMAKE_BINARY_DIR}/empty.cpp" "")
    set_target_properties(${ARGN} PROPERTIES
        SOURCES "${CMAKE_BINARY_DIR}/empty.cpp" COMPILE_OPTIONS "" LINK_LIBRARIES "")
endfunction()

cmake_language(DEFER CALL pop_add_programs)

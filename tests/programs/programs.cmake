# Adds programs that tests run in an emulator, beside the libraries: there they find ggml's CPU libraries, and on Windows
# all others too. CMakePresets.json includes this file in the preset "windows", and tests/arm/programs.cmake includes it
# in the preset "arm".
function(pop_add_programs)
    add_executable(worker tests/programs/worker.cpp)
    target_include_directories(worker PRIVATE csrc)
    target_link_libraries(worker PRIVATE llama)
    add_executable(products tests/programs/products.cpp)
    target_link_libraries(products PRIVATE ggml)
    set_target_properties(worker products PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endfunction()

cmake_language(DEFER CALL pop_add_programs)

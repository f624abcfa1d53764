# CMakePresets.json includes this file in the preset "amx".

# Adds the program that tests run, and the library that emulates the tiles for it.
function(pop_add_amx_programs)
    add_executable(products tests/programs/products.cpp)
    target_link_libraries(products PRIVATE ggml)
    add_library(emulated-tiles SHARED tests/amx/emulated-tiles.cpp)
    target_link_libraries(emulated-tiles PRIVATE ${CMAKE_DL_LIBS})
    set_target_properties(products emulated-tiles PROPERTIES
        RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin" LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endfunction()

cmake_language(DEFER CALL pop_add_amx_programs)

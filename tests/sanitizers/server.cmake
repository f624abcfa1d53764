# CMakePresets.json includes this file. GCC takes up to a quarter of an hour for one of llama-server's files with every
# sanitizer, so these files are built with less optimization and without the search for undefined behaviour. Our own file
# keeps that search.
function(pop_build_server_lighter)
    foreach(target IN ITEMS cpp-httplib llama-common mtmd server-context llama-server-impl)
        target_compile_options(${target} PRIVATE -O1 -g1 -fno-sanitize=undefined)
    endforeach()
    if(LLAMA_SANITIZE_UNDEFINED)
        set_source_files_properties(csrc/pop-server.cpp TARGET_DIRECTORY server-context PROPERTIES COMPILE_OPTIONS -fsanitize=undefined)
    endif()
endfunction()
cmake_language(DEFER CALL pop_build_server_lighter)

# The settings of the wheel for Linux, and the C++ library that it carries. `make wheel` has this file included after
# the project() of CMakeLists.txt.
set(GGML_NATIVE OFF CACHE BOOL "")
set(GGML_BACKEND_DL ON CACHE BOOL "")
set(GGML_CPU_ALL_VARIANTS ON CACHE BOOL "")
set(GGML_OPENMP OFF CACHE BOOL "") # ziglang brings no OpenMP, so that ggml computes in threads of its own
set(GGML_CCACHE OFF CACHE BOOL "") # zig itself keeps what it has compiled

# zig would link its C++ library into each of our libraries, and then none could catch an exception of another one.
# Therefore its sources are built here as one shared library.
execute_process(COMMAND ${Python_EXECUTABLE} -c "import ziglang; print(ziglang.__path__[0])"
    OUTPUT_VARIABLE zig OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
file(GLOB sources "${zig}/lib/libcxx/src/*.cpp" "${zig}/lib/libcxx/src/filesystem/*.cpp"
    "${zig}/lib/libcxx/src/ryu/*.cpp" "${zig}/lib/libcxxabi/src/*.cpp")
list(FILTER sources EXCLUDE REGEX "libcxx/src/new.cpp|cxa_noexception.cpp") # others define the same functions
add_library(pop-cxx SHARED ${sources})
target_compile_features(pop-cxx PRIVATE cxx_std_23)
target_compile_definitions(pop-cxx PRIVATE _LIBCPP_BUILDING_LIBRARY LIBCXX_BUILDING_LIBCXXABI
    _LIBCXXABI_BUILDING_LIBRARY LIBC_NAMESPACE=__llvm_libc_common_utils)
target_compile_options(pop-cxx PRIVATE -w)
target_include_directories(pop-cxx PRIVATE "${zig}/lib/libcxx/src" "${zig}/lib/libcxx/libc")
add_link_options(-nostdlib++ -lunwind -s)
link_libraries(pop-cxx)

install(TARGETS pop-cxx COMPONENT pypop_gguf LIBRARY DESTINATION pypop_gguf/_vendor/llama_cpp/lib)
foreach(notice IN ITEMS lib/libcxx/LICENSE.TXT:libcxx lib/libcxxabi/LICENSE.TXT:libcxxabi
        lib/libunwind/LICENSE.TXT:libunwind LICENSE:zig)
    string(REPLACE ":" ";" notice "${notice}")
    list(GET notice 0 file)
    list(GET notice 1 name)
    install(FILES "${zig}/${file}" DESTINATION pypop_gguf/_vendor/llama.cpp/licenses RENAME LICENSE-${name}
        COMPONENT pypop_gguf)
endforeach()

# zig takes the names of Arm's architectures for those of processors. It knows them, and what they may add, as features.
function(pop_name_features)
    foreach(backend IN LISTS GGML_AVAILABLE_BACKENDS)
        get_target_property(options ${backend} COMPILE_OPTIONS)
        string(REGEX REPLACE "-march=armv([0-9])-a" "-mcpu=generic+v\\1a" options "${options}")
        string(REGEX REPLACE "-march=armv([0-9])[.]([0-9])-a" "-mcpu=generic+v\\1_\\2a" options "${options}")
        string(REPLACE "+fp16" "+fullfp16" options "${options}")
        set_target_properties(${backend} PROPERTIES COMPILE_OPTIONS "${options}")
    endforeach()
endfunction()

cmake_language(DEFER CALL pop_name_features)

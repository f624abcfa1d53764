# Compiles the wheel for Linux with the clang of PyPI's ziglang, which brings the interface of an old glibc. The wheel
# then runs with that glibc and newer ones, whatever the machine has that compiles it. `make wheel` and `make wheel-arm`
# use this file, and POP_WHEEL_ARCH names the kind of processors: x86_64 or aarch64.
find_program(POP_ZIG python-zig REQUIRED)
set(CMAKE_SYSTEM_NAME Linux)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES POP_WHEEL_ARCH)
set(CMAKE_SYSTEM_PROCESSOR ${POP_WHEEL_ARCH})
set(pop_target -target ${POP_WHEEL_ARCH}-linux-gnu.2.17)
set(CMAKE_C_COMPILER ${POP_ZIG} cc ${pop_target})
set(CMAKE_CXX_COMPILER ${POP_ZIG} c++ ${pop_target})
set(CMAKE_AR ${POP_ZIG})
foreach(language IN ITEMS C CXX)
    set(CMAKE_${language}_ARCHIVE_CREATE "<CMAKE_AR> ar qcs <TARGET> <OBJECTS>")
    set(CMAKE_${language}_ARCHIVE_APPEND "<CMAKE_AR> ar qs <TARGET> <OBJECTS>")
    set(CMAKE_${language}_ARCHIVE_FINISH "")
    set(CMAKE_${language}_FLAGS_INIT "-g0 -fomit-frame-pointer")
endforeach()

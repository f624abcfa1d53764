#include "pop-backend-dir.h"

#include <filesystem>

#ifdef _WIN32
#    define WIN32_LEAN_AND_MEAN
#    ifndef NOMINMAX
#        define NOMINMAX
#    endif
#    include <windows.h>
#else
#    include <dlfcn.h>
#endif

std::string pop_backend_dir() {
    const auto * here = reinterpret_cast<const void *>(&pop_backend_dir);
#ifdef _WIN32
    HMODULE      library = nullptr;
    std::wstring path(32767, L'\0'); // the longest that Windows knows
    if (!GetModuleHandleExW(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                            static_cast<LPCWSTR>(here), &library)) {
        return "";
    }
    path.resize(GetModuleFileNameW(library, path.data(), static_cast<DWORD>(path.size())));
#else
    Dl_info library;
    if (!dladdr(here, &library)) {
        return "";
    }
    const char * path = library.dli_fname;
#endif
    return std::filesystem::path(path).parent_path().u8string();
}

// libwsync_cuda.so, opened on first use.
#pragma once

#include <string>

namespace wsync {

// The library's handle, or null with `reason`. `cudart`: path of a libcudart to open first, or empty.
void* open_cuda_library(const std::string& cudart, std::string* reason);

// A function of the library by its name. Throws Error("ConfigError") where the library or the function is missing.
void* cuda_function(const char* name);

}  // namespace wsync

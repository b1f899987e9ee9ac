#include "api/cuda_library.h"

#include <dlfcn.h>

#include "core/errors.h"

namespace wsync {
namespace {

// The CUDA library lies beside this extension.
std::string library_path() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&open_cuda_library), &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string self = info.dli_fname;
  return self.substr(0, self.find_last_of('/') + 1) + "libwsync_cuda.so";
}

std::string dl_reason() {
  const char* message = dlerror();
  return message == nullptr ? "unknown dlopen error" : message;
}

}  // namespace

void* open_cuda_library(const std::string& cudart, std::string* reason) {
  if (!cudart.empty() && dlopen(cudart.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    *reason = "the CUDA runtime cannot be opened: " + dl_reason();
    return nullptr;
  }
  void* library = dlopen(library_path().c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) *reason = "the CUDA library of wsync cannot be opened: " + dl_reason();
  return library;
}

void* cuda_function(const char* name) {
  std::string reason;
  void* library = open_cuda_library("", &reason);
  if (library == nullptr) throw Error("ConfigError", reason);
  void* function = dlsym(library, name);
  if (function == nullptr) {
    throw Error("ConfigError", "the CUDA library of wsync has no " + std::string(name) + ": " + dl_reason());
  }
  return function;
}

}  // namespace wsync

// Launches run at once and to their end: every stream of the emulator is always idle.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "emulator/machine.h"
#include "emulator/runtime_api.h"

namespace wsync::emulator {

template <typename... Params>
struct BoundKernel {
  void (*kernel)(Params...);
  std::tuple<Params...> arguments;

  static void call(const void* self) {
    const auto& bound = *static_cast<const BoundKernel*>(self);
    std::apply(bound.kernel, bound.arguments);
  }
};

template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t, Args&&... args) {
  const BoundKernel<Params...> bound{kernel, std::tuple<Params...>(std::forward<Args>(args)...)};
  note_launch(run_launch({name, reinterpret_cast<const void*>(kernel), grid, block, &BoundKernel<Params...>::call,
                          &bound, sizeof(bound)}));
}

}  // namespace wsync::emulator

#define WSYNC_LAUNCH(kernel, grid, block, stream, ...) \
  ::wsync::emulator::launch(#kernel, kernel, grid, block, stream, __VA_ARGS__)

// One function per area, each in its own file of this folder.
#pragma once

#include <pybind11/pybind11.h>

namespace wsync {

void register_kernels(pybind11::module_& m);
void register_cuda(pybind11::module_& m);
void register_delta(pybind11::module_& m);
void register_cuda_programs(pybind11::module_& m);
void register_shm(pybind11::module_& m);

}  // namespace wsync

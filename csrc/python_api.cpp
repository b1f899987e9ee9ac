#include "api/errors.h"
#include "api/register.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels, staging rings and the probe of the CUDA library. Use wsync.kernels and wsync.transport.";
  wsync::register_errors(m);
  wsync::register_kernels(m);
  wsync::register_cuda(m);
  wsync::register_delta(m);
  wsync::register_cuda_programs(m);
  wsync::register_shm(m);
}

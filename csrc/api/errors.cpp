#include "core/errors.h"

#include <exception>

#include "api/errors.h"

namespace py = pybind11;

namespace wsync {

void register_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const Error& error) {
      py::object leaf = py::module_::import("wsync.errors").attr(error.leaf());
      PyErr_SetObject(leaf.ptr(), leaf(error.what()).ptr());
    }
  });
}

}  // namespace wsync

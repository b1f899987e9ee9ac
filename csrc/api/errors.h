#pragma once

#include <pybind11/pybind11.h>

namespace wsync {

// Makes every wsync::Error that leaves this module arrive in Python as the class of wsync.errors that it names.
void register_errors(pybind11::module_& m);

}  // namespace wsync

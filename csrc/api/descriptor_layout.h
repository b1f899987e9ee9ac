#pragma once

#include <pybind11/pybind11.h>

namespace wsync {

// For each record: its size and (field, offset, bytes).
pybind11::dict descriptor_layout();

}  // namespace wsync

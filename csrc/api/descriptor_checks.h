// What a descriptor must be before a kernel runs it. Addresses are checked for null only.
#pragma once

#include <cstddef>
#include <string>

#include "core/descriptors.h"

namespace wsync {

// Throw ConfigError, naming the record, its index and the field.
[[noreturn]] void refuse(const char* record, size_t index, const std::string& what);
void check(const PackDesc& d, size_t index);
void check(const AmaxDesc& d, size_t index);
void check(const UnpackDesc& d, size_t index);
void check(const TransformDesc& d, size_t index);

}  // namespace wsync

// Errors of the C++ code. csrc/api turns them into the leaf of wsync.errors of the same name.
#pragma once

#include <stdexcept>
#include <string>

namespace wsync {

class Error : public std::runtime_error {
 public:
  // `leaf` names a class of wsync/errors.py, such as "ConfigError".
  Error(const char* leaf, const std::string& message) : std::runtime_error(message), leaf_(leaf) {}
  const char* leaf() const { return leaf_; }

 private:
  const char* leaf_;
};

}  // namespace wsync

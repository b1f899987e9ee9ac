#include "cpu/ops.h"

namespace wsync {

void FirstBad::report(size_t desc, int64_t element) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (found() && (desc > desc_ || (desc == desc_ && element >= element_))) return;
  desc_ = desc;
  element_ = element;
  found_.store(true, std::memory_order_release);
}

}  // namespace wsync

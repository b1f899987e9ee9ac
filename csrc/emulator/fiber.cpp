#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if WSYNC_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(WSYNC_EMULATOR_UCONTEXT)
// void wsync_emulator_switch(void** save_sp, void* load_sp): the callee-saved registers go over the stack.
asm(R"(
.text
.globl wsync_emulator_switch
.hidden wsync_emulator_switch
.type wsync_emulator_switch, @function
wsync_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size wsync_emulator_switch, .-wsync_emulator_switch
)");
extern "C" void wsync_emulator_switch(void** save_sp, void* load_sp);
#endif

namespace wsync::emulator {
namespace {

// Sanitizers put red zones around every local variable.
constexpr size_t kStackBytes = WSYNC_EMULATOR_ASAN ? size_t{256} << 10 : size_t{64} << 10;

void before_switch(void** fake_stack, const Context& to) {
#if WSYNC_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(fake_stack, to.stack_low, to.stack_bytes);
#else
  (void)fake_stack;
  (void)to;
#endif
}

void after_switch(void* fake_stack, Context* from) {
#if WSYNC_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, from == nullptr ? nullptr : &from->stack_low,
                                  from == nullptr ? nullptr : &from->stack_bytes);
#else
  (void)fake_stack;
  (void)from;
#endif
}

}  // namespace

Stack make_stack() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("emulator: no memory for a stack");
    std::abort();
  }
  return {static_cast<char*>(memory) + page, kStackBytes};
}

void start_context(Context* context, const Stack& stack, void (*entry)()) {
#if WSYNC_EMULATOR_ASAN
  __asan_unpoison_memory_region(stack.low, stack.bytes);  // what a fiber that was dropped left behind
#endif
  context->stack_low = stack.low;
  context->stack_bytes = stack.bytes;
#if defined(WSYNC_EMULATOR_UCONTEXT)
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = stack.low;
  context->state.uc_stack.ss_size = stack.bytes;
  context->state.uc_link = nullptr;
  makecontext(&context->state, entry, 0);
#else
  // Six registers, the address to return to, and a word that makes the stack of entry() what the ABI asks for.
  auto* top = reinterpret_cast<uint64_t*>(stack.low + stack.bytes);
  for (int i = 1; i <= 8; ++i) top[-i] = 0;
  top[-2] = reinterpret_cast<uint64_t>(entry);
  context->sp = top - 8;
#endif
}

void switch_context(Context* from, Context* to, bool leaving) {
  void* fake_stack = nullptr;
  before_switch(leaving ? nullptr : &fake_stack, *to);
#if defined(WSYNC_EMULATOR_UCONTEXT)
  swapcontext(&from->state, &to->state);
#else
  wsync_emulator_switch(&from->sp, to->sp);
#endif
  after_switch(fake_stack, nullptr);
}

void entered_context(Context* from) { after_switch(nullptr, from); }

}  // namespace wsync::emulator

// Gives the interpreter's lock away for a scope.
#pragma once

#include <Python.h>

namespace wsync {

// Unlike pybind11::gil_scoped_release it may end its thread: while the interpreter finalises, CPython before 3.14 ends
// a thread that asks for the lock by pthread_exit, which glibc does by unwinding the stack. A destructor that is
// noexcept, as destructors are by default, would turn that into std::terminate and the process's exit into an abort.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() noexcept(false) { PyEval_RestoreThread(state_); }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace wsync

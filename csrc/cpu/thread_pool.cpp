#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "core/float_mode.h"

namespace wsync {
namespace {

struct Job {
  Job(size_t num_units_, int max_helpers_, const std::function<void(size_t)>* fn_)
      : num_units(num_units_), max_helpers(max_helpers_), fn(fn_) {}

  const size_t num_units;
  const int max_helpers;
  const std::function<void(size_t)>* fn;
  std::atomic<size_t> next{0};
  int num_helpers = 0;  // that ever joined; guarded by the pool's mutex
  int num_active = 0;   // that are still inside; guarded by the pool's mutex

  void work() {
    const FloatMode mode;
    for (size_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < num_units;) (*fn)(unit);
  }
};

class Pool {
 public:
  void run(Job* job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(job->max_helpers);
      jobs_.push_back(job);
    }
    wake_.notify_all();
    job->work();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
    left_.wait(lock, [job] { return job->num_active == 0; });
  }

 private:
  // Up to `wanted` workers. Where the process may have no more threads, those that there are do the work.
  void grow(int wanted) {
    try {
      for (; num_workers_ < wanted; ++num_workers_) std::thread([this] { worker(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  Job* open_job() {
    for (Job* job : jobs_) {
      if (job->num_helpers < job->max_helpers && job->next.load(std::memory_order_relaxed) < job->num_units) return job;
    }
    return nullptr;
  }

  void worker() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] { return (job = open_job()) != nullptr; });
      ++job->num_helpers;
      ++job->num_active;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->num_active == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  std::deque<Job*> jobs_;
  int num_workers_ = 0;
};

// Never destroyed: detached workers wait on it until the process ends. A fork leaves the parent's threads behind, and
// maybe a locked mutex: the child begins with a new pool.
std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
  });
  return *g_pool.load();
}

}  // namespace

int num_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void parallel_for(size_t num_units, int num_threads, const std::function<void(size_t)>& fn) {
  if (num_threads <= 0) num_threads = num_processors();
  const size_t helpers = std::min<size_t>(static_cast<size_t>(num_threads), num_units) - (num_units > 0 ? 1 : 0);
  if (helpers == 0) {
    const FloatMode mode;
    for (size_t unit = 0; unit < num_units; ++unit) fn(unit);
    return;
  }
  Job job(num_units, static_cast<int>(helpers), &fn);
  pool().run(&job);
}

}  // namespace wsync

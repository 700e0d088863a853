// Parts of a computation that several threads take, one after the other, until none is left.
#ifndef JAXDW_NATIVE_WORK_H_
#define JAXDW_NATIVE_WORK_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>

#include "kernels.h"

namespace jaxdw {

class Work {
 public:
  Work(int64_t count, Parts& parts) : count_(count), parts_(parts) {}

  // Runs parts until none is left. A thread that comes after the last part was taken reads no more than a counter, so
  // it may come when the computation is long done, as long as this object lives.
  void take() {
    for (int64_t part; (part = next_.fetch_add(1)) < count_;) {
      try {
        parts_.run(part);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        failure_ = std::current_exception();
      }
      if (done_.fetch_add(1) + 1 == count_) {
        std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_one();
      }
    }
  }

  // Waits for the parts that other threads have begun. To be called after `take`: then no part waits for a thread. A
  // part is soon done, and to sleep and be woken costs tens of microseconds. So it sleeps only after a while.
  void wait() {
    auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    while (done_.load() != count_ && std::chrono::steady_clock::now() < end) {
    }
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_.load() == count_; });
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  const int64_t count_;
  Parts& parts_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
  std::exception_ptr failure_;
};

}  // namespace jaxdw

#endif  // JAXDW_NATIVE_WORK_H_

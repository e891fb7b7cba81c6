// A loop over numbered blocks of work, shared between the calling thread and helpers on another owner's thread pool.
#pragma once

#include <atomic>
#include <cstddef>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace llorch {

// While this is alive, subnormal numbers count as zero, as they do in XLA's own threads: the result of a block must not
// depend on which thread computes it.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// One loop. Whichever thread is free takes the next block. A helper that the pool starts late, even after the loop has
// ended, finds no block left; it still holds a reference, so that the loop outlives it. Nothing waits for a helper that
// has not started, so a pool whose threads are all busy, or all running loops of their own, cannot deadlock.
class Loop {
 public:
  using Block = void (*)(const void* context, size_t block);

  // Runs `first` on this thread, then block(context, i) for i = 0 .. count - 1. `schedule(loop)` starts a helper, which
  // must call `loop->help()` once, on any thread, at any time: also on this one before `schedule` returns, as a pool
  // does whose queue is full.
  template <typename Schedule, typename First>
  static void run(size_t count, size_t helpers, const void* context, Block block, First first, Schedule schedule) {
    Loop* loop = take();
    loop->begin(count, context, block, helpers);
    starting() = loop;
    for (size_t i = 0; i < helpers; ++i) schedule(loop);
    starting() = nullptr;
    {
      const FlushDenormals flush;
      first();
    }
    loop->ready_.store(true, std::memory_order_release);
    loop->ready_.notify_all();
    loop->work();
    loop->wait();
    loop->release();
  }

  void help() {
    if (starting() == this) return release();  // this thread would wait for itself
    for (int turn = 0; turn < kTurns && !ready_.load(std::memory_order_acquire); ++turn) rest();
    ready_.wait(false, std::memory_order_acquire);
    work();
    release();
  }

 private:
  // Every thread keeps its last loop, and reuses it for the next one unless a late helper still holds it.
  struct Kept {
    Loop* loop = nullptr;
    ~Kept() {
      if (loop != nullptr) loop->release();
    }
  };

  // The loop whose helpers this thread is starting.
  static const Loop*& starting() {
    thread_local const Loop* loop = nullptr;
    return loop;
  }

  static Loop* take() {
    thread_local Kept kept;
    if (kept.loop == nullptr || kept.loop->holders_.load(std::memory_order_acquire) > 1) {
      if (kept.loop != nullptr) kept.loop->release();
      kept.loop = new Loop;
    }
    return kept.loop;
  }

  void begin(size_t count, const void* context, Block block, size_t helpers) {
    count_ = count;
    context_ = context;
    block_ = block;
    next_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ready_.store(false, std::memory_order_relaxed);
    holders_.fetch_add(helpers + 1, std::memory_order_release);
  }

  void work() {
    const FlushDenormals flush;
    for (;;) {
      const size_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= count_) return;
      block_(context_, i);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) done_.notify_all();
    }
  }

  // The helpers' last blocks take a few microseconds, less than going to sleep at once and waking up would take. But if
  // other processes compete for the processor, a helper may have been preempted in the middle of its block, and only
  // sleeping lets it continue.
  void wait() {
    for (int turn = 0; turn < kTurns && done_.load(std::memory_order_acquire) < count_; ++turn) rest();
    for (size_t done = done_.load(std::memory_order_acquire); done < count_;) {
      done_.wait(done, std::memory_order_acquire);
      done = done_.load(std::memory_order_acquire);
    }
  }

  void release() {
    if (holders_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  static void rest() {
#if defined(__SSE2__)
    _mm_pause();
#endif
  }

  static constexpr int kTurns = 200;
  std::atomic<size_t> holders_{1};
  std::atomic<size_t> next_{0};
  std::atomic<size_t> done_{0};
  std::atomic<bool> ready_{false};
  size_t count_ = 0;
  const void* context_ = nullptr;
  Block block_ = nullptr;
};

}  // namespace llorch

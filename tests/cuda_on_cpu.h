// Just enough CUDA to run a generated kernel on the CPU, for tests: a fiber for each CUDA thread, blocks in turn.
// A warp runs until it has to wait for another, then it is another's turn, forwards and backwards: so what a missing
// __syncthreads leaves undefined comes out wrong.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define CUDART_INF_F __builtin_inff()

constexpr int kMaxThreads = 1024;
struct Dim { int x = 0, y = 0, z = 0; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline Dim threadIdx, blockIdx;
inline float lane_value[kMaxThreads];
inline int lane_int[kMaxThreads];
alignas(128) unsigned char pool_buf_ptr[256 * 1024];  // dynamic shared memory

// -- fibers

inline int block_threads;
inline long changes;  // of anything that a fiber may wait for
inline ucontext_t scheduler, fibers[kMaxThreads];
inline bool finished[kMaxThreads];
inline std::function<void()> fiber_body;
constexpr size_t kStackBytes = 256 * 1024;

inline void run_fiber() {
  fiber_body();
  finished[threadIdx.x] = true, ++changes;
}
// Waits, while the other threads run, until `done()`.
template <typename Done> void wait_until(Done done) {
  while (!done()) swapcontext(&fibers[threadIdx.x], &scheduler);
}

struct ThreadBarrier {
  int arrived = 0, phase = 0;
  void arrive_and_wait(int threads) {
    int before = phase;
    if (++arrived == threads) arrived = 0, ++phase, ++changes;
    wait_until([&] { return phase != before; });
  }
};
inline ThreadBarrier block_barrier, warp_barrier[kMaxThreads / 32];
inline void __syncthreads() { block_barrier.arrive_and_wait(block_threads); }
inline void sync_warp() { warp_barrier[threadIdx.x / 32].arrive_and_wait(32); }

// Runs the threads of a warp until all wait for others or have finished; how many have.
inline int run_warp(int warp) {
  int ended = 0;
  for (long before = changes - 1; changes != before;) {
    before = changes;
    for (int i = 0; i < 32; ++i) {
      int t = threadIdx.x = 32 * warp + (before % 2 ? i : 31 - i);
      if (finished[t]) continue;
      swapcontext(&scheduler, &fibers[t]);
      ended += finished[t];
    }
  }
  return ended;
}

// Runs `kernel` for every thread of `grid` blocks. Shared memory is NaN before a block.
template <typename Kernel> void run_grid(int grid, int threads, Kernel kernel) {
  std::unique_ptr<char[]> stacks(new char[threads * kStackBytes]);
  fiber_body = kernel, block_threads = threads;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
    std::memset(pool_buf_ptr, 0xFF, sizeof pool_buf_ptr);
    for (int t = 0; t < threads; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = stacks.get() + t * kStackBytes;
      fibers[t].uc_stack.ss_size = kStackBytes;
      fibers[t].uc_link = &scheduler;
      makecontext(&fibers[t], run_fiber, 0);
      finished[t] = false;
    }
    int left = threads;
    for (unsigned round = blockIdx.x; left; ++round) {
      long before = changes;
      for (int i = 0, warps = threads / 32; i < warps; ++i)
        left -= run_warp(round % 2 ? i : warps - 1 - i);
      if (changes == before) fprintf(stderr, "threads of an emulated kernel wait for ever\n"), abort();
    }
  }
}

// -- mbarriers

inline uint32_t tvm_builtin_cuda_cvta_generic_to_shared(const void* p) { return uint32_t((unsigned char*)p - pool_buf_ptr); }
// Barriers in shared memory: a phase ends when all have arrived and all bytes are there.
struct Barrier {
  int expected = 0, missing = 0, phase = 0;
  long bytes = 0;
  void update(int arrivals, long more) {
    bytes += more;
    if ((missing -= arrivals) < 0) abort();
    if (missing || bytes) return;
    phase ^= 1, missing = expected;
    ++changes;
  }
};
inline Barrier barriers[sizeof pool_buf_ptr / 8];
inline Barrier& barrier_at(uint32_t at) {
  if (at % 8) abort();
  return barriers[at / 8];
}
inline void tvm_builtin_ptx_mbarrier_init_init_shared_b64(uint32_t at, unsigned count) {
  Barrier& b = barrier_at(at);
  b.expected = b.missing = count, b.phase = b.bytes = 0;
}
inline void tvm_builtin_ptx_mbarrier_arrive_expect_tx_arrive_expect_tx_shared_b64(uint32_t at, unsigned bytes) {
  barrier_at(at).update(1, bytes);
}
inline void tvm_builtin_ptx_mbarrier_arrive_nocount_arrive_shared_b64(uint32_t at) { barrier_at(at).update(1, 0); }
inline void tvm_builtin_ptx_mbarrier_arrive_nocount_arrive_shared_b64_pred(uint32_t at, int only) {
  if (only) barrier_at(at).update(1, 0);
}
inline void tvm_builtin_cuda_mbarrier_wait(void* p, int parity) {
  Barrier& b = barrier_at(tvm_builtin_cuda_cvta_generic_to_shared(p));
  wait_until([&] { return b.phase != parity; });
}

// -- what threads exchange

template <typename T> T exchange(T* slots, T value, int source) {
  slots[threadIdx.x] = value;
  sync_warp();
  T result = slots[source];
  sync_warp();
  return result;
}
inline float __shfl_xor_sync(unsigned, float value, int mask, int) { return exchange(lane_value, value, threadIdx.x ^ mask); }
inline int __shfl_sync(unsigned, int value, int lane, int) { return exchange(lane_int, value, threadIdx.x / 32 * 32 + lane); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float f) {  // round to nearest even
    uint32_t u;
    std::memcpy(&u, &f, 4);
    bits = f != f ? 0x7FFF : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
};
using half = _Float16;

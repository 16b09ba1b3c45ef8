// Just enough CUDA to run a generated kernel on the CPU, for tests: one std::thread per CUDA thread, blocks in turn.
// Barriers and shuffles are real synchronisation, so a missing __syncthreads can be found with -fsanitize=thread.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
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
inline thread_local Dim threadIdx, blockIdx;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::unique_ptr<std::barrier<>> warp_barrier[kMaxThreads / 32];
inline float lane_value[kMaxThreads];
inline int lane_int[kMaxThreads];
alignas(128) unsigned char pool_buf_ptr[256 * 1024];  // dynamic shared memory

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <typename T> T exchange(T* slots, T value, int source) {
  slots[threadIdx.x] = value;
  warp_barrier[threadIdx.x / 32]->arrive_and_wait();
  T result = slots[source];
  warp_barrier[threadIdx.x / 32]->arrive_and_wait();
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

// Runs `kernel` for every thread of `grid` blocks.
template <typename Kernel> void run_grid(int grid, int threads, Kernel kernel) {
  block_barrier = std::make_unique<std::barrier<>>(threads);
  for (int w = 0; w < threads / 32; ++w) warp_barrier[w] = std::make_unique<std::barrier<>>(32);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([=] {
      threadIdx.x = t;
      for (int b = 0; b < grid; ++b) {
        if (t == 0) std::memset(pool_buf_ptr, 0xFF, sizeof pool_buf_ptr);  // poison: NaN
        blockIdx.x = b;
        __syncthreads();
        kernel();
        __syncthreads();
      }
    });
  for (auto& thread : pool) thread.join();
}

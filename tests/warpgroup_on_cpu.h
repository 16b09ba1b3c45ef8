// What kernels of one warpgroup need beside cuda_on_cpu.h: copies, stores and matrix products, as PTX defines them.
#pragma once
#include "cuda_on_cpu.h"

using namespace std;

constexpr int kWarpgroup = 128;
inline void tvm_builtin_cuda_cta_sync() { __syncthreads(); }
inline void tvm_builtin_cuda_warp_sync() { sync_warp(); }
inline int tvm_builtin_cuda_any_sync(unsigned, int value) {
  int any = 0, base = threadIdx.x / 32 * 32;
  lane_int[threadIdx.x] = value;
  tvm_builtin_cuda_warp_sync();
  for (int i = 0; i < 32; ++i) any |= lane_int[base + i];
  tvm_builtin_cuda_warp_sync();
  return any != 0;
}
template <typename T> T tvm_builtin_cuda_warp_reduce_max_32(T x) {
  for (int mask = 16; mask; mask /= 2) x = max(x, __shfl_xor_sync(0, x, mask, 32));
  return x;
}
template <typename T> T tvm_builtin_cuda_warp_reduce_sum_32(T x) {
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(0, x, mask, 32);
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline void tvm_builtin_ptx_shf_r_wrap_b32(uint32_t& d, uint32_t low, uint32_t high, uint32_t by) {
  d = uint32_t(((uint64_t)high << 32 | low) >> (by & 31));
}

// Copies happen at once: that their data may come late is what a GPU must show.
inline void tvm_builtin_ptx_cp_async_cg_src_size_async_cg_shared_global_16(uint32_t to, const void* from, uint32_t size) {
  if (to % 16 || uintptr_t(from) % 16) abort();
  memset(pool_buf_ptr + to, 0, 16);
  memcpy(pool_buf_ptr + to, from, size);
}
inline void tvm_builtin_ptx_cp_async_ca_src_size_async_ca_shared_global_4(uint32_t to, const void* from, uint32_t size) {
  memset(pool_buf_ptr + to, 0, 4);
  memcpy(pool_buf_ptr + to, from, size);
}
inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() {}
inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_1() {}
inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_0() {}
inline void tvm_builtin_ptx_fence_proxy_proxy_async_shared__cta() {}
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_0() {}
inline void tvm_builtin_ptx_griddepcontrol_wait() {}
inline void tvm_builtin_ptx_griddepcontrol_launch_dependents() {}
inline void splatc_fence_float32(float&) {}
inline void splatc_fence_int32(int&) {}

inline void tvm_builtin_ptx_st_shared_b32(uint32_t to, uint32_t x) {
  if (to % 4) abort();
  memcpy(pool_buf_ptr + to, &x, 4);
}
inline void tvm_builtin_ptx_ld_global_b32_s32(int32_t& x, const void* from) {
  if (uintptr_t(from) % 4) abort();
  memcpy(&x, from, 4);
}
inline void tvm_builtin_ptx_ld_vec_global_v2_b32_s32(int32_t& a, int32_t& b, const void* from) {
  if (uintptr_t(from) % 8) abort();
  a = ((const int32_t*)from)[0], b = ((const int32_t*)from)[1];
}
inline void tvm_builtin_ptx_ld_shared_b32(uint32_t& x, uint32_t from) {
  if (from % 4) abort();
  memcpy(&x, pool_buf_ptr + from, 4);
}
inline void tvm_builtin_ptx_st_global_b32(void* to, uint32_t x) {
  if (uintptr_t(to) % 4) abort();
  memcpy(to, &x, 4);
}
inline void tvm_builtin_ptx_st_vec_global_v2_b32(void* to, uint32_t a, uint32_t b) {
  if (uintptr_t(to) % 8) abort();
  ((uint32_t*)to)[0] = a, ((uint32_t*)to)[1] = b;
}
inline void tvm_builtin_ptx_ld_vec_global_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* from) {
  if (uintptr_t(from) % 16) abort();
  const uint32_t* x = (const uint32_t*)from;
  a = x[0], b = x[1], c = x[2], d = x[3];
}
inline void tvm_builtin_ptx_ld_vec_shared_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from) {
  tvm_builtin_ptx_ld_vec_global_v4_b32(a, b, c, d, pool_buf_ptr + from);
}
inline void tvm_builtin_ptx_st_vec_global_v4_b32(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if (uintptr_t(to) % 16) abort();
  uint32_t* x = (uint32_t*)to;
  x[0] = a, x[1] = b, x[2] = c, x[3] = d;
}

struct tf32 { uint32_t bits; };
inline void tvm_builtin_ptx_cvt_tf32_f32_rn_tf32_f32(uint32_t& d, float x) {
  memcpy(&d, &x, 4);
  d = (d + 0xFFF + (d >> 13 & 1)) & 0xFFFFE000;
}
inline void tvm_builtin_ptx_st_vec_shared_v2_f32(uint32_t to, float a, float b) {
  float* x = (float*)(pool_buf_ptr + to);
  x[0] = a, x[1] = b;
}
inline void tvm_builtin_ptx_ld_vec_shared_v2_f32(float& a, float& b, uint32_t from) {
  const float* x = (const float*)(pool_buf_ptr + from);
  a = x[0], b = x[1];
}
inline void tvm_builtin_ptx_ld_vec_shared_v4_f32(float& a, float& b, float& c, float& d, uint32_t from) {
  const float* x = (const float*)(pool_buf_ptr + from);
  a = x[0], b = x[1], c = x[2], d = x[3];
}
inline void tvm_builtin_ptx_st_vec_shared_v4_b32(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  tvm_builtin_ptx_st_vec_global_v4_b32(pool_buf_ptr + to, a, b, c, d);
}

template <typename T> uint16_t to_half(float x) {
  T t(x);
  uint16_t bits;
  memcpy(&bits, &t, 2);
  return bits;
}
// A value of type T that lies at p; tensor cores ignore the last 13 bits of tf32.
template <typename T> float value_at(const void* p) {
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, p, 4);
    bits &= 0xFFFFE000;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  } else {
    T t;
    memcpy(&t, p, 2);
    return float(t);
  }
}
inline void tvm_builtin_ptx_cvt_bf16x2_f32_rn_bf16x2_f32(uint32_t& d, float high, float low) {
  d = uint32_t(to_half<nv_bfloat16>(high)) << 16 | to_half<nv_bfloat16>(low);
}
inline void tvm_builtin_ptx_cvt_f16x2_f32_rn_f16x2_f32(uint32_t& d, float high, float low) {
  d = uint32_t(to_half<half>(high)) << 16 | to_half<half>(low);
}

// Matrix descriptors of 128-byte swizzled rows: (start, leading, stride), all in 16 bytes.
inline void ptx_wgmma_encode_matrix_descriptor(uint64_t* d, void* p, int leading, int stride, int swizzle) {
  if (swizzle != 3 || ((unsigned char*)p - pool_buf_ptr) % 1024) abort();
  *d = uint64_t((unsigned char*)p - pool_buf_ptr) >> 4 | uint64_t(leading) << 16 | uint64_t(stride) << 32;
}
// The value at a row of 128 bytes and a column (beyond those of a row: ``leading`` on).
template <typename T> float at_descriptor(uint64_t d, int row, int column) {
  constexpr int width = 128 / sizeof(T);
  uint32_t start = (d & 0x3FFF) << 4, leading = (d >> 16 & 0x3FFF) << 4, stride = (d >> 32 & 0x3FFF) << 4;
  uint32_t at = start + row / 8 * stride + row % 8 * 128 + column / width * leading + column % width * sizeof(T);
  at ^= at >> 3 & 0x70;
  return value_at<T>(pool_buf_ptr + at);
}

inline ThreadBarrier team_barrier[2];
inline void sync_team() { team_barrier[threadIdx.x / kWarpgroup].arrive_and_wait(kWarpgroup); }
inline void tvm_builtin_ptx_bar_sync_count_sync(uint32_t barrier, uint32_t threads) {
  if (barrier != threadIdx.x / kWarpgroup + 1 || threads != kWarpgroup) abort();
  sync_team();
}
inline uint32_t a_words[2][kWarpgroup][64];
// One statement of `steps` products of 64 x n x (32 bytes) on d: a is a descriptor a step or, in registers, 4 words.
template <typename T, typename A>
void wgmma(float** d, int n, const A* a, const uint64_t* b, int steps, bool b_transposed, bool fresh) {
  constexpr bool registers = sizeof(A) == 4;
  constexpr int depth = 32 / sizeof(T), in_word = 4 / sizeof(T);
  int thread = threadIdx.x % kWarpgroup, row = thread / 32 * 16 + thread % 32 / 4, quad = thread % 4;
  auto& words = a_words[threadIdx.x / kWarpgroup];
  if (registers) memcpy(words[thread], a, 16 * steps);
  sync_team();
  for (int i = 0; i < n / 2; ++i) {
    int m = row + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * quad + i % 2;
    float sum = fresh ? 0 : *d[i];
    for (int step = 0; step < steps; ++step)
      for (int k = 0; k < depth; ++k) {
        float x;
        if (registers) {  // word 2 (k's half) + m / 8 % 2 of the thread that has the row, and k among its quad's
          int owner = m / 16 * 32 + m % 8 * 4 + k / in_word % 4, word = 4 * step + k / (depth / 2) * 2 + m / 8 % 2;
          x = value_at<T>((char*)&words[owner][word] + k % in_word * sizeof(T));
        } else {
          x = at_descriptor<T>(a[step], m, k);
        }
        sum += x * (b_transposed ? at_descriptor<T>(b[step], k, column) : at_descriptor<T>(b[step], column, k));
      }
    *d[i] = sum;
  }
  sync_team();
}

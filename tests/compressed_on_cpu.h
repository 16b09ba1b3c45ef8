// What kernels of copying and computing warps need beside cuda_on_cpu.h: tensor maps, bulk copies, wgmma, as PTX has them.
// Copies happen at once: that their data may come late, and be read late, is what a GPU must show.
#pragma once
#include "cuda_on_cpu.h"

#include <array>

using namespace std;
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
#define _ptr pool_buf_ptr
#define __grid_constant__

constexpr int kWarpgroup = 128;
inline void tvm_builtin_cuda_cta_sync() { __syncthreads(); }
inline void tvm_builtin_cuda_warp_sync() { sync_warp(); }
inline void tvm_builtin_ptx_prefetch_tensormap(const void*) {}
inline void tvm_builtin_ptx_fence_mbarrier_init_mbarrier_init_release_cluster() {}
inline void tvm_builtin_ptx_griddepcontrol_wait() {}
inline void tvm_builtin_ptx_griddepcontrol_launch_dependents() {}
inline void tvm_builtin_ptx_cp_async_bulk_commit_group_async_bulk_commit_group() {}
inline void tvm_builtin_ptx_cp_async_bulk_wait_group_async_bulk_wait_group_read_0() {}
inline void tvm_builtin_ptx_cp_async_bulk_wait_group_async_bulk_wait_group_read_1() {}
inline void tvm_builtin_ptx_fence_proxy_proxy_async_shared__cta() {}
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_0() {}
inline void splatc_fence_float32(float&) {}
inline void splatc_fence_uint32(uint32_t&) {}

// Tensor maps of 16-bit values; strides in bytes, the first one unused. Boxes have rows of 128 swizzled bytes.
struct CUtensorMap { unsigned char* base; int64_t dims[5], strides[5], box[5]; };
inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 3 & 0x70); }
template <typename Move> long each_value(const void* map, array<int, 5> at, uint32_t shared, Move move) {
  const CUtensorMap& m = *(const CUtensorMap*)map;
  if (shared % 1024 || m.box[0] != 64) abort();
  long count = m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.box[4];
  for (long i = 0; i < count; ++i) {
    long rest = i, offset = 0;
    bool inside = true;
    for (int d = 0; d < 5; rest /= m.box[d++]) {
      long x = at[d] + rest % m.box[d];
      inside &= x >= 0 && x < m.dims[d];
      offset += x * (d ? m.strides[d] : 2);
    }
    move((uint16_t*)(pool_buf_ptr + swizzled(shared + 2 * i)), inside ? (uint16_t*)(m.base + offset) : nullptr);
  }
  return 2 * count;
}
inline void tvm_builtin_ptx_cp_async_bulk_tensor_g2s_cluster_async_bulk_tensor_5d_shared__cluster_global_mbarrier__complete_tx__bytes(
    uint32_t to, const void* map, int a, int b, int c, int d, int e, uint32_t barrier) {
  auto load = [](uint16_t* s, uint16_t* g) { *s = g ? *g : 0; };
  barrier_at(barrier).update(0, -each_value(map, {a, b, c, d, e}, to, load));
}
inline void tvm_builtin_ptx_cp_async_bulk_tensor_s2g_async_bulk_tensor_5d_global_shared__cta_tile_bulk_group(
    const void* map, int a, int b, int c, int d, int e, uint32_t from) {
  each_value(map, {a, b, c, d, e}, from, [](uint16_t* s, uint16_t* g) { if (g) *g = *s; });
}
inline void tvm_builtin_ptx_cp_async_bulk_g2s_cluster_async_bulk_shared__cluster_global_mbarrier__complete_tx__bytes(
    uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (to % 16 || uintptr_t(from) % 16 || bytes % 16) abort();
  memcpy(pool_buf_ptr + to, from, bytes);
  barrier_at(barrier).update(0, -long(bytes));
}

inline void tvm_builtin_ptx_ld_vec_global_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* from) {
  if (uintptr_t(from) % 16) abort();
  const uint32_t* x = (const uint32_t*)from;
  a = x[0], b = x[1], c = x[2], d = x[3];
}
inline void tvm_builtin_ptx_st_vec_global_v4_b32(const void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if (uintptr_t(to) % 16) abort();
  uint32_t* x = (uint32_t*)to;
  x[0] = a, x[1] = b, x[2] = c, x[3] = d;
}

inline uint32_t matrix_row[kMaxThreads];
inline void tvm_builtin_ptx_stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t to, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  int lane = threadIdx.x % 32;
  if (to % 16) abort();
  matrix_row[threadIdx.x] = to;
  tvm_builtin_cuda_warp_sync();
  uint32_t words[] = {r0, r1, r2, r3};
  for (int i = 0; i < 4; ++i) memcpy(pool_buf_ptr + matrix_row[threadIdx.x - lane + 8 * i + lane / 4] + lane % 4 * 4, &words[i], 4);
  tvm_builtin_cuda_warp_sync();
}

// Matrix descriptors of 128-byte swizzled rows, all in 16 bytes: start, where the next 64 columns are, 8 rows.
inline void ptx_wgmma_encode_matrix_descriptor(uint64_t* d, void* p, int leading, int stride, int swizzle) {
  uint32_t at = tvm_builtin_cuda_cvta_generic_to_shared(p);
  if (swizzle != 3 || at % 1024) abort();
  *d = at >> 4 | uint64_t(leading) << 16 | uint64_t(stride) << 32;
}
template <typename T> float at_descriptor(uint64_t d, int row, int column) {
  uint32_t start = (d & 0x3FFF) << 4, leading = (d >> 16 & 0x3FFF) << 4, stride = (d >> 32 & 0x3FFF) << 4;
  T value;
  memcpy(&value, pool_buf_ptr + swizzled(start + row / 8 * stride + row % 8 * 128 + column / 64 * leading + column % 64 * 2), 2);
  return float(value);
}

inline ThreadBarrier warpgroup_barrier[kMaxThreads / kWarpgroup];
inline uint32_t metadata_words[kMaxThreads][8];
// d (+)= A B: `steps` products of 64 x n x 16 values of A, in shared memory. words: of an A that is compressed 2:4.
template <typename T>
void wgmma(float** d, int n, const uint64_t* a, const uint64_t* b, const uint32_t* words, int steps, bool sparse, bool b_transposed, bool fresh) {
  int thread = threadIdx.x % kWarpgroup, first = threadIdx.x - thread, row = thread / 32 * 16 + thread % 32 / 4;
  if (sparse) memcpy(metadata_words[threadIdx.x], words, 4 * ((steps + 1) / 2));
  warpgroup_barrier[first / kWarpgroup].arrive_and_wait(kWarpgroup);
  for (int i = 0; i < n / 2; ++i) {
    int m = row + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (thread % 4) + i % 2;
    float sum = fresh ? 0 : *d[i];
    for (int step = 0; step < steps; ++step)
      for (int k = 0; k < 16; ++k) {
        int key = k;
        if (sparse) {  // word of lane 2 (step % 2) + half, in its 16 bits of the row a nibble for two values
          int lane = m % 8 * 4 + step % 2 * 2 + k / 8;
          uint32_t word = metadata_words[first + m / 16 * 32 + lane][step / 2], code = word >> (m / 8 % 2 * 16 + k % 8 / 2 * 4);
          key = k / 2 * 4 + (k % 2 ? code >> 2 & 3 : code & 3);
        }
        float x = at_descriptor<T>(a[step], m, k);
        sum += x * (b_transposed ? at_descriptor<T>(b[step], key, column) : at_descriptor<T>(b[step], column, key));
      }
    *d[i] = sum;
  }
  warpgroup_barrier[first / kWarpgroup].arrive_and_wait(kWarpgroup);
}

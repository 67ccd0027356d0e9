// Instructions that only a GPU has, one small function each, with a plain meaning for the emulation: products of small
// matrices on tensor cores, loads of their fragments from shared memory, asynchronous copies into shared memory.
// Fragments are laid out as the PTX ISA says (section "Matrix multiply-accumulate operation using mma instruction"):
// with group = lane / 4 and in_group = lane % 4, for m16n8k16 (pairs of 16-bit values, the lower index in the low half)
//   a[0]: row group,     columns 2 in_group, +1        b[0]: rows 2 in_group, +1,     column group
//   a[1]: row group + 8, columns 2 in_group, +1        b[1]: rows 2 in_group + 8, +9, column group
//   a[2]: row group,     columns 2 in_group + 8, +9
//   a[3]: row group + 8, columns 2 in_group + 8, +9
// for m16n8k8 (tf32)
//   a[0], a[1]: rows group, group + 8, column in_group     b[0]: row in_group,     column group
//   a[2], a[3]: the same rows, column in_group + 4         b[1]: row in_group + 4, column group
// and for both
//   d[0], d[1]: row group,     columns 2 in_group, +1
//   d[2], d[3]: row group + 8, columns 2 in_group, +1
// Every function here must be called by all 32 lanes together, but for the copies.
#pragma once

#include "device.cuh"

namespace rendseg {

#if !defined(__CUDACC__)
namespace emulated {

struct Operands {
  uint32_t a[4], b[2];
};

inline float value_16bit(uint32_t pair, int which, half_t) {
  return __half2float(half_t{static_cast<uint16_t>(pair >> (16 * which))});
}
inline float value_16bit(uint32_t pair, int which, bfloat16_t) {
  return __bfloat162float(bfloat16_t{static_cast<uint16_t>(pair >> (16 * which))});
}
// Tensor cores read the upper 19 bits of a tf32 operand.
inline float value_tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

// d[16,8] += a[16,depth] * b[depth,8]: exact products, summed in double and rounded once. The hardware rounds
// otherwise, so a result must not depend on the last bits.
template <typename A, typename B>
void multiply_add(float (&d)[4], int depth, A&& a_at, B&& b_at) {
  const int group = emulation::lane() / 4, in_group = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i / 2) * 8, column = 2 * in_group + i % 2;
    double sum = d[i];
    for (int k = 0; k < depth; ++k) sum += static_cast<double>(a_at(row, k)) * b_at(k, column);
    d[i] = static_cast<float>(sum);
  }
}

inline void exchange(const uint32_t (&a)[4], const uint32_t (&b)[2], Operands (&all)[32], const char* name,
                     emulation::Place place) {
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulation::warp_exchange(kAllLanes, name, &mine, sizeof(mine), reinterpret_cast<unsigned char*>(all), place);
}

template <typename T>
void multiply_16bit(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T tag, emulation::Place place) {
  Operands all[32];
  exchange(a, b, all, "mma_m16n8k16", place);
  multiply_add(
      d, 16, [&](int i, int k) { return value_16bit(all[i % 8 * 4 + k % 8 / 2].a[i / 8 + k / 8 * 2], k % 2, tag); },
      [&](int k, int j) { return value_16bit(all[j * 4 + k % 8 / 2].b[k / 8], k % 2, tag); });
}

inline void load_matrices(uint32_t* r, int matrices, bool transposed, const void* row, const char* name,
                          emulation::Place place) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix: a row must be 16-byte aligned", place);
  const void* rows[32];
  emulation::warp_exchange(kAllLanes, name, &row, sizeof(row), reinterpret_cast<unsigned char*>(rows), place);
  const int group = emulation::lane() / 4, in_group = emulation::lane() % 4;
  for (int m = 0; m < matrices; ++m) {
    const auto element = [&](int i, int j) {
      return static_cast<uint32_t>(static_cast<const uint16_t*>(rows[m * 8 + i])[j]);
    };
    const uint32_t low = transposed ? element(2 * in_group, group) : element(group, 2 * in_group);
    const uint32_t high = transposed ? element(2 * in_group + 1, group) : element(group, 2 * in_group + 1);
    r[m] = low | high << 16;
  }
  // Nobody overwrites the rows before everyone has read them: the instruction is one.
  emulation::warp_exchange(kAllLanes, name, nullptr, 0, nullptr, place);
}

}  // namespace emulated
#define RENDSEG_PLACE , emulation::Place place = emulation::Place::current()
#else
#define RENDSEG_PLACE
#endif

// d[16,8] += a[16,16] * b[16,8], 16-bit operands, sums in float.
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    half_t tag RENDSEG_PLACE) {
#if defined(__CUDACC__)
  (void)tag;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated::multiply_16bit(d, a, b, tag, place);
#endif
}

__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    bfloat16_t tag RENDSEG_PLACE) {
#if defined(__CUDACC__)
  (void)tag;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated::multiply_16bit(d, a, b, tag, place);
#endif
}

// d[16,8] += a[16,8] * b[8,8], operands made by to_tf32.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] RENDSEG_PLACE) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulated::Operands all[32];
  emulated::exchange(a, b, all, "mma_m16n8k8_tf32", place);
  emulated::multiply_add(
      d, 8, [&](int i, int k) { return emulated::value_tf32(all[i % 8 * 4 + k % 4].a[i / 8 + k / 4 * 2]); },
      [&](int k, int j) { return emulated::value_tf32(all[j * 4 + k % 4].b[k / 4]); });
#endif
}

// Rounds to the 10 bits of mantissa that tf32 has, halves away from zero.
__device__ inline uint32_t to_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#endif
}

// Both rounded to T (half_t or bfloat16_t), `low` in the low half.
template <typename T>
__device__ inline uint32_t pack_half2(float low, float high) {
#if defined(__CUDACC__)
  const T pair[2] = {narrow<T>(low), narrow<T>(high)};
  if constexpr (std::is_same_v<T, half_t>) {
    return static_cast<uint32_t>(__half_as_ushort(pair[0])) | static_cast<uint32_t>(__half_as_ushort(pair[1])) << 16;
  } else {
    return static_cast<uint32_t>(__bfloat16_as_ushort(pair[0])) | static_cast<uint32_t>(__bfloat16_as_ushort(pair[1]))
                                                                      << 16;
  }
#else
  return uint32_t{narrow<T>(low).bits} | uint32_t{narrow<T>(high).bits} << 16;
#endif
}

#if defined(__CUDACC__)
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Four (two) 8x8 matrices of 16-bit values from shared memory: lanes 0-7 give the addresses of the rows (16 bytes each,
// aligned) of the first, lanes 8-15 of the second, and so on. Lane l receives elements (l / 4, 2 (l % 4)) and the next
// of that row; transposed, elements (2 (l % 4), l / 4) and the next of that column.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row RENDSEG_PLACE) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulated::load_matrices(r, 4, false, row, "ldmatrix_x4", place);
#endif
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row RENDSEG_PLACE) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#else
  emulated::load_matrices(r, 4, true, row, "ldmatrix_x4_trans", place);
#endif
}

// Of the two-matrix forms the addresses of lanes 16-31 are not used, but must be aligned shared addresses as well.
__device__ inline void ldmatrix_x2(uint32_t (&r)[2], const void* row RENDSEG_PLACE) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  emulated::load_matrices(r, 2, false, row, "ldmatrix_x2", place);
#endif
}

__device__ inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row RENDSEG_PLACE) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#else
  emulated::load_matrices(r, 2, true, row, "ldmatrix_x2_trans", place);
#endif
}

// Starts copying 16 bytes (both sides 16-byte aligned); zeros when not `valid`, and then `global` is not read but must
// still be an address in global memory. Copies started since the last commit form a group.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid = true RENDSEG_PLACE) {
#if defined(__CUDACC__)
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#else
  if (!is_aligned(shared, 16) || (valid && !is_aligned(global, 16))) {
    emulation::fail("cp_async_16: both addresses must be 16-byte aligned", place);
  }
  emulation::copy_async(shared, global, 16, valid);
#endif
}

__device__ inline void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::copy_async_commit();
#endif
}

// Waits until at most `pending` groups of this thread are under way. Other threads see the copies after a barrier.
template <int pending>
__device__ inline void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
  emulation::copy_async_wait(pending);
#endif
}

#undef RENDSEG_PLACE

}  // namespace rendseg

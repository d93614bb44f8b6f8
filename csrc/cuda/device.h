// What the CUDA kernels use beyond plain C++: 16-bit conversions, asynchronous copies, matrix instructions, the launch.
// tests/cuda_on_cpu/device.h has the same functions for g++, so that a kernel's own source runs under the sanitizers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kWarpSize = 32;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(uint8_t value) { return static_cast<float>(value); }
__device__ inline float to_float(bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(float16 value) { return __half2float(value); }

// Round to nearest even.
template <class T>
__device__ T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline bfloat16 from_float<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline float16 from_float<float16>(float value) {
  return __float2half_rn(value);
}

// The float or 16-bit element whose bits these are (the low ones).
template <class T>
__device__ T from_bits(uint32_t bits);

template <>
__device__ inline float from_bits<float>(uint32_t bits) {
  return __uint_as_float(bits);
}
template <>
__device__ inline bfloat16 from_bits<bfloat16>(uint32_t bits) {
  return __ushort_as_bfloat16(static_cast<unsigned short>(bits));
}
template <>
__device__ inline float16 from_bits<float16>(uint32_t bits) {
  return __ushort_as_half(static_cast<unsigned short>(bits));
}

__device__ inline float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The block's dynamic shared memory, on a 16-byte boundary.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ inline void synchronize_block() { __syncthreads(); }

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies the first `valid` of kBytes bytes from global to shared memory and fills the rest with zeros, without passing
// registers. Both addresses are multiples of kBytes; nothing is read where valid is 0 (PTX ISA, cp.async).
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
}

// Waits for all of the calling thread's copies; other threads see them after the next synchronize_block.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r names row r of matrix i (16 bytes), and gets elements 2 (lane %
// 4) and 2 (lane % 4) + 1 of row lane / 4 of matrix i in result[i] (PTX ISA, ldmatrix).
__device__ inline void load_matrices(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, fp32) += a (16 x 16) b (16 x 8), the fragments as PTX ISA has them for mma.m16n8k16. The last argument
// only gives the type of a and b.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   const Params& params) {
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

// What this processor can do at best, for benchmarks to divide by: probes that do nothing but the instruction
// that bounds a kernel. Each runs on `threads` threads for `seconds` and returns the sum of the threads' own
// rates. And how far apart two threads are.
#pragma once

#include <omp.h>

#include "dispatch.h"
#include "simd/amx.h"
#include "simd/pairs.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

namespace peak {

// Independent sums, each waiting only for itself. Two pipes times a latency of 4 cycles need 8, vdpbf16ps
// needs at least 24 (its latency is longer: fewer leave it waiting); 24 + 2 operands of 32
// registers with AVX-512, 12 + 2 of 16 otherwise.
constexpr int kSums = kLanes == 16 ? 24 : 12;
constexpr int kSteps = 4096;  // per look at the clock: some 10 us

constexpr int kLoads = 8;  // loads in flight of the reading probe

// Runs `block(thread, team, turn)`, which returns the work it did, again and again in every thread.
template <class Block>
static double rate(int threads, double seconds, Block block) {
  double total = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    int64_t turn = 0;
    block(thread, team, turn);  // wakes the core and fills its instruction cache
#pragma omp barrier
    const double start = omp_get_wtime();
    double done = 0.0, elapsed = 0.0;
    do {
      done += block(thread, team, ++turn);
      elapsed = omp_get_wtime() - start;
    } while (elapsed < seconds);
    total += done / elapsed;
  }
  return total;
}

static inline void keep(const Vec* sum, int count) {
  Vec total = sum[0];
  for (int i = 1; i < count; ++i) total += sum[i];
  volatile float sink = total[0];  // or the compiler would drop the loop
  (void)sink;
}

// 2 flops per lane and step. The sums are the multiplicand, so that nothing is loop-invariant where a product
// and a sum are two instructions; they tend to 2 and meet no overflow and no subnormal.
static inline double fma_block() {
  volatile float half = 0.5f;  // unknown to the compiler
  const Vec a = broadcast(half), b = broadcast(half + half);
  Vec sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = broadcast(static_cast<float>(i));
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = mul_add(sum[i], a, b);
  }
  keep(sum, kSums);
  return 2.0 * kLanes * kSums * kSteps;
}

#ifdef __AMX_BF16__
// A product of tiles is 16 x 16 sums of 32 terms. Six independent sums, of which each waits for itself 52 cycles: a
// product takes the unit 16. The tiles are zeros.
static inline double dot_bf16_block() {
  const AmxTiles tiles;
  for (int step = 0; step < kSteps; ++step) {
    multiply_add_amx_tiles<0, 6, 7>();
    multiply_add_amx_tiles<1, 6, 7>();
    multiply_add_amx_tiles<2, 6, 7>();
    multiply_add_amx_tiles<3, 6, 7>();
    multiply_add_amx_tiles<4, 6, 7>();
    multiply_add_amx_tiles<5, 6, 7>();
  }
  return 2.0 * kAmxSide * kAmxSide * 2 * kAmxSide * 6 * kSteps;
}
#elif defined(__AVX512BF16__)
// 4 flops per lane and step: two products and two sums.
static inline double dot_bf16_block() {
  const bfloat16 ones[2] = {{0x3f80}, {0x3f80}};
  const Vec one = broadcast_pair(ones);
  Vec sum[kSums] = {};
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = mul_add_pairs(one, one, sum[i]);
  }
  keep(sum, kSums);
  return 4.0 * kLanes * kSums * kSteps;
}
#endif

// Adds up `count` floats, a multiple of kLoads * kLanes of them.
static inline void read_block(const float* data, int64_t count) {
  Vec sum[kLoads] = {};
  for (int64_t i = 0; i + kLoads * kLanes <= count; i += kLoads * kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < kLoads; ++j) sum[j] += load_vec(data + i + j * kLanes);
  }
  keep(sum, kLoads);
}

}  // namespace peak

// GFLOP/s of a register-only loop of fused multiply-adds (of a multiplication and an addition on the scalar
// ISA).
[[maybe_unused]] static double peak_fma(int threads, double seconds) {
  return 1e-9 * peak::rate(threads, seconds, [](int, int, int64_t) { return peak::fma_block(); });
}

// GFLOP/s of a register-only loop of tdpbf16ps (AMX) or vdpbf16ps. An ISA without either widens bf16 to fp32: its
// limit is that of FMA.
static double peak_dot_bf16(int threads, double seconds) {
#ifdef __AVX512BF16__
  return 1e-9 * peak::rate(threads, seconds, [](int, int, int64_t) { return peak::dot_bf16_block(); });
#else
  return peak_fma(threads, seconds);
#endif
}

// GB/s of reading `count` floats in order, each thread its own part of them over and over. The caller
// makes them more than the caches hold, and at least kPeakReadFloats for each thread.
[[maybe_unused]] static double peak_read(const float* data, int64_t count, int threads, double seconds) {
  return 1e-9 * peak::rate(threads, seconds, [=](int thread, int team, int64_t turn) {
           const int64_t blocks = count / team / kPeakReadFloats;
           const int64_t block = thread * blocks + turn % blocks;
           peak::read_block(data + block * kPeakReadFloats, kPeakReadFloats);
           return static_cast<double>(kPeakReadFloats * sizeof(float));
         });
}

// Nanoseconds until one of two threads sees what the other has written, the mean over `seconds`: how far apart their
// cores are. 0 where the system gives no second thread.
[[maybe_unused]] static double handoff(double seconds) {
  double result = 0.0;
  enum : int { kMine, kYours, kOver };
  alignas(64) int turn = kMine;
#pragma omp parallel num_threads(2)
  if (omp_get_num_threads() == 2) {
    if (omp_get_thread_num() == 0) {
      constexpr int kRounds = 16;  // per look at the clock
      const double start = omp_get_wtime();
      double elapsed = 0.0;
      int64_t rounds = 0;
      do {
        for (int i = 0; i < kRounds; ++i) {
          __atomic_store_n(&turn, kYours, __ATOMIC_RELEASE);
          while (__atomic_load_n(&turn, __ATOMIC_ACQUIRE) != kMine) {
          }
        }
        rounds += kRounds;
        elapsed = omp_get_wtime() - start;
      } while (elapsed < seconds);
      result = 1e9 * elapsed / static_cast<double>(2 * rounds);
      __atomic_store_n(&turn, kOver, __ATOMIC_RELEASE);
    } else {
      for (int now = kMine; now != kOver; now = __atomic_load_n(&turn, __ATOMIC_ACQUIRE))
        if (now == kYours) __atomic_store_n(&turn, kMine, __ATOMIC_RELEASE);
    }
  }
  return result;
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA

// The functions of csrc/cuda/device.h for g++: one block at a time, each CUDA thread a fiber, so that a CUDA kernel's
// own source runs on a CPU under AddressSanitizer and UndefinedBehaviorSanitizer.
//
// A fiber runs until it meets a barrier or an instruction of the whole warp; which of two fibers runs first is the
// caller's choice, and a result that depends on it shows a missing barrier. Shared memory is a heap block of exactly
// the size asked for at launch and begins as NaN; an asynchronous copy makes its target NaN and arrives when it is
// waited for.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define GPT4V_FAST_ISA cuda_on_cpu
#include "simd/scalar.h"

#define __global__
#define __device__
#define __launch_bounds__(...)

using gpt4v_fast::cuda_on_cpu::bfloat16;
using gpt4v_fast::cuda_on_cpu::float16;
using gpt4v_fast::cuda_on_cpu::from_float;
using gpt4v_fast::cuda_on_cpu::to_float;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "error"; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

constexpr int kWarpSize = 32;

inline dim3 threadIdx{0}, blockIdx{0};

template <class T>
T from_bits(uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));  // the low bytes: little-endian, as a GPU is
  return value;
}

inline float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

namespace cuda_on_cpu {

// In what order the fibers of a block run between two barriers.
enum class Order { kForward, kBackward };
inline Order order = Order::kForward;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, %u, thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
  std::exit(3);
}

enum class State { kReady, kAtBlockBarrier, kAtWarpInstruction, kDone };

struct PendingCopy {
  void* shared;
  const void* global;
  int bytes, valid;
};

// What the lanes of a warp show each other in one instruction; two in turn, since a lane may be one ahead of another.
struct Exchange {
  uint32_t words[kWarpSize][6];
  const void* rows[kWarpSize];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  std::vector<PendingCopy> copies;
  unsigned instructions = 0;
  void* fake_stack = nullptr;
};

constexpr size_t kStackBytes = 256 * 1024;

// The block that is running.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Exchange> exchanges;
  std::function<void()> kernel;
  unsigned char* shared = nullptr;
  ucontext_t scheduler;
  int current = 0;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};
inline Block* block = nullptr;

// AddressSanitizer keeps a shadow of the stack, and must know of every change of stacks.
inline void start_switch(void** save, const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(save, stack, bytes);
#else
  (void)save, (void)stack, (void)bytes;
#endif
}

inline void finish_switch(void* saved, const void** old_stack, size_t* old_bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(saved, old_stack, old_bytes);
#else
  (void)saved, (void)old_stack, (void)old_bytes;
#endif
}

// Gives way to the other fibers until the scheduler finds that the whole block (or warp) is here.
inline void wait(State at) {
  Fiber& fiber = block->fibers[static_cast<size_t>(block->current)];
  fiber.state = at;
  start_switch(at == State::kDone ? nullptr : &fiber.fake_stack, block->scheduler_stack, block->scheduler_stack_bytes);
  swapcontext(&fiber.context, &block->scheduler);
  finish_switch(fiber.fake_stack, &block->scheduler_stack, &block->scheduler_stack_bytes);
}

inline void fiber_main() {
  finish_switch(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
  block->kernel();
  if (!block->fibers[static_cast<size_t>(block->current)].copies.empty()) fail("a copy was never waited for");
  wait(State::kDone);
}

inline void resume(int thread) {
  Fiber& fiber = block->fibers[static_cast<size_t>(thread)];
  block->current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  start_switch(&block->scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&block->scheduler, &fiber.context);
  finish_switch(block->scheduler_fake_stack, nullptr, nullptr);
}

// Makes fibers [begin, end) ready when all of them are in state `at`; true when it did.
inline bool release(size_t begin, size_t end, State at) {
  for (size_t i = begin; i < end; ++i)
    if (block->fibers[i].state != at) return false;
  for (size_t i = begin; i < end; ++i) block->fibers[i].state = State::kReady;
  return true;
}

inline void run_block(const std::function<void()>& kernel, int threads, int shared_bytes) {
  Block running;
  block = &running;
  running.kernel = kernel;
  running.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
  running.exchanges = std::vector<Exchange>(static_cast<size_t>(threads / kWarpSize * 2));
  running.shared = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(shared_bytes)));
  std::memset(running.shared, 0xff, static_cast<size_t>(shared_bytes));
  for (Fiber& fiber : running.fibers) {
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  const size_t count = running.fibers.size();
  for (size_t done = 0; done < count;) {
    bool progress = false;
    for (size_t i = 0; i < count; ++i) {
      const size_t thread = order == Order::kForward ? i : count - 1 - i;
      if (running.fibers[thread].state != State::kReady) continue;
      progress = true;
      resume(static_cast<int>(thread));
      done += running.fibers[thread].state == State::kDone;
    }
    for (size_t warp = 0; warp < count; warp += kWarpSize)
      progress |= release(warp, warp + kWarpSize, State::kAtWarpInstruction);
    progress |= release(0, count, State::kAtBlockBarrier);
    if (!progress && done < count) fail("some threads wait for others that will not come");
  }
  std::free(running.shared);
  block = nullptr;
}

// Shows `words` and `row` to the warp and returns what all lanes showed.
inline const Exchange& exchange(const uint32_t* words, int count, const void* row) {
  Fiber& fiber = block->fibers[static_cast<size_t>(block->current)];
  const size_t warp = static_cast<size_t>(block->current / kWarpSize);
  Exchange& shown = block->exchanges[warp * 2 + fiber.instructions++ % 2];
  const int lane = block->current % kWarpSize;
  std::copy(words, words + count, shown.words[lane]);
  shown.rows[lane] = row;
  wait(State::kAtWarpInstruction);
  return shown;
}

template <class T>
float element(uint32_t pair, int index) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * index))});
}

}  // namespace cuda_on_cpu

inline unsigned char* shared_memory() { return cuda_on_cpu::block->shared; }

inline void synchronize_block() {
#ifndef CUDA_ON_CPU_WITHOUT_BARRIERS  // for the test that shows that their absence is noticed
  cuda_on_cpu::wait(cuda_on_cpu::State::kAtBlockBarrier);
#endif
}

template <int kBytes>
void copy_async(void* shared, const void* global, int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0) cuda_on_cpu::fail("misaligned target of a copy");
  if (valid > 0 && reinterpret_cast<uintptr_t>(global) % kBytes != 0) cuda_on_cpu::fail("misaligned source of a copy");
  if (valid < 0 || valid > kBytes) cuda_on_cpu::fail("more valid bytes than a copy has");
  std::memset(shared, 0xff, kBytes);
  cuda_on_cpu::Fiber& fiber = cuda_on_cpu::block->fibers[static_cast<size_t>(cuda_on_cpu::block->current)];
  fiber.copies.push_back({shared, global, kBytes, valid});
}

inline void wait_for_copies() {
  cuda_on_cpu::Fiber& fiber = cuda_on_cpu::block->fibers[static_cast<size_t>(cuda_on_cpu::block->current)];
  for (const cuda_on_cpu::PendingCopy& copy : fiber.copies) {
    std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
    if (copy.valid > 0) std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid));
  }
  fiber.copies.clear();
}

inline void load_matrices(uint32_t (&result)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cuda_on_cpu::fail("misaligned row of a matrix");
  const cuda_on_cpu::Exchange& shown = cuda_on_cpu::exchange(nullptr, 0, row);
  const int lane = cuda_on_cpu::block->current % kWarpSize;
  for (int i = 0; i < 4; ++i)
    std::memcpy(&result[i], static_cast<const char*>(shown.rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
}

// The fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): a lane's group is lane / 4, its place
// in it lane % 4. Words 0..3 are a at rows (group, group + 8, group, group + 8), columns 2 place and 2 place + 8 from
// word 2 on; words 4, 5 are b at rows 2 place and 2 place + 8 of column group.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const cuda_on_cpu::Exchange& shown = cuda_on_cpu::exchange(words, 6, nullptr);
  const int lane = cuda_on_cpu::block->current % kWarpSize, group = lane / 4, place = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = 2 * place + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, high = k / 8;
      const uint32_t left = shown.words[row % 8 * 4 + holder][row / 8 + 2 * high];
      const uint32_t right = shown.words[column * 4 + holder][4 + high];
      c[i] += cuda_on_cpu::element<T>(left, k % 2) * cuda_on_cpu::element<T>(right, k % 2);
    }
  }
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, cudaStream_t,
                   const Params& params) {
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      cuda_on_cpu::run_block([&] { kernel(params); }, threads, shared_bytes);
    }
  return cudaSuccess;
}

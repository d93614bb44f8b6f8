// Tasks of a team that go to the same thread as tasks on the same data before.
//
// What a thread has just written lies in its caches, and may be far from another's: cores of different chiplets or
// sockets pass a line on in 200 ns and more, one of the same in 25 (docs/notes/2026-11-measuring.md). So each of the
// threads has its share of the tasks, in order, and with it the same part of the data in every round; a thread that has
// done its own takes from others'.
#pragma once

#include <omp.h>

#include "simd/buffer.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

class TeamTasks {
 public:
  explicit TeamTasks(int threads) : team_(threads), shares_(threads) {
    for (int t = 0; t < threads; ++t) shares_[t].taken = 0;
  }

  // The place of a thread in its rounds; every thread of the team has its own, and goes through the same rounds.
  struct Round {
    uint64_t number = 0;
  };

  // Calls body(task) for the tasks [0, count) of a round, each on one thread of the team. It does not wait for those of
  // other threads.
  template <class Body>
  void run(Round& round, int64_t count, Body body) const {
    ++round.number;
    const int me = omp_get_thread_num();
    for (int i = 0; i < team_; ++i) {
      const int64_t owner = (me + i) % team_, begin = count * owner / team_, end = count * (owner + 1) / team_;
      for (int64_t taken; (taken = take(shares_[owner].taken, round.number, end - begin)) >= 0;) body(begin + taken);
    }
  }

 private:
  struct alignas(64) Share {
    uint64_t taken;  // the number of the round, and in the lower 32 bits tasks that are taken
  };

  // The next of `count` tasks of a share, or -1. A share that is in a later round has none left: a thread begins a
  // round when it has found all tasks of the last one taken.
  static int64_t take(uint64_t& share, uint64_t round, int64_t count) {
    uint64_t seen = __atomic_load_n(&share, __ATOMIC_RELAXED);
    for (;;) {
      if (seen >> 32 > round) return -1;
      const uint64_t taken = seen >> 32 == round ? seen & 0xffffffffu : 0;
      if (static_cast<int64_t>(taken) >= count) return -1;
      if (__atomic_compare_exchange_n(&share, &seen, round << 32 | (taken + 1), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED))
        return static_cast<int64_t>(taken);
    }
  }

  const int team_;
  const Buffer<Share> shares_;
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA

// Runs rounds of csrc/product/team_tasks.h for tests/native/test_team_tasks.py, which names the number of threads.
// Prints how many tasks there were, and how many of them ran not once.
#include "product/team_tasks.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace gpt4v_fast::GPT4V_FAST_ISA;

int main(int, char** arguments) {
  constexpr int kRounds = 20000;
  const int threads = std::atoi(arguments[1]), told = std::atoi(arguments[2]);
  std::vector<int> counts(kRounds);
  for (int round = 0; round < kRounds; ++round) counts[round] = round * 7919 % 41;  // 0 to 40 tasks
  std::vector<std::vector<int>> runs(kRounds);
  for (int round = 0; round < kRounds; ++round) runs[round].resize(counts[round]);
  const TeamTasks tasks(told);  // may be told of more threads than there are
#pragma omp parallel num_threads(threads)
  {
    TeamTasks::Round round;
    for (int r = 0; r < kRounds; ++r) {
      tasks.run(round, counts[r], [&](int64_t task) { __atomic_fetch_add(&runs[r][task], 1, __ATOMIC_RELAXED); });
      if (r % 100 == 0) {
#pragma omp barrier
      }
    }
  }
  long all = 0, wrong = 0;
  for (const std::vector<int>& round : runs)
    for (int times : round) ++all, wrong += times != 1;
  std::printf("%ld %ld\n", all, wrong);
}

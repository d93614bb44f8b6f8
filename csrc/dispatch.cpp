#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(GPT4V_FAST_HAS_AMX_BF16) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gpt4v_fast {

namespace scalar {
const Kernels& table();
}
#ifdef GPT4V_FAST_HAS_AVX2
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
namespace avx512_bf16 {
const Kernels& table();
}
#endif
#ifdef GPT4V_FAST_HAS_AMX_BF16
namespace amx_bf16 {
const Kernels& table();
}
#endif

namespace {

struct Candidate {
  const Kernels& (*table)();
  bool supported;
};

#ifdef GPT4V_FAST_HAS_AMX_BF16
// Whether the processor multiplies bf16 tiles, and the system lets this process: Linux saves tiles only for one that
// has asked, once for all its threads.
bool has_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: Linux 5.16
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  static const bool granted = [] {
    unsigned eax, ebx, ecx, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
std::vector<Candidate> candidates() {
  std::vector<Candidate> found = {{scalar::table, true}};
#ifdef GPT4V_FAST_HAS_AVX2
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  found.push_back({avx2::table, has_avx2});
  found.push_back({avx512::table, has_avx512});
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  found.push_back({avx512_bf16::table, has_bf16});
#ifdef GPT4V_FAST_HAS_AMX_BF16
  found.push_back({amx_bf16::table, has_bf16 && has_amx()});
#endif
#endif
  return found;
}

const Kernels& find(const std::string& name) {
  std::string names;
  for (const Candidate& candidate : candidates()) {
    if (!candidate.supported) continue;
    if (name == candidate.table().isa) return candidate.table();
    names += (names.empty() ? "" : ", ") + std::string(candidate.table().isa);
  }
  throw std::invalid_argument("isa: expected one of " + names + " (what this build and processor have), got '" + name +
                              "'");
}

std::atomic<const Kernels*> selected{nullptr};

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.push_back(candidate.table().isa);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.supported) names.push_back(candidate.table().isa);
  return names;
}

const Kernels& kernels() {
  const Kernels* table = selected.load(std::memory_order_acquire);
  if (table == nullptr) {
    const char* forced = std::getenv("GPT4V_FAST_ISA");
    const bool has_forced = forced != nullptr && *forced != '\0';
    table = &find(has_forced ? std::string(forced) : available_isas().back());
    selected.store(table, std::memory_order_release);
  }
  return *table;
}

void select_isa(const std::string& name) { selected.store(&find(name), std::memory_order_release); }

}  // namespace gpt4v_fast

// Which kernels this processor runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace jaxdw {

namespace scalar {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*is_here)();
};

const Isa isas[] = {  // the widest first
#if defined(__x86_64__)
    {"avx512", &avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
     }},
    // F16C is older than AVX2, and GCC 10 cannot ask for it
    {"avx2", &avx2::kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#elif defined(__aarch64__)
    {"neon", &neon::kernels, [] { return true; }},
#endif
    {"scalar", &scalar::kernels, [] { return true; }},
};

}  // namespace

const Kernels* kernels_of(const char* isa) {
  if (!isa) {
    static const Kernels* const chosen = [] {
      const char* named = std::getenv("JAXDW_ISA");
      return kernels_of(named ? named : "");
    }();
    return chosen;
  }
  for (const Isa& each : isas)
    if ((!*isa || !std::strcmp(isa, each.name)) && each.is_here()) return each.kernels;
  return nullptr;
}

const char* name_of(const Kernels* kernels) {
  for (const Isa& each : isas)
    if (each.kernels == kernels) return each.name;
  return nullptr;
}

}  // namespace jaxdw

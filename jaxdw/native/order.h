// The order in which products are added: jaxdw/sum_order.py has the program, docs/arithmetic.md its meaning.
#ifndef JAXDW_NATIVE_ORDER_H_
#define JAXDW_NATIVE_ORDER_H_

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace jaxdw {

// A program as chains. The chains are cut into segments of at most 512 terms, whose weights stay in the nearest caches.
struct SumOrder {
  std::vector<Chain> chains;
  std::vector<int64_t> segment_ends;  // chains before the end of each segment
  std::vector<int64_t> terms;         // in the order in which they are added; empty: 0, 1, 2 and so on
  int64_t depth = 0;                  // most sums on the stack

  // Throws std::invalid_argument for steps that are no program over each of `terms` terms once, and a bias if there is
  // one.
  SumOrder(const int64_t* steps, int64_t count, int64_t terms, bool has_bias);

  void give_to(Matmul& matmul) const;
};

}  // namespace jaxdw

#endif  // JAXDW_NATIVE_ORDER_H_

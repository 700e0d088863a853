// Programs that add, as chains.
#include "order.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace jaxdw {
namespace {

constexpr int64_t add_step = -1, bias_step = -2, zero_step = -3;

void expect(bool holds, const std::string& expected) {
  if (!holds) throw std::invalid_argument("`steps` is no program that adds: expected " + expected);
}

// Chains that are as long as can be, and the terms in their order.
struct Parsed {
  std::vector<Chain> chains;
  std::vector<int64_t> terms;
  int64_t depth = 0, most_depth = 0;

  void push(Chain::Start start) {
    int64_t at = int64_t(terms.size());
    chains.push_back({start, Chain::Products::none, at, at, 0});
    depth += start != Chain::Start::top;
    most_depth = std::max(most_depth, depth);
  }

  void add_product(int64_t term, Chain::Products products) {
    using Products = Chain::Products;
    const Chain& last = chains.back();
    if (last.adds || (last.products != Products::none && last.products != products)) push(Chain::Start::top);
    chains.back().products = products;
    append(term);
  }

  void append(int64_t term) {
    terms.push_back(term);
    ++chains.back().end;
  }
};

}  // namespace

SumOrder::SumOrder(const int64_t* steps, int64_t count, int64_t term_count, bool has_bias) {
  Parsed parsed;
  std::vector<bool> seen(term_count);
  int64_t biases = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t step = steps[i];
    if (step == add_step) {
      expect(parsed.depth > 1, "two sums before each addition");
      --parsed.depth;
      ++parsed.chains.back().adds;
    } else if (step == bias_step || step == zero_step) {
      biases += step == bias_step;
      parsed.push(step == bias_step ? Chain::Start::bias : Chain::Start::zero);
    } else {
      int64_t term = step / 2;
      expect(step >= 0 && term < term_count && !seen[term], "each term once, and no other");
      seen[term] = true;
      if (step % 2) {
        expect(parsed.depth > 0, "a sum before each fused product");
        parsed.add_product(term, Chain::Products::fused);
      } else if (parsed.depth > 0 && i + 1 < count && steps[i + 1] == add_step) {
        parsed.add_product(term, Chain::Products::rounded);
        ++i;
      } else {  // -0 plus a product is the product
        parsed.push(Chain::Start::minus_zero);
        parsed.append(term);
      }
    }
  }
  expect(parsed.depth == 1, "one sum at the end");
  expect(int64_t(parsed.terms.size()) == term_count, "each of " + std::to_string(term_count) + " terms");
  expect(biases == has_bias, has_bias ? "the bias once" : "no bias where none is given");
  depth = parsed.most_depth;
  bool in_order = true;
  for (int64_t i = 0; i < term_count; ++i) in_order &= parsed.terms[i] == i;
  if (!in_order) terms = std::move(parsed.terms);

  int64_t in_segment = 0;
  for (Chain chain : parsed.chains) {
    while (in_segment + chain.end - chain.first > most_terms) {
      if (int64_t room = most_terms - in_segment) {
        chains.push_back({chain.start, chain.products, chain.first, chain.first + room, 0});
        chain.first += room;
        chain.start = Chain::Start::top;
      }
      segment_ends.push_back(int64_t(chains.size()));
      in_segment = 0;
    }
    chains.push_back(chain);
    in_segment += chain.end - chain.first;
  }
  segment_ends.push_back(int64_t(chains.size()));
}

void SumOrder::give_to(Matmul& matmul) const {
  matmul.chains = chains.data();
  matmul.segment_ends = segment_ends.data(), matmul.segments = int64_t(segment_ends.size());
  matmul.order = terms.empty() ? nullptr : terms.data();
  matmul.depth = depth;
}

}  // namespace jaxdw

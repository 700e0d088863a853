// Matrix products whose sums are chains over consecutive blocks of terms, compiled once for each instruction set.
//
// Lanes of a vector are columns of the result, never terms of one sum. docs/arithmetic.md has the sequence of roundings.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "support.h"

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

// A tile has at most so many rows, and so many vectors of columns: its sums are kept in registers.
constexpr int tile_rows = JAXDW_IS == JAXDW_IS_scalar ? 4 : JAXDW_IS == JAXDW_IS_avx2 ? 6 : 12;
constexpr int tile_vectors = 2;
// Terms that are added before the next rows: their weights stay in the nearest caches.
constexpr int64_t most_terms = 512;
// Values of x that one thread works on at once, about.
constexpr int64_t values_at_once = 32768;

// Where the sums of a tile go: to `keep` or, rounded, to y; each after what `add` holds of the same element.
template <class T, class Sum>
struct Output {
  const Sum* add;
  Sum* keep;
  T* y;
  int64_t y_row;
  int columns;
  const Sum* bias;
};

template <class T, class Sum>
struct Tile {
  const Sum* x;
  int64_t x_row, x_term;
  const Sum* w;
  int64_t w_term, terms;
  const Sum* start;  // the sums so far; all rows have the same ones where `start_row` is 0
  int64_t start_row;
  Output<T, Sum> to;
};

template <class V, class T, class Sum>
__attribute__((noinline)) void finish(int rows, int vectors, const Sum* sums, const Output<T, Sum>& to) {
  constexpr int width = tile_vectors * V::lanes;
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < vectors; ++i) {
      int at = row * width + i * V::lanes, lanes = to.columns - i * V::lanes;
      V sum = V::load(sums + at);
      if (to.add) sum = add(V::load(to.add + at), sum);
      if (!to.keep && to.bias) sum = add(sum, V::load(to.bias + i * V::lanes));
      T* y = to.y + row * to.y_row + i * V::lanes;
      if (to.keep)
        sum.store(to.keep + at);
      else if (lanes >= V::lanes)
        sum.store(y);
      else
        store_first(sum, y, lanes);
    }
  }
}

template <class V, int Rows, int Vectors, class T, class Sum>
JAXDW_INLINE void add_tile(const Tile<T, Sum>& tile) {
  V s[Rows][Vectors];
  for (int row = 0; row < Rows; ++row)
    for (int i = 0; i < Vectors; ++i) s[row][i] = V::load(tile.start + row * tile.start_row + i * V::lanes);
  const Sum *x = tile.x, *w = tile.w;
  const int64_t x_row = tile.x_row, x_term = tile.x_term, w_term = tile.w_term;
  for (int64_t term = 0; term < tile.terms; ++term, x += x_term, w += w_term) {
    V weight[Vectors];
    for (int i = 0; i < Vectors; ++i) weight[i] = V::load(w + i * V::lanes);
    for (int row = 0; row < Rows; ++row) {
      V value = V::splat(x[row * x_row]);
      for (int i = 0; i < Vectors; ++i) s[row][i] = fma(value, weight[i], s[row][i]);
    }
  }
  // Plain loops, which the compiler unrolls: only so are the sums in registers.
  const Output<T, Sum>& to = tile.to;
  constexpr int width = tile_vectors * V::lanes;
  if (to.keep && !to.add) {
    for (int row = 0; row < Rows; ++row)
      for (int i = 0; i < Vectors; ++i) s[row][i].store(to.keep + row * width + i * V::lanes);
  } else if (!to.keep && !to.add && !to.bias && to.columns >= Vectors * V::lanes) {
    for (int row = 0; row < Rows; ++row)
      for (int i = 0; i < Vectors; ++i) s[row][i].store(to.y + row * to.y_row + i * V::lanes);
  } else {
    Sum sums[Rows * width];
    for (int row = 0; row < Rows; ++row)
      for (int i = 0; i < Vectors; ++i) s[row][i].store(sums + row * width + i * V::lanes);
    finish<V>(Rows, Vectors, sums, to);
  }
}

template <class V, int Rows, class T, class Sum>
void add_rows(int rows, int vectors, const Tile<T, Sum>& tile) {
  if constexpr (Rows > 0) {
    if (rows < Rows) return add_rows<V, Rows - 1>(rows, vectors, tile);
    vectors == 1 ? add_tile<V, Rows, 1>(tile) : add_tile<V, Rows, 2>(tile);
  }
}

// Numbers that are written before they are read.
template <class T>
std::unique_ptr<T[]> scratch(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

template <class V, class T, class Sum>
class MatmulParts : public Parts {
  static constexpr int width = tile_vectors * V::lanes;
  static constexpr bool is_wide = std::is_same<T, Sum>::value;

 public:
  MatmulParts(const Matmul& of, int64_t threads) : of_(of), panels_(divided(of.columns, width)) {
    // Threads share rows out first, and then columns: what is read of w serves all rows of a part.
    rows_ = std::min(of.rows, std::max<int64_t>(8 * tile_rows, values_at_once / std::min(of.terms, most_terms)));
    int64_t wanted = threads == 1 ? 1 : 4 * threads;
    panels_at_once_ = panels_;
    if (divided(of.rows, rows_) < wanted) {
      rows_ = std::min(of.rows, std::max<int64_t>(4 * tile_rows, divided(of.rows, wanted)));
      panels_at_once_ = std::max<int64_t>(1, panels_ * divided(of.rows, rows_) / wanted);
    }
    row_parts_ = divided(of.rows, rows_);
  }

  int64_t count() const { return row_parts_ * divided(panels_, panels_at_once_); }

  void run(int64_t part) override {
    Rounding rounding;
    int64_t first = part % row_parts_ * rows_, rows = std::min(rows_, of_.rows - first);
    int64_t panel = part / row_parts_ * panels_at_once_, end = std::min(panels_, panel + panels_at_once_);
    int64_t terms = std::min(most_terms, of_.terms);
    auto sums = scratch<Sum>(rows * width), totals = scratch<Sum>(rows * width), packed = scratch<Sum>(terms * width);
    auto wide = scratch<Sum>(is_wide ? 0 : rows * terms);
    Sum zeros[width] = {}, bias[width] = {};
    for (; panel < end; ++panel) {
      int64_t column = panel * width, term = 0;
      int columns = int(std::min<int64_t>(width, of_.columns - column));
      if (of_.bias_place != Bias::none)
        for (int i = 0; i < width; ++i)
          bias[i] = i < columns ? widened(static_cast<const T*>(of_.bias)[column + i]) : Sum(0);
      for (int64_t block = 0; block < of_.blocks; ++block) {
        const Sum* start = block == 0 && of_.bias_place == Bias::first ? bias : zeros;
        for (int64_t start_row = 0; term < of_.ends[block]; start_row = width, start = sums.get()) {
          int64_t count = std::min(most_terms, of_.ends[block] - term);
          bool ends = term + count == of_.ends[block], is_last = ends && block + 1 == of_.blocks;
          Output<T, Sum> to{ends && block > 0 ? totals.get() : nullptr,
                            is_last ? nullptr : ends ? totals.get() : sums.get(),
                            static_cast<T*>(of_.y) + first * of_.columns + column,
                            of_.columns,
                            columns,
                            of_.bias_place == Bias::last ? bias : nullptr};
          add_terms(first, rows, column, columns, term, count, start, start_row, to, packed.get(), wide.get());
          term += count;
        }
      }
    }
  }

 private:
  static int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

  void add_terms(int64_t first, int64_t rows, int64_t column, int columns, int64_t term, int64_t terms,
                 const Sum* start, int64_t start_row, Output<T, Sum> to, Sum* packed, Sum* wide) const {
    const T* x = static_cast<const T*>(of_.x) + first * of_.x_row + term * of_.x_term;
    const T* w = static_cast<const T*>(of_.w) + term * of_.w_term + column * of_.w_column;
    Tile<T, Sum> tile{wide, terms, 1, packed, width, terms, start, start_row, to};
    bool packs = true;
    if constexpr (is_wide) {
      tile.x = x, tile.x_row = of_.x_row, tile.x_term = of_.x_term;
      // for few rows, copying would cost more than it gains
      packs = of_.w_column != 1 || columns < width || rows > 4 * tile_rows;
      if (!packs) tile.w = w, tile.w_term = of_.w_term;
    } else {
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < terms; ++i) wide[row * terms + i] = widened(x[row * of_.x_row + i * of_.x_term]);
    }
    if (packs) pack(w, columns, terms, packed);
    int64_t tiles = divided(rows, tile_rows);
    const Tile<T, Sum> whole = tile;
    for (int64_t i = 0; i < tiles; ++i) {  // all have nearly the same number of rows
      int64_t row = rows * i / tiles, next = rows * (i + 1) / tiles;
      tile.x = whole.x + row * whole.x_row;
      tile.start = whole.start + row * start_row;
      if (to.add) tile.to.add = to.add + row * width;
      if (to.keep) tile.to.keep = to.keep + row * width;
      tile.to.y = to.y + row * to.y_row;
      add_rows<V, tile_rows>(int(next - row), columns > V::lanes ? 2 : 1, tile);
    }
  }

  void pack(const T* w, int columns, int64_t terms, Sum* packed) const {
    for (int64_t term = 0; term < terms; ++term, w += of_.w_term, packed += width) {
      if (of_.w_column != 1) {
        for (int at = 0; at < width; ++at) packed[at] = at < columns ? widened(w[at * of_.w_column]) : Sum(0);
        continue;
      }
      for (int at = 0; at < width; at += V::lanes) {
        int lanes = columns - at;
        (lanes >= V::lanes ? V::load(w + at) : lanes > 0 ? load_first<V>(w + at, lanes) : V::zero()).store(packed + at);
      }
    }
  }

  static Sum widened(T value) {
    if constexpr (is_wide) {
      return value;
    } else {
      Sum all[V::lanes];
      load_first<V>(&value, 1).store(all);
      return all[0];
    }
  }

  const Matmul& of_;
  int64_t panels_, panels_at_once_, rows_, row_parts_;
};

template <class V, class T, class Sum>
void matmul_of(const Matmul& of, Threads& threads) {
  MatmulParts<V, T, Sum> parts(of, threads.count());
  threads.run(parts.count(), parts);
}

}  // namespace

void matmul(const Matmul&, Threads&);
void matmul(const Matmul& of, Threads& threads) {
  switch (of.type) {
    case Type::f32: return matmul_of<Floats, float, float>(of, threads);
    case Type::f64: return matmul_of<Doubles, double, double>(of, threads);
    case Type::bf16: return matmul_of<Floats, bf16, float>(of, threads);
    case Type::f16: return matmul_of<Floats, f16, float>(of, threads);
  }
}

}  // namespace JAXDW_ISA
}  // namespace jaxdw

// Matrix products whose sums are added in a given order, compiled once for each instruction set.
//
// Lanes of a vector are columns of the result, never terms of one sum. docs/arithmetic.md has the sequence of roundings.
#include <algorithm>
#include <memory>
#include <type_traits>

#include "epilogue.h"
#include "support.h"

namespace jaxdw {
namespace JAXDW_ISA {
namespace {

// A tile has at most so many rows, and so many vectors of columns: its sums are kept in registers.
constexpr int tile_rows = JAXDW_IS == JAXDW_IS_scalar ? 4 : JAXDW_IS == JAXDW_IS_avx2 ? 6 : 12;
constexpr int tile_vectors = 2;
// Values of x that one thread works on at once, about; and sums on the stacks of its tiles.
constexpr int64_t values_at_once = 32768;
constexpr int64_t sums_at_once = 131072;

// A segment of the program over a tile. A sum on the stack is `tile_rows` rows of `tile_vectors` vectors.
template <class T, class Sum>
struct Tile {
  const Sum* x;
  int64_t x_row, x_term;
  const Sum* w;
  int64_t w_term;
  const Chain *chain, *end;
  Sum* top;  // the sum on top of the stack, or one sum below it
  const Sum* bias;
  T* y;  // where the last sum goes if nothing is done to it, else nullptr
  int64_t y_row;
};

template <class V, int Rows, int Vectors, class T, class Sum>
JAXDW_INLINE void add_tile(const Tile<T, Sum>& tile) {
  constexpr int width = tile_vectors * V::lanes;
  const int64_t x_row = tile.x_row, x_term = tile.x_term, w_term = tile.w_term, first = tile.chain->first;
  Sum* top = tile.top;
  for (const Chain* chain = tile.chain; chain < tile.end; ++chain) {
    // Plain loops, which the compiler unrolls: only so are the sums in registers.
    V s[Rows][Vectors];
    if (chain->start == Chain::Start::top) {
      for (int row = 0; row < Rows; ++row)
        for (int i = 0; i < Vectors; ++i) s[row][i] = V::load(top + row * width + i * V::lanes);
    } else {
      top += tile_rows * width;
      V start[Vectors];
      for (int i = 0; i < Vectors; ++i)
        start[i] = chain->start == Chain::Start::bias ? V::load(tile.bias + i * V::lanes)
                                                      : V::splat(chain->start == Chain::Start::zero ? 0 : Sum(-0.0));
      for (int row = 0; row < Rows; ++row)
        for (int i = 0; i < Vectors; ++i) s[row][i] = start[i];
    }
    const Sum *x = tile.x + (chain->first - first) * x_term, *w = tile.w + (chain->first - first) * w_term;
    int64_t terms = chain->end - chain->first;
    if (chain->products != Chain::Products::rounded) {
      for (int64_t term = 0; term < terms; ++term, x += x_term, w += w_term) {
        V weight[Vectors];
        for (int i = 0; i < Vectors; ++i) weight[i] = V::load(w + i * V::lanes);
        for (int row = 0; row < Rows; ++row) {
          V value = V::splat(x[row * x_row]);
          for (int i = 0; i < Vectors; ++i) s[row][i] = fma(value, weight[i], s[row][i]);
        }
      }
    } else {
      for (int64_t term = 0; term < terms; ++term, x += x_term, w += w_term) {
        V weight[Vectors];
        for (int i = 0; i < Vectors; ++i) weight[i] = V::load(w + i * V::lanes);
        for (int row = 0; row < Rows; ++row) {
          V value = V::splat(x[row * x_row]);
          for (int i = 0; i < Vectors; ++i) s[row][i] = add(s[row][i], multiply(value, weight[i]));
        }
      }
    }
    for (int64_t adds = 0; adds < chain->adds; ++adds) {
      top -= tile_rows * width;
      for (int row = 0; row < Rows; ++row)
        for (int i = 0; i < Vectors; ++i) s[row][i] = add(V::load(top + row * width + i * V::lanes), s[row][i]);
    }
    if (tile.y && chain + 1 == tile.end) {
      for (int row = 0; row < Rows; ++row)
        for (int i = 0; i < Vectors; ++i) s[row][i].store(tile.y + row * tile.y_row + i * V::lanes);
    } else {
      for (int row = 0; row < Rows; ++row)
        for (int i = 0; i < Vectors; ++i) s[row][i].store(top + row * width + i * V::lanes);
    }
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
  static constexpr int64_t slot = tile_rows * width;
  static constexpr bool is_wide = std::is_same<T, Sum>::value;

 public:
  MatmulParts(const Matmul& of, int64_t threads) : of_(of), panels_(divided(of.columns, width)) {
    // Threads share rows out first, and then columns: what is read of w serves all rows of a part.
    rows_ = std::min(of.rows, std::max<int64_t>(8 * tile_rows, values_at_once / std::min(of.terms, most_terms)));
    if (of.segments > 1) rows_ = std::min(rows_, std::max<int64_t>(tile_rows, sums_at_once / (of.depth * width)));
    int64_t wanted = threads == 1 ? 1 : 4 * threads;
    panels_at_once_ = panels_;
    if (of.batch * divided(of.rows, rows_) < wanted) {
      rows_ = std::min(rows_, std::max<int64_t>(4 * tile_rows, divided(of.rows, wanted)));
      panels_at_once_ = std::max<int64_t>(1, panels_ * of.batch * divided(of.rows, rows_) / wanted);
    }
    row_parts_ = divided(of.rows, rows_);
    Sum divisor = Sum(of.divisor);
    epilogue_ = {static_cast<const Sum*>(of.scale),  static_cast<const Sum*>(of.shift), static_cast<const T*>(of.y),
                 static_cast<const T*>(of.residual), of.activation, divisor};
    has_epilogue_ = of.scale || of.residual || of.activation != Activation::none || divisor != 1;
  }

  int64_t count() const { return of_.batch * row_parts_ * divided(panels_, panels_at_once_); }

  void run(int64_t part) override {
    Rounding rounding;
    int64_t batch = part % of_.batch;
    part /= of_.batch;
    int64_t first = part % row_parts_ * rows_, rows = std::min(rows_, of_.rows - first);
    int64_t panel = part / row_parts_ * panels_at_once_, end = std::min(panels_, panel + panels_at_once_);
    int64_t terms = std::min(most_terms, of_.terms), tiles = divided(rows, tile_rows);
    // What one segment leaves on the stacks the next one finds there.
    auto stacks = scratch<Sum>((of_.segments > 1 ? tiles : 1) * of_.depth * slot);
    auto packed = scratch<Sum>(terms * width), copied = scratch<Sum>(copies() ? rows * terms : 0);
    Sum bias[width] = {};
    for (; panel < end; ++panel) {
      int64_t column = panel * width;
      int columns = int(std::min<int64_t>(width, of_.columns - column));
      if (of_.bias)
        for (int i = 0; i < width; ++i)
          bias[i] = i < columns ? widened(static_cast<const T*>(of_.bias)[column + i]) : Sum(0);
      const Chain* chain = of_.chains;
      int64_t on_stack = 0;
      for (int64_t segment = 0; segment < of_.segments; ++segment) {
        const Chain* next = of_.chains + of_.segment_ends[segment];
        Tile<T, Sum> tile{};
        tile.chain = chain, tile.end = next, tile.bias = bias, tile.y_row = of_.columns;
        bool is_last = segment + 1 == of_.segments;
        bool finishes = is_last && (has_epilogue_ || columns < (columns > V::lanes ? width : V::lanes));
        read(tile, batch, first, rows, column, columns, packed.get(), copied.get());
        const Sum* x = tile.x;
        for (int64_t i = 0; i < tiles; ++i) {  // all have nearly the same number of rows
          int64_t row = rows * i / tiles, count = rows * (i + 1) / tiles - row;
          Sum* stack = stacks.get() + (of_.segments > 1 ? i : 0) * of_.depth * slot;
          T* y = static_cast<T*>(of_.y) + (batch * of_.rows + first + row) * of_.columns;
          tile.x = x + row * tile.x_row;
          tile.top = stack + (on_stack - 1) * slot;
          tile.y = is_last && !finishes ? y + column : nullptr;
          add_rows<V, tile_rows>(int(count), columns > V::lanes ? 2 : 1, tile);
          if (finishes) finish<V>(epilogue_, stack, width, count, column, columns, y, of_.columns);
        }
        for (; chain < next; ++chain) on_stack += (chain->start != Chain::Start::top) - chain->adds;
      }
    }
  }

 private:
  static int64_t divided(int64_t count, int64_t by) { return (count + by - 1) / by; }

  bool copies() const { return !is_wide || of_.order; }

  int64_t term(int64_t place) const { return of_.order ? of_.order[place] : place; }

  // Sets where a tile reads x and w: the terms of a segment, for some rows and columns.
  void read(Tile<T, Sum>& tile, int64_t batch, int64_t row, int64_t rows, int64_t column, int columns, Sum* packed,
            Sum* copied) const {
    int64_t first = tile.chain->first, terms = tile.end[-1].end - first;
    const T* x = static_cast<const T*>(of_.x) + batch * of_.x_batch + row * of_.x_row;
    const T* w = static_cast<const T*>(of_.w) + batch * of_.w_batch + column * of_.w_column;
    bool packs = true;
    if constexpr (is_wide) {
      if (!of_.order) {
        tile.x = x + first * of_.x_term, tile.x_row = of_.x_row, tile.x_term = of_.x_term;
        // for few rows, copying would cost more than it gains
        packs = of_.w_column != 1 || columns < width || rows > 4 * tile_rows;
      }
    }
    if (copies()) {
      tile.x = copied, tile.x_row = terms, tile.x_term = 1;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t at = 0; at < terms; ++at)
          copied[i * terms + at] = widened(x[i * of_.x_row + term(first + at) * of_.x_term]);
    }
    if (packs) {
      tile.w = packed, tile.w_term = width;
      for (int64_t at = 0; at < terms; ++at) pack(w + term(first + at) * of_.w_term, columns, packed + at * width);
    } else if constexpr (is_wide) {
      tile.w = w + first * of_.w_term, tile.w_term = of_.w_term;
    }
  }

  void pack(const T* w, int columns, Sum* to) const {
    if (of_.w_column != 1) {
      for (int at = 0; at < width; ++at) to[at] = at < columns ? widened(w[at * of_.w_column]) : Sum(0);
      return;
    }
    for (int at = 0; at < width; at += V::lanes) {
      int lanes = columns - at;
      (lanes >= V::lanes ? V::load(w + at) : lanes > 0 ? load_first<V>(w + at, lanes) : V::zero()).store(to + at);
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
  Epilogue<T, Sum> epilogue_;
  bool has_epilogue_;
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

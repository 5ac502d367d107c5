// prefix_attention on the CPU, forward and backward; ldm_sg/ops/prefix_attention.py has the definition.
//
// A task is one sample and head. Its keys, prefix and image together, are packed transposed, its values as they are,
// into scratch that fits L2: this widens 16-bit types, takes any strides, and is the only place where prefix and image
// become one matrix. Blocks of queries then run through scores = q k^T, softmax, scores v, all on one product that
// keeps its tile in registers. Tasks share nothing, so that the result does not depend on the number of threads.
#include "parallel.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

namespace ldm_sg {
namespace {

constexpr int64_t QUERIES = 32;  // of a block: 32 x 72 scores are 9 KiB
constexpr int64_t DEPTH = 128;   // of a product's sums at a time: 128 x 3 vectors are 12 KiB

using ldm_sg::larger;
using ldm_sg::smaller;
using ldm_sg::load;
using ldm_sg::store;

// Vectors of double, for gradients checked in float64.
inline VecD load(const double* p, int count = LANES) {
  VecD v{};
  std::memcpy(&v, p, count * sizeof(double));
  return v;
}
inline void store(double* p, VecD v, int count = LANES) { std::memcpy(p, &v, count * sizeof(double)); }
inline VecD larger(VecD a, VecD b) { return b > a ? b : a; }
inline VecD smaller(VecD a, VecD b) { return b < a ? b : a; }

// 2^v for v <= 127.
inline Vec exp2(Vec v) { return ldm_sg::exp2<1, 5>(larger(v, splat(-127.0f))); }
inline VecD exp2(VecD v) {
  for (int i = 0; i < LANES; ++i) v[i] = std::exp2(v[i]);
  return v;
}

// ln v for finite v > 0, else NaN: e ln 2 + ln m with m from sqrt(1/2) to sqrt(2), ln m = 2 atanh((m - 1) / (m + 1)).
inline Vec log(Vec v) {
  const VecI bits = std::bit_cast<VecI>(v), e = (bits - 0x3f3504f3) >> 23;
  const Vec m = std::bit_cast<Vec>(bits - (e << 23)), s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const Vec ln_m = s * (((0.29871049f * q + 0.3997757f) * q + 0.66666776f) * q + 2.0f);
  return __builtin_convertvector(e, Vec) * 0.693147181f + ln_m + (v - v);
}
inline VecD log(VecD v) {
  for (int i = 0; i < LANES; ++i) v[i] = std::log(v[i]);
  return v;
}

template <class T>
using VecOf = std::conditional_t<std::is_same_v<T, double>, VecD, Vec>;

// A row of a matrix is whole vectors, and not of a length at which every row would fall into the same cache sets.
template <class T>
struct Matrix {
  int64_t row;
  std::vector<T> values;
  Matrix(int64_t rows, int64_t columns) : row((columns + LANES - 1) / LANES * LANES) {
    if (row * sizeof(T) % 1024 == 0) row += LANES;
    values.resize(rows * row);
  }
  T* at(int64_t i) { return values.data() + i * row; }
};

// A factor and how far apart its rows and columns are.
template <class T>
struct Factor {
  const T* data;
  int64_t row, column;
  Factor from(int64_t i, int64_t k) const { return {data + i * row + k * column, row, column}; }
};

template <class T>
Factor<T> plain(Matrix<T>& m) {
  return {m.at(0), m.row, 1};
}
template <class T>
Factor<T> transposed(Matrix<T>& m) {
  return {m.at(0), 1, m.row};
}

// c[i, :] (+)= sum_k a[i, k] b[k, :] for R rows and C vectors of columns, the sums in registers.
template <int R, int C, class T>
inline void product_tile(Factor<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t depth, bool add) {
  VecOf<T> sums[R][C] = {};
  for (int64_t k = 0; k < depth; ++k, a.data += a.column, b += b_row) {
    VecOf<T> row[C];
    for (int j = 0; j < C; ++j) row[j] = load(b + j * LANES);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) sums[i][j] += a.data[i * a.row] * row[j];
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) {
      T* to = c + i * c_row + j * LANES;
      store(to, add ? load(to) + sums[i][j] : sums[i][j]);
    }
}

template <int C, class T>
void product_columns(Factor<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows, int64_t depth,
                     bool add) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) product_tile<4, C>(a.from(i, 0), b, b_row, c + i * c_row, c_row, depth, add);
  for (; i < rows; ++i) product_tile<1, C>(a.from(i, 0), b, b_row, c + i * c_row, c_row, depth, add);
}

// c (rows, columns) (+)= a (rows, depth) b (depth, columns), DEPTH at a time: that much of b stays in L1 for all rows,
// and long sums lose fewer digits.
template <class T>
void product(Factor<T> a, Matrix<T>& b, Matrix<T>& c, int64_t rows, int64_t depth, int64_t columns, bool add = false) {
  for (int64_t k = 0; k < depth; k += DEPTH, add = true)
    for (int64_t j = 0; j < columns;) {
      const int64_t vectors = (columns - j + LANES - 1) / LANES;
      const auto run = [&](auto count) {
        product_columns<count()>(a.from(0, k), b.at(k) + j, b.row, c.at(0) + j, c.row, rows,
                                 std::min(DEPTH, depth - k), add);
        j += count() * LANES;
      };
      if (vectors == 3 || vectors > 4) run(std::integral_constant<int, 3>{});
      else if (vectors >= 2) run(std::integral_constant<int, 2>{});
      else run(std::integral_constant<int, 1>{});
    }
}

// One head of a (B, rows, heads, width) tensor with any strides.
template <class E>
struct Rows {
  E* data;
  int64_t row, column;
};

// A (B, rows, heads, width) tensor, or a prefix that is not there.
template <class E>
struct Heads {
  E* data = nullptr;
  int64_t batch = 0, row = 0, head = 0, column = 0;

  explicit Heads(const Tensor& t)
      : data(static_cast<E*>(t.data_ptr())),
        batch(t.stride(0)), row(t.stride(1)), head(t.stride(2)), column(t.stride(3)) {}
  explicit Heads(const std::optional<Tensor>& t) {
    if (t) *this = Heads(*t);
  }
  Rows<E> of(int64_t b, int64_t h, int64_t first = 0) const {
    return {data + b * batch + h * head + first * row, row, column};
  }
};

// Row i with its columns side by side: where it lies, or copied to scratch.
template <class E>
inline const E* dense(const Rows<E>& x, int64_t i, int64_t width, std::vector<E>& scratch) {
  const E* from = x.data + i * x.row;
  if (x.column == 1) return from;
  scratch.resize(width);
  for (int64_t d = 0; d < width; ++d) scratch[d] = from[d * x.column];
  return scratch.data();
}

// to[first + i, :] = scale x[i, :]
template <class T, class E>
void pack(const Rows<E>& x, int64_t rows, int64_t width, T scale, Matrix<T>& to, int64_t first = 0) {
  std::vector<E> scratch;
  for (int64_t i = 0; i < rows; ++i) {
    const E* from = dense(x, i, width, scratch);
    T* row = to.at(first + i);
    for_vectors(width, [=](int64_t d, auto lanes) { store(row + d, scale * load(from + d, lanes)); });
  }
}

// x[i, :] = scales[i] from[first + i, :], x with its columns side by side; one scale for all where scale_step is 0
template <class T, class E>
void unpack(Matrix<T>& from, int64_t first, int64_t rows, int64_t width, const T* scales, int64_t scale_step,
            const Rows<E>& x) {
  for (int64_t i = 0; i < rows; ++i) {
    const T scale = scales[i * scale_step];
    const T* row = from.at(first + i);
    E* to = x.data + i * x.row;
    for_vectors(width, [=](int64_t d, auto lanes) { store(to + d, scale * load(row + d), lanes); });
  }
}

// A step of a transpose: lanes of a whose bit BIT is set trade places with those of b whose bit is not.
template <int BIT, class V, int... I>
inline void trade(V& a, V& b, std::integer_sequence<int, I...>) {
  const V first = lanes(a, b, std::integer_sequence<int, (I & BIT ? LANES + (I ^ BIT) : I)...>{});
  b = lanes(a, b, std::integer_sequence<int, (I & BIT ? LANES + I : I ^ BIT)...>{});
  a = first;
}

template <int BIT, class V>
inline void transpose_block(V (&rows)[LANES]) {
  if constexpr (BIT < LANES) {
    for (int i = 0; i < LANES; ++i)
      if (!(i & BIT)) trade<BIT>(rows[i], rows[i | BIT], AllLanes{});
    transpose_block<2 * BIT>(rows);
  }
}

// Rows as a factor: where they lie, or packed, which makes 16-bit types float.
template <class T, class E>
Factor<T> factor(const Rows<E>& x, int64_t rows, int64_t width, Matrix<T>& scratch) {
  if constexpr (std::is_same_v<T, E>) {
    return {x.data, x.row, x.column};
  } else {
    pack(x, rows, width, T(1), scratch);
    return plain(scratch);
  }
}

// to[:, first + i] = scale x[i, :], in whole vectors: what lies right of it is written later
template <class T, class E>
void pack_transposed(const Rows<E>& x, int64_t rows, int64_t width, T scale, Matrix<T>& to, int64_t first) {
  std::vector<E> scratch[LANES], zeros(width);
  for (int64_t i = 0; i < rows; i += LANES) {
    const E* from[LANES];
    for (int r = 0; r < LANES; ++r) from[r] = i + r < rows ? dense(x, i + r, width, scratch[r]) : zeros.data();
    for_vectors(width, [&](int64_t d, auto lanes) {
      VecOf<T> block[LANES];
      for (int r = 0; r < LANES; ++r) block[r] = scale * load(from[r] + d, lanes);
      transpose_block<1>(block);
      T* column = to.at(d) + first + i;
      for (int r = 0; r < lanes; ++r) store(column + r * to.row, block[r]);
    });
  }
}

struct Sizes {
  int64_t batch, queries, heads, width, prefix, keys;
  explicit Sizes(const Tensor& q, const std::optional<Tensor>& prefix_)
      : batch(q.size(0)), queries(q.size(1)), heads(q.size(2)), width(q.size(3)),
        prefix(prefix_ ? prefix_->size(1) : 0), keys(prefix + queries) {}
};

// Let the vector that holds the last key end with keys of no weight.
template <class T>
void close(T* scores, int64_t keys) {
  for (int64_t j = keys; j % LANES; ++j) scores[j] = -std::numeric_limits<T>::infinity();
}

// Lane i: all lanes of rows[i], joined by f in a tree.
template <int BIT = 1, class V, size_t N, class F>
V across(const V (&rows)[N], const F& f) {
  if constexpr (N == 1) return rows[0];
  else {
    V half[N / 2];
    for (size_t i = 0; i < N / 2; ++i) {
      V a = rows[2 * i], b = rows[2 * i + 1];
      trade<BIT>(a, b, AllLanes{});
      half[i] = f(a, b);
    }
    return across<2 * BIT>(half, f);
  }
}

// scores, times log2(e) -> 2^(scores - max), to be multiplied by `inverse`; lse = log-sum-exp of what was not times it.
template <class T>
void softmax(Matrix<T>& scores, int64_t rows, int64_t keys, T* inverse, T* lse) {
  for (int64_t i = 0; i < rows; i += LANES) {
    const int count = static_cast<int>(std::min<int64_t>(LANES, rows - i));
    VecOf<T> most[LANES], sums[LANES];
    for (int r = count; r < LANES; ++r) most[r] = sums[r] = VecOf<T>{};
    for (int r = 0; r < count; ++r) {
      T* row = scores.at(i + r);
      close(row, keys);
      VecOf<T> m = load(row);
      for (int64_t j = LANES; j < keys; j += LANES) m = larger(m, load(row + j));
      most[r] = m;
    }
    const VecOf<T> peak = across(most, [](auto a, auto b) { return larger(a, b); });
    for (int r = 0; r < count; ++r) {
      T* row = scores.at(i + r);
      const T top = peak[r];
      VecOf<T> sum{};
      for_wide<3>((keys + LANES - 1) / LANES * LANES, [&](int64_t j, auto vectors, auto) {
        constexpr int n = vectors;
        VecOf<T> e[n];
        for (int v = 0; v < n; ++v) e[v] = exp2(load(row + j + v * LANES) - top);
        for (int v = 0; v < n; ++v) store(row + j + v * LANES, e[v]), sum += e[v];
      });
      sums[r] = sum;
    }
    const VecOf<T> sum = across(sums, [](auto a, auto b) { return a + b; });
    store(inverse + i, 1 / sum);
    store(lse + i, peak / static_cast<T>(LOG2_E) + log(sum), count);
  }
}

// scores, times log2(e), and d_weights -> weights and d_scores = weights (d_weights - sum(weights d_weights))
template <class T>
void softmax_backward(Matrix<T>& scores, Matrix<T>& d_weights, int64_t rows, int64_t keys, const T* lse) {
  for (int64_t i = 0; i < rows; ++i) {
    T *row = scores.at(i), *d = d_weights.at(i);
    close(row, keys);
    const T log2_of_sum = lse[i] * static_cast<T>(LOG2_E);
    VecOf<T> sums{}, products{};
    for (int64_t j = 0; j < keys; j += LANES) {
      const VecOf<T> p = exp2(smaller(load(row + j) - log2_of_sum, VecOf<T>{} + 64));
      store(row + j, p);
      sums += p, products += p * load(d + j);
    }
    const T inverse = 1 / sum_of(sums), delta = sum_of(products) * inverse;  // the sum is 1 but for lse's rounding
    for (int64_t j = 0; j < keys; j += LANES) {
      const VecOf<T> p = load(row + j) * inverse;
      store(row + j, p), store(d + j, p * (load(d + j) - delta));
    }
  }
}

template <class E, class T>
void forward_tasks(int64_t begin, int64_t end, const Sizes& n, const Heads<E>& q, const Heads<E>& k,
                   const Heads<E>& v, const Heads<E>& k_prefix, const Heads<E>& v_prefix, T scale,
                   const Heads<E>& out, T* lse) {
  Matrix<T> keys(n.width, n.keys + LANES), values(n.keys, n.width), queries(QUERIES, n.width);
  Matrix<T> scores(QUERIES, n.keys), result(QUERIES, n.width);
  static_assert(QUERIES % LANES == 0);
  T inverse[QUERIES];
  const T log2_e = static_cast<T>(LOG2_E);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / n.heads, h = task % n.heads;
    pack_transposed(k_prefix.of(b, h), n.prefix, n.width, scale * log2_e, keys, 0);
    pack_transposed(k.of(b, h), n.queries, n.width, scale * log2_e, keys, n.prefix);
    pack(v_prefix.of(b, h), n.prefix, n.width, T(1), values);
    pack(v.of(b, h), n.queries, n.width, T(1), values, n.prefix);
    for (int64_t first = 0; first < n.queries; first += QUERIES) {
      const int64_t rows = std::min(QUERIES, n.queries - first);
      product(factor(q.of(b, h, first), rows, n.width, queries), keys, scores, rows, n.width, n.keys);
      softmax(scores, rows, n.keys, inverse, lse + task * n.queries + first);
      product(plain(scores), values, result, rows, n.keys, n.width);
      unpack(result, 0, rows, n.width, inverse, 1, out.of(b, h, first));
    }
  }
}

template <class E>
struct Gradients {
  Heads<E> q, k, v, k_prefix, v_prefix;
};

template <class E, class T>
void backward_tasks(int64_t begin, int64_t end, const Sizes& n, const Heads<E>& d, const Heads<E>& q,
                    const Heads<E>& k, const Heads<E>& v, const Heads<E>& k_prefix, const Heads<E>& v_prefix,
                    const T* lse, T scale, const Gradients<E>& to) {
  Matrix<T> keys_t(n.width, n.keys + LANES), values_t(keys_t), keys(n.keys, n.width), d_keys(keys), d_values(keys);
  Matrix<T> queries(QUERIES, n.width), d_out(queries), d_queries(queries);
  Matrix<T> weights(QUERIES, n.keys), d_scores(weights);
  const T one = 1, log2_e = static_cast<T>(LOG2_E);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / n.heads, h = task % n.heads;
    pack_transposed(k_prefix.of(b, h), n.prefix, n.width, scale * log2_e, keys_t, 0);  // as in the forward, to the bit
    pack_transposed(k.of(b, h), n.queries, n.width, scale * log2_e, keys_t, n.prefix);
    pack_transposed(v_prefix.of(b, h), n.prefix, n.width, one, values_t, 0);
    pack_transposed(v.of(b, h), n.queries, n.width, one, values_t, n.prefix);
    pack(k_prefix.of(b, h), n.prefix, n.width, one, keys);
    pack(k.of(b, h), n.queries, n.width, one, keys, n.prefix);
    for (int64_t first = 0; first < n.queries; first += QUERIES) {
      const int64_t rows = std::min(QUERIES, n.queries - first);
      pack(q.of(b, h, first), rows, n.width, one, queries);
      pack(d.of(b, h, first), rows, n.width, one, d_out);
      product(plain(queries), keys_t, weights, rows, n.width, n.keys);
      product(plain(d_out), values_t, d_scores, rows, n.width, n.keys);
      softmax_backward(weights, d_scores, rows, n.keys, lse + task * n.queries + first);
      product(plain(d_scores), keys, d_queries, rows, n.keys, n.width);
      product(transposed(d_scores), queries, d_keys, n.keys, rows, n.width, first > 0);
      product(transposed(weights), d_out, d_values, n.keys, rows, n.width, first > 0);
      unpack(d_queries, 0, rows, n.width, &scale, 0, to.q.of(b, h, first));
    }
    unpack(d_keys, 0, n.prefix, n.width, &scale, 0, to.k_prefix.of(b, h));
    unpack(d_values, 0, n.prefix, n.width, &one, 0, to.v_prefix.of(b, h));
    unpack(d_keys, n.prefix, n.queries, n.width, &scale, 0, to.k.of(b, h));
    unpack(d_values, n.prefix, n.queries, n.width, &one, 0, to.v.of(b, h));
  }
}

// Call f(E{}, T{}) with the C++ types of a dtype and of its computation.
template <class F>
void with_types(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) return f(double{}, double{});
  with_type(dtype, [&](auto element) { f(element, float{}); });
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> k_prefix,
                                   std::optional<Tensor> v_prefix, double scale) {
  const Sizes n(q, k_prefix);
  const ScalarType dtype = q.scalar_type();
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  Tensor out = empty(std::array{n.batch, n.queries, n.heads, n.width}, dtype);
  Tensor lse = empty(std::array{n.batch, n.heads, n.queries}, wide);
  with_types(dtype, [&]<class E, class T>(E, T) {
    const Heads<E> queries(q), keys(k), values(v), prefix_keys(k_prefix), prefix_values(v_prefix), result(out);
    T* sums = mutable_data<T>(lse);
    torch::stable::parallel_for(0, n.batch * n.heads, 1, [&](int64_t begin, int64_t end) {
      forward_tasks<E, T>(begin, end, n, queries, keys, values, prefix_keys, prefix_values, scale, result, sums);
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor d_out, Tensor q, Tensor k, Tensor v,
                                                            std::optional<Tensor> k_prefix,
                                                            std::optional<Tensor> v_prefix, Tensor out, Tensor lse,
                                                            double scale) {
  const Sizes n(q, k_prefix);
  const auto of_rows = [&](int64_t rows) {
    return empty(std::array{n.batch, rows, n.heads, n.width}, q.scalar_type());
  };
  Tensor dq = of_rows(n.queries), dk = of_rows(n.queries), dv = of_rows(n.queries);
  Tensor dk_prefix = of_rows(n.prefix), dv_prefix = of_rows(n.prefix);
  with_types(q.scalar_type(), [&]<class E, class T>(E, T) {
    const Heads<E> d(d_out), queries(q), keys(k), values(v), prefix_keys(k_prefix), prefix_values(v_prefix);
    const Gradients<E> to{Heads<E>(dq), Heads<E>(dk), Heads<E>(dv), Heads<E>(dk_prefix), Heads<E>(dv_prefix)};
    const T* sums = data<T>(lse);
    torch::stable::parallel_for(0, n.batch * n.heads, 1, [&](int64_t begin, int64_t end) {
      backward_tasks<E, T>(begin, end, n, d, queries, keys, values, prefix_keys, prefix_values, sums, scale, to);
    });
  });
  return {dq, dk, dv, dk_prefix, dv_prefix};
}

}  // namespace
}  // namespace ldm_sg

STABLE_TORCH_LIBRARY_IMPL(ldm_sg, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&ldm_sg::forward));
  m.impl("prefix_attention_backward", TORCH_BOX(&ldm_sg::backward));
}

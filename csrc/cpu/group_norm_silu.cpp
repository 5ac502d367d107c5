// group_norm_silu on the CPU: y = silu((x - mean) rstd w (1 + s) + b (1 + s) + t), s and t per sample and channel.
//
// A task is one sample and a run of whole groups; its part of x is read once from memory, then from the cache. Tasks
// share nothing, so that the result does not depend on the number of threads or on how groups are dealt to them.
// Within a task both memory layouts are blocks of rows whose columns carry their own constants: channels-last gives one
// block of (pixels, channels), contiguous one per channel of (pixels / FOLD, FOLD).
#include "parallel.h"

#include <algorithm>
#include <cmath>

namespace ldm_sg {
namespace {

constexpr int FOLD = 4 * LANES;
constexpr int CHUNK = 32;  // rows summed in float before they join a double

struct Shape {
  int64_t batch, channels, pixels, groups;
  bool channels_last;
  int64_t width() const { return channels / groups; }
};

struct Block {
  int64_t offset, rows, stride, columns;
};

// Per-column constants of a block, from per-channel ones; `channel` is counted from the task's first.
struct Columns {
  const float* values[4];
  float folded[4][FOLD];

  Columns(bool channels_last, int64_t channel, std::initializer_list<const float*> per_channel) {
    int i = 0;
    for (const float* p : per_channel) {
      if (!channels_last) std::fill_n(folded[i], FOLD, p[channel]);
      values[i] = channels_last ? p : folded[i];
      ++i;
    }
  }
};

// Per-channel numbers, padded so that whole vectors may be read at any channel.
using Numbers = std::vector<float>;
Numbers numbers(int64_t count) { return Numbers(count + LANES); }

// Call f(block, channel) for the blocks that make up channels [first, first + count) of a sample.
template <class F>
void for_blocks(const Shape& shape, int64_t first, int64_t count, const F& f) {
  if (shape.channels_last) return f(Block{first, shape.pixels, shape.channels, count}, 0);
  const int64_t full = shape.pixels / FOLD, rest = shape.pixels % FOLD;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t offset = (first + c) * shape.pixels;
    if (full) f(Block{offset, full, FOLD, FOLD}, c);
    if (rest) f(Block{offset + full * FOLD, 1, FOLD, rest}, c);
  }
}

// Call f(column, lanes) along a row.
template <class F>
inline void for_vectors(int64_t columns, const F& f) {
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) f(c, LANES);
  if (c < columns) f(c, static_cast<int>(columns - c));
}

inline void add(double* total, Vec v, int lanes) {
  for (int i = 0; i < lanes; ++i) total[i] += v[i];
}

// Add each column's sum of x - shift and of its square.
template <class T>
void moments(const T* x, const Block& k, const float* shift, double* s1, double* s2) {
  for (int64_t row = 0; row < k.rows; row += CHUNK) {
    const int64_t end = std::min(k.rows, row + CHUNK);
    for_vectors(k.columns, [&](int64_t c, int lanes) {
      const Vec centre = load(shift + c);
      Vec first{}, second{};
      for (int64_t r = row; r < end; ++r) {
        const Vec d = load(x + r * k.stride + c, lanes) - centre;
        first += d;
        second += d * d;
      }
      add(s1 + c, first, lanes);
      add(s2 + c, second, lanes);
    });
  }
}

template <class T, bool SILU>
void apply(const T* x, T* y, const Block& k, const Columns& of) {
  const auto [mean, gain, offset, _] = of.values;
  for (int64_t r = 0; r < k.rows; ++r) {
    for_vectors(k.columns, [&](int64_t c, int lanes) {
      const int64_t i = r * k.stride + c;
      const Vec z = (load(x + i, lanes) - load(mean + c)) * load(gain + c) + load(offset + c);
      store(y + i, SILU ? z * sigmoid(z) : z, lanes);
    });
  }
}

// Each channel's sums over its pixels.
struct Sums {
  std::vector<double> first, second;
  explicit Sums(int64_t count) : first(count + LANES), second(count + LANES) {}
};

// Call f(block, channel, s1, s2), which adds to sums per column; for contiguous tensors join them to the channel's.
template <class F>
void sum_columns(const Shape& shape, int64_t first, int64_t count, Sums& sums, const F& f) {
  for_blocks(shape, first, count, [&](const Block& k, int64_t channel) {
    if (shape.channels_last) return f(k, channel, sums.first.data(), sums.second.data());
    double s1[FOLD] = {}, s2[FOLD] = {};
    f(k, channel, s1, s2);
    for (int i = 0; i < k.columns; ++i) sums.first[channel] += s1[i], sums.second[channel] += s2[i];
  });
}

// Mean and 1 / sqrt(variance + eps) of the task's groups: channels' moments about a value of their own, joined.
template <class T>
void statistics(const Shape& shape, const T* x, int64_t first, int64_t count, float eps, float* mean, float* rstd) {
  const int64_t width = shape.width(), pixels = shape.pixels;
  Numbers shift = numbers(count);
  for (int64_t c = 0; c < count; ++c) {
    shift[c] = load(x + (first + c) * (shape.channels_last ? 1 : pixels), 1)[0];
  }
  Sums sums(count);
  sum_columns(shape, first, count, sums, [&](const Block& k, int64_t channel, double* s1, double* s2) {
    const Columns of(shape.channels_last, channel, {shift.data()});
    moments(x + k.offset, k, of.values[0], s1, s2);
  });
  for (int64_t g = 0; g * width < count; ++g) {
    double centre = 0, square = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) centre += shift[c] + sums.first[c] / pixels;
    centre /= width;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double apart = shift[c] + sums.first[c] / pixels - centre;
      square += sums.second[c] - sums.first[c] * sums.first[c] / pixels + pixels * apart * apart;
    }
    mean[g] = static_cast<float>(centre);
    rstd[g] = static_cast<float>(1 / std::sqrt(std::max(0.0, square) / (width * pixels) + eps));
  }
}

// A small tensor as rows of floats; absent ones stand for `otherwise`.
class Floats {
 public:
  Floats(const std::optional<Tensor>& t, float otherwise) {
    if (!t) {
      value_ = otherwise;
      return;
    }
    columns_ = t->size(t->dim() - 1);
    const int64_t rows = t->dim() == 2 ? t->size(0) : 1, stride = t->dim() == 2 ? t->stride(0) : 0;
    STD_TORCH_CHECK(columns_ <= 1 || t->stride(t->dim() - 1) == 1, "expected weights and modulation dense in channels");
    copy_.resize(rows * columns_);
    with_type(t->scalar_type(), [&](auto type) {
      const auto* from = data<decltype(type)>(*t);
      for (int64_t r = 0; r < rows; ++r) {
        for_vectors(columns_, [&](int64_t c, int lanes) {
          store(copy_.data() + r * columns_ + c, load(from + r * stride + c, lanes), lanes);
        });
      }
    });
  }
  float operator()(int64_t row, int64_t column) const {
    return copy_.empty() ? value_ : copy_[row * columns_ + column];
  }

 private:
  std::vector<float> copy_;
  int64_t columns_ = 0;
  float value_ = 0;
};

struct Affine {
  Floats weight, bias, scale, shift;
  Affine(const std::optional<Tensor>& w, const std::optional<Tensor>& b, const std::optional<Tensor>& s,
         const std::optional<Tensor>& t)
      : weight(w, 1), bias(b, 0), scale(s, 0), shift(t, 0) {}
  float gain(int64_t n, int64_t c) const { return weight(0, c) * (1 + scale(n, c)); }
  float offset(int64_t n, int64_t c) const { return bias(0, c) * (1 + scale(n, c)) + shift(n, c); }
};

bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

Shape shape_of(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4, "expected x of (B, C, H, W)");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "expected groups to divide the channels");
  const bool last = is_channels_last(x);
  STD_TORCH_CHECK(last || x.is_contiguous(), "expected x contiguous or channels-last");
  return {x.size(0), x.size(1), x.size(2) * x.size(3), groups, last};
}

// Call f(sample, first group, count of groups), in as many tasks as keep the threads busy.
template <class F>
void for_tasks(const Shape& shape, const F& f) {
  if (shape.batch * shape.channels * shape.pixels == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t line = std::max<int64_t>(1, 32 / shape.width());  // groups that fill two cache lines
  const int64_t most = shape.channels_last ? (shape.groups + line - 1) / line : shape.groups;
  const int64_t parts = std::min(most, (threads + shape.batch - 1) / shape.batch);
  parallel_rows(shape.batch * parts, [&](int64_t task) {
    const int64_t part = task % parts;
    const int64_t begin = part * shape.groups / parts, end = (part + 1) * shape.groups / parts;
    f(task / parts, begin, end - begin);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t groups, double eps, bool silu) {
  const Shape shape = shape_of(x, groups);
  const Affine affine(weight, bias, scale, shift);
  Tensor y = torch::stable::empty_like(x);
  const std::vector<int64_t> size = {shape.batch, groups};
  Tensor mean = torch::stable::new_empty(x, size, ScalarType::Float), rstd = torch::stable::empty_like(mean);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_tasks(shape, [&](int64_t n, int64_t first_group, int64_t count_groups) {
      const int64_t slab = n * shape.channels * shape.pixels, width = shape.width();
      const int64_t first = first_group * width, count = count_groups * width;
      float* means = mutable_data<float>(mean) + n * groups + first_group;
      float* rstds = mutable_data<float>(rstd) + n * groups + first_group;
      statistics(shape, data<T>(x) + slab, first, count, static_cast<float>(eps), means, rstds);
      Numbers centre = numbers(count), gain = numbers(count), offset = numbers(count);
      for (int64_t c = 0; c < count; ++c) {
        centre[c] = means[c / width];
        gain[c] = rstds[c / width] * affine.gain(n, first + c);
        offset[c] = affine.offset(n, first + c);
      }
      for_blocks(shape, first, count, [&](const Block& k, int64_t channel) {
        const Columns of(shape.channels_last, channel, {centre.data(), gain.data(), offset.data()});
        const T* from = data<T>(x) + slab + k.offset;
        T* to = mutable_data<T>(y) + slab + k.offset;
        silu ? apply<T, true>(from, to, k, of) : apply<T, false>(from, to, k, of);
      });
    });
  });
  return {y, mean, rstd};
}

STABLE_TORCH_LIBRARY_IMPL(ldm_sg, CPU, m) { m.impl("group_norm_silu", TORCH_BOX(&forward)); }

}  // namespace
}  // namespace ldm_sg

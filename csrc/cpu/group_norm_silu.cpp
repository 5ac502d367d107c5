// group_norm_silu on the CPU: y = silu((x - mean) rstd w (1 + s) + b (1 + s) + t), s and t per sample and channel.
//
// A task is one sample and a run of whole groups; its part of x is read once from memory, then from the cache. Tasks
// share nothing, so that the result does not depend on the number of threads or on how groups are dealt to them.
// Within a task both memory layouts are blocks of rows whose columns carry their own constants: channels-last gives one
// block of (pixels, channels), contiguous one per channel of (pixels / FOLD, FOLD).
#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

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

[[gnu::always_inline]] inline void add(double* total, Vec v, int lanes) {
  if (lanes == LANES) {
    VecD sums;
    std::memcpy(&sums, total, sizeof sums);
    sums += __builtin_convertvector(v, VecD);
    std::memcpy(total, &sums, sizeof sums);
  } else {
    for (int i = 0; i < lanes; ++i) total[i] += v[i];
  }
}

// Call f(row, rows, column, N vectors, lanes) along a block: by at most CHUNK rows, and by N vectors while they last.
template <int N, class F>
[[gnu::always_inline]] inline void for_chunks(const Block& k, const F& f) {
  for (int64_t row = 0; row < k.rows; row += CHUNK) {
    const int64_t rows = std::min<int64_t>(CHUNK, k.rows - row);
    int64_t c = 0;
    for (; c + N * LANES <= k.columns; c += N * LANES) f(row, rows, c, std::integral_constant<int, N>{}, Full{});
    for_vectors(k.columns - c, [&](int64_t i, auto lanes) {
      f(row, rows, c + i, std::integral_constant<int, 1>{}, lanes);
    });
  }
}

// Add each column's sum of x - shift and of its square.
template <class T>
void moments(const T* x, const Block& k, const float* shift, double* s1, double* s2) {
  for_chunks<4>(k, [=, stride = k.stride](int64_t row, int64_t rows, int64_t c, auto vectors, auto lanes) {
    constexpr int n = vectors;
    Vec centre[n], first[n] = {}, second[n] = {};
    for (int i = 0; i < n; ++i) centre[i] = load(shift + c + i * LANES);
    for (int64_t r = row; r < row + rows; ++r) {
      for (int i = 0; i < n; ++i) {
        const Vec d = load(x + r * stride + c + i * LANES, lanes) - centre[i];
        first[i] += d;
        second[i] += d * d;
      }
    }
    for (int i = 0; i < n; ++i) {
      add(s1 + c + i * LANES, first[i], lanes);
      add(s2 + c + i * LANES, second[i], lanes);
    }
  });
}

template <class T, bool SILU>
void apply(const T* x, T* y, const Block& k, const Columns& of) {
  const auto [mean, gain, offset, _] = of.values;
  for (int64_t r = 0; r < k.rows; ++r) {
    for_vectors(k.columns, [=, row = r * k.stride](int64_t c, auto lanes) {
      const int64_t i = row + c;
      const Vec z = (load(x + i, lanes) - load(mean + c)) * load(gain + c) + load(offset + c);
      store(y + i, SILU ? silu(z) : z, lanes);
    });
  }
}

// z of the forward again, dz = dy silu'(z) kept, and each column's sums of dz and dz xhat added.
template <class T, bool SILU>
void grad_sums(const T* x, const T* dy, float* dz, int64_t dz_stride, const Block& k, const Columns& of, double* s1,
               double* s2) {
  const auto [means, rstds, gains, offsets] = of.values;
  for_chunks<2>(k, [=, stride = k.stride](int64_t row, int64_t rows, int64_t c, auto vectors, auto lanes) {
    constexpr int n = vectors;
    Vec first[n] = {}, second[n] = {};
    for (int64_t r = row; r < row + rows; ++r) {
      for (int i = 0; i < n; ++i) {
        const int64_t at = c + i * LANES;
        const Vec xhat = (load(x + r * stride + at, lanes) - load(means + at)) * load(rstds + at);
        Vec d = load(dy + r * stride + at, lanes);
        if constexpr (SILU) {
          const Vec z = xhat * load(gains + at) + load(offsets + at), s = sigmoid(z);
          d *= s + z * s * (1.0f - s);
        }
        store(dz + r * dz_stride + at, d, lanes);
        first[i] += d;
        second[i] += d * xhat;
      }
    }
    for (int i = 0; i < n; ++i) {
      add(s1 + c + i * LANES, first[i], lanes);
      add(s2 + c + i * LANES, second[i], lanes);
    }
  });
}

// dx = rstd (gain dz - mean(gain dz) - xhat mean(gain dz xhat)), its factors per column; dz may be dx.
template <class T>
void grad_apply(const T* x, const float* dz, int64_t dz_stride, T* dx, const Block& k, const Columns& of) {
  const auto [mean, of_dz, constant, of_x] = of.values;
  for (int64_t r = 0; r < k.rows; ++r) {
    for_vectors(k.columns, [=, row = r * k.stride, dz_row = r * dz_stride](int64_t c, auto lanes) {
      const int64_t i = row + c;
      const Vec centred = load(x + i, lanes) - load(mean + c);
      const Vec d = load(dz + dz_row + c, lanes);
      store(dx + i, d * load(of_dz + c) - load(constant + c) - centred * load(of_x + c), lanes);
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

struct Statistics {
  std::vector<double> mean, rstd;  // per group of the task
};

// Mean and 1 / sqrt(variance + eps) of the task's groups: channels' moments about a value of their own, joined.
template <class T>
Statistics statistics(const Shape& shape, const T* x, int64_t first, int64_t count, double eps) {
  const int64_t width = shape.width(), pixels = shape.pixels;
  Numbers shift = numbers(count);
  for (int64_t c = 0; c < count && pixels; ++c) {
    shift[c] = load(x + (first + c) * (shape.channels_last ? 1 : pixels), 1)[0];
  }
  Sums sums(count);
  sum_columns(shape, first, count, sums, [&](const Block& k, int64_t channel, double* s1, double* s2) {
    const Columns of(shape.channels_last, channel, {shift.data()});
    moments(x + k.offset, k, of.values[0], s1, s2);
  });
  const double per = 1.0 / static_cast<double>(pixels);
  Statistics found;
  for (int64_t begin = 0; begin < count; begin += width) {
    double mean = 0, square = 0;
    for (int64_t c = begin; c < begin + width; ++c) mean += shift[c] + sums.first[c] * per;
    mean /= width;
    for (int64_t c = begin; c < begin + width; ++c) {
      const double apart = shift[c] + sums.first[c] * per - mean;
      square += sums.second[c] - sums.first[c] * sums.first[c] * per + pixels * apart * apart;
    }
    found.mean.push_back(mean);
    found.rstd.push_back(1 / std::sqrt((square < 0 ? 0 : square) / (width * pixels) + eps));
  }
  return found;
}

// A small tensor of (columns,) or (rows, columns) as floats; 0 everywhere where it is absent.
class Floats {
 public:
  Floats(const std::optional<Tensor>& t, int64_t rows, int64_t columns) : columns_(columns) {
    if (!t) return;
    const bool is_row = t->dim() == 1;
    STD_TORCH_CHECK(is_row ? rows == 1 : t->dim() == 2 && t->size(0) == rows, "expected a modulation of (B, C)");
    STD_TORCH_CHECK(t->size(t->dim() - 1) == columns, "expected one value per channel");
    STD_TORCH_CHECK(columns <= 1 || t->stride(t->dim() - 1) == 1, "expected channels side by side");
    copy_.resize(rows * columns);
    with_type(t->scalar_type(), [&](auto type) {
      const auto* from = data<decltype(type)>(*t);
      for (int64_t r = 0; r < rows; ++r) {
        for_vectors(columns, [&](int64_t c, auto lanes) {
          store(copy_.data() + r * columns + c, load(from + (is_row ? 0 : r * t->stride(0)) + c, lanes), lanes);
        });
      }
    });
  }
  double operator()(int64_t row, int64_t column) const { return copy_.empty() ? 0 : copy_[row * columns_ + column]; }

 private:
  int64_t columns_;
  std::vector<float> copy_;
};

// z = xhat gain + offset, per sample and channel.
struct Affine {
  Floats weight, bias, scale, shift;
  Affine(const Shape& shape, const Tensor& w, const Tensor& b, const std::optional<Tensor>& s,
         const std::optional<Tensor>& t)
      : weight(w, 1, shape.channels),
        bias(b, 1, shape.channels),
        scale(s, shape.batch, shape.channels),
        shift(t, shape.batch, shape.channels) {}
  double gain(int64_t n, int64_t c) const { return weight(0, c) * (1 + scale(n, c)); }
  double offset(int64_t n, int64_t c) const { return bias(0, c) * (1 + scale(n, c)) + shift(n, c); }
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
  if (shape.batch * shape.channels == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t line = std::max<int64_t>(1, 32 / shape.width());  // groups that fill two cache lines
  const int64_t most = shape.channels_last ? (shape.groups + line - 1) / line : shape.groups;
  const int64_t parts = std::min(most, (threads + shape.batch - 1) / shape.batch);
  parallel_rows(shape.batch * parts, shape.channels * shape.pixels / parts, [&](int64_t task) {
    const int64_t part = task % parts;
    const int64_t begin = part * shape.groups / parts, end = (part + 1) * shape.groups / parts;
    f(task / parts, begin, end - begin);
  });
}

// One task of the forward; means and rstds point at its first group.
template <class T>
void forward_task(const Shape& shape, const T* x, T* y, int64_t n, int64_t first, int64_t count, const Affine& affine,
                  float* means, float* rstds, double eps, bool silu) {
  const Statistics found = statistics(shape, x, first, count, eps);
  std::copy(found.mean.begin(), found.mean.end(), means);
  std::copy(found.rstd.begin(), found.rstd.end(), rstds);
  Numbers mean = numbers(count), gain = numbers(count), offset = numbers(count);
  for (int64_t g = 0, c = 0; c < count; ++g) {
    for (const int64_t end = c + shape.width(); c < end; ++c) {
      const double factor = found.rstd[g] * affine.gain(n, first + c);
      mean[c] = means[g];
      gain[c] = static_cast<float>(factor);
      offset[c] = static_cast<float>(affine.offset(n, first + c) + (means[g] - found.mean[g]) * factor);
    }
  }
  for_blocks(shape, first, count, [&](const Block& k, int64_t channel) {
    const Columns of(shape.channels_last, channel, {mean.data(), gain.data(), offset.data()});
    const auto run = silu ? apply<T, true> : apply<T, false>;
    run(x + k.offset, y + k.offset, k, of);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t groups, double eps, bool silu) {
  const Shape shape = shape_of(x, groups);
  const Affine affine(shape, weight, bias, scale, shift);
  Tensor y = torch::stable::empty_like(x);
  const std::vector<int64_t> size = {shape.batch, groups};
  Tensor mean = torch::stable::new_empty(x, size, ScalarType::Float), rstd = torch::stable::empty_like(mean);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_tasks(shape, [&](int64_t n, int64_t first_group, int64_t count_groups) {
      const int64_t slab = n * shape.channels * shape.pixels, first = first_group * shape.width();
      const int64_t group = n * groups + first_group;
      forward_task<T>(shape, data<T>(x) + slab, mutable_data<T>(y) + slab, n, first, count_groups * shape.width(),
                      affine, mutable_data<float>(mean) + group, mutable_data<float>(rstd) + group, eps, silu);
    });
  });
  return {y, mean, rstd};
}

// The gradients of one task; s1, s2, means and rstds point at its first channel and group.
template <class T>
void backward_task(const Shape& shape, const T* dy, const T* x, T* dx, int64_t n, int64_t first, int64_t count,
                   const Affine& affine, const float* means, const float* rstds, float* s1, float* s2, bool silu) {
  const int64_t width = shape.width(), pixels = shape.pixels;
  Numbers mean = numbers(count), rstd = numbers(count), gain = numbers(count), offset = numbers(count);
  for (int64_t g = 0, c = 0; c < count; ++g) {
    for (const int64_t end = c + width; c < end; ++c) {
      mean[c] = means[g], rstd[c] = rstds[g];
      gain[c] = static_cast<float>(affine.gain(n, first + c));
      offset[c] = static_cast<float>(affine.offset(n, first + c));
    }
  }
  std::vector<float> kept(std::is_same_v<T, float> ? 0 : count * pixels);  // float32 needs none: dz lies in dx
  const int64_t kept_stride = std::is_same_v<T, float> && shape.channels_last ? shape.channels
                              : shape.channels_last                          ? count
                                                                             : FOLD;
  const auto dz = [&](const Block& k) {
    if constexpr (std::is_same_v<T, float>) return dx + k.offset;
    else return kept.data() + (shape.channels_last ? 0 : k.offset - first * pixels);
  };
  Sums sums(count);
  sum_columns(shape, first, count, sums, [&](const Block& k, int64_t channel, double* first_sum, double* second_sum) {
    const Columns of(shape.channels_last, channel, {mean.data(), rstd.data(), gain.data(), offset.data()});
    const auto run = silu ? grad_sums<T, true> : grad_sums<T, false>;
    run(x + k.offset, dy + k.offset, dz(k), kept_stride, k, of, first_sum, second_sum);
  });
  Numbers of_dz = numbers(count), constant = numbers(count), of_x = numbers(count);
  for (int64_t g = 0; g * width < count; ++g) {
    double m1 = 0, m2 = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      s1[c] = static_cast<float>(sums.first[c]), s2[c] = static_cast<float>(sums.second[c]);
      m1 += gain[c] * sums.first[c], m2 += gain[c] * sums.second[c];
    }
    const double scale = rstds[g] / static_cast<double>(width * pixels);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      of_dz[c] = gain[c] * rstds[g];
      constant[c] = static_cast<float>(m1 * scale), of_x[c] = static_cast<float>(m2 * scale * rstds[g]);
    }
  }
  for_blocks(shape, first, count, [&](const Block& k, int64_t channel) {
    const Columns of(shape.channels_last, channel, {mean.data(), of_dz.data(), constant.data(), of_x.data()});
    grad_apply<T>(x + k.offset, dz(k), kept_stride, dx + k.offset, k, of);
  });
}

// The gradient of x, and s1 = sum of dz, s2 = sum of dz xhat over each sample's and channel's pixels.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t groups, bool silu) {
  const Shape shape = shape_of(x, groups);
  STD_TORCH_CHECK(is_channels_last(dy) == shape.channels_last && (shape.channels_last || dy.is_contiguous()),
                  "expected dy in the layout of x");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "expected dy in the dtype of x");
  const Affine affine(shape, weight, bias, scale, shift);
  Tensor dx = torch::stable::empty_like(x);
  const std::vector<int64_t> size = {shape.batch, shape.channels};
  Tensor s1 = torch::stable::new_empty(x, size, ScalarType::Float), s2 = torch::stable::empty_like(s1);
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_tasks(shape, [&](int64_t n, int64_t first_group, int64_t count_groups) {
      const int64_t slab = n * shape.channels * shape.pixels, first = first_group * shape.width();
      const int64_t group = n * groups + first_group, channel = n * shape.channels + first;
      backward_task<T>(shape, data<T>(dy) + slab, data<T>(x) + slab, mutable_data<T>(dx) + slab, n, first,
                       count_groups * shape.width(), affine, data<float>(mean) + group, data<float>(rstd) + group,
                       mutable_data<float>(s1) + channel, mutable_data<float>(s2) + channel, silu);
    });
  });
  return {dx, s1, s2};
}

STABLE_TORCH_LIBRARY_IMPL(ldm_sg, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&forward));
  m.impl("group_norm_silu_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace ldm_sg

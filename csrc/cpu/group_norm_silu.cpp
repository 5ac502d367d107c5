// group_norm_silu on the CPU: y = silu((x - mean) rstd w (1 + s) + b (1 + s) + t), s and t per sample and channel.
//
// A task's part of x is read once from memory, then from the cache; columns.h has tasks and columns.
#include "columns.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace ldm_sg {
namespace {

// Add each column's sum of x - shift and of its square.
template <class T>
void moments(const T* x, const Block& k, const float* shift, float* s1, float* s2) {
  for_chunks<4>(k, [=, stride = k.stride](int64_t row, int64_t rows, int64_t c, auto vectors, auto lanes) {
    constexpr int n = vectors;
    Vec centre[n], first[n] = {}, second[n] = {};
    for (int i = 0; i < n; ++i) centre[i] = load(shift + c + i * LANES);
    for (int64_t r = row; r < row + rows; ++r) {
      Vecs<n> d = load_wide<n>(x + r * stride + c, lanes);
      for (int i = 0; i < n; ++i) {
        d[i] -= centre[i];
        first[i] += d[i];
        second[i] += d[i] * d[i];
      }
    }
    for (int i = 0; i < n; ++i) {
      add(s1 + c + i * LANES, first[i], lanes);
      add(s2 + c + i * LANES, second[i], lanes);
    }
  });
}

enum class Silu { NONE, WITHIN, CLAMPED };  // WITHIN: |u| <= 126 is known

// z = gain x + offset, or silu(u / log2(e)) of u = gain x + offset. What lies `next` further on than x, the next task's
// part, comes into the cache meanwhile: its moments would take as long to compute as to fetch.
template <class T, Silu SILU>
void apply(const T* x, T* y, const Block& k, const Columns& of, int64_t next) {
  const float *gain = of.values[0], *offset = of.values[1];
  for (int64_t r = 0; r < k.rows; ++r) {
    for_wide<4>(k.columns, [=, row = r * k.stride](int64_t c, auto vectors, auto lanes) {
      constexpr int n = vectors;
      for (size_t i = 0; i < n * LANES; i += 64 / sizeof(T)) __builtin_prefetch(x + row + c + i + next, 0, 2);
      Vecs<n> u = load_wide<n>(x + row + c, lanes);
      for (int64_t i = 0, at = c; i < n; ++i, at += LANES) u[i] = u[i] * load(gain + at) + load(offset + at);
      for (int i = 0; i < n && SILU != Silu::NONE; ++i) {
        u[i] /= log2e_over_sigmoid<T>(SILU == Silu::CLAMPED ? clamped(u[i]) : u[i]);
      }
      store_wide<n>(y + row + c, u, lanes);
    });
  }
}

// u of the forward again, dz = dy silu'(z) kept, and each column's sums of dz and dz (x - mean) added.
template <class T, bool SILU>
void grad_sums(const T* x, const T* dy, float* dz, int64_t dz_stride, const Block& k, const Columns& of, float* s1,
               float* s2) {
  const float *means = of.values[0], *gains = of.values[1], *offsets = of.values[2];
  for_chunks<2>(k, [=, stride = k.stride](int64_t row, int64_t rows, int64_t c, auto vectors, auto lanes) {
    constexpr int n = vectors;
    Vec first[n] = {}, second[n] = {};
    for (int64_t r = row; r < row + rows; ++r) {
      Vecs<n> xs = load_wide<n>(x + r * stride + c, lanes), dys = load_wide<n>(dy + r * stride + c, lanes);
      for (int i = 0; i < n; ++i) {
        const int64_t at = c + i * LANES;
        const Vec centred = xs[i] - load(means + at);
        Vec d = dys[i];
        if constexpr (SILU) {  // silu'(z) = s (1 + z (1 - s)), s = sigmoid(z), z = u / log2(e)
          const Vec u = clamped(centred * load(gains + at) + load(offsets + at));
          const Vec s = static_cast<float>(LOG2_E) / log2e_over_sigmoid<T>(u);
          const float z_per_u = static_cast<float>(1 / LOG2_E);
          d *= s * (u * (z_per_u - z_per_u * s) + 1.0f);
        }
        store(dz + r * dz_stride + at, d, lanes);
        first[i] += d;
        second[i] += d * centred;
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
  const float *of_x = of.values[0], *of_dz = of.values[1], *constant = of.values[2];
  for (int64_t r = 0; r < k.rows; ++r) {
    for_wide<4>(k.columns, [=, row = r * k.stride, dz_row = r * dz_stride](int64_t c, auto vectors, auto lanes) {
      constexpr int n = vectors;
      Vecs<n> d = load_wide<n>(x + row + c, lanes);
      for (int64_t i = 0, at = c; i < n; ++i, at += LANES) {
        const Vec rest = d[i] * load(of_x + at) + load(constant + at);
        d[i] = load(dz + dz_row + at, lanes) * load(of_dz + at) - rest;
      }
      store_wide<n>(dx + row + c, d, lanes);
    });
  }
}

// A small tensor of (columns,) or (rows, columns) as floats, padded as scratch is; empty where it is absent.
class Floats {
 public:
  Floats(const std::optional<Tensor>& t, int64_t rows, int64_t columns) : columns_(columns) {
    if (!t) return;
    const bool is_row = t->dim() == 1;
    STD_TORCH_CHECK(is_row ? rows == 1 : t->dim() == 2 && t->size(0) == rows, "expected a modulation of (B, C)");
    STD_TORCH_CHECK(t->size(t->dim() - 1) == columns, "expected one value per channel");
    STD_TORCH_CHECK(columns <= 1 || t->stride(t->dim() - 1) == 1, "expected channels side by side");
    copy_.resize(rows * columns + LANES);
    with_type(t->scalar_type(), [&](auto type) {
      const auto* from = data<decltype(type)>(*t);
      for (int64_t r = 0; r < rows; ++r) {
        for_vectors(columns, [&](int64_t c, auto lanes) {
          store(copy_.data() + r * columns + c, load(from + (is_row ? 0 : r * t->stride(0)) + c, lanes), lanes);
        });
      }
    });
  }
  explicit operator bool() const { return !copy_.empty(); }
  Vec at(int64_t row, int64_t column) const { return load(copy_.data() + row * columns_ + column); }

 private:
  int64_t columns_;
  std::vector<float> copy_;
};

// z = xhat gain + offset, per sample and channel; with SiLU u = log2(e) z for it.
struct Affine {
  Floats weight, bias, scale, shift;
  Affine(const Shape& shape, const Tensor& w, const Tensor& b, const std::optional<Tensor>& s,
         const std::optional<Tensor>& t)
      : weight(w, 1, shape.channels),
        bias(b, 1, shape.channels),
        scale(s, shape.batch, shape.channels),
        shift(t, shape.batch, shape.channels) {}

  void write(int64_t n, int64_t first, int64_t count, bool silu, float* gain, float* offset) const {
    const float unit = silu ? static_cast<float>(LOG2_E) : 1.0f;
    for_vectors(count, [&](int64_t i, auto lanes) {
      Vec g = weight.at(0, first + i) * unit, o = bias.at(0, first + i) * unit;
      if (scale) {
        const Vec k = 1.0f + scale.at(n, first + i);
        g *= k, o = o * k + shift.at(n, first + i) * unit;
      }
      store(gain + i, g, lanes), store(offset + i, o, lanes);
    });
  }
};

// The mean of eight of each group's values.
template <class T>
void guess_means(const Shape& shape, const T* x, int64_t first, int64_t count, float* to) {
  const int64_t width = shape.width(), some = std::min<int64_t>(width * shape.pixels, 8);
  const int64_t step = shape.channels_last ? 1 : shape.pixels, next = shape.channels_last ? shape.channels : 1;
  for (int64_t c = 0; c < count; c += width) {
    float sum = 0;
    const T* at = x + (first + c) * step;
    for (int64_t left = some; left > 0; left -= width, at += next) {
      for (int64_t i = 0; i < std::min(left, width); ++i) sum += load(at + i * step, 1)[0];
    }
    std::fill_n(to + c, width, some ? sum / static_cast<float>(some) : 0.0f);
  }
}

// Mean and 1 / sqrt(variance + eps) of the task's groups, from moments about a guess. A group whose guess was far off,
// by an outlier among its eight, takes them again about its mean; the others' come out as they were.
template <class T>
void statistics(const Shape& shape, const T* x, int64_t first, int64_t count, double eps, Scratch& scratch,
                float* means, float* rstds, bool again = false) {
  const int64_t width = shape.width();
  const double per = 1.0 / static_cast<double>(std::max<int64_t>(1, width * shape.pixels));
  float* centre = scratch.of(0);
  if (!again) guess_means(shape, x, first, count, centre);
  sum_columns<T>(shape, first, count, scratch, [&](const Block& k, int64_t, const Columns& of, float* s1, float* s2) {
    moments(x + k.offset, k, of.values[0], s1, s2);
  });
  bool far = false;
  for (int64_t g = 0, c = 0; c < count; ++g, c += width) {
    const double mean = total(scratch.s1() + c, width) * per;
    const double variance = total(scratch.s2() + c, width) * per - mean * mean;
    means[g] = static_cast<float>(centre[c] + mean);
    rstds[g] = static_cast<float>(1 / std::sqrt((variance < 0 ? 0 : variance) + eps));
    if (again || !(mean * mean > 8 * variance)) continue;
    far = true;
    std::fill_n(centre + c, width, means[g]);
  }
  if (far) statistics(shape, x, first, count, eps, scratch, means, rstds, true);
}

// A task's means and rstds, a number per channel.
void spread(const Shape& shape, int64_t count, const float* means, const float* rstds, float* mean, float* rstd) {
  for (int64_t c = 0; c < count; c += shape.width(), ++means, ++rstds) {
    std::fill_n(mean + c, shape.width(), *means);
    std::fill_n(rstd + c, shape.width(), *rstds);
  }
}

// Fold mean and rstd into gain and offset, constants 0 and 1 from then on. Whether all of the task's |u| <= 126 then,
// 14 at the centre and 112 from there: no x is further than sqrt(s2) from the centre. What lies behind the last
// channel counts, too, and can only say no.
bool fold(int64_t count, Scratch& scratch) {
  float *centre = scratch.of(0), *gain = scratch.of(1);
  const float *mean = scratch.of(2), *rstd = scratch.of(3), *offset = scratch.s1(), *s2 = scratch.s2();
  Vec most{};
  for_vectors(count, [&](int64_t c, auto) {
    const Vec g = load(rstd + c) * load(gain + c), o = load(offset + c) - load(mean + c) * g;
    const Vec at_centre = 8.0f * (load(centre + c) * g + o);
    most = larger(most, larger(at_centre * at_centre, g * g * load(s2 + c)));
    store(centre + c, g), store(gain + c, o);
  });
  return folded(most, [](Vec a, Vec b) { return larger(a, b); }, AllLanes{}) <= 112.0f * 112.0f;
}

// One task of the forward; x and y point at its sample, means and rstds at its first group.
template <class T>
void forward_task(const Shape& shape, const T* x, T* y, int64_t n, int64_t first, int64_t count, const Affine& affine,
                  float* means, float* rstds, double eps, bool silu, Scratch& scratch, int64_t next) {
  statistics(shape, x, first, count, eps, scratch, means, rstds);
  spread(shape, count, means, rstds, scratch.of(2), scratch.of(3));
  affine.write(n, first, count, silu, scratch.of(1), scratch.s1());
  const bool within = fold(count, scratch);
  const auto run = !silu ? apply<T, Silu::NONE> : within ? apply<T, Silu::WITHIN> : apply<T, Silu::CLAMPED>;
  for_columns<T>(shape, first, count, scratch, [&](const Block& k, int64_t, const Columns& of) {
    run(x + k.offset, y + k.offset, k, of, next);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t groups, double eps, bool silu) {
  const Shape shape = shape_of(x, groups);
  const Affine affine(shape, weight, bias, scale, shift);
  Tensor y = empty_as(x);
  const auto statistics = [&] { return empty(std::array{shape.batch, groups}, ScalarType::Float); };
  Tensor mean = statistics(), rstd = statistics();
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    float *means = mutable_data<float>(mean), *rstds = mutable_data<float>(rstd);
    for_tasks(shape, false, [&](int64_t n, int64_t first, int64_t count, Scratch& scratch, int64_t next) {
      const int64_t slab = n * shape.channels * shape.pixels, group = n * groups + first / shape.width();
      forward_task(shape, from + slab, to + slab, n, first, count, affine, means + group, rstds + group, eps, silu,
                   scratch, next);
    });
  });
  return {y, mean, rstd};
}

// The gradient of x in one task; dy, x and dx point at its sample, means and rstds at its first group, s1 and s2, the
// sums of dz and dz xhat over a channel's pixels, at its first channel.
template <class T>
void backward_task(const Shape& shape, const T* dy, const T* x, T* dx, int64_t n, int64_t first, int64_t count,
                   const Affine& affine, const float* means, const float* rstds, float* s1, float* s2, bool silu,
                   Scratch& scratch) {
  float *mean = scratch.of(0), *gain = scratch.of(1), *offset = scratch.of(2), *rstd = scratch.of(3);
  float *sum = scratch.s1(), *xhat_sum = scratch.s2();
  spread(shape, count, means, rstds, mean, rstd);
  affine.write(n, first, count, silu, gain, offset);
  for_vectors(count, [=](int64_t c, auto) { store(gain + c, load(gain + c) * load(rstd + c)); });
  const auto dz = [&](const Block& k) {
    if constexpr (std::is_same_v<T, float>) return dx + k.offset;
    else return scratch.kept.get() + (shape.channels_last ? 0 : k.offset - first * shape.pixels);
  };
  const int64_t dz_stride = !shape.channels_last ? FOLD : std::is_same_v<T, float> ? shape.channels : count;
  const auto run = silu ? grad_sums<T, true> : grad_sums<T, false>;
  sum_columns<T>(shape, first, count, scratch, [&](const Block& k, int64_t, const Columns& of, float* a, float* b) {
    run(x + k.offset, dy + k.offset, dz(k), dz_stride, k, of, a, b);
  });
  affine.write(n, first, count, false, gain, offset);
  for_vectors(count, [=](int64_t c, auto lanes) {
    const Vec g = load(gain + c), r = load(rstd + c), dz = load(sum + c), dz_xhat = load(xhat_sum + c) * r;
    store(s1 + c, dz, lanes), store(s2 + c, dz_xhat, lanes);
    store(sum + c, dz * g), store(xhat_sum + c, dz_xhat * g);
    store(gain + c, r * g);
  });
  const int64_t width = shape.width();
  for (int64_t g = 0, c = 0; c < count; ++g, c += width) {
    const double per = rstds[g] / static_cast<double>(width * shape.pixels);
    const float of_x = static_cast<float>(total(xhat_sum + c, width) * per * rstds[g]);
    std::fill_n(mean + c, width, of_x);
    std::fill_n(offset + c, width, static_cast<float>(total(sum + c, width) * per - double{of_x} * means[g]));
  }
  for_columns<T>(shape, first, count, scratch, [&](const Block& k, int64_t, const Columns& of) {
    grad_apply<T>(x + k.offset, dz(k), dz_stride, dx + k.offset, k, of);
  });
}

// The gradients of weight and bias (C,), summed over samples, and of scale and shift (B, C), if there are any.
template <class W, class S>
void affine_gradients(const Shape& shape, const Affine& affine, const float* s1, const float* s2, W* of_weight,
                      W* of_bias, S* of_scale, S* of_shift) {
  for_vectors(shape.channels, [&](int64_t c, auto lanes) {
    Vec weight{}, bias{};
    for (int64_t n = 0; n < shape.batch; ++n) {
      const int64_t at = n * shape.channels + c;
      Vec dz = load(s1 + at, lanes), dz_xhat = load(s2 + at, lanes);
      if (affine.scale) {
        store(of_scale + at, dz_xhat * affine.weight.at(0, c) + dz * affine.bias.at(0, c), lanes);
        store(of_shift + at, dz, lanes);
        const Vec k = 1.0f + affine.scale.at(n, c);
        dz *= k, dz_xhat *= k;
      }
      weight += dz_xhat, bias += dz;
    }
    store(of_weight + c, weight, lanes), store(of_bias + c, bias, lanes);
  });
}

// The gradients of x, weight and bias, and of scale and shift where they are.
std::vector<Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t groups, bool silu) {
  const Shape shape = shape_of(x, groups);
  STD_TORCH_CHECK(is_channels_last(dy) == shape.channels_last && (shape.channels_last || dy.is_contiguous()),
                  "expected dy in the layout of x");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "expected dy in the dtype of x");
  STD_TORCH_CHECK(weight.scalar_type() == bias.scalar_type(), "expected weight and bias of one dtype");
  STD_TORCH_CHECK(!scale || scale->scalar_type() == shift->scalar_type(), "expected scale and shift of one dtype");
  const Affine affine(shape, weight, bias, scale, shift);
  std::vector<Tensor> of = {empty_as(x)};
  for (int i = 0; i < 2; ++i) of.push_back(empty(std::array{shape.channels}, weight.scalar_type()));
  for (int i = 0; i < 2 && scale; ++i) {
    of.push_back(empty(std::array{shape.batch, shape.channels}, scale->scalar_type()));
  }
  std::vector<float> sums(2 * shape.batch * shape.channels);
  float *s1 = sums.data(), *s2 = s1 + shape.batch * shape.channels;
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr bool keep = !std::is_same_v<T, float>;  // of float32 dz lies in dx
    const T *of_y = data<T>(dy), *from = data<T>(x);
    T* to = mutable_data<T>(of[0]);
    const float *means = data<float>(mean), *rstds = data<float>(rstd);
    for_tasks(shape, keep, [&](int64_t n, int64_t first, int64_t count, Scratch& scratch, int64_t) {
      const int64_t slab = n * shape.channels * shape.pixels, channel = n * shape.channels + first;
      const int64_t group = n * groups + first / shape.width();
      backward_task(shape, of_y + slab, from + slab, to + slab, n, first, count, affine, means + group, rstds + group,
                    s1 + channel, s2 + channel, silu, scratch);
    });
  });
  with_type(weight.scalar_type(), [&](auto of_weight) {
    with_type(of.back().scalar_type(), [&](auto of_scale) {
      using W = decltype(of_weight);
      using S = decltype(of_scale);
      S *to_scale = scale ? mutable_data<S>(of[3]) : nullptr, *to_shift = scale ? mutable_data<S>(of[4]) : nullptr;
      affine_gradients(shape, affine, s1, s2, mutable_data<W>(of[1]), mutable_data<W>(of[2]), to_scale, to_shift);
    });
  });
  return of;
}

STABLE_TORCH_LIBRARY_IMPL(ldm_sg, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&forward));
  m.impl("group_norm_silu_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace ldm_sg

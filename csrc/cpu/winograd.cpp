// 3x3 convolution with padding 1 by Winograd's F(2x2, 3x3): 16 products for four outputs where the definition takes 36.
//
// Per tile of 4x4 inputs d, which gives 2x2 outputs, and with A, B, G of Lavin & Gray (2016), eq. 8 and 9:
//   y = A^T [ (G w G^T) . (B^T d B) ] A,   dw = G^T [ (B^T d B) . (A dy A^T) ] G
// Summed over channels (over tiles for dw) each of the 16 products is a matrix product. The 16 come from one tile kernel
// on data that stay in the cache: V = B^T d B of some tiles, and M, what becomes y, of those tiles and PANEL channels.
// Maps lie in memory as (B, H, W, C), H and W even. A tile's result depends on nothing but its inputs and weights.
#include "parallel.h"

#include <algorithm>
#include <memory>

namespace ldm_sg {
namespace {

constexpr int POINTS = 16, PANEL = 16;
constexpr int COLUMNS = PANEL / LANES, ROWS = 12 / COLUMNS;  // ROWS x PANEL: 12 vectors of sums
constexpr int64_t FORWARD_TILES = 48, GRADIENT_TILES = 96;  // V and M, or V and D, of so many stay in the cache

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Map {
  int64_t batch, height, width, channels;
  explicit Map(const Tensor& t) : batch(t.size(0)), height(t.size(1)), width(t.size(2)), channels(t.size(3)) {
    STD_TORCH_CHECK(height % 2 == 0 && width % 2 == 0, "expected maps of even sides");
    STD_TORCH_CHECK(t.is_contiguous(), "expected (B, H, W, C) without gaps");
  }
  int64_t tiles() const { return batch * height / 2 * (width / 2); }

  // Call f(offset in elements) for the `side` x `side` pixels from (top, left) of a tile on; -1 outside of the map.
  template <class F>
  void pixels(int64_t tile, int64_t margin, int64_t side, const F& f) const {
    const int64_t across = width / 2, down = height / 2;
    const int64_t b = tile / (across * down), row = tile / across % down, column = tile % across;
    const int64_t top = 2 * row - margin, left = 2 * column - margin;
    for (int64_t y = top; y < top + side; ++y) {
      for (int64_t x = left; x < left + side; ++x) {
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        f(inside ? ((b * height + y) * width + x) * channels : -1);
      }
    }
  }
};

// B^T d B, d and the result row by row.
[[gnu::always_inline]] inline void transform_input(const Vec (&d)[POINTS], Vec (&v)[POINTS]) {
  Vec t[POINTS];
  for (int j = 0; j < 4; ++j) {
    t[j] = d[j] - d[8 + j];
    t[4 + j] = d[4 + j] + d[8 + j];
    t[8 + j] = d[8 + j] - d[4 + j];
    t[12 + j] = d[4 + j] - d[12 + j];
  }
  for (int i = 0; i < POINTS; i += 4) {
    v[i] = t[i] - t[i + 2];
    v[i + 1] = t[i + 1] + t[i + 2];
    v[i + 2] = t[i + 2] - t[i + 1];
    v[i + 3] = t[i + 1] - t[i + 3];
  }
}

// A^T m A: 4x4 to 2x2.
[[gnu::always_inline]] inline void transform_output(const Vec (&m)[POINTS], Vec (&y)[4]) {
  Vec t[8];
  for (int j = 0; j < 4; ++j) {
    t[j] = m[j] + m[4 + j] + m[8 + j];
    t[4 + j] = m[4 + j] - m[8 + j] - m[12 + j];
  }
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = t[4 * i] + t[4 * i + 1] + t[4 * i + 2];
    y[2 * i + 1] = t[4 * i + 1] - t[4 * i + 2] - t[4 * i + 3];
  }
}

// A dy A^T: 2x2 to 4x4, the transpose of the above.
[[gnu::always_inline]] inline void spread_output(const Vec (&y)[4], Vec (&d)[POINTS]) {
  Vec t[8];
  for (int j = 0; j < 2; ++j) {
    t[j] = y[j];
    t[2 + j] = y[j] + y[2 + j];
    t[4 + j] = y[j] - y[2 + j];
    t[6 + j] = -y[2 + j];
  }
  for (int i = 0; i < 4; ++i) {
    d[4 * i] = t[2 * i];
    d[4 * i + 1] = t[2 * i] + t[2 * i + 1];
    d[4 * i + 2] = t[2 * i] - t[2 * i + 1];
    d[4 * i + 3] = -t[2 * i + 1];
  }
}

// G w G^T: 3x3 to 4x4.
[[gnu::always_inline]] inline void transform_weight(const Vec (&w)[9], Vec (&u)[POINTS]) {
  Vec t[12];
  for (int j = 0; j < 3; ++j) {
    const Vec ends = (w[j] + w[6 + j]) * 0.5f, middle = w[3 + j] * 0.5f;
    t[j] = w[j];
    t[3 + j] = ends + middle;
    t[6 + j] = ends - middle;
    t[9 + j] = w[6 + j];
  }
  for (int i = 0; i < 4; ++i) {
    const Vec ends = (t[3 * i] + t[3 * i + 2]) * 0.5f, middle = t[3 * i + 1] * 0.5f;
    u[4 * i] = t[3 * i];
    u[4 * i + 1] = ends + middle;
    u[4 * i + 2] = ends - middle;
    u[4 * i + 3] = t[3 * i + 2];
  }
}

// G^T u G: 4x4 to 3x3, the transpose of the above.
[[gnu::always_inline]] inline void gather_weight(const Vec (&u)[POINTS], Vec (&w)[9]) {
  Vec t[12];
  for (int j = 0; j < 4; ++j) {
    const Vec sum = (u[4 + j] + u[8 + j]) * 0.5f, difference = (u[4 + j] - u[8 + j]) * 0.5f;
    t[j] = u[j] + sum;
    t[4 + j] = difference;
    t[8 + j] = sum + u[12 + j];
  }
  for (int i = 0; i < 3; ++i) {
    const Vec sum = (t[4 * i + 1] + t[4 * i + 2]) * 0.5f;
    w[3 * i] = t[4 * i] + sum;
    w[3 * i + 1] = (t[4 * i + 1] - t[4 * i + 2]) * 0.5f;
    w[3 * i + 2] = sum + t[4 * i + 3];
  }
}

// Transform a tile's `side` x `side` pixels into 16 points, `plane` apart, for all channels.
template <int SIDE, class T, class F>
void transform_tile(const Map& map, const T* from, int64_t tile, float* to, int64_t plane, const F& transform) {
  const T* pixel[SIDE * SIDE];
  int count = 0;
  map.pixels(tile, SIDE / 4, SIDE, [&](int64_t offset) { pixel[count++] = offset < 0 ? nullptr : from + offset; });
  for_vectors(map.channels, [&](int64_t c, auto lanes) {
    Vec in[SIDE * SIDE], out[POINTS];
    for (int i = 0; i < SIDE * SIDE; ++i) in[i] = pixel[i] ? load(pixel[i] + c, lanes) : Vec{};
    transform(in, out);
    for (int i = 0; i < POINTS; ++i) store(to + i * plane + c, out[i], lanes);
  });
}

// c (R, PANEL) = [c +] sum over k of a[r * a_row + k * a_step] * b[k * b_step ...].
template <int R, bool ADD>
void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c, int64_t c_row,
              int64_t depth) {
  Vec sums[R][COLUMNS];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < COLUMNS; ++j) sums[r][j] = ADD ? load(c + r * c_row + j * LANES) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) row[j] = load(b + k * b_step + j * LANES);
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < COLUMNS; ++j) sums[r][j] += a[r * a_row + k * a_step] * row[j];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < COLUMNS; ++j) store(c + r * c_row + j * LANES, sums[r][j]);
  }
}

// The same for any number of rows.
template <bool ADD>
void multiply_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                   float* c, int64_t c_row, int64_t depth) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) {
    multiply<ROWS, ADD>(a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row, depth);
  }
  for (; r < rows; ++r) multiply<1, ADD>(a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row, depth);
}

// y of `count` tiles from `first` on.
template <class T>
void forward_tiles(const Map& in, const T* x, const Map& out, T* y, const float* packed, const float* bias,
                   int64_t first, int64_t count, float* v, float* m) {
  const int64_t plane = count * in.channels;
  for (int64_t t = 0; t < count; ++t) {
    transform_tile<4>(in, x, first + t, v + t * in.channels, plane, transform_input);
  }
  for (int64_t c = 0; c < out.channels; c += PANEL) {
    for (int point = 0; point < POINTS; ++point) {
      const float* weights = packed + (c * POINTS + point * PANEL) * in.channels;
      multiply_rows<false>(count, v + point * plane, in.channels, 1, weights, PANEL, m + point * count * PANEL, PANEL,
                           in.channels);
    }
    for (int64_t t = 0; t < count; ++t) {
      int64_t pixel[4], *at = pixel;
      out.pixels(first + t, 0, 2, [&](int64_t offset) { *at++ = offset; });
      for_vectors(std::min<int64_t>(PANEL, out.channels - c), [&](int64_t i, auto lanes) {
        Vec points[POINTS], values[4];
        for (int p = 0; p < POINTS; ++p) points[p] = load(m + (p * count + t) * PANEL + i);
        transform_output(points, values);
        for (int p = 0; p < 4; ++p) store(y + pixel[p] + c + i, values[p] + load(bias + c + i, lanes), lanes);
      });
    }
  }
}

// weight (O, C, 3, 3) of any strides: G w G^T in the order in which `forward` reads it, (O / 16, 16, C, 16), zeros
// after the last of O. Backwards the weights are those that take dy to dx: turned around, O and C exchanged.
Tensor pack(Tensor weight, bool backwards) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "expected float32 weights");
  const int64_t outputs = weight.size(backwards ? 1 : 0), inputs = weight.size(backwards ? 0 : 1);
  const int64_t o_step = weight.stride(backwards ? 1 : 0), c_step = weight.stride(backwards ? 0 : 1);
  const int64_t y_step = weight.stride(2), x_step = weight.stride(3);
  const int64_t panels = (outputs + PANEL - 1) / PANEL;
  Tensor packed = empty(std::array<int64_t, 4>{panels, POINTS, inputs, PANEL}, ScalarType::Float);
  float* to = mutable_data<float>(packed);
  const float* from = data<float>(weight);
  const int64_t grain = std::max<int64_t>(1, ELEMENTS_PER_THREAD / std::max<int64_t>(1, inputs * PANEL * 9));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t panel, int64_t last) {
    for (; panel < last; ++panel) {
      const int64_t count = std::min<int64_t>(PANEL, outputs - panel * PANEL);
      for (int64_t first = 0; first < inputs; first += PANEL) {  // a cache line of weights at a time
        float taps[PANEL][9][PANEL] = {};
        const int64_t some = std::min<int64_t>(PANEL, inputs - first);
        for (int64_t o = 0; o < count; ++o) {
          const float* at = from + (panel * PANEL + o) * o_step + first * c_step;
          for (int k = 0; k < 9; ++k) {
            const float* tap = at + k / 3 * y_step + k % 3 * x_step;
            for (int64_t c = 0; c < some; ++c) taps[c][backwards ? 8 - k : k][o] = tap[c * c_step];
          }
        }
        for (int64_t c = 0; c < some; ++c) {
          for (int i = 0; i < PANEL; i += LANES) {
            Vec w[9], u[POINTS];
            for (int k = 0; k < 9; ++k) w[k] = load(taps[c][k] + i);
            transform_weight(w, u);
            for (int p = 0; p < POINTS; ++p) store(to + ((panel * POINTS + p) * inputs + first + c) * PANEL + i, u[p]);
          }
        }
      }
    }
  });
  return packed;
}

// x (B, H, W, C), packed (O / 16, 16, C, 16) = G w G^T, bias (O,): y (B, H, W, O).
Tensor forward(Tensor x, Tensor packed, Tensor bias) {
  const Map in(x);
  const int64_t channels = bias.size(0);
  const int64_t values = round_up(channels, PANEL) * POINTS * in.channels;
  STD_TORCH_CHECK(packed.numel() == values, "expected weights for these maps");
  for (const Tensor& t : {packed, bias}) STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "expected float32");
  Tensor y = empty(std::array{in.batch, in.height, in.width, channels}, x.scalar_type());
  const Map out(y);
  const int64_t threads = torch::stable::get_num_threads(), share = (in.tiles() + threads - 1) / threads;
  const int64_t some = std::min(FORWARD_TILES, round_up(std::max<int64_t>(share, 1), ROWS));
  with_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(x);
    T* to = mutable_data<T>(y);
    torch::stable::parallel_for(0, (in.tiles() + some - 1) / some, 1, [&](int64_t task, int64_t last) {
      const std::unique_ptr<float[]> v(new float[POINTS * some * in.channels]), m(new float[POINTS * some * PANEL]);
      for (; task < last; ++task) {
        const int64_t first = task * some, count = std::min(some, in.tiles() - first);
        forward_tiles(in, from, out, to, data<float>(packed), data<float>(bias), first, count, v.get(), m.get());
      }
    });
  });
  return y;
}

// sums[point] (C, columns) = [sums[point] +] V^T D of `count` tiles, all channels.
template <bool ADD>
void add_products(const float* v, const float* d, int64_t inputs, int64_t columns, int64_t count, float* sums) {
  torch::stable::parallel_for(0, POINTS, 1, [&](int64_t point, int64_t last) {
    for (; point < last; ++point) {
      const float *of_x = v + point * count * inputs, *of_y = d + point * count * columns;
      for (int64_t c = 0; c < columns; c += PANEL) {
        float* to = sums + point * inputs * columns + c;
        multiply_rows<ADD>(inputs, of_x, 1, inputs, of_y + c, columns, to, columns, count);
      }
    }
  });
}

// sums (16, C, columns) to dw (O, 3, 3, C).
void gather_weights(const float* sums, int64_t inputs, int64_t outputs, int64_t columns, float* dw) {
  torch::stable::parallel_for(0, columns / PANEL, 1, [&](int64_t panel, int64_t last) {
    for (; panel < last; ++panel) {
      for (int64_t first = 0; first < inputs; first += PANEL) {  // a cache line of weights at a time
        float taps[PANEL][9][PANEL];
        const int64_t some = std::min<int64_t>(PANEL, inputs - first);
        for (int64_t c = 0; c < some; ++c) {
          for (int i = 0; i < PANEL; i += LANES) {
            Vec u[POINTS], w[9];
            const float* at = sums + (first + c) * columns + panel * PANEL + i;
            for (int p = 0; p < POINTS; ++p) u[p] = load(at + p * inputs * columns);
            gather_weight(u, w);
            for (int k = 0; k < 9; ++k) store(taps[c][k] + i, w[k]);
          }
        }
        for (int64_t o = 0; o < std::min<int64_t>(PANEL, outputs - panel * PANEL); ++o) {
          for (int k = 0; k < 9; ++k) {
            float* to = dw + ((panel * PANEL + o) * 9 + k) * inputs + first;
            for (int64_t c = 0; c < some; ++c) to[c] = taps[c][k][o];
          }
        }
      }
    }
  });
}

// x (B, H, W, C), dy (B, H, W, O): dw (O, 3, 3, C) = G^T [ sum over tiles of (B^T d B) . (A dy A^T) ] G, float32.
Tensor weight_gradient(Tensor x, Tensor dy) {
  const Map in(x), out(dy);
  const bool alike = in.batch == out.batch && in.height == out.height && in.width == out.width;
  STD_TORCH_CHECK(alike && dy.scalar_type() == x.scalar_type(), "expected dy as x");
  const int64_t columns = round_up(out.channels, PANEL), tiles = in.tiles();
  Tensor dw = empty(std::array<int64_t, 4>{out.channels, 3, 3, in.channels}, ScalarType::Float);
  const std::unique_ptr<float[]> sums(new float[POINTS * in.channels * columns]);
  const std::unique_ptr<float[]> v(new float[POINTS * GRADIENT_TILES * in.channels]);
  const std::unique_ptr<float[]> d(new float[POINTS * GRADIENT_TILES * columns]);
  if (!tiles) std::fill_n(sums.get(), POINTS * in.channels * columns, 0.0f);
  for (int64_t first = 0; first < tiles; first += GRADIENT_TILES) {
    const int64_t count = std::min(GRADIENT_TILES, tiles - first);
    with_type(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      torch::stable::parallel_for(0, count, 8, [&](int64_t t, int64_t last) {
        for (; t < last; ++t) {
          transform_tile<4>(in, data<T>(x), first + t, v.get() + t * in.channels, count * in.channels, transform_input);
          transform_tile<2>(out, data<T>(dy), first + t, d.get() + t * columns, count * columns, spread_output);
        }
      });
    });
    (first ? add_products<true> : add_products<false>)(v.get(), d.get(), in.channels, columns, count, sums.get());
  }
  gather_weights(sums.get(), in.channels, out.channels, columns, mutable_data<float>(dw));
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ldm_sg, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&pack));
  m.impl("winograd", TORCH_BOX(&forward));
  m.impl("winograd_weight_gradient", TORCH_BOX(&weight_gradient));
}

}  // namespace ldm_sg

// A map of (B, C, H, W) as rows of columns that carry their own constants, in tasks that share nothing.
//
// A task is one sample and a run of whole groups; the result does not depend on the number of threads or on how groups
// are dealt to them. Within a task both memory layouts are blocks of rows: channels-last gives one block of
// (pixels, channels), contiguous one per channel of (pixels / FOLD, FOLD).
#pragma once

#include "parallel.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace ldm_sg {

inline constexpr int FOLD = 4 * LANES;
inline constexpr int CHUNK = 32;  // rows added up before they join the sum of all: fewer digits are lost

struct Shape {
  int64_t batch, channels, pixels, groups;
  bool channels_last;
  int64_t width() const { return channels / groups; }
};

struct Block {
  int64_t offset, rows, stride, columns;
};

// What a task keeps: six numbers per channel, padded so that whole vectors may be read at any channel, and dz of 16-bit
// types. Threads reuse it for task after task.
struct Scratch {
  int64_t row;
  std::vector<float> numbers;
  std::unique_ptr<float[]> kept;

  Scratch(int64_t channels, int64_t values)
      : row(channels + LANES), numbers(6 * row), kept(values ? new float[values] : nullptr) {}
  float* of(int i) { return numbers.data() + i * row; }  // constants from 0 on
  float* s1() { return of(4); }
  float* s2() { return of(5); }
};

// Per-column constants of a block; `channel` is counted from the task's first.
struct Columns {
  const float* values[4];
  float folded[4][FOLD];

  Columns(bool channels_last, int64_t channel, Scratch& scratch) {
    for (int i = 0; i < 4; ++i) {
      if (!channels_last) std::fill_n(folded[i], FOLD, scratch.of(i)[channel]);
      values[i] = channels_last ? scratch.of(i) : folded[i];
    }
  }
};

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

[[gnu::always_inline]] inline void add(float* total, Vec v, int lanes) { store(total, load(total, lanes) + v, lanes); }

inline double total(const float* values, int64_t count) {
  Vec sums{};
  for_vectors(count, [&](int64_t i, auto lanes) { sums += load(values + i, lanes); });
  return sum_of(__builtin_convertvector(sums, VecD));
}

// Call f(row, rows, column, N vectors, lanes) along a block: by at most CHUNK rows, and by N vectors while they last.
template <int N, class F>
[[gnu::always_inline]] inline void for_chunks(const Block& k, const F& f) {
  for (int64_t row = 0; row < k.rows; row += CHUNK) {
    const int64_t rows = std::min<int64_t>(CHUNK, k.rows - row);
    for_wide<N>(k.columns, [&](int64_t c, auto vectors, auto lanes) { f(row, rows, c, vectors, lanes); });
  }
}

inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

inline Shape shape_of(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4, "expected x of (B, C, H, W)");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "expected groups to divide the channels");
  const bool last = is_channels_last(x);
  STD_TORCH_CHECK(last || x.is_contiguous(), "expected x contiguous or channels-last");
  return {x.size(0), x.size(1), x.size(2) * x.size(3), groups, last};
}

// Call f(block, channel, its constants) along a task, whose constants are woven as columns of T are.
template <class T, class F>
void for_columns(const Shape& shape, int64_t first, int64_t count, Scratch& scratch, const F& f) {
  for (int i = 0; i < 4 && shape.channels_last; ++i) weave<T>(scratch.of(i), count);
  for_blocks(shape, first, count, [&](const Block& k, int64_t channel) {
    f(k, channel, Columns(shape.channels_last, channel, scratch));
  });
}

// The same with f(block, channel, constants, s1, s2), which adds to sums per column; for contiguous tensors join them to
// the channel's. All numbers are in the channels' order again afterwards.
template <class T, class F>
void sum_columns(const Shape& shape, int64_t first, int64_t count, Scratch& scratch, const F& f) {
  std::fill_n(scratch.s1(), count, 0.0f);
  std::fill_n(scratch.s2(), count, 0.0f);
  for_columns<T>(shape, first, count, scratch, [&](const Block& k, int64_t channel, const Columns& of) {
    if (shape.channels_last) return f(k, channel, of, scratch.s1(), scratch.s2());
    float s1[FOLD] = {}, s2[FOLD] = {};
    f(k, channel, of, s1, s2);
    scratch.s1()[channel] += total(s1, FOLD), scratch.s2()[channel] += total(s2, FOLD);
  });
  for (int i = 0; i < 6 && shape.channels_last; ++i) weave<T, true>(scratch.of(i), count);
}

// Call f(sample, first channel, count of channels, scratch, next) in as many tasks as keep the threads busy; `keep`:
// whether scratch has room for the values; `next`: how much further on the thread's next part is, 0 if it is not known.
template <class F>
void for_tasks(const Shape& shape, bool keep, const F& f) {
  if (shape.batch * shape.channels == 0) return;
  const int64_t threads = torch::stable::get_num_threads(), values = shape.channels * shape.pixels;
  const int64_t line = std::max<int64_t>(1, 32 / shape.width());  // groups that fill two cache lines
  const int64_t most = shape.channels_last ? (shape.groups + line - 1) / line : shape.groups;
  const int64_t parts = std::min(most, (threads + shape.batch - 1) / shape.batch);
  const int64_t grain = std::max<int64_t>(1, ELEMENTS_PER_THREAD * parts / std::max<int64_t>(1, values));
  torch::stable::parallel_for(0, shape.batch * parts, grain, [&](int64_t task, int64_t last) {
    const int64_t channels = (shape.groups + parts - 1) / parts * shape.width();
    Scratch scratch(channels, keep ? channels * shape.pixels : 0);
    for (; task < last; ++task) {
      const int64_t begin = task % parts * shape.groups / parts, end = (task % parts + 1) * shape.groups / parts;
      const int64_t next = parts == 1 && task + 1 < last ? values : 0;
      f(task / parts, begin * shape.width(), (end - begin) * shape.width(), scratch, next);
    }
  });
}

}  // namespace ldm_sg

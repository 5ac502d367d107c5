// group_norm_silu on GPUs for channels-last images whose groups are too large for a program's registers, and fit into
// shared memory: every value is read once and written once all the same (forward 1 read and 1 write, backward 2 and 1).
//
// A block of threads takes one image and `together` whole groups, side by side. Thread t keeps to one run of V channels
// and takes every `rows`-th pixel, so that it waits only for what it copied itself. Sums have one order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ldm_sg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int MEMORY_FOR_TWO = 96 * 1024;  // bytes of slabs with which two blocks share a multiprocessor

struct Shape {
  int pixels, channels, groups, width, together;  // width: channels of a group
};

// A small tensor of (C,) or (B, C) in any of the three dtypes; an absent one is 0.
struct Channels {
  const void* values = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride = 0;

  __device__ float operator()(int64_t image, int channel) const {
    if (values == nullptr) return 0;
    const int64_t i = image * stride + channel;
    if (dtype == ScalarType::Float) return static_cast<const float*>(values)[i];
    if (dtype == ScalarType::Half) return __half2float(static_cast<const __half*>(values)[i]);
    return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[i]);
  }
};

struct Affine {
  Channels weight, bias, scale, shift;
  __device__ float gain(int64_t n, int c) const { return weight(0, c) * (1 + scale(n, c)); }
  __device__ float offset(int64_t n, int c) const { return bias(0, c) * (1 + scale(n, c)) + shift(n, c); }
};

__device__ float to_float(float v) { return v; }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ void from_float(float v, float& to) { to = v; }
__device__ void from_float(float v, __half& to) { to = __float2half_rn(v); }
__device__ void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// V neighbouring values, moved as one.
template <class T, int V>
struct alignas(sizeof(T) * V) Run {
  T values[V];
};

template <class T, int V>
__device__ void copy_async(Run<T, V>* to, const Run<T, V>* from) {
  if constexpr (sizeof(T) * V >= 4) {
    __pipeline_memcpy_async(to, from, sizeof(T) * V);
  } else {
    *to = *from;
  }
}

// Where a thread works, and the sums that the block shares.
template <class T, int V>
struct Place {
  int64_t image;
  int group, groups, channel, span, runs, run, row, rows;  // span: channels of the block; run: which V of them
  float* scratch;                                          // rows * span
  float* per_channel;                                      // span
  float* per_group;                                        // groups

  __device__ Place(const Shape& s, float* shared) {
    const int blocks = s.groups / s.together;
    image = blockIdx.x / blocks;
    group = blockIdx.x % blocks * s.together;
    groups = s.together;
    span = groups * s.width;
    runs = span / V;
    rows = THREADS / runs;
    run = threadIdx.x % runs;
    row = threadIdx.x / runs;
    channel = group * s.width + run * V;
    scratch = shared;
    per_channel = scratch + THREADS * V;
    per_group = per_channel + span;
  }

  __device__ bool is_working() const { return row < rows; }

  // Sum each channel over the block's pixels into per_channel; `mine` are this thread's V.
  __device__ void sum_channels(const float (&mine)[V]) {
    __syncthreads();
    if (is_working()) {
      for (int j = 0; j < V; ++j) scratch[row * span + run * V + j] = mine[j];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < span; c += THREADS) {
      float total = 0;
      for (int r = 0; r < rows; ++r) total += scratch[r * span + c];
      per_channel[c] = total;
    }
    __syncthreads();
  }

  // Sum per_channel over each group's channels into per_group, a warp per group.
  __device__ void sum_groups(int width) {
    for (int g = threadIdx.x / 32; g < groups; g += WARPS) {
      float total = 0;
      for (int c = threadIdx.x % 32; c < width; c += 32) total += per_channel[g * width + c];
      for (int apart = 16; apart; apart /= 2) total += __shfl_xor_sync(~0u, total, apart);
      if (threadIdx.x % 32 == 0) per_group[g] = total;
    }
    __syncthreads();
  }

  // This thread's V values of a per-group quantity.
  __device__ void spread(int width, float (&to)[V]) const {
    for (int j = 0; j < V; ++j) to[j] = is_working() ? per_group[(run * V + j) / width] : 0;
  }
};

__device__ float sigmoid(float z) { return 1 / (1 + __expf(-z)); }

template <class T, int V>
__global__ void __launch_bounds__(THREADS)
    forward_kernel(const T* x, T* y, float* mean, float* rstd, Affine affine, Shape s, float eps,
                   bool silu) {
  using R = Run<T, V>;
  extern __shared__ __align__(16) unsigned char memory[];
  R* slab = reinterpret_cast<R*>(memory);
  const int block_runs = s.pixels * s.together * s.width / V;
  Place<T, V> at(s, reinterpret_cast<float*>(slab + (block_runs + 15) / 16 * 16));
  const int64_t start = at.image * s.pixels * s.channels + at.channel;
  const float count = static_cast<float>(s.pixels) * s.width;
  const int first = at.is_working() ? at.row : s.pixels;

  for (int p = first; p < s.pixels; p += at.rows) {
    copy_async(slab + p * at.runs + at.run, reinterpret_cast<const R*>(x + start + int64_t{p} * s.channels));
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);

  float sums[V] = {}, centre[V], factor[V], gain[V], offset[V];
  for (int p = first; p < s.pixels; p += at.rows) {
    const R run = slab[p * at.runs + at.run];
    for (int j = 0; j < V; ++j) sums[j] += to_float(run.values[j]);
  }
  at.sum_channels(sums);
  at.sum_groups(s.width);
  at.spread(s.width, centre);
  if (threadIdx.x < at.groups) mean[at.image * s.groups + at.group + threadIdx.x] = at.per_group[threadIdx.x] / count;
  for (int j = 0; j < V; ++j) centre[j] /= count, sums[j] = 0;

  for (int p = first; p < s.pixels; p += at.rows) {
    const R run = slab[p * at.runs + at.run];
    for (int j = 0; j < V; ++j) {
      const float apart = to_float(run.values[j]) - centre[j];
      sums[j] += apart * apart;
    }
  }
  at.sum_channels(sums);
  at.sum_groups(s.width);
  at.spread(s.width, factor);
  if (threadIdx.x < at.groups) {
    rstd[at.image * s.groups + at.group + threadIdx.x] = rsqrtf(at.per_group[threadIdx.x] / count + eps);
  }
  if (!at.is_working()) return;
  for (int j = 0; j < V; ++j) {
    gain[j] = rsqrtf(factor[j] / count + eps) * affine.gain(at.image, at.channel + j);
    offset[j] = affine.offset(at.image, at.channel + j);
  }
  for (int p = first; p < s.pixels; p += at.rows) {
    R run = slab[p * at.runs + at.run];
    for (int j = 0; j < V; ++j) {
      const float z = (to_float(run.values[j]) - centre[j]) * gain[j] + offset[j];
      from_float(silu ? z * sigmoid(z) : z, run.values[j]);
    }
    *reinterpret_cast<R*>(y + start + int64_t{p} * s.channels) = run;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS)
    backward_kernel(const T* dy, const T* x, T* dx, const float* mean, const float* rstd, float* sum_dz,
                    float* sum_dz_xhat, Affine affine, Shape s, bool silu) {
  using R = Run<T, V>;
  extern __shared__ __align__(16) unsigned char memory[];
  const int block_runs = (s.pixels * s.together * s.width / V + 15) / 16 * 16;
  R *slab = reinterpret_cast<R*>(memory), *slopes = slab + block_runs;
  Place<T, V> at(s, reinterpret_cast<float*>(slopes + block_runs));
  const int64_t start = at.image * s.pixels * s.channels + at.channel;
  const int first = at.is_working() ? at.row : s.pixels;

  for (int p = first; p < s.pixels; p += at.rows) {
    const int64_t from = start + int64_t{p} * s.channels;
    copy_async(slab + p * at.runs + at.run, reinterpret_cast<const R*>(x + from));
    copy_async(slopes + p * at.runs + at.run, reinterpret_cast<const R*>(dy + from));
  }
  __pipeline_commit();

  float m[V], r[V], gain[V], offset[V], first_sum[V] = {}, second_sum[V] = {};
  for (int j = 0; j < V && at.is_working(); ++j) {
    const int64_t statistic = at.image * s.groups + (at.channel + j) / s.width;
    m[j] = mean[statistic];
    r[j] = rstd[statistic];
    gain[j] = affine.gain(at.image, at.channel + j);
    offset[j] = affine.offset(at.image, at.channel + j);
  }
  const auto slope = [&](int j, const R& values, const R& outer, float& xhat) {
    xhat = (to_float(values.values[j]) - m[j]) * r[j];
    const float dz = to_float(outer.values[j]);
    if (!silu) return dz;
    const float z = xhat * gain[j] + offset[j], sig = sigmoid(z);
    return dz * (sig * (1 + z * (1 - sig)));
  };
  __pipeline_wait_prior(0);
  for (int p = first; p < s.pixels; p += at.rows) {
    const R values = slab[p * at.runs + at.run], outer = slopes[p * at.runs + at.run];
    for (int j = 0; j < V; ++j) {
      float xhat;
      const float dz = slope(j, values, outer, xhat);
      first_sum[j] += dz;
      second_sum[j] += dz * xhat;
    }
  }
  // The sums of dz and of dz xhat in turn: written, weighted by gain, and averaged over each group.
  const float count = static_cast<float>(s.pixels) * s.width;
  const auto average = [&](const float(&mine)[V], float* all, float(&to)[V]) {
    at.sum_channels(mine);
    for (int c = threadIdx.x; c < at.span; c += THREADS) {
      const int channel = at.group * s.width + c;
      all[at.image * s.channels + channel] = at.per_channel[c];
      at.per_channel[c] *= affine.gain(at.image, channel);
    }
    __syncthreads();
    at.sum_groups(s.width);
    at.spread(s.width, to);
    for (int j = 0; j < V; ++j) to[j] /= count;
  };
  float mean_1[V], mean_2[V];
  average(first_sum, sum_dz, mean_1);
  average(second_sum, sum_dz_xhat, mean_2);
  for (int p = first; p < s.pixels; p += at.rows) {
    const R values = slab[p * at.runs + at.run], outer = slopes[p * at.runs + at.run];
    R result;
    for (int j = 0; j < V; ++j) {
      float xhat;
      const float dz = slope(j, values, outer, xhat);
      from_float(r[j] * (gain[j] * dz - mean_1[j] - xhat * mean_2[j]), result.values[j]);
    }
    *reinterpret_cast<R*>(dx + start + int64_t{p} * s.channels) = result;
  }
}

Channels channels_of(const std::optional<Tensor>& t) {
  if (!t) return {};
  STD_TORCH_CHECK(t->size(t->dim() - 1) <= 1 || t->stride(t->dim() - 1) == 1, "expected channels side by side");
  return {t->const_data_ptr(), t->scalar_type(), t->dim() == 2 ? t->stride(0) : 0};
}

Shape shape_of(const Tensor& x, int64_t groups, int tensors, int bytes) {
  STD_TORCH_CHECK(x.dim() == 4 && groups > 0 && x.size(1) % groups == 0, "expected (B, C, H, W), groups dividing C");
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(x.size(dim) <= 1 || x.stride(dim) == expected, "expected x channels-last");
    expected *= x.size(dim);
  }
  Shape s{static_cast<int>(x.size(2) * x.size(3)), static_cast<int>(x.size(1)), static_cast<int>(groups)};
  s.width = s.channels / s.groups;
  s.together = 1;
  const auto fits = [&](int k) { return k * s.width <= 64 && tensors * s.pixels * k * s.width * bytes <= MEMORY_FOR_TWO; };
  while (s.groups % (2 * s.together) == 0 && fits(2 * s.together)) s.together *= 2;
  return s;
}

// Call f(T{}, V) with x's type and the widest run that divides a block's channels.
template <class T, class F>
void with_run(const Shape& s, const F& f) {
  const int span = s.together * s.width;
  constexpr int widest = 16 / sizeof(T);
  if (span % widest == 0) return f(T{}, std::integral_constant<int, widest>{});
  if (span % (widest / 2) == 0) return f(T{}, std::integral_constant<int, widest / 2>{});
  if (sizeof(T) == 2 && span % 2 == 0) return f(T{}, std::integral_constant<int, 2>{});
  f(T{}, std::integral_constant<int, 1>{});
}

template <class F>
void with_type(ScalarType dtype, const Shape& s, const F& f) {
  if (dtype == ScalarType::Float) return with_run<float>(s, f);
  if (dtype == ScalarType::BFloat16) return with_run<__nv_bfloat16>(s, f);
  if (dtype == ScalarType::Half) return with_run<__half>(s, f);
  STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
}

int bytes_of(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 2; }

template <class Kernel, class... Arguments>
void launch(Kernel kernel, const Tensor& x, const Shape& s, int tensors, int run, Arguments... arguments) {
  const int span = s.together * s.width;
  STD_TORCH_CHECK(span / run <= THREADS, "expected at most ", THREADS, " runs of channels, got ", span / run);
  const size_t slab = (size_t{1} * s.pixels * span / run + 15) / 16 * 16 * run * bytes_of(x);
  const size_t memory = tensors * slab + (THREADS * run + span + s.together) * sizeof(float);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory)));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const unsigned blocks = static_cast<unsigned>(x.size(0) * (s.groups / s.together));
  kernel<<<blocks, THREADS, memory, static_cast<cudaStream_t>(stream)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t groups, double eps, bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Shape s = shape_of(x, groups, 1, bytes_of(x));
  const Affine affine{channels_of(weight), channels_of(bias), channels_of(scale), channels_of(shift)};
  Tensor y = torch::stable::empty_like(x);
  const std::vector<int64_t> size = {x.size(0), groups};
  Tensor mean = torch::stable::new_empty(x, size, ScalarType::Float), rstd = torch::stable::empty_like(mean);
  if (x.numel() == 0) return {y, mean, rstd};
  with_type(x.scalar_type(), s, [&](auto type, auto run) {
    using T = decltype(type);
    launch(forward_kernel<T, run>, x, s, 1, run, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
           static_cast<float*>(mean.mutable_data_ptr()), static_cast<float*>(rstd.mutable_data_ptr()), affine, s,
           static_cast<float>(eps), silu);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, int64_t groups,
    bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Shape s = shape_of(x, groups, 2, bytes_of(x));
  const Affine affine{channels_of(weight), channels_of(bias), channels_of(scale), channels_of(shift)};
  Tensor dx = torch::stable::empty_like(x);
  const std::vector<int64_t> size = {x.size(0), x.size(1)};
  Tensor sum_dz = torch::stable::new_empty(x, size, ScalarType::Float), sum_dz_xhat = torch::stable::empty_like(sum_dz);
  if (x.numel() == 0) return {dx, torch::stable::zero_(sum_dz), torch::stable::zero_(sum_dz_xhat)};
  with_type(x.scalar_type(), s, [&](auto type, auto run) {
    using T = decltype(type);
    launch(backward_kernel<T, run>, x, s, 2, run, static_cast<const T*>(dy.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
           static_cast<T*>(dx.mutable_data_ptr()), static_cast<const float*>(mean.const_data_ptr()),
           static_cast<const float*>(rstd.const_data_ptr()), static_cast<float*>(sum_dz.mutable_data_ptr()),
           static_cast<float*>(sum_dz_xhat.mutable_data_ptr()), affine, s, silu);
  });
  return {dx, sum_dz, sum_dz_xhat};
}

STABLE_TORCH_LIBRARY_IMPL(ldm_sg, CUDA, m) {
  m.impl("group_norm_silu_slab", TORCH_BOX(&forward));
  m.impl("group_norm_silu_slab_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace ldm_sg

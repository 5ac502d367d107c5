// Tensors taken apart, and what a thread is worth waking for. LibTorch stable ABI, target 2.11.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "vector.h"

namespace ldm_sg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t ELEMENTS_PER_THREAD = 16384;  // fewer are not worth waking a thread for

// Call f(T{}) with the C++ type of a dtype.
template <class F>
void with_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(float{});
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
  if (dtype == ScalarType::Half) return f(Half{});
  STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Set by tests: new tensors are NaN then, and show what a kernel has not written.
extern "C" {
[[gnu::visibility("default")]] inline bool ldm_sg_poison = false;
}

// A new tensor. What torch::stable offers looks its operator up by name at every call, longer than a small map takes.
inline Tensor empty(int64_t dims, const int64_t* size, const int64_t* stride, ScalarType dtype) {
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, size, stride, number, aoti_torch_device_type_cpu(), 0, &made));
  Tensor t(made);
  const int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  if (ldm_sg_poison) std::memset(t.data_ptr(), 0xff, t.numel() * bytes);
  return t;
}

template <size_t N>
Tensor empty(const std::array<int64_t, N>& size, ScalarType dtype) {
  std::array<int64_t, N> stride;
  int64_t step = 1;
  for (size_t i = N; i-- > 0; step *= size[i]) stride[i] = step;
  return empty(N, size.data(), stride.data(), dtype);
}

// With the dtype and the memory layout of x, which is dense.
inline Tensor empty_as(const Tensor& x) {
  int64_t *size, *stride;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &stride));
  return empty(x.dim(), size, stride, x.scalar_type());
}

}  // namespace ldm_sg

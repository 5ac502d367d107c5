// As much of CUDA and of torch's stable ABI as csrc/cuda asks for, on the host: every thread of a block is a fiber that
// runs to its next barrier. What a GPU would forgive only at times is an error at once: reading a copy that was not
// waited for (it is made when it is waited for; all memory is NaN before), a barrier that not every thread reaches, a
// misaligned copy, a write outside of shared memory, a result that depends on the order of the threads.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define STD_TORCH_CHECK(condition, ...) \
  do {                                  \
    if (!(condition)) throw std::runtime_error("not so: " #condition); \
  } while (0)
#define STD_CUDA_CHECK(call) STD_TORCH_CHECK((call) == 0)
#define TORCH_ERROR_CODE_CHECK(call) STD_TORCH_CHECK((call) == 0)
#define STD_CUDA_KERNEL_LAUNCH_CHECK()

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }
inline __half __float2half_rn(float v) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(v))}; }
inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  return {static_cast<uint16_t>(v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0)};
}
inline float __expf(float v) { return std::exp(v); }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }

namespace host {

constexpr size_t MOST_SHARED = 227 * 1024, GUARD = 4096;
enum class State { RUNS, AT_BLOCK, AT_WARP, ENDED };

struct Fiber {
  ucontext_t at;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  State state;
  float lane;  // what it shows to its warp
  std::vector<std::tuple<void*, const void*, size_t>> asked, committed;  // copies
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t current;
inline const std::function<void()>* body;
inline std::string error;
inline int order;  // of the threads: 0 as they are numbered, 1 backwards, 2 by chance
inline unsigned char* shared;

inline void leave(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].at, &scheduler);
}

inline void run_thread() {
  try {
    (*body)();
    STD_TORCH_CHECK(fibers[current].asked.empty() && fibers[current].committed.empty());
  } catch (const std::exception& e) {
    error = e.what();
  }
  leave(State::ENDED);
}

inline size_t count(State state, size_t first, size_t last) {
  return std::count_if(&fibers[first], &fibers[0] + last, [=](const Fiber& f) { return f.state == state; });
}

// Let those go on that wait for each other and are all there; false where there are none.
inline bool pass_barriers() {
  const size_t all = fibers.size(), ended = count(State::ENDED, 0, all);
  bool passed = false;
  for (size_t warp = 0; warp < all; warp += 32) {
    if (count(State::AT_WARP, warp, warp + 32) < 32) continue;
    for (size_t i = warp; i < warp + 32; ++i) fibers[i].state = State::RUNS;
    passed = true;
  }
  if (!ended && count(State::AT_BLOCK, 0, all) == all) {
    for (Fiber& f : fibers) f.state = State::RUNS;
    passed = true;
  }
  return passed;
}

}  // namespace host

struct Index {
  int x;
};
inline Index threadIdx, blockIdx;

namespace host {

inline void run_block(std::vector<size_t> turns) {
  static std::mt19937 chance(1);
  for (Fiber& f : fibers) {
    getcontext(&f.at);
    f.at.uc_stack = {.ss_sp = f.stack.data(), .ss_flags = 0, .ss_size = f.stack.size()};
    f.at.uc_link = &scheduler;
    makecontext(&f.at, run_thread, 0);
    f.state = State::RUNS, f.asked.clear(), f.committed.clear();
  }
  do {
    if (order == 2) std::shuffle(turns.begin(), turns.end(), chance);
    for (const size_t i : turns) {
      if (fibers[i].state != State::RUNS) continue;
      current = i, threadIdx.x = static_cast<int>(i);
      swapcontext(&scheduler, &fibers[i].at);
    }
  } while (error.empty() && pass_barriers());
  if (!error.empty()) throw std::runtime_error(error);
  STD_TORCH_CHECK(count(State::ENDED, 0, fibers.size()) == fibers.size());  // else some wait for threads that ended
}

inline void launch(unsigned blocks, size_t threads, size_t bytes, const std::function<void()>& kernel) {
  STD_TORCH_CHECK(bytes <= MOST_SHARED);
  std::vector<unsigned char> memory(bytes + 3 * GUARD);
  const auto guarded = [&](unsigned char* from, unsigned char* to) {
    return std::all_of(from, to, [](unsigned char b) { return b == 0xff; });
  };
  fibers.resize(threads), body = &kernel, error.clear();
  shared = memory.data() + 2 * GUARD - reinterpret_cast<uintptr_t>(memory.data()) % GUARD;
  std::vector<size_t> turns(threads);
  for (size_t i = 0; i < threads; ++i) turns[i] = order == 1 ? threads - 1 - i : i;
  for (unsigned block = 0; block < blocks; ++block) {
    std::fill(memory.begin(), memory.end(), 0xff);  // NaN
    blockIdx.x = static_cast<int>(block);
    run_block(turns);
    STD_TORCH_CHECK(guarded(memory.data(), shared) && guarded(shared + bytes, memory.data() + memory.size()));
  }
}

}  // namespace host

inline void __syncthreads() { host::leave(host::State::AT_BLOCK); }
inline float __shfl_xor_sync(unsigned, float v, int apart) {
  host::fibers[host::current].lane = v;
  host::leave(host::State::AT_WARP);
  const float other = host::fibers[host::current ^ apart].lane;
  host::leave(host::State::AT_WARP);
  return other;
}
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  STD_TORCH_CHECK(bytes == 4 || bytes == 8 || bytes == 16);
  STD_TORCH_CHECK((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes == 0);
  host::fibers[host::current].asked.emplace_back(to, from, bytes);
}
inline void __pipeline_commit() {
  host::Fiber& f = host::fibers[host::current];
  f.committed.insert(f.committed.end(), f.asked.begin(), f.asked.end());
  f.asked.clear();
}
inline void __pipeline_wait_prior(int) {
  host::Fiber& f = host::fibers[host::current];
  for (const auto& [to, from, bytes] : f.committed) std::memcpy(to, from, bytes);
  f.committed.clear();
}

using cudaStream_t = void*;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return 0;
}
inline int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }

namespace torch::headeronly {
enum class ScalarType : int32_t { Half, Float, BFloat16 };
}

namespace torch::stable {

using headeronly::ScalarType;

// What the test hands over; results are written where it says, in the order in which they are made.
struct Tensor {
  void* data;
  int64_t dims, sizes[4], strides[4];
  ScalarType dtype;
  int64_t dim() const { return dims; }
  int64_t size(int64_t d) const { return sizes[d]; }
  int64_t stride(int64_t d) const { return strides[d]; }
  int64_t numel() const { return dims == 4 ? sizes[0] * sizes[1] * sizes[2] * sizes[3] : sizes[0] * sizes[1]; }
  ScalarType scalar_type() const { return dtype; }
  int get_device_index() const { return 0; }
  const void* const_data_ptr() const { return data; }
  void* mutable_data_ptr() const { return data; }
};

inline void* const* results;
inline Tensor empty_like(Tensor x) {
  x.data = *results++;
  return x;
}
inline Tensor new_empty(const Tensor&, const std::vector<int64_t>& size, ScalarType dtype) {
  return {*results++, 2, {size[0], size[1]}, {size[1], 1}, dtype};
}
inline Tensor zero_(Tensor x) { return x; }

namespace accelerator {
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
}  // namespace accelerator

}  // namespace torch::stable

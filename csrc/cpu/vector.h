// Vectors of float as wide as the target of this compilation, and the 16-bit types in memory beside them.
//
// setup.py compiles every file of csrc/cpu once per instruction set, each into a shared object of its own, and
// ldm_sg/ops/extension.py loads the one that this CPU runs: no file here chooses at run time.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ldm_sg {

#if defined(__AVX512F__)
inline constexpr int LANES = 16;
#else
inline constexpr int LANES = 8;
#endif

using Vec = float __attribute__((vector_size(4 * LANES)));
using VecI = int32_t __attribute__((vector_size(4 * LANES)));
using VecU = uint32_t __attribute__((vector_size(4 * LANES)));
using VecD = double __attribute__((vector_size(8 * LANES)));
using VecH = uint16_t __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline Vec splat(float value) { return Vec{} + value; }

// Numbers up to 65535 to and from 16 bits, and the larger and smaller of two (a where either is NaN): compilers know
// these instructions, but do not find them.
#if defined(__AVX512F__)
inline VecU widen(VecH v) { return std::bit_cast<VecU>(_mm512_cvtepu16_epi32(std::bit_cast<__m256i>(v))); }
inline VecH narrow(VecU v) { return std::bit_cast<VecH>(_mm512_cvtepi32_epi16(std::bit_cast<__m512i>(v))); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(b, a); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(b, a); }
#elif defined(__AVX2__)
inline VecU widen(VecH v) { return std::bit_cast<VecU>(_mm256_cvtepu16_epi32(std::bit_cast<__m128i>(v))); }
inline VecH narrow(VecU v) {
  const auto all = std::bit_cast<__m256i>(v);
  return std::bit_cast<VecH>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(b, a); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(b, a); }
#else
inline VecU widen(VecH v) { return __builtin_convertvector(v, VecU); }
inline VecH narrow(VecU v) { return __builtin_convertvector(v, VecH); }
inline Vec larger(Vec a, Vec b) { return b > a ? b : a; }
inline Vec smaller(Vec a, Vec b) { return b < a ? b : a; }
#endif

inline Vec to_float(VecH bits, BFloat16) { return std::bit_cast<Vec>(widen(bits) << 16); }

inline VecH from_float(Vec v, BFloat16) {  // to nearest, ties to even
  const VecU bits = std::bit_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow(v == v ? rounded : VecU{} + 0x7fc0u);
}

inline Vec to_float(VecH bits, Half) {
#if defined(__AVX512F__)
  return std::bit_cast<Vec>(_mm512_cvtph_ps(std::bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return std::bit_cast<Vec>(_mm256_cvtph_ps(std::bit_cast<__m128i>(bits)));
#else
  Vec v{};
  for (int i = 0; i < LANES; ++i) v[i] = static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits[i])));
  return v;
#endif
}

inline VecH from_float(Vec v, Half) {
#if defined(__AVX512F__)
  return std::bit_cast<VecH>(_mm512_cvtps_ph(std::bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return std::bit_cast<VecH>(_mm256_cvtps_ph(std::bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  VecH bits{};
  for (int i = 0; i < LANES; ++i) bits[i] = std::bit_cast<uint16_t>(static_cast<_Float16>(v[i]));
  return bits;
#endif
}

// The first `count` elements at p, the other lanes 0.
template <class T>
[[gnu::always_inline]] inline Vec load(const T* p, int count = LANES) {
  if constexpr (sizeof(T) == 4) {
    Vec v{};
    std::memcpy(&v, p, count == LANES ? sizeof v : count * sizeof(T));
    return v;
  } else {
    VecH bits{};
    std::memcpy(&bits, p, count == LANES ? sizeof bits : count * sizeof(T));
    return to_float(bits, T{});
  }
}

template <class T>
[[gnu::always_inline]] inline void store(T* p, Vec v, int count = LANES) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(p, &v, count == LANES ? sizeof v : count * sizeof(T));
  } else {
    VecH bits = from_float(v, T{});
    std::memcpy(p, &bits, count == LANES ? sizeof bits : count * sizeof(T));
  }
}

// Lanes I of (a, b).
template <class V, int... I>
inline V lanes(V a, V b, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else
  using Index = std::conditional_t<std::is_same_v<V, Vec>, int32_t, int64_t>;
  using Indices __attribute__((vector_size(sizeof(V)))) = Index;
  return __builtin_shuffle(a, b, Indices{I...});
#endif
}

using AllLanes = std::make_integer_sequence<int, LANES>;

// All lanes joined by f, in a tree.
template <int HALF = LANES / 2, class V, class F, int... I>
inline auto folded(V v, const F& f, std::integer_sequence<int, I...> all) {
  const V joined = f(v, lanes(v, v, std::integer_sequence<int, (I ^ HALF)...>{}));
  if constexpr (HALF == 1) return joined[0];
  else return folded<HALF / 2>(joined, f, all);
}

template <class V>
inline auto sum_of(V v) {
  return folded(v, [](V a, V b) { return a + b; }, AllLanes{});
}

using Full = std::integral_constant<int, LANES>;

// Call f(i, lanes) along `count` elements: i steps by LANES, and `lanes` is a constant but for the last call.
template <class F>
[[gnu::always_inline]] inline void for_vectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) f(i, Full{});
  if (i < count) f(i, static_cast<int>(count - i));
}

// The same by N vectors while they last: f(i, N, lanes), then f(i, 1, lanes). Their chains of operations overlap.
template <int N, class F>
[[gnu::always_inline]] inline void for_wide(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + N * LANES <= count; i += N * LANES) f(i, std::integral_constant<int, N>{}, Full{});
  for_vectors(count - i, [&](int64_t j, auto lanes) { f(i + j, std::integral_constant<int, 1>{}, lanes); });
}

// q of e^r = 1 + r + r^2 q(r): of degree 2, 3 and 4, with the least relative error on |r| <= 0.347, 5e-6, 1.1e-7, 3e-9.
inline constexpr float EXP_TERMS[][5] = {{0.50005144f, 0.16753727f, 0.041276816f},
                                         {0.49999228f, 0.16667117f, 0.04189065f, 0.008312467f},
                                         {0.49999994f, 0.1666651964f, 0.0416684002f, 0.0083688563f, 0.0013814309f}};

// e^u, u = SIGN v: 0 below -87.6, infinity above 88.3, NaN for NaN. e^r is a polynomial of DEGREE 4, 5 or 6; 6 errs
// by 6.1e-8 with its rounding. A degree costs a twelfth of silu, which its multiply-adds bind.
//
// e^v = 2^n e^r with n = round(v / ln 2).
template <int SIGN = 1, int DEGREE = 6>
inline Vec exp(Vec v) {
  constexpr float s = SIGN, low = SIGN > 0 ? -88.0f : -89.0f;
  v = smaller(larger(v, splat(low)), splat(low + 177.0f));  // n from -127 to 128: exponents of 0 and of infinity
  const float magic = 12583039.0f;  // 1.5 * 2^23 + 127: added, it leaves n + 127, an exponent, in the low bits
  const Vec shifted = v * (s * 1.44269504f) + magic;
  const Vec power = std::bit_cast<Vec>(std::bit_cast<VecI>(shifted) << 23);
  const Vec r = v - (shifted - magic) * (s * 0.69314718f);  // SIGN times r, to be exact
  constexpr auto& q = EXP_TERMS[DEGREE - 4];
  Vec p = splat((DEGREE % 2 ? s : 1.0f) * q[DEGREE - 2]);
  for (int k = DEGREE - 1; k > 1; --k) p = p * r + (k % 2 ? s : 1.0f) * q[k - 2];
  p = p * r + s;
  p = p * r + 1.0f;
  return p * power;
}

// Of results that are stored as T.
template <class T>
inline Vec one_plus_exp_minus(Vec v) {
  return 1.0f + exp<-1, sizeof(T) == 4 ? 5 : 4>(v);
}
template <class T>
inline Vec sigmoid(Vec v) {
  return 1.0f / one_plus_exp_minus<T>(v);
}
template <class T>
inline Vec silu(Vec v) {
  return v / one_plus_exp_minus<T>(v);
}

}  // namespace ldm_sg

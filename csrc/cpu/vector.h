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

// Bits whose upper half is v as bfloat16, to nearest, ties away from zero: three operations fewer than ties to even.
inline VecU rounded(Vec v, BFloat16) {
  return (std::bit_cast<VecU>(v) + 0x8000u) | std::bit_cast<VecU>(v != v);
}
inline VecH from_float(Vec v, BFloat16 type) { return narrow(rounded(v, type) >> 16); }

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

// The same by N vectors while they last, then by 2: f(i, N, lanes), then f(i, 1, lanes). Their operations overlap.
template <int N, class F>
[[gnu::always_inline]] inline void for_wide(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + N * LANES <= count; i += N * LANES) f(i, std::integral_constant<int, N>{}, Full{});
  if constexpr (N > 2) {
    for (; i + 2 * LANES <= count; i += 2 * LANES) f(i, std::integral_constant<int, 2>{}, Full{});
  }
  for_vectors(count - i, [&](int64_t j, auto lanes) { f(i + j, std::integral_constant<int, 1>{}, lanes); });
}

// N vectors side by side in memory. Pairs of bfloat16 are woven: the even numbers of 2 LANES, then the odd ones, which
// takes half the operations of keeping their order. Constants to go with them are woven by `weave`.
template <int N>
struct Vecs {
  Vec v[N];
  Vec& operator[](int i) { return v[i]; }
};
template <class T>
inline constexpr bool WOVEN = std::is_same_v<T, BFloat16>;

template <int N, class T>
[[gnu::always_inline]] inline Vecs<N> load_wide(const T* p, int count = LANES) {
  Vecs<N> to;
  if constexpr (WOVEN<T> && N % 2 == 0) {
    for (int i = 0; i < N; i += 2) {
      VecU pair;
      std::memcpy(&pair, p + i * LANES, sizeof pair);
      to[i] = std::bit_cast<Vec>(pair << 16), to[i + 1] = std::bit_cast<Vec>(pair & 0xffff0000u);
    }
  } else {
    for (int i = 0; i < N; ++i) to[i] = load(p + i * LANES, count);
  }
  return to;
}

template <int N, class T>
[[gnu::always_inline]] inline void store_wide(T* p, Vecs<N> from, int count = LANES) {
  if constexpr (WOVEN<T> && N % 2 == 0) {
    for (int i = 0; i < N; i += 2) {
      const VecU pair = rounded(from[i], T{}) >> 16 | (rounded(from[i + 1], T{}) & 0xffff0000u);
      std::memcpy(p + i * LANES, &pair, sizeof pair);
    }
  } else {
    for (int i = 0; i < N; ++i) store(p + i * LANES, from[i], count);
  }
}

// Weave numbers as pairs of T are, or put them back into their order.
template <class T, bool BACK = false, int... I>
inline void weave(float* values, int64_t count, std::integer_sequence<int, I...> = {}) {
  if constexpr (!WOVEN<T>) return;
  else if constexpr (sizeof...(I) == 0) return weave<T, BACK>(values, count, AllLanes{});
  else {
    for (; count >= 2 * LANES; count -= 2 * LANES, values += 2 * LANES) {
      const Vec a = load(values), b = load(values + LANES);
      constexpr auto from = [](int i) { return BACK ? i / 2 + i % 2 * LANES : i % LANES * 2 + i / LANES; };
      store(values, lanes(a, b, std::integer_sequence<int, from(I)...>{}));
      store(values + LANES, lanes(a, b, std::integer_sequence<int, from(I + LANES)...>{}));
    }
  }
}

// 2^f = sum of terms[k] f^k: of degree 3, 4 and 5, with relative errors of 1e-4, 3e-6 and 1.2e-7 on |f| <= 0.5.
inline constexpr double EXP2_TERMS[][6] = {{1, 0.693283021, 0.242211789, 0.0550088175},
                                           {1, 0.693123996, 0.240241155, 0.0559075996, 0.00958089251},
                                           {1, 0.693146974, 0.240222686, 0.0555074449, 0.00967059199, 0.00132605165}};
inline constexpr double LOG2_E = 1.4426950408889634;

// factor 2^u, u = SIGN v from -127, where it is 0, to 128, where it is infinity, by a polynomial of DEGREE: 2^n 2^f with
// n = round(u). Powers of two, not of e: what multiplies v anyway can take log2(e) along.
template <int SIGN, int DEGREE>
[[gnu::always_inline]] inline Vec exp2(Vec v, double factor = 1) {
  constexpr auto& terms = EXP2_TERMS[DEGREE - 3];
  const auto term = [=](int k) { return static_cast<float>((k % 2 ? SIGN : 1) * factor * terms[k]); };
  const float magic = 12583039.0f;  // 1.5 * 2^23 + 127: added, it leaves n + 127, an exponent, in the low bits
  const Vec shifted = SIGN > 0 ? magic + v : magic - v;
  const Vec power = std::bit_cast<Vec>(std::bit_cast<VecI>(shifted) << 23);
  const Vec f = SIGN > 0 ? v - (shifted - magic) : v + (shifted - magic);  // SIGN times f, to be exact
  Vec p = splat(term(DEGREE));
  for (int k = DEGREE - 1; k >= 0; --k) p = p * f + term(k);
  return p * power;
}

// log2(e) (1 + e^-z), z = u / log2(e), for results that are stored as T; u from -128 to 127.
template <class T>
[[gnu::always_inline]] inline Vec log2e_over_sigmoid(Vec u) {
  return static_cast<float>(LOG2_E) + exp2<-1, sizeof(T) == 4 ? 5 : std::is_same_v<T, BFloat16> ? 3 : 4>(u, LOG2_E);
}
inline Vec clamped(Vec u) { return smaller(larger(u, splat(-128.0f)), splat(127.0f)); }

}  // namespace ldm_sg

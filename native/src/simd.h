// Vectors of one instruction set. Every translation unit that includes this header defines LLORCH_ISA (a namespace) and
// LLORCH_BYTES (the width of a vector) first. Nothing here or in products.h may call an inline function of the
// standard library: the linker keeps one copy of such a function, which might be one with instructions that the
// machine does not have.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if !defined(LLORCH_ISA) || !defined(LLORCH_BYTES)
#error "Define LLORCH_ISA and LLORCH_BYTES before including simd.h."
#endif

#define LLORCH_INLINE inline __attribute__((always_inline))
// An array of sums stays in registers only if the loops over it are unrolled before the compiler allocates registers.
#define LLORCH_UNROLL _Pragma("GCC unroll 16")

namespace llorch::LLORCH_ISA {

constexpr int kLanes = LLORCH_BYTES / 4;   // of float and int32
constexpr int kShorts = LLORCH_BYTES / 2;  // of int16

typedef float Floats __attribute__((vector_size(LLORCH_BYTES)));
typedef int32_t Ints __attribute__((vector_size(LLORCH_BYTES)));
typedef uint32_t Words __attribute__((vector_size(LLORCH_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(LLORCH_BYTES)));
typedef int16_t HalfShorts __attribute__((vector_size(LLORCH_BYTES / 2)));
typedef uint16_t HalfWords __attribute__((vector_size(LLORCH_BYTES / 2)));
typedef uint8_t Bytes __attribute__((vector_size(LLORCH_BYTES)));
typedef int8_t HalfBytes __attribute__((vector_size(LLORCH_BYTES / 2)));
typedef int8_t QuarterBytes __attribute__((vector_size(LLORCH_BYTES / 4)));
typedef uint8_t QuarterUnsignedBytes __attribute__((vector_size(LLORCH_BYTES / 4)));

template <typename Vector>
LLORCH_INLINE Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename Vector>
LLORCH_INLINE void store(void* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// A copy without a function call, which would force all sums out of registers even if it is never reached.
template <typename Element>
LLORCH_INLINE void copy(Element* to, const Element* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = from[i];
}

// As many lanes as there are elements, `count` of them or a whole vector; zeros in the others.
LLORCH_INLINE Floats load_some(const float* from, size_t count) {
  if (count >= kLanes) return load<Floats>(from);
  float some[kLanes] = {};
  copy(some, from, count);
  return load<Floats>(some);
}

LLORCH_INLINE void store_some(float* to, Floats values, size_t count) {
  if (count >= kLanes) return store(to, values);
  float some[kLanes];
  store(some, values);
  copy(to, some, count);
}

LLORCH_INLINE Floats broadcast(float value) { return value - Floats{}; }

// The four bytes at an address, in every lane.
LLORCH_INLINE Words broadcast_word(const void* from) {
  uint32_t word;
  __builtin_memcpy(&word, from, sizeof(word));
  return word + Words{};
}

// a * b + c, rounded only once if the instruction set has a fused operation.
LLORCH_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if LLORCH_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif LLORCH_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Adds a[2i] * b[2i] + a[2i + 1] * b[2i + 1] to lane i.
LLORCH_INLINE Ints add_products_of_pairs(Ints sums, Shorts a, Shorts b) {
#if LLORCH_BYTES == 64
  return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif LLORCH_BYTES == 32
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sums + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const Ints even = ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16);
  const Ints odd = ((Ints)a >> 16) * ((Ints)b >> 16);
  return sums + even + odd;
#endif
}

#if LLORCH_BYTES == 64
// Adds to each lane the products of its four bytes, unsigned ones of a and signed ones of b.
LLORCH_INLINE Ints add_products_of_bytes(Ints sums, Words a, Words b) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
}
#endif

// Adds to each lane the products of its four codes, 0 to 15, and four signed bytes, for two vectors of codes.
LLORCH_INLINE Ints add_products_of_fours(Ints sums, const Bytes (&codes)[2], const int8_t* first, const int8_t* second) {
#if LLORCH_BYTES == 64
  const __m512i some = _mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes[0], load<__m512i>(first));
  return (Ints)_mm512_dpbusd_epi32(some, (__m512i)codes[1], load<__m512i>(second));
#elif LLORCH_BYTES == 32
  const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)codes[0], load<__m256i>(first)),
                                         _mm256_maddubs_epi16((__m256i)codes[1], load<__m256i>(second)));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const int8_t* from[2] = {first, second};
  for (int i = 0; i < 2; ++i) {
    const Shorts bytes = load<Shorts>(from[i]);
    const Shorts even = (Shorts)codes[i] & 15;
    sums = add_products_of_pairs(sums, even, bytes << 8 >> 8);
    sums = add_products_of_pairs(sums, (Shorts)codes[i] >> 8, bytes >> 8);
  }
  return sums;
#endif
}

// kCount values, each in as many consecutive lanes.
template <int kCount>
LLORCH_INLINE Floats spread(const float* values) {
#if LLORCH_BYTES == 64
  if constexpr (kCount == 4) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_maskz_permutexvar_ps(0xffff, lanes, _mm512_maskz_broadcast_f32x4(0xffff, load<__m128>(values)));
  }
#endif
  Floats of = broadcast(values[0]);
  for (int i = 1; i < kCount; ++i) {
    Ints here;
    for (int lane = 0; lane < kLanes; ++lane) here[lane] = lane / (kLanes / kCount) == i ? -1 : 0;
    of = here ? broadcast(values[i]) : of;
  }
  return of;
}

#if LLORCH_BYTES == 64
// Four elements, four times.
LLORCH_INLINE Words repeat(const void* four) {
  return (Words)_mm512_maskz_broadcast_f32x4(0xffff, load<__m128>(four));
}
#endif

LLORCH_INLINE Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

template <typename Narrow>
LLORCH_INLINE Narrow narrow(Ints values) {
  return __builtin_convertvector(values, Narrow);
}

LLORCH_INLINE Shorts widen(HalfBytes values) {
#if LLORCH_BYTES == 64
  return (Shorts)_mm512_maskz_cvtepi8_epi16(0xffffffff, (__m256i)values);
#elif LLORCH_BYTES == 32
  return (Shorts)_mm256_cvtepi8_epi16((__m128i)values);
#else
  return __builtin_convertvector(values, Shorts);
#endif
}

LLORCH_INLINE Words widen(HalfWords values) {
#if LLORCH_BYTES == 64
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)values);
#elif LLORCH_BYTES == 32
  return (Words)_mm256_cvtepu16_epi32((__m128i)values);
#else
  return __builtin_convertvector(values, Words);
#endif
}

LLORCH_INLINE Floats to_floats(QuarterBytes values) {
#if LLORCH_BYTES == 64
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)values));
#elif LLORCH_BYTES == 32
  long long bits;
  __builtin_memcpy(&bits, &values, sizeof(bits));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits)));
#else
  return __builtin_convertvector(values, Floats);
#endif
}

LLORCH_INLINE Floats to_floats(QuarterUnsignedBytes values) {
  return to_floats((QuarterBytes)values);  // these bytes never exceed 127
}

LLORCH_INLINE Floats from_bfloat16(HalfWords bits) { return (Floats)(widen(bits) << 16); }

LLORCH_INLINE Floats from_float16(HalfWords bits) {
#if LLORCH_BYTES == 64
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#elif LLORCH_BYTES == 32
  return _mm256_cvtph_ps((__m128i)bits);
#else
  // Exponents are biased by 127 instead of 15. Subnormal numbers are multiples of 2^-24, computed from integers because
  // float32 products may flush subnormals to zero; infinities and NaNs keep the largest exponent.
  const Words word = widen(bits);
  const Words magnitude = word & 0x7fff;
  const Words normal = (magnitude << 13) + (112u << 23);
  const Words special = (magnitude << 13) | 0x7f800000;
  const Words subnormal = (Words)(to_floats((Ints)magnitude) * 0x1p-24f);
  Words result = magnitude >= 0x7c00 ? special : normal;
  result = magnitude < 0x0400 ? subnormal : result;
  return (Floats)(result | ((word & 0x8000) << 16));
#endif
}

// The sum of all lanes, always added in the same order: one half to the other, repeatedly. It uses registers only: an
// array in memory, even a short-lived one, would keep the arguments in memory all the time.
typedef float Quarter __attribute__((vector_size(16)));
typedef int32_t QuarterInts __attribute__((vector_size(16)));

LLORCH_INLINE float sum_quarter(Quarter values) { return (values[0] + values[2]) + (values[1] + values[3]); }

LLORCH_INLINE float sum(Floats values) {
#if LLORCH_BYTES == 64
  const __m256 half = _mm512_maskz_extractf32x8_ps(0xff, values, 0) + _mm512_maskz_extractf32x8_ps(0xff, values, 1);
  return sum_quarter(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif LLORCH_BYTES == 32
  return sum_quarter(_mm256_castps256_ps128(values) + _mm256_extractf128_ps(values, 1));
#else
  return sum_quarter(values);
#endif
}

LLORCH_INLINE int32_t sum(Ints values) {
#if LLORCH_BYTES == 64
  const __m256i half = _mm256_add_epi32(_mm512_maskz_extracti32x8_epi32(0xff, (__m512i)values, 0),
                                        _mm512_maskz_extracti32x8_epi32(0xff, (__m512i)values, 1));
#elif LLORCH_BYTES == 32
  const __m256i half = (__m256i)values;
#endif
#if LLORCH_BYTES >= 32
  const auto quarter = (QuarterInts)_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
#else
  const auto quarter = (QuarterInts)values;
#endif
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// Indices from 0 on, as template arguments.
template <int... kIndices>
struct Sequence {};
template <int kCount, int... kIndices>
struct UpTo : UpTo<kCount - 1, kCount - 1, kIndices...> {};
template <int... kIndices>
struct UpTo<0, kIndices...> {
  typedef Sequence<kIndices...> type;
};

// The lanes of (a, b) that form the first halves of consecutive groups of 2 * kWidth lanes.
template <int kWidth>
constexpr int first_half(int lane) {
  return lane / kWidth * 2 * kWidth + lane % kWidth;
}

// For each group of 2 * kWidth lanes of a, then of b, the sum of its two halves.
template <int kWidth, typename Vector, int... kIndices>
LLORCH_INLINE Vector fold(Vector a, Vector b, Sequence<kIndices...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, first_half<kWidth>(kIndices)...) +
         __builtin_shufflevector(a, b, (first_half<kWidth>(kIndices) + kWidth)...);
#else
  return __builtin_shuffle(a, b, Ints{first_half<kWidth>(kIndices)...}) +
         __builtin_shuffle(a, b, Ints{(first_half<kWidth>(kIndices) + kWidth)...});
#endif
}

// Lane i of the result is sum(vectors[i]), added in the same order.
template <int kCount = kLanes, typename Vector>
LLORCH_INLINE Vector sums(Vector (&vectors)[kLanes]) {
  if constexpr (kCount == 1) {
    return vectors[0];
  } else {
    LLORCH_UNROLL for (int i = 0; i < kCount / 2; ++i) {
      vectors[i] = fold<kCount / 2>(vectors[2 * i], vectors[2 * i + 1], typename UpTo<kLanes>::type());
    }
    return sums<kCount / 2>(vectors);
  }
}

LLORCH_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

LLORCH_INLINE float largest(Floats values) {
  float most = values[0];
  for (int i = 1; i < kLanes; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

// e to the power of x, for x up to 0: 2^k times a polynomial of the remainder (Cephes, expf), with a relative error of
// about 1e-7; 0 where the result is below float32's normal range. NaN stays NaN.
LLORCH_INLINE Floats exponential(Floats x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  constexpr int32_t kRounderBits = 0x4b400000;
  const Floats shifted = x * 1.44269504088896341f + kRounder;
  const Floats k = shifted - kRounder;
  const Floats rest = multiply_add(k, broadcast(2.12194440e-4f), multiply_add(k, broadcast(-0.693359375f), x));
  Floats p = broadcast(1.9875691500e-4f);
  p = multiply_add(p, rest, broadcast(1.3981999507e-3f));
  p = multiply_add(p, rest, broadcast(8.3334519073e-3f));
  p = multiply_add(p, rest, broadcast(4.1665795894e-2f));
  p = multiply_add(p, rest, broadcast(1.6666665459e-1f));
  p = multiply_add(p, rest, broadcast(5.0000001201e-1f));
  p = multiply_add(p, rest * rest, rest + 1.0f);
  const Ints exponents = ((Ints)shifted - kRounderBits + 127) << 23;
  return x < broadcast(-87.0f) ? Floats{} : p * (Floats)exponents;
}

}  // namespace llorch::LLORCH_ISA

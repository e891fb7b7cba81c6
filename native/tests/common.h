// Random numbers and memory for the driver.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>

inline std::mt19937 random_bits(1);

inline int between(int least, int most) { return std::uniform_int_distribution<int>(least, most)(random_bits); }

// Memory that ends where the sanitizer's red zone begins, and starts at an odd multiple of the elements' size.
template <typename Element>
struct Array {
  explicit Array(size_t count) : memory(new Element[count + 1]), data(memory.get() + 1), size(count) {
    for (size_t i = 0; i < count; ++i) data[i] = Element{};
  }
  std::unique_ptr<Element[]> memory;
  Element* data;
  size_t size;
};

inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const float mantissa = static_cast<float>(bits & 1023);
  const float size = exponent ? std::ldexp(mantissa + 1024, exponent - 25) : std::ldexp(mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

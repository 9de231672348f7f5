// The bank update, f <- normalise(m * f + (1 - m) * f_new / |f_new|)  (eq. 15 of the NTDNE paper),
// for B features of D values each that go into rows of an (N, D) bank.
#pragma once

#include "float_type.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <type_traits>

namespace ntdne_kernels {

// Sums and products of a float64 bank are float64, of every other bank float32.
template <typename row_t>
using accumulator_t = std::conditional_t<std::is_same_v<row_t, double>, double, float>;

// A row whose blend with the new feature is shorter than this, or not finite, becomes the new feature.
constexpr double kVanishing = 1e-12;

// Index of a feature that belongs to no bank row: the update leaves it out.
constexpr int64_t kNotInBank = -1;

// An index outside of what it counts.
constexpr int64_t kWrong = -2;

// Row of a feature: its index or, where there is a `position` (images values), the entry that the index counts.
#ifdef __CUDACC__
__host__ __device__
#endif
inline int64_t row_of(int64_t index, const int64_t* position, int64_t images) {
  if (position == nullptr || index == kNotInBank) {
    return index;
  }
  return index >= 0 && index < images ? position[index] : kWrong;
}

// What keeps the kernels inside their buffers; everything a user can get wrong is explained in Python.
inline void check_arguments(
    const Tensor& bank, const Tensor& features, const Tensor& index, const std::optional<Tensor>& position) {
  const auto on_bank_device = [&](const Tensor& tensor) {
    return tensor.get_device_index() == bank.get_device_index() && tensor.is_cuda() == bank.is_cuda();
  };
  STD_TORCH_CHECK(bank.dim() == 2 && bank.size(1) > 0 && bank.is_contiguous(), "update_bank_: bank must be contiguous, (N, D)");
  STD_TORCH_CHECK(features.dim() == 2 && features.size(1) == bank.size(1), "update_bank_: features must be (B, D)");
  STD_TORCH_CHECK(
      index.dim() == 1 && index.size(0) == features.size(0) && index.scalar_type() == ScalarType::Long,
      "update_bank_: index must be (B,) and int64");
  STD_TORCH_CHECK(
      !position || (position->dim() == 1 && position->scalar_type() == ScalarType::Long),
      "update_bank_: position must be one-dimensional and int64");
  STD_TORCH_CHECK(
      on_bank_device(features) && on_bank_device(index) && (!position || on_bank_device(*position)),
      "update_bank_: bank, features, index and position must be on one device");
}

// The tensor, contiguous and outside the bank's memory: a kernel that reads what it has written would mix old rows with
// new ones. Whoever calls cannot see to it, for a compiler may drop the copy made before the call. The ordinary case
// compares addresses and copies nothing.
inline Tensor dense_beside(const Tensor& bank, const Tensor& tensor) {
  const auto begin = [](const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); };
  const auto end = [&](const Tensor& x) { return begin(x) + x.numel() * x.element_size(); };
  const Tensor dense = torch::stable::contiguous(tensor);
  return begin(dense) < end(bank) && begin(bank) < end(dense) ? torch::stable::clone(dense) : dense;
}

// Tells autograd that the bank changes, as every in-place op of PyTorch does: a backward that saved the old rows then
// raises instead of using the new ones. The stable ABI has no call for it; copying a tensor onto itself does that and
// moves no data. (The same from a kernel in Python made a call 6 us longer.)
inline void bump_version(Tensor& bank) {
  torch::stable::copy_(bank, bank);
}

}  // namespace ntdne_kernels

// The dtypes of a bank and of features, as C++ types.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace ntdne_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls function(x) with a value of the type of the tensor's elements; `name` says in an error what has another.
template <typename Function>
void dispatch_float_type(const Tensor& tensor, const char* name, Function&& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace ntdne_kernels

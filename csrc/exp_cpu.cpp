// CPU kernel of ntdne_kernels::exp_: x = exp(x) in place for a contiguous float32 tensor.
#include "exp.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace ntdne_kernels {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 16384;

void exp_cpu(Tensor x) {
  STD_TORCH_CHECK(
      x.scalar_type() == torch::headeronly::ScalarType::Float && x.is_contiguous(), "exp_: expected contiguous float32");
  float* data = static_cast<float*>(x.mutable_data_ptr());
  torch::stable::parallel_for(
      0, x.numel(), kGrain, [&](int64_t begin, int64_t end) { exp_range(data, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(ntdne_kernels, CPU, m) {
  m.impl("exp_", TORCH_BOX(&exp_cpu));
}

}  // namespace
}  // namespace ntdne_kernels

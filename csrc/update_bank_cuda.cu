// CUDA kernel of ntdne_kernels::update_bank_: one launch, one warp per feature, no synchronisation with the host.
#include "update_bank.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cuda_runtime.h>

namespace ntdne_kernels {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// Features left out because of their norm or index, since the library was loaded; one counter on each device.
__device__ unsigned long long skipped_rows;

template <typename acc_t>
__device__ acc_t warp_sum(acc_t value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// A lane reads and writes the same elements of the row every time, so repeated updates of a row need no barrier.
template <typename row_t, typename feature_t>
__device__ void update_row(row_t* row, const feature_t* feature, int64_t D, accumulator_t<row_t> m, int lane) {
  using acc_t = accumulator_t<row_t>;
  acc_t squares = 0;
  for (int64_t d = lane; d < D; d += kWarp) {
    const acc_t x = static_cast<acc_t>(feature[d]);
    squares += x * x;
  }
  const acc_t feature_norm = sqrt(warp_sum(squares));
  if (!(feature_norm > 0 && isfinite(feature_norm))) {
    if (lane == 0) {
      atomicAdd(&skipped_rows, 1ull);
    }
    return;
  }
  const acc_t scale = 1 / feature_norm;
  const auto blend = [&](int64_t d) {
    return m * static_cast<acc_t>(row[d]) + (1 - m) * (static_cast<acc_t>(feature[d]) * scale);
  };
  squares = 0;
  for (int64_t d = lane; d < D; d += kWarp) {
    const acc_t x = blend(d);
    squares += x * x;
  }
  const acc_t norm = sqrt(warp_sum(squares));
  const bool has_direction = norm >= static_cast<acc_t>(kVanishing) && isfinite(norm);
  const acc_t rescale = 1 / norm;
  for (int64_t d = lane; d < D; d += kWarp) {
    row[d] = static_cast<row_t>(has_direction ? blend(d) * rescale : static_cast<acc_t>(feature[d]) * scale);
  }
}

// The first feature of each bank row applies all updates of that row in batch order: the same result as one after the
// other on a CPU. Finding the others is B index reads per warp, 2 KB that stay in cache at B = 256.
template <typename row_t, typename feature_t>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) update_bank_kernel(
    row_t* bank, const feature_t* features, const int64_t* index, const int64_t* position, int64_t images, int64_t N,
    int64_t B, int64_t D, accumulator_t<row_t> m) {
  const int lane = threadIdx.x % kWarp;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (mine >= B) {
    return;
  }
  const auto row = [&](int64_t i) { return row_of(index[i], position, images); };
  const int64_t target = row(mine);
  if (target < 0 || target >= N) {
    if (target != kNotInBank && lane == 0) {
      atomicAdd(&skipped_rows, 1ull);
    }
    return;
  }
  bool earlier = false;
  for (int64_t i = lane; i < mine; i += kWarp) {
    earlier |= row(i) == target;
  }
  if (__any_sync(kAllLanes, earlier)) {
    return;
  }
  for (int64_t first = mine; first < B; first += kWarp) {
    const bool same = first + lane < B && row(first + lane) == target;
    for (unsigned found = __ballot_sync(kAllLanes, same); found != 0; found &= found - 1) {
      const int64_t i = first + __ffs(found) - 1;
      update_row(bank + target * D, features + i * D, D, m, lane);
    }
  }
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void update_bank_cuda(
    Tensor bank, const Tensor& features, const Tensor& index, double momentum, const std::optional<Tensor>& position) {
  check_arguments(bank, features, index, position);
  bump_version(bank);
  const int64_t B = features.size(0);
  if (B == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(bank.get_device_index());
  const Tensor dense_features = dense_beside(bank, features);
  const Tensor dense_index = dense_beside(bank, index);
  const Tensor dense_position = position ? dense_beside(bank, *position) : dense_index;
  const cudaStream_t stream = static_cast<cudaStream_t>(current_stream(bank));
  const unsigned blocks = static_cast<unsigned>((B + kWarpsPerBlock - 1) / kWarpsPerBlock);
  dispatch_float_type(bank, "update_bank_: bank", [&](auto row) {
    using row_t = decltype(row);
    dispatch_float_type(features, "update_bank_: features", [&](auto feature) {
      using feature_t = decltype(feature);
      update_bank_kernel<<<blocks, kWarp * kWarpsPerBlock, 0, stream>>>(
          static_cast<row_t*>(bank.mutable_data_ptr()),
          static_cast<const feature_t*>(dense_features.const_data_ptr()),
          static_cast<const int64_t*>(dense_index.const_data_ptr()),
          position ? static_cast<const int64_t*>(dense_position.const_data_ptr()) : nullptr, dense_position.size(0),
          bank.size(0), B, features.size(1), static_cast<accumulator_t<row_t>>(momentum));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

int64_t skipped_rows_cuda(const Tensor& bank) {
  const torch::stable::accelerator::DeviceGuard guard(bank.get_device_index());
  const cudaStream_t stream = static_cast<cudaStream_t>(current_stream(bank));
  unsigned long long count = 0;
  STD_CUDA_CHECK(cudaMemcpyFromSymbolAsync(&count, skipped_rows, sizeof(count), 0, cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return static_cast<int64_t>(count);
}

STABLE_TORCH_LIBRARY_IMPL(ntdne_kernels, CUDA, m) {
  m.impl("update_bank_", TORCH_BOX(&update_bank_cuda));
  m.impl("skipped_rows", TORCH_BOX(&skipped_rows_cuda));
}

}  // namespace
}  // namespace ntdne_kernels

// CPU kernel of ntdne_kernels::update_bank_. Every feature is checked before the first row is written.
#include "update_bank.h"
#include "vector_width.h"

#include <atomic>
#include <cmath>
#include <vector>

namespace ntdne_kernels {
namespace {

// Elements that make starting a thread worth it; 256 x 128, the usual batch, is done in some 10 us on one.
constexpr int64_t kGrain = 65536;

// Independent partial sums, so that the compiler may use vector registers without reordering a sum of its own accord.
template <typename acc_t>
inline acc_t norm(const acc_t* values, int64_t D) {
  constexpr int64_t kLanes = 16;
  acc_t partial[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      partial[lane] += values[d + lane] * values[d + lane];
    }
  }
  acc_t sum = 0;
  for (; d < D; ++d) {
    sum += values[d] * values[d];
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sum += partial[lane];
  }
  return std::sqrt(sum);
}

// Norms of features[begin:end); false where one of them cannot be used. wide is scratch of D values.
template <typename row_t, typename feature_t>
FOR_EACH_VECTOR_WIDTH bool measure(
    accumulator_t<row_t>* norms, const feature_t* features, const int64_t* rows, accumulator_t<row_t>* wide, int64_t N,
    int64_t D, int64_t begin, int64_t end) {
  bool valid = true;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t d = 0; d < D; ++d) {
      wide[d] = static_cast<accumulator_t<row_t>>(features[i * D + d]);
    }
    norms[i] = norm(wide, D);
    const bool usable = rows[i] >= 0 && rows[i] < N && norms[i] > 0 && std::isfinite(norms[i]);
    valid &= usable || rows[i] == kNotInBank;
  }
  return valid;
}

// Row := normalise(m * row + (1 - m) * feature / feature_norm); blend is scratch of D values.
template <typename row_t, typename feature_t>
FOR_EACH_VECTOR_WIDTH void update_row(
    row_t* row, const feature_t* feature, accumulator_t<row_t> feature_norm, accumulator_t<row_t>* blend, int64_t D,
    accumulator_t<row_t> m) {
  using acc_t = accumulator_t<row_t>;
  const acc_t scale = 1 / feature_norm;
  for (int64_t d = 0; d < D; ++d) {
    blend[d] = m * static_cast<acc_t>(row[d]) + (1 - m) * (static_cast<acc_t>(feature[d]) * scale);
  }
  const acc_t length = norm(blend, D);
  if (length >= static_cast<acc_t>(kVanishing) && std::isfinite(length)) {
    const acc_t rescale = 1 / length;
    for (int64_t d = 0; d < D; ++d) {
      row[d] = static_cast<row_t>(blend[d] * rescale);
    }
  } else {
    for (int64_t d = 0; d < D; ++d) {
      row[d] = static_cast<row_t>(static_cast<acc_t>(feature[d]) * scale);
    }
  }
}

template <typename row_t, typename feature_t>
void update_rows(
    row_t* bank, const feature_t* features, const std::vector<int64_t>& rows, int64_t N, int64_t D, double momentum) {
  using acc_t = accumulator_t<row_t>;
  const int64_t B = rows.size();
  std::vector<acc_t> norms(B);
  std::atomic<bool> valid{true};
  torch::stable::parallel_for(0, B, kGrain / D + 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> wide(D);
    if (!measure<row_t>(norms.data(), features, rows.data(), wide.data(), N, D, begin, end)) {
      valid = false;
    }
  });
  STD_TORCH_CHECK(valid, "update_bank_: a feature has norm 0 or is not finite, or an index is out of range");

  // Each bank row belongs to one part, which applies its updates in batch order: the result does not depend on the
  // number of threads, also where an index stands in the batch twice.
  const int64_t parts = B * D <= kGrain ? 1 : torch::stable::get_num_threads();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> blend(D);
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t i = 0; i < B; ++i) {
        if (rows[i] != kNotInBank && rows[i] % parts == part) {
          update_row(bank + rows[i] * D, features + i * D, norms[i], blend.data(), D, static_cast<acc_t>(momentum));
        }
      }
    }
  });
}

void update_bank_cpu(
    Tensor bank, const Tensor& features, const Tensor& index, double momentum, const std::optional<Tensor>& position) {
  check_arguments(bank, features, index, position);
  bump_version(bank);
  const Tensor dense_features = dense_beside(bank, features);
  const Tensor dense_index = torch::stable::contiguous(index);
  const Tensor dense_position = position ? torch::stable::contiguous(*position) : dense_index;
  const int64_t* image = static_cast<const int64_t*>(dense_index.const_data_ptr());
  const int64_t* place = position ? static_cast<const int64_t*>(dense_position.const_data_ptr()) : nullptr;
  std::vector<int64_t> rows(features.size(0));
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = row_of(image[i], place, dense_position.size(0));
  }
  dispatch_float_type(bank, "update_bank_: bank", [&](auto row) {
    using row_t = decltype(row);
    dispatch_float_type(features, "update_bank_: features", [&](auto feature) {
      using feature_t = decltype(feature);
      update_rows(
          static_cast<row_t*>(bank.mutable_data_ptr()),
          static_cast<const feature_t*>(dense_features.const_data_ptr()), rows, bank.size(0), features.size(1),
          momentum);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(ntdne_kernels, CPU, m) {
  m.impl("update_bank_", TORCH_BOX(&update_bank_cpu));
}

}  // namespace
}  // namespace ntdne_kernels

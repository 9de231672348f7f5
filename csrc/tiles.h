// Tiles of a bank on a CPU, what is done with one, and the shares of the bank that threads walk.
//
// Shapes: B queries, b of them in a block, N bank rows, n of a tile, D features.
#pragma once

#include "exp.h"
#include "float_type.h"
#include "vector_width.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace ntdne_kernels {
namespace {

using torch::headeronly::BFloat16;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename T>
constexpr ScalarType kTypeOf = std::is_same_v<T, double> ? ScalarType::Double
                               : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16 : ScalarType::Float;

// Memory of a thread, kept from call to call: a fresh tile of 2 MB would be mapped and cleared anew each time.
template <typename T, int slot>
T* scratch(int64_t size) {
  static thread_local std::vector<T> memory;
  if (memory.size() < static_cast<size_t>(size)) {
    memory.resize(size);
  }
  return memory.data();
}

// A matrix in memory; the transposed one has its strides the other way round.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row_stride;

  Tensor rows(int64_t first, int64_t count, int64_t columns) const {
    return view(first, {count, columns}, {row_stride, 1});
  }
  Tensor transposed(int64_t first, int64_t count, int64_t columns) const {
    return view(first, {columns, count}, {1, row_stride});
  }

 private:
  Tensor view(int64_t first, std::vector<int64_t> sizes, std::vector<int64_t> strides) const {
    return torch::stable::from_blob(
        const_cast<T*>(data) + first * row_stride, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), kTypeOf<T>);
  }
};

// out = alpha * a @ b + beta * out.
void multiply(Tensor out, const Tensor& a, const Tensor& b, double alpha, double beta) {
  if (a.scalar_type() == ScalarType::BFloat16) {
    std::array<StableIValue, 4> stack{
        torch::stable::detail::from(out), torch::stable::detail::from(a), torch::stable::detail::from(b),
        torch::stable::detail::from(alpha)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("ntdne_kernels::bf16_mm_", "", stack.data(), TORCH_ABI_VERSION));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
  }
}

// Whether ntdne_kernels::bf16_mm_ has a kernel here: else bfloat16 is widened, and its products are those of float32.
bool multiplies_bfloat16() {
#ifdef BUILDS_BF16_MM
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void exp_range(double* x, int64_t begin, int64_t end) {
  if (begin < end) {
    std::array<StableIValue, 1> stack{
        torch::stable::detail::from(Matrix<double>{x + begin, end - begin}.rows(0, 1, end - begin))};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::exp_", "", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // owns what was returned
  }
}

template <typename from_t, typename to_t>
FOR_EACH_VECTOR_WIDTH void convert(to_t* to, const from_t* from, int64_t stride, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<to_t>(from[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<to_t>(from[i * stride]);
    }
  }
}

// A row of any strided matrix, converted.
template <typename to_t>
void read_row(to_t* to, const Tensor& matrix, int64_t row) {
  STD_TORCH_CHECK(row >= 0 && row < matrix.size(0), "streaming: expected rows of the bank in its order, got ", row);
  dispatch_float_type(matrix, "streaming: what is read", [&](auto type) {
    using from_t = decltype(type);
    const from_t* data = static_cast<const from_t*>(matrix.const_data_ptr());
    convert(to, data + row * matrix.stride(0), matrix.stride(1), matrix.size(1));
  });
}

constexpr int64_t kLanes = 16;

// Independent lanes, so that the compiler may use vector registers; a float lane adds up n / 16 values.
template <typename acc_t>
FOR_EACH_VECTOR_WIDTH double sum_of_lanes(const acc_t* values, int64_t n) {
  acc_t lanes[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += values[i + lane];
    }
  }
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    total += lanes[lane];
  }
  return total;
}

template <typename acc_t>
FOR_EACH_VECTOR_WIDTH acc_t largest_of_lanes(const acc_t* values, int64_t n) {
  acc_t lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -std::numeric_limits<acc_t>::infinity());  // NaN is not larger
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  return *std::max_element(lanes, lanes + kLanes);
}

// The lanes are left out of a few values: of many classes each has few rows.
template <typename acc_t>
double sum(const acc_t* values, int64_t n) {
  double total = n < kLanes ? 0 : sum_of_lanes(values, n);
  for (int64_t i = n / kLanes * kLanes; i < n; ++i) {
    total += values[i];
  }
  return total;
}

// −inf of none, or of NaN alone.
template <typename acc_t>
acc_t largest(const acc_t* values, int64_t n) {
  acc_t result = -std::numeric_limits<acc_t>::infinity();
  const acc_t of_lanes = n < kLanes ? result : largest_of_lanes(values, n);
  result = of_lanes > result ? of_lanes : result;
  for (int64_t i = n / kLanes * kLanes; i < n; ++i) {
    result = values[i] > result ? values[i] : result;
  }
  return result;
}

template <typename acc_t>
FOR_EACH_VECTOR_WIDTH void add(acc_t* values, acc_t what, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    values[i] += what;
  }
}

template <typename acc_t>
FOR_EACH_VECTOR_WIDTH void add_weighted(double* total, const acc_t* values, double weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    total[i] += weight * values[i];
  }
}

struct Range {
  int64_t begin, end;

  bool operator==(const Range&) const = default;
};

// The bank, in the order in which its rows are visited, and which of them are of a query's class.
struct Bank {
  Tensor storage;
  const int64_t* order;       // bank row at each place; null: the rows as they stand
  const int64_t* row_labels;  // of each row where they stand in any order; null: a class is one range of places

  int64_t size() const { return storage.size(0); }
  int64_t dim() const { return storage.size(1); }
};

// Rows [start, start + n) of the bank in class order.
template <typename acc_t>
class Tile {
 public:
  Tile(const Bank& bank, int64_t start, int64_t n) : start(start), n(n), bank_(bank) {
    if (bank.row_labels != nullptr) {
      sort_by_label();
    }
    const bool as_it_stands = bank.order == nullptr && bank.row_labels == nullptr && bank.storage.stride(1) == 1;
    narrow_ = bank.storage.scalar_type() == ScalarType::BFloat16 && multiplies_bfloat16();
    if (narrow_) {
      narrow_rows_ = read<BFloat16, 0>(as_it_stands);
    } else {
      rows_ = read<acc_t, 1>(as_it_stands && bank.storage.scalar_type() == kTypeOf<acc_t>);
    }
  }

  // Bank row at a place of the tile.
  int64_t row(int64_t place) const {
    if (!sorted_.empty()) {
      return sorted_[place];
    }
    return bank_.order != nullptr ? bank_.order[start + place] : start + place;
  }

  // Places of a class: its range in class order, or where the rows with its label stand.
  Range places(Range of_class) const {
    if (bank_.row_labels != nullptr) {
      const auto [first, last] = std::equal_range(labels_.begin(), labels_.end(), of_class.begin);
      return {first - labels_.begin(), last - labels_.begin()};
    }
    return {std::clamp<int64_t>(of_class.begin - start, 0, n), std::clamp<int64_t>(of_class.end - start, 0, n)};
  }

  // Place of the row that a query leaves out, −1 for one that is not in the tile.
  int64_t place_of(int64_t excluded) const {
    const int64_t place = excluded - start;
    if (place < 0 || place >= n) {
      return -1;
    }
    return sorted_.empty() ? place : std::find(sorted_.begin(), sorted_.end(), excluded) - sorted_.begin();
  }

  // logits (count, n) = scale · queries @ rowsᵀ.
  void score(acc_t* logits, const Matrix<acc_t>& queries, const Matrix<BFloat16>& narrow_queries, int64_t first,
             int64_t count, double scale) const {
    const Tensor out = Matrix<acc_t>{logits, n}.rows(0, count, n);
    if (narrow_) {
      multiply(out, narrow_queries.rows(first, count, bank_.dim()), narrow_rows_.transposed(0, n, bank_.dim()), scale, 0);
    } else {
      multiply(out, queries.rows(first, count, bank_.dim()), rows_.transposed(0, n, bank_.dim()), scale, 0);
    }
  }

  // Weights (count, places) of a tile's block @ its rows: (count, D), in memory of the thread.
  const acc_t* weigh(const acc_t* weights, int64_t count, Range places) const {
    acc_t* product = scratch<acc_t, 2>(count * bank_.dim());
    const Tensor out = Matrix<acc_t>{product, bank_.dim()}.rows(0, count, bank_.dim());
    const int64_t length = places.end - places.begin;
    if (narrow_) {
      BFloat16* rounded = scratch<BFloat16, 3>(count * length);
      for (int64_t i = 0; i < count; ++i) {
        convert(rounded + i * length, weights + i * n + places.begin, 1, length);
      }
      multiply(
          out, Matrix<BFloat16>{rounded, length}.rows(0, count, length),
          narrow_rows_.rows(places.begin, length, bank_.dim()), 1, 0);
    } else {
      multiply(
          out, Matrix<acc_t>{weights + places.begin, n}.rows(0, count, length),
          rows_.rows(places.begin, length, bank_.dim()), 1, 0);
    }
    return product;
  }

  const int64_t start, n;

 private:
  void sort_by_label() {
    sorted_.resize(n);
    std::iota(sorted_.begin(), sorted_.end(), start);
    std::stable_sort(sorted_.begin(), sorted_.end(), [&](int64_t i, int64_t j) {
      return bank_.row_labels[i] < bank_.row_labels[j];
    });
    labels_.resize(n);
    std::transform(sorted_.begin(), sorted_.end(), labels_.begin(), [&](int64_t i) { return bank_.row_labels[i]; });
  }

  template <typename T, int slot>
  Matrix<T> read(bool in_place) const {
    if (in_place) {
      const int64_t stride = bank_.storage.stride(0);
      return {static_cast<const T*>(bank_.storage.const_data_ptr()) + start * stride, stride};
    }
    T* copy = scratch<T, slot>(n * bank_.dim());
    for (int64_t place = 0; place < n; ++place) {
      read_row(copy + place * bank_.dim(), bank_.storage, row(place));
    }
    return {copy, bank_.dim()};
  }

  const Bank& bank_;
  bool narrow_;
  Matrix<acc_t> rows_{};
  Matrix<BFloat16> narrow_rows_{};
  std::vector<int64_t> sorted_, labels_;
};

// Queries of a call, in an order in which those of a class stand together.
template <typename acc_t>
struct Queries {
  std::vector<int64_t> order;  // place of each in the batch
  std::vector<acc_t> wide;
  std::vector<BFloat16> narrow;
  Matrix<acc_t> rows;
  Matrix<BFloat16> narrow_rows;

  Queries(const Tensor& features, const int64_t* sort_by, int64_t stride) : order(features.size(0)) {
    const int64_t D = features.size(1);
    std::iota(order.begin(), order.end(), 0);
    if (sort_by != nullptr) {
      std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
        return sort_by[i * stride] < sort_by[j * stride];
      });
    }
    wide.resize(order.size() * D);
    const bool both = features.scalar_type() == ScalarType::BFloat16 && multiplies_bfloat16();
    narrow.resize(both ? wide.size() : 0);
    for (size_t i = 0; i < order.size(); ++i) {
      read_row(wide.data() + i * D, features, order[i]);
      if (both) {
        read_row(narrow.data() + i * D, features, order[i]);
      }
    }
    rows = {wide.data(), D};
    narrow_rows = {narrow.data(), D};
  }
};

// Calls function(first, last) for rows [first, last) of tiles of at most `length` rows, all about as long.
template <typename Function>
void for_each_tile(Range share, int64_t length, Function&& function) {
  const int64_t rows = share.end - share.begin, tiles = (rows + length - 1) / length;
  for (int64_t t = 0; t < tiles; ++t) {
    function(share.begin + rows * t / tiles, share.begin + rows * (t + 1) / tiles);
  }
}

// Calls function(share, rows of the bank) for each share, in as many threads as PyTorch takes here.
template <typename Function>
void for_each_share(int64_t N, int64_t shares, Function&& function) {
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      function(share, Range{N * share / shares, N * (share + 1) / shares});
    }
  });
}

int64_t count_shares(int64_t N, int64_t length) {
  return std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>((N + length - 1) / length, 1));
}

const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

}  // namespace
}  // namespace ntdne_kernels

// CPU kernels of ntdne_kernels::tiled_class_sums, tiled_class_log_sums and tiled_bank_gradient: the streaming backend's
// walks over the bank, defined by what ntdne_kernels/ops/streaming.py does with the same arguments.
//
// Each thread walks a share of its own, tile by tile, and calls PyTorch's matrix products, which then take one thread:
// with all threads inside each small step a step waits for the slowest of them, twice as long as the step where other
// processes keep the cores busy. Shares are added up in their order: the same number of threads gives the same bits.
//
// Shapes: B queries, b of them in a block, N bank rows, n of a tile, D features, K classes.
#include "exp.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace ntdne_kernels {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
#if defined(__x86_64__) && defined(__GNUC__)
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

// Calls function(x) with a value of the type of the tensor's elements.
template <typename Function>
void with_type_of(const Tensor& tensor, Function&& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "streaming: expected float64, float32, float16 or bfloat16");
  }
}

// A row of any strided matrix, converted.
template <typename to_t>
void read_row(to_t* to, const Tensor& matrix, int64_t row) {
  STD_TORCH_CHECK(row >= 0 && row < matrix.size(0), "streaming: expected rows of the bank in its order, got ", row);
  with_type_of(matrix, [&](auto type) {
    using from_t = decltype(type);
    const from_t* data = static_cast<const from_t*>(matrix.const_data_ptr());
    convert(to, data + row * matrix.stride(0), matrix.stride(1), matrix.size(1));
  });
}

// Sums with independent lanes, so that the compiler may use vector registers; a float lane adds up n / 16 values.
template <typename acc_t>
FOR_EACH_VECTOR_WIDTH double sum(const acc_t* values, int64_t n) {
  constexpr int64_t kLanes = 16;
  acc_t lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += values[i + lane];
    }
  }
  double total = 0;
  for (; i < n; ++i) {
    total += values[i];
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    total += lanes[lane];
  }
  return total;
}

template <typename acc_t>
FOR_EACH_VECTOR_WIDTH acc_t largest(const acc_t* values, int64_t n) {
  constexpr int64_t kLanes = 16;
  acc_t lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -std::numeric_limits<acc_t>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  for (; i < n; ++i) {
    lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  }
  return *std::max_element(lanes, lanes + kLanes);
}

template <typename acc_t>
FOR_EACH_VECTOR_WIDTH void add(acc_t* values, acc_t what, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    values[i] += what;
  }
}

template <typename acc_t>
FOR_EACH_VECTOR_WIDTH void scale_and_add(double* total, double scale, const acc_t* values, double weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    total[i] = scale * total[i] + weight * values[i];
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

// Σ = Σ_j exp(logit_j − maximum) and v = Σ_j exp(logit_j − maximum)·f_j of a block's queries, over the rows seen so far.
// Tiles are added up in float64: in float32 the gradient's error grew with their number.
struct Sums {
  std::vector<double> maximum, total, vector;
  int64_t dim = 0;

  void start(int64_t count, int64_t dim_, bool tracked) {
    dim = dim_;
    maximum.assign(count, tracked ? -kInfinity : 0);
    total.assign(count, 0);
    vector.assign(count * dim, 0);
  }

  // The maximum that the logits of a query are to be reduced by, to which its sums are rescaled; 0 where there is none.
  double raise(int64_t i, double highest) {
    const double raised = std::max(maximum[i], highest), finite = raised == -kInfinity ? 0 : raised;
    rescale(i, std::exp(maximum[i] - finite));
    maximum[i] = raised;
    return finite;
  }

  void add(const Sums& other, int64_t i) {
    const double finite = raise(i, other.maximum[i]);
    const double weight = std::exp(other.maximum[i] - finite);
    total[i] += weight * other.total[i];
    if (dim > 0) {
      scale_and_add(vector.data() + i * dim, 1, other.vector.data() + i * dim, weight, dim);
    }
  }

  double log_total(int64_t i) const { return total[i] == 0 ? -kInfinity : std::log(total[i]) + maximum[i]; }

 private:
  void rescale(int64_t i, double factor) {
    if (factor != 1) {
      total[i] *= factor;
      for (int64_t d = 0; d < dim; ++d) {
        vector[i * dim + d] *= factor;
      }
    }
  }
};

struct BothSums {
  Sums same, other;
};

// What tiled_class_sums is asked for.
template <typename acc_t>
struct ClassSumsCall {
  const Bank& bank;
  const Queries<acc_t>& queries;
  const int64_t* same;  // a range of places, or a label, of each query of the batch
  const int64_t* excluded;
  double sigma;
  bool need_means, tracked;

  Range of_class(int64_t i) const {
    const int64_t place = queries.order[i];
    return bank.row_labels != nullptr ? Range{same[place], same[place] + 1} : Range{same[2 * place], same[2 * place + 1]};
  }

  // Adds a tile to the sums of the queries [first, first + count).
  void add_tile(BothSums& sums, const Tile<acc_t>& tile, int64_t first, int64_t count) const {
    acc_t* weights = scratch<acc_t, 4>(count * tile.n);
    tile.score(weights, queries.rows, queries.narrow_rows, first, count, 1 / sigma);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t own = tile.place_of(excluded[queries.order[first + i]]);
      if (own >= 0) {
        weights[i * tile.n + own] = -std::numeric_limits<acc_t>::infinity();
      }
    }
    if (tracked) {
      for (int64_t i = 0; i < count; ++i) {
        reduce(sums, i, weights + i * tile.n, tile.n, tile.places(of_class(first + i)));
      }
    }
    exp_range(weights, 0, count * tile.n);
    for (int64_t i = 0; i < count;) {
      const Range class_of_run = of_class(first + i);
      int64_t last = i + 1;
      while (last < count && of_class(first + last) == class_of_run) {
        ++last;
      }
      const Range places = tile.places(class_of_run);
      if (places.begin < places.end) {
        add_weights(sums.same, tile, weights, i, last, places);
        for (int64_t row = i; row < last; ++row) {
          std::fill(weights + row * tile.n + places.begin, weights + row * tile.n + places.end, acc_t{0});
        }
      }
      i = last;
    }
    add_weights(sums.other, tile, weights, 0, count, {0, tile.n});
  }

 private:
  static void reduce(BothSums& sums, int64_t i, acc_t* logits, int64_t n, Range places) {
    const int64_t length = places.end - places.begin;
    const acc_t before = largest(logits, places.begin), after = largest(logits + places.end, n - places.end);
    const double same = sums.same.raise(i, largest(logits + places.begin, length));
    const double other = sums.other.raise(i, std::max(before, after));
    add(logits, static_cast<acc_t>(-other), places.begin);
    add(logits + places.begin, static_cast<acc_t>(-same), length);
    add(logits + places.end, static_cast<acc_t>(-other), n - places.end);
  }

  void add_weights(
      Sums& sums, const Tile<acc_t>& tile, const acc_t* weights, int64_t first, int64_t last, Range places) const {
    for (int64_t i = first; i < last; ++i) {
      sums.total[i] += sum(weights + i * tile.n + places.begin, places.end - places.begin);
    }
    if (need_means) {
      const acc_t* product = tile.weigh(weights + first * tile.n, last - first, places);
      scale_and_add(sums.vector.data() + first * sums.dim, 1, product, 1, (last - first) * sums.dim);
    }
  }
};

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename acc_t>
void class_sums(
    const Bank& bank, const Tensor& features, const Tensor& same, const Tensor& excluded, double sigma, bool tracked,
    bool need_means, int64_t block, int64_t length, const FourTensors& results) {
  const int64_t B = features.size(0), D = bank.dim(), shares = count_shares(bank.size(), length);
  const Queries<acc_t> queries(features, integers(same), same.dim() == 2 ? 2 : 1);
  const ClassSumsCall<acc_t> call{bank, queries, integers(same), integers(excluded), sigma, need_means, tracked};
  const auto data = [](const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); };
  double* log_sums[] = {data(std::get<0>(results)), data(std::get<1>(results))};
  double* means[] = {data(std::get<2>(results)), data(std::get<3>(results))};
  for (int64_t first = 0; first < B; first += block) {
    const int64_t count = std::min(block, B - first);
    std::vector<BothSums> parts(shares);
    for_each_share(bank.size(), shares, [&](int64_t share, Range rows) {
      BothSums& sums = parts[share];
      sums.same.start(count, need_means ? D : 0, tracked);
      sums.other.start(count, need_means ? D : 0, tracked);
      for_each_tile(rows, length, [&](int64_t begin, int64_t end) {
        call.add_tile(sums, Tile<acc_t>(bank, begin, end - begin), first, count);
      });
    });
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t place = queries.order[first + i];
        for (int of = 0; of < 2; ++of) {
          Sums& whole = of == 0 ? parts[0].same : parts[0].other;
          for (int64_t share = 1; share < shares; ++share) {
            whole.add(of == 0 ? parts[share].same : parts[share].other, i);
          }
          log_sums[of][place] = whole.log_total(i);
          for (int64_t d = 0; d < whole.dim; ++d) {
            means[of][place * D + d] = whole.total[i] == 0 ? 0 : whole.vector[i * D + d] / whole.total[i];
          }
        }
      }
    });
  }
}

// Of what the ops are given, that all of them need: else a kernel would read outside of its buffers.
Bank check(const Tensor& features, const Tensor& bank, const std::optional<Tensor>& row_labels,
           const std::optional<Tensor>& order, int64_t block, int64_t length) {
  const auto fits = [&](const std::optional<Tensor>& of_rows) {
    return !of_rows || (of_rows->scalar_type() == ScalarType::Long && of_rows->is_contiguous() &&
                        of_rows->numel() == bank.size(0));
  };
  STD_TORCH_CHECK(
      features.dim() == 2 && bank.dim() == 2 && features.size(1) == bank.size(1) &&
          features.scalar_type() == bank.scalar_type() && fits(row_labels) && fits(order),
      "streaming: expected features (B, D) and bank (N, D) of one dtype, labels and order int64 (N,)");
  STD_TORCH_CHECK(block > 0 && length > 0, "streaming: expected tiles of at least one query and one row");
  return {bank, order ? integers(*order) : nullptr, row_labels ? integers(*row_labels) : nullptr};
}

void check_per_query(const Tensor& tensor, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() == size,
      "streaming: expected contiguous values of each query");
}

FourTensors tiled_class_sums_cpu(
    const Tensor& features, const Tensor& bank, const Tensor& same, const std::optional<Tensor>& row_labels,
    const std::optional<Tensor>& order, const Tensor& excluded, double sigma, bool tracked, bool need_means,
    int64_t block, int64_t length) {
  const Bank rows = check(features, bank, row_labels, order, block, length);
  const int64_t B = features.size(0), D = bank.size(1);
  check_per_query(same, row_labels ? B : 2 * B, ScalarType::Long);
  check_per_query(excluded, B, ScalarType::Long);
  const std::vector<int64_t> sums{B}, means{need_means ? B : 0, D};
  const auto room = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(features, {sizes.data(), sizes.size()}, ScalarType::Double);
  };
  const FourTensors results{room(sums), room(sums), room(means), room(means)};
  const auto run = [&](auto type) {
    class_sums<decltype(type)>(rows, features, same, excluded, sigma, tracked, need_means, block, length, results);
  };
  bank.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return results;
}

// log(exp(a) + exp(b)); NaN where one of them is, which std::max would drop.
double log_add_exp(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high == -kInfinity ? low : high + std::log1p(std::exp(low - high));
}

// Adds exp(logits) of each class to a query's sums, or to their logarithms.
template <typename acc_t>
void add_classes(double* sums, acc_t* logits, const Tile<acc_t>& tile, const int64_t* offsets, Range classes, bool logs) {
  for (int64_t c = classes.begin; c < classes.end; ++c) {
    const Range places = tile.places({offsets[c], offsets[c + 1]});
    const int64_t length = places.end - places.begin;
    if (!logs) {
      sums[c] += sum(logits + places.begin, length);
      continue;
    }
    if (length > 0) {
      const acc_t highest = largest(logits + places.begin, length);
      const acc_t finite = highest > -std::numeric_limits<acc_t>::infinity() ? highest : 0;  // else excluded, or NaN
      add(logits + places.begin, -finite, length);
      exp_range(logits, places.begin, places.end);
      sums[c] = log_add_exp(sums[c], std::log(sum(logits + places.begin, length)) + finite);
    }
  }
}

template <typename acc_t>
void class_log_sums(
    const Bank& bank, const Tensor& features, const int64_t* index, const int64_t* offsets, int64_t K, double sigma,
    bool tracked, int64_t block, int64_t length, double* log_sums) {
  const int64_t B = features.size(0);
  const Queries<acc_t> queries(features, nullptr, 0);
  // Of many classes few rows would be a thread's: here each has queries of its own, and nothing is added up.
  for_each_share(B, std::clamp<int64_t>(torch::stable::get_num_threads(), 1, B), [&](int64_t, Range own) {
    std::fill(log_sums + own.begin * K, log_sums + own.end * K, tracked ? -kInfinity : 0);
    for_each_tile({0, bank.size()}, length, [&](int64_t begin, int64_t end) {
      const Tile<acc_t> tile(bank, begin, end - begin);
      // Classes with rows in the tile, empty ones at its ends left out.
      const Range classes{
          std::upper_bound(offsets, offsets + K + 1, begin) - offsets - 1,
          std::lower_bound(offsets, offsets + K + 1, end) - offsets};
      for_each_tile(own, block, [&](int64_t first, int64_t last) {
        acc_t* logits = scratch<acc_t, 4>((last - first) * tile.n);
        tile.score(logits, queries.rows, queries.narrow_rows, first, last - first, 1 / sigma);
        for (int64_t i = first; i < last; ++i) {
          const int64_t place = tile.place_of(index[i]);
          if (place >= 0) {
            logits[(i - first) * tile.n + place] = -std::numeric_limits<acc_t>::infinity();
          }
        }
        if (!tracked) {
          exp_range(logits, 0, (last - first) * tile.n);
        }
        for (int64_t i = first; i < last; ++i) {
          add_classes(log_sums + i * K, logits + (i - first) * tile.n, tile, offsets, classes, tracked);
        }
      });
    });
    if (!tracked) {
      for (int64_t i = own.begin * K; i < own.end * K; ++i) {
        log_sums[i] = std::log(log_sums[i]);
      }
    }
  });
}

Tensor tiled_class_log_sums_cpu(
    const Tensor& features, const Tensor& bank, const Tensor& index, const Tensor& offsets, double sigma, bool tracked,
    int64_t block, int64_t length) {
  const Bank rows = check(features, bank, std::nullopt, std::nullopt, block, length);
  const int64_t B = features.size(0), K = offsets.numel() - 1;
  check_per_query(index, B, ScalarType::Long);
  check_per_query(offsets, K + 1, ScalarType::Long);
  STD_TORCH_CHECK(
      K >= 0 && integers(offsets)[0] == 0 && integers(offsets)[K] == bank.size(0),
      "streaming: expected offsets from 0 to the number of rows");
  const std::vector<int64_t> sizes{B, K};
  const Tensor log_sums = torch::stable::new_empty(features, {sizes.data(), sizes.size()}, ScalarType::Double);
  double* data = static_cast<double*>(log_sums.mutable_data_ptr());
  const auto run = [&](auto type) {
    class_log_sums<decltype(type)>(
        rows, features, integers(index), integers(offsets), K, sigma, tracked, block, length, data);
  };
  if (B > 0) {
    bank.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  }
  return log_sums;
}

// Turns a query's logits into (p̃ − p)·weight: p of all rows, p̃ of those of its class (eq. 7).
template <typename acc_t>
void to_weights(acc_t* logits, int64_t n, Range places, acc_t log_same, acc_t log_all, acc_t weight) {
  const int64_t length = places.end - places.begin;
  acc_t* of_class = scratch<acc_t, 5>(n);
  std::copy(logits + places.begin, logits + places.end, of_class);
  add(of_class, -log_same, length);
  add(logits, -log_all, n);
  exp_range(of_class, 0, length);
  exp_range(logits, 0, n);
  for (int64_t j = 0; j < n; ++j) {
    logits[j] *= -weight;
  }
  for (int64_t j = 0; j < length; ++j) {
    logits[places.begin + j] += weight * of_class[j];
  }
}

template <typename acc_t>
void bank_gradient(
    const Bank& bank, const Tensor& features, const int64_t* same, const int64_t* excluded, const Tensor& log_same,
    const Tensor& log_all, const Tensor& weights, double sigma, int64_t block, int64_t length, const Tensor& gradient) {
  const int64_t B = features.size(0), D = bank.dim();
  const Queries<acc_t> queries(features, nullptr, 0);
  const auto values = [](const Tensor& tensor) { return static_cast<const acc_t*>(tensor.const_data_ptr()); };
  for_each_share(bank.size(), count_shares(bank.size(), length), [&](int64_t, Range share) {
    for_each_tile(share, length, [&](int64_t begin, int64_t end) {
      const Tile<acc_t> tile(bank, begin, end - begin);
      acc_t* of_rows = scratch<acc_t, 6>(tile.n * D);
      std::fill(of_rows, of_rows + tile.n * D, acc_t{0});
      for_each_tile({0, B}, block, [&](int64_t first, int64_t last) {
        acc_t* logits = scratch<acc_t, 4>((last - first) * tile.n);
        tile.score(logits, queries.rows, queries.narrow_rows, first, last - first, 1 / sigma);
        for (int64_t i = first; i < last; ++i) {
          acc_t* row = logits + (i - first) * tile.n;
          const int64_t own = tile.place_of(excluded[i]);
          if (own >= 0) {
            row[own] = -std::numeric_limits<acc_t>::infinity();
          }
          const Range of_class = bank.row_labels != nullptr ? Range{same[i], same[i] + 1} : Range{same[2 * i], same[2 * i + 1]};
          to_weights(row, tile.n, tile.places(of_class), values(log_same)[i], values(log_all)[i], values(weights)[i]);
        }
        multiply(
            Matrix<acc_t>{of_rows, D}.rows(0, tile.n, D), Matrix<acc_t>{logits, tile.n}.transposed(0, last - first, tile.n),
            queries.rows.rows(first, last - first, D), 1, 1);
      });
      with_type_of(gradient, [&](auto type) {
        using row_t = decltype(type);
        row_t* data = static_cast<row_t*>(gradient.mutable_data_ptr());
        for (int64_t place = 0; place < tile.n; ++place) {
          convert(data + tile.row(place) * D, of_rows + place * D, 1, D);
        }
      });
    });
  });
}

Tensor tiled_bank_gradient_cpu(
    const Tensor& features, const Tensor& bank, const Tensor& same, const std::optional<Tensor>& row_labels,
    const std::optional<Tensor>& order, const Tensor& excluded, const Tensor& log_same, const Tensor& log_all,
    const Tensor& weights, double sigma, int64_t block, int64_t length) {
  const Bank rows = check(features, bank, row_labels, order, block, length);
  const int64_t B = features.size(0);
  const ScalarType wide = bank.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_per_query(same, row_labels ? B : 2 * B, ScalarType::Long);
  check_per_query(excluded, B, ScalarType::Long);
  for (const Tensor* of_query : {&log_same, &log_all, &weights}) {
    check_per_query(*of_query, B, wide);
  }
  const std::vector<int64_t> sizes{bank.size(0), bank.size(1)};
  const Tensor gradient = torch::stable::new_empty(bank, {sizes.data(), sizes.size()});
  const auto run = [&](auto type) {
    bank_gradient<decltype(type)>(
        rows, features, integers(same), integers(excluded), log_same, log_all, weights, sigma, block, length, gradient);
  };
  wide == ScalarType::Double ? run(double{}) : run(float{});
  return gradient;
}

STABLE_TORCH_LIBRARY_IMPL(ntdne_kernels, CPU, m) {
  m.impl("tiled_class_sums", TORCH_BOX(&tiled_class_sums_cpu));
  m.impl("tiled_class_log_sums", TORCH_BOX(&tiled_class_log_sums_cpu));
  m.impl("tiled_bank_gradient", TORCH_BOX(&tiled_bank_gradient_cpu));
}

}  // namespace
}  // namespace ntdne_kernels

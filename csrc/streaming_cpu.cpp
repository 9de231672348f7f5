// CPU kernels of ntdne_kernels::tiled_class_sums, tiled_class_log_sums and tiled_bank_gradient: the streaming backend's
// walks over the bank, defined by what ntdne_kernels/ops/streaming.py does with the same arguments.
//
// Each thread walks a share of its own, tile by tile, and calls PyTorch's matrix products, which then take one thread:
// with all threads inside each small step each of them waits for the slowest, which beside two busy processes took 8 s
// and more where this takes 0.9 (docs/speed.md). Shares are added up in their order: the same number of threads, the
// same bits.
//
// Shapes: B queries, b of them in a block, N bank rows, n of a tile, D features, K classes.
#include "tiles.h"

#include <tuple>

namespace ntdne_kernels {
namespace {

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
      add_weighted(vector.data() + i * dim, other.vector.data() + i * dim, weight, dim);
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
    return bank.row_labels != nullptr ? Range{same[place], same[place]} : Range{same[2 * place], same[2 * place + 1]};
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
      add_weighted(sums.vector.data() + first * sums.dim, product, 1, (last - first) * sums.dim);
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
  return low == -kInfinity ? high : high == -kInfinity ? low : high + std::log1p(std::exp(low - high));
}

// Adds the exponentials of a query's logits to its sums of each class, or to the logarithms of these.
template <typename acc_t>
void add_classes(double* sums, acc_t* logits, const Tile<acc_t>& tile, const int64_t* offsets, Range classes, bool logs) {
  const auto places = [&](int64_t c) { return tile.places({offsets[c], offsets[c + 1]}); };
  acc_t* highest = scratch<acc_t, 5>(classes.end - classes.begin);
  for (int64_t c = classes.begin; logs && c < classes.end; ++c) {
    const auto [begin, end] = places(c);
    const acc_t found = largest(logits + begin, end - begin);
    highest[c - classes.begin] = found > -std::numeric_limits<acc_t>::infinity() ? found : 0;  // else excluded, or NaN
    add(logits + begin, -highest[c - classes.begin], end - begin);
  }
  exp_range(logits, 0, tile.n);  // at once: of many classes each has few rows
  for (int64_t c = classes.begin; c < classes.end; ++c) {
    const auto [begin, end] = places(c);
    if (!logs) {
      sums[c] += sum(logits + begin, end - begin);
    } else if (begin < end) {
      sums[c] = log_add_exp(sums[c], std::log(sum(logits + begin, end - begin)) + highest[c - classes.begin]);
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
          const Range of_class = bank.row_labels != nullptr ? Range{same[i], same[i]} : Range{same[2 * i], same[2 * i + 1]};
          to_weights(row, tile.n, tile.places(of_class), values(log_same)[i], values(log_all)[i], values(weights)[i]);
        }
        multiply(
            Matrix<acc_t>{of_rows, D}.rows(0, tile.n, D), Matrix<acc_t>{logits, tile.n}.transposed(0, last - first, tile.n),
            queries.rows.rows(first, last - first, D), 1, 1);
      });
      dispatch_float_type(gradient, "streaming: the bank", [&](auto type) {
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

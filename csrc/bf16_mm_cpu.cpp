// CPU kernel of ntdne_kernels::bf16_mm_: out = alpha * a @ b, a and b bfloat16, sums and out float32.
// PyTorch has this product for CUDA alone (torch.mm with out_dtype); its bfloat16 product on a CPU rounds the result to
// 8 bits, too few for similarities that are divided by sigma. Registered where the processor has AVX-512 BF16; where it has
// AMX too, and Linux lets the process use it, that is taken: docs/speed.md has what a step then takes.
//
// Shapes: a (M, K), b (K, L), out (M, L). L is cut into strips of 16 columns, packed as pairs along K, which both
// instructions take: AVX-512 a pair of a by 16 pairs, AMX 16 rows of 32 values by 16 rows of 16 pairs, both tiles of 1 KB.
#include "vector_width.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#ifdef BUILDS_BF16_MM
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace ntdne_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLanes = 16;         // float32 values or pairs of a vector, and rows of a tile
constexpr int64_t kStep = 2 * kLanes;  // values along K that a tile has, and a packed strip is a multiple of
constexpr int64_t kRowBytes = 64;      // of a tile, and a cache line
static_assert(kRowBytes == kStep * sizeof(uint16_t) && kRowBytes == kLanes * sizeof(uint32_t));
// Products added up in registers before they join the sum in memory. It bounds the rounding error of long sums: with 4000
// in one go, the gradient of clustered features with p near 1 was off by 6e-5 instead of 4e-6.
constexpr int64_t kDepth = 256;

int64_t ceil_div(int64_t size, int64_t by) { return (size + by - 1) / by; }

// Memory of a thread, kept from call to call: fresh memory would be mapped and cleared by the kernel for each tile. From
// a cache line on, so that no row of a tile lies in two.
template <typename T>
T* grow(std::vector<T>& memory, int64_t size) {
  memory.resize(std::max<size_t>(memory.size(), size + kRowBytes / sizeof(T)));
  void* start = memory.data();
  size_t space = memory.size() * sizeof(T);
  return static_cast<T*>(std::align(kRowBytes, size * sizeof(T), start, space));
}

struct Matrix {
  const uint16_t* data;  // bfloat16 as stored
  int64_t rows, columns;
  int64_t row_stride, column_stride;

  const uint16_t* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

__mmask32 first_lanes(int64_t count) {
  return static_cast<__mmask32>((uint64_t{1} << std::clamp<int64_t>(count, 0, 32)) - 1);
}

// gcc's own intrinsics start from values that they leave uninitialised.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// 16 rows of 16 words become its columns.
__attribute__((target("avx512f"))) void transpose(__m512i rows[kLanes]) {
  __m512i words[kLanes], quarters[kLanes];
  for (int64_t i = 0; i < kLanes; i += 2) {
    words[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    words[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int64_t i = 0; i < kLanes; i += 4) {  // quarter q of i + j: word 4q + j of rows i to i + 3
    quarters[i] = _mm512_unpacklo_epi64(words[i], words[i + 2]);
    quarters[i + 1] = _mm512_unpackhi_epi64(words[i], words[i + 2]);
    quarters[i + 2] = _mm512_unpacklo_epi64(words[i + 1], words[i + 3]);
    quarters[i + 3] = _mm512_unpackhi_epi64(words[i + 1], words[i + 3]);
  }
  for (int64_t j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(quarters[j], quarters[j + 4], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(quarters[j], quarters[j + 4], 0xee);
    const __m512i later_low = _mm512_shuffle_i32x4(quarters[j + 8], quarters[j + 12], 0x44);
    const __m512i later_high = _mm512_shuffle_i32x4(quarters[j + 8], quarters[j + 12], 0xee);
    rows[j] = _mm512_shuffle_i32x4(low, later_low, 0x88);
    rows[j + 4] = _mm512_shuffle_i32x4(low, later_low, 0xdd);
    rows[j + 8] = _mm512_shuffle_i32x4(high, later_high, 0x88);
    rows[j + 12] = _mm512_shuffle_i32x4(high, later_high, 0xdd);
  }
}

// `count` values of a row, from a column on; zeros for those beyond the matrix, and after them.
__attribute__((target("avx512f,avx512bw"))) inline __m512i load_row(
    const Matrix& x, int64_t row, int64_t column, int64_t count) {
  const int64_t inside = row < x.rows ? std::min(x.columns - column, count) : 0;
  if (x.column_stride == 1) {
    return _mm512_maskz_loadu_epi16(first_lanes(inside), x.at(row, column));
  }
  uint16_t values[kStep] = {};
  for (int64_t i = 0; i < inside; ++i) {
    values[i] = *x.at(row, column + i);
  }
  return _mm512_loadu_si512(values);
}

// Columns l of [first, first + 16) of b as pairs (b[2p][l], b[2p + 1][l]): for each p the 16 pairs, one p after the other.
// Zeros past L, and past K up to a multiple of kStep.
__attribute__((target("avx512f,avx512bw"))) void pack_strip(uint32_t* strip, const Matrix& b, int64_t first) {
  alignas(64) uint16_t places[kStep];  // of two rows' values, one beside the other
  for (int64_t i = 0; i < kStep; ++i) {
    places[i] = static_cast<uint16_t>(i / 2 + i % 2 * kStep);
  }
  for (int64_t k = 0; k < b.rows; k += kStep) {
    __m512i pairs[kLanes];
    if (b.row_stride == 1) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const __mmask32 inside = first + l < b.columns ? first_lanes(b.rows - k) : 0;
        pairs[l] = _mm512_maskz_loadu_epi16(inside, b.at(k, first + l));
      }
      transpose(pairs);
    } else {
      for (int64_t p = 0; p < kLanes; ++p) {
        const __m512i even = load_row(b, k + 2 * p, first, kLanes), odd = load_row(b, k + 2 * p + 1, first, kLanes);
        pairs[p] = _mm512_permutex2var_epi16(even, _mm512_load_si512(places), odd);
      }
    }
    for (int64_t p = 0; p < kLanes; ++p, strip += kLanes) {
      _mm512_storeu_si512(strip, pairs[p]);
    }
  }
}

#pragma GCC diagnostic pop

// Rows of a, as many strips of b as a kernel takes, the last ones perhaps of zeros, and a depth of the sums between them.
struct Block {
  float* out;
  int64_t out_stride;
  const uint16_t* a;
  int64_t a_stride;
  const uint32_t* strips;
  int64_t strip_size;
  int64_t rows, columns, depth;
  float alpha;
  bool accumulate;
};

// 16 sums of a row, from column on, into out.
__attribute__((target("avx512f"))) inline void write(const Block& block, int64_t row, int64_t column, __m512 sums) {
  const __mmask16 inside = static_cast<__mmask16>(first_lanes(std::min(block.columns - column, kLanes)));
  float* place = block.out + row * block.out_stride + column;
  const __m512 before = block.accumulate ? _mm512_maskz_loadu_ps(inside, place) : _mm512_setzero_ps();
  _mm512_mask_storeu_ps(place, inside, _mm512_fmadd_ps(sums, _mm512_set1_ps(block.alpha), before));
}

constexpr int64_t kRows = 6, kStrips = 4;  // 24 sums, 4 vectors of b, 1 of a

template <int rows>
__attribute__((target("avx512f,avx512bf16"))) void multiply_rows(const Block& block) {
  __m512 sums[rows][kStrips];
  for (int r = 0; r < rows; ++r) {
    for (int s = 0; s < kStrips; ++s) {
      sums[r][s] = _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < block.depth; k += 2) {
    const uint32_t* strips = block.strips + k / 2 * kLanes;
    for (int r = 0; r < rows; ++r) {
      const uint16_t* values = block.a + r * block.a_stride + k;
      uint32_t pair = values[0];
      if (k + 1 < block.depth) {
        std::memcpy(&pair, values, sizeof(pair));
      }
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
      for (int s = 0; s < kStrips; ++s) {
        sums[r][s] = _mm512_dpbf16_ps(sums[r][s], both, (__m512bh)_mm512_load_si512(strips + s * block.strip_size));
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int s = 0; s < kStrips; ++s) {
      write(block, r, s * kLanes, sums[r][s]);
    }
  }
}

using Kernel = void (*)(const Block&);
constexpr Kernel kOfRows[kRows] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                   multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};

void multiply_vectors(const Block& block) { kOfRows[block.rows - 1](block); }

constexpr int64_t kTiledRows = 2 * kLanes, kTiledStrips = 2;  // tiles 0 to 3 hold sums, 4 and 5 a, 6 and 7 b

bool may_use_amx() {
  constexpr unsigned kTileFeatures = 1u << 22 | 1u << 24;      // AMX-BF16 and AMX-TILE
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTileFeatures) == kTileFeatures &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Eight tiles of full size until the end of the scope; then the configuration that was there, which others may count on.
// In assembly: what gcc 12 has for it claims 8 of the 64 bytes, and stores to the others are dropped.
class TileRegisters {
 public:
  TileRegisters() {
    __asm__ volatile("sttilecfg %0" : "=m"(before_));
    const Configuration full{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" : : "m"(full));
  }
  ~TileRegisters() { __asm__ volatile("ldtilecfg %0" : : "m"(before_)); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_of_row[16];
    uint8_t rows[16];
  };
  Configuration before_;
};

// Rows [first, first + 16) of a as tiles (16, 32), one after the other along K; zeros past M and K.
__attribute__((target("avx512f,avx512bw"))) void pack_tiles(uint16_t* tiles, const Matrix& a, int64_t first) {
  for (int64_t k = 0; k < a.columns; k += kStep) {
    for (int64_t row = first; row < first + kLanes; ++row, tiles += kStep) {
      _mm512_storeu_si512(tiles, load_row(a, row, k, kStep));
    }
  }
}

// Of a block whose `a` stands in such tiles.
__attribute__((target("avx512f,amx-tile,amx-bf16"))) void multiply_tiles(const Block& block) {
  alignas(kRowBytes) float sums[4][kLanes][kLanes];
  const bool two = block.rows > kLanes;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // gcc does not see that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < block.depth; k += kStep) {
    const uint16_t* a = block.a + k * kLanes;
    const uint32_t* b = block.strips + k / 2 * kLanes;
    _tile_loadd(4, a, kRowBytes);
    _tile_loadd(6, b, kRowBytes);
    _tile_loadd(7, b + block.strip_size, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, a + kLanes * block.a_stride, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], kRowBytes);
  _tile_stored(1, sums[1], kRowBytes);
  _tile_stored(2, sums[2], kRowBytes);
  _tile_stored(3, sums[3], kRowBytes);
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t s = 0; s < kTiledStrips; ++s) {
      write(block, row, s * kLanes, _mm512_load_ps(sums[row / kLanes * kTiledStrips + s][row % kLanes]));
    }
  }
}

void bf16_mm_cpu(Tensor out, const Tensor& a, const Tensor& b, double alpha) {
  const int64_t M = a.size(0), K = a.size(1), L = b.size(1);
  STD_TORCH_CHECK(
      a.scalar_type() == ScalarType::BFloat16 && b.scalar_type() == ScalarType::BFloat16 &&
          out.scalar_type() == ScalarType::Float && b.size(0) == K && out.size(0) == M && out.size(1) == L &&
          (K <= 1 || a.stride(1) == 1) && (L <= 1 || out.stride(1) == 1),
      "bf16_mm_: expected a (M, K) and b (K, L) in bfloat16 and out (M, L) in float32, a and out by rows");
  const auto matrix = [](const Tensor& x) {
    return Matrix{static_cast<const uint16_t*>(x.const_data_ptr()), x.size(0), x.size(1), x.stride(0), x.stride(1)};
  };
  const Matrix a_matrix = matrix(a), b_matrix = matrix(b);
  static const bool tiled = may_use_amx();
  const Kernel multiply = tiled ? multiply_tiles : multiply_vectors;
  const int64_t rows = tiled ? kTiledRows : kRows, columns = (tiled ? kTiledStrips : kStrips) * kLanes;

  static thread_local std::vector<uint32_t> of_b;
  static thread_local std::vector<uint16_t> of_a;
  const int64_t depth = ceil_div(K, kStep) * kStep, strip_size = depth / 2 * kLanes;
  const int64_t strips = ceil_div(L, columns) * columns / kLanes;
  uint32_t* packed = grow(of_b, strips * strip_size);
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      pack_strip(packed + strip * strip_size, b_matrix, strip * kLanes);
    }
  });
  uint16_t* tiles = tiled ? grow(of_a, ceil_div(M, rows) * rows * depth) : nullptr;
  const Matrix operand = tiled ? Matrix{tiles, M, K, depth, kLanes} : a_matrix;  // where row i, value k stands

  float* out_data = static_cast<float*>(out.mutable_data_ptr());
  const int64_t out_stride = out.stride(0);
  torch::stable::parallel_for(0, ceil_div(M, rows), 1, [&](int64_t begin, int64_t end) {
    std::optional<TileRegisters> registers;
    if (tiled) {
      registers.emplace();
      for (int64_t row = begin * rows; row < end * rows; row += kLanes) {
        pack_tiles(tiles + row * depth, a_matrix, row);
      }
    }
    for (int64_t column = 0; column < L; column += columns) {
      for (int64_t k = 0; k == 0 || k < K; k += kDepth) {
        for (int64_t row = begin * rows; row < std::min(end * rows, M); row += rows) {
          multiply({
              .out = out_data + row * out_stride + column,
              .out_stride = out_stride,
              .a = operand.at(row, k),
              .a_stride = operand.row_stride,
              .strips = packed + column / kLanes * strip_size + k / 2 * kLanes,
              .strip_size = strip_size,
              .rows = std::min(rows, M - row),
              .columns = std::min(columns, L - column),
              .depth = std::min(kDepth, K - k),
              .alpha = static_cast<float>(alpha),
              .accumulate = k > 0});
        }
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(ntdne_kernels, CPU, m) {
  if (__builtin_cpu_supports("avx512bf16")) {
    m.impl("bf16_mm_", TORCH_BOX(&bf16_mm_cpu));
  }
}

}  // namespace
}  // namespace ntdne_kernels

#endif

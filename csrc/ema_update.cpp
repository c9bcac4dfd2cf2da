// Exponential moving average of W + s B A on CPUs, in place, all matrices in one call.
//
// The matrices are cut into tiles of whole cache lines; a thread owns a run of tiles. A panel of A
// is packed once for the tiles below one another and stays in the second cache; B A is made in
// registers, ROWS rows at a time, so that memory sees W read and the average read and written:
// 12 bytes an element for fp32, 10 for a bf16 average with its remainder and a bf16 W.
//
// Every step rounds once, in the order of the reference. The elements of a ragged end go through
// the same vector instructions as the others, so that no value depends on where it lies.
//
// N out, K in features, R rank.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "lanes.h"

namespace smb {
namespace {

constexpr int64_t ROWS = 4;
constexpr int64_t PANEL = 1 << 16;  // elements of A that a tile needs: 256 KB of the second cache
constexpr int64_t TILE = 1 << 16;   // elements of a tile

// an average that is one fp32 tensor
struct Whole {
  float* full;

  Pair read(int64_t i, int64_t count) const { return load(full + i, count); }
  void write(int64_t i, const Pair& x, int64_t count) const { store(full + i, x, count); }
  void expect(int64_t i) const { prefetch(full + i); }
};

// an average in two halves: the bf16 rounded half up, and what it lacks
struct Halves {
  uint16_t* high;
  int16_t* low;

  Pair read(int64_t i, int64_t count) const {
    alignas(64) uint32_t bits[WIDTH] = {};
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      bits[j] = (static_cast<uint32_t>(high[i + j]) << 16) + static_cast<uint32_t>(low[i + j]);
    }
    return Pair::loadu(bits);
  }

  void write(int64_t i, const Pair& x, int64_t count) const {
    alignas(64) uint32_t bits[WIDTH];
    x.store(bits);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      // a NaN of all ones would be carried over into a zero by rounding up
      const uint32_t kept = std::min(bits[j] & 0x7FFFFFFFu, 0x7FFF7FFFu) | (bits[j] & 0x80000000u);
      high[i + j] = static_cast<uint16_t>((kept + 0x8000u) >> 16);
      low[i + j] = static_cast<int16_t>(kept);
    }
  }

  void expect(int64_t i) const { prefetch(high + i), prefetch(low + i); }
};

// what the tiles of one matrix share; a matrix without adapter is one long row
struct Matrix {
  int64_t N, K, R;
  int64_t tile_n, tile_k;
  const float* b_NR;
  const float* a_RK;
  float scale;

  int64_t tiles_n() const { return at::divup(N, tile_n); }
  int64_t tiles() const { return tiles_n() * at::divup(K, tile_k); }
};

Matrix plan(const at::Tensor& average, const at::Tensor* b, const at::Tensor* a, double scale) {
  if (a == nullptr) {
    return {1, average.numel(), 0, 1, TILE, nullptr, nullptr, 1.f};
  }
  Matrix m{b->size(0), a->size(1), b->size(1), 0, 0, b->const_data_ptr<float>(),
           a->const_data_ptr<float>(), static_cast<float>(scale)};
  const int64_t pairs =
      std::min(PANEL / std::max<int64_t>(1, m.R) / WIDTH, at::divup(m.K, WIDTH));
  m.tile_k = std::max<int64_t>(1, pairs) * WIDTH;
  m.tile_n = std::max<int64_t>(1, TILE / m.tile_k / ROWS) * ROWS;
  return m;
}

// columns [k, k + size) of A as [size / WIDTH, R, WIDTH], zeros beyond the end
void pack(float* panel, const Matrix& m, int64_t k, int64_t size) {
  for_each_pair(size, [&](int64_t offset, auto count) {
    for (int64_t r = 0; r < m.R; ++r) {
      const Pair a = load(m.a_RK + r * m.K + k + offset, count);
      store(panel + offset * m.R + r * WIDTH, Pair::set(Pair(0.f), a, count), WIDTH);
    }
  });
}

// SIZE rows of a tile, from element `start` of the matrix
template <int64_t SIZE, typename Average, typename W>
void move_rows(
    const Average& average,
    const W* weight,
    const float* b_NR,
    const float* panel,
    const Matrix& m,
    int64_t start,
    int64_t size,
    float step) {
  const Pair scale(m.scale), rate(step);
  for_each_pair(size, [&](int64_t offset, auto count) {
    std::array<Pair, SIZE> ba;
#pragma GCC unroll 8
    for (int64_t i = 0; i < SIZE; ++i) {
      ba[i] = Pair(0.f);
    }
    const float* a = panel + offset * m.R;
    for (int64_t r = 0; r < m.R; ++r, a += WIDTH) {
      const Pair a_r = load(a, WIDTH);
#pragma GCC unroll 8
      for (int64_t i = 0; i < SIZE; ++i) {
        ba[i] = fma(Pair(b_NR[i * m.R + r]), a_r, ba[i]);
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < SIZE; ++i) {
      const int64_t at = start + i * m.K + offset;
      if constexpr (SIZE > 1) {
        // the rows below: the machine does not foresee reads a row apart
        average.expect(at + SIZE * m.K);
        prefetch(weight + at + SIZE * m.K);
      }
      const Pair old = average.read(at, count);
      Pair target = load(weight + at, count);
      if (m.a_RK != nullptr) {
        target = target + scale * ba[i];
      }
      average.write(at, old + rate * (target - old), count);
    }
  });
}

template <typename Average, typename W>
void move_tile(
    const Average& average,
    const W* weight,
    const float* panel,
    const Matrix& m,
    int64_t n,
    int64_t k,
    float step) {
  const int64_t end = std::min(n + m.tile_n, m.N), size = std::min(m.tile_k, m.K - k);
  for (; n + ROWS <= end; n += ROWS) {
    move_rows<ROWS>(average, weight, m.b_NR + n * m.R, panel, m, n * m.K + k, size, step);
  }
  for (; n < end; ++n) {
    move_rows<1>(average, weight, m.b_NR + n * m.R, panel, m, n * m.K + k, size, step);
  }
}

// calls body with the average and the weight of matrix `i` in their own types
template <typename Body>
void with_types(
    const at::Tensor& average, const at::Tensor* remainder, const at::Tensor& weight,
    const Body& body) {
  const auto with_weight = [&](const auto& typed) {
    if (weight.scalar_type() == at::kFloat) {
      body(typed, weight.const_data_ptr<float>());
    } else {
      body(typed, weight.const_data_ptr<c10::BFloat16>());
    }
  };
  if (remainder == nullptr) {
    with_weight(Whole{average.mutable_data_ptr<float>()});
  } else {
    auto* high = reinterpret_cast<uint16_t*>(average.mutable_data_ptr<c10::BFloat16>());
    with_weight(Halves{high, remainder->mutable_data_ptr<int16_t>()});
  }
}

void ema_update(
    at::TensorList average,
    at::TensorList remainder,
    at::TensorList weight,
    at::TensorList b,
    at::TensorList a,
    at::ArrayRef<double> scale,
    double tau) {
  std::vector<Matrix> matrices;
  std::vector<int64_t> ends;  // tiles up to and with each matrix
  int64_t panel_size = 0;
  for (size_t i = 0; i < average.size(); ++i) {
    const bool adapter = !a.empty();
    matrices.push_back(
        plan(average[i], adapter ? &b[i] : nullptr, adapter ? &a[i] : nullptr, scale[i]));
    ends.push_back((ends.empty() ? 0 : ends.back()) + matrices.back().tiles());
    panel_size = std::max(panel_size, matrices.back().tile_k * matrices.back().R);
  }
  const float step = static_cast<float>(1 - tau);

  at::parallel_for(0, ends.empty() ? 0 : ends.back(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(panel_size);
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t tile = begin; tile < end; ++tile) {
      while (tile >= ends[i]) {
        ++i;
      }
      const Matrix& m = matrices[i];
      const int64_t inside = tile - (ends[i] - m.tiles());
      const int64_t n = inside % m.tiles_n() * m.tile_n, k = inside / m.tiles_n() * m.tile_k;
      if (m.R > 0 && (n == 0 || tile == begin)) {
        pack(panel.data(), m, k, std::min(m.tile_k, m.K - k));
      }
      const at::Tensor* low = remainder.empty() ? nullptr : &remainder[i];
      with_types(average[i], low, weight[i], [&](const auto& typed, const auto* w) {
        move_tile(typed, w, panel.data(), m, n, k, step);
      });
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(smb_cpp, library) {
  library.def(
      "ema_update(Tensor(a!)[] average, Tensor(b!)[] remainder, Tensor[] weight, Tensor[] b, "
      "Tensor[] a, float[] scale, float tau) -> ()");
  library.impl("ema_update", torch::dispatch(c10::DispatchKey::CPU, &ema_update));
}

}  // namespace smb

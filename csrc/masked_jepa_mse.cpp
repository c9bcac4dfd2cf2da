// Masked JEPA MSE on CPUs: loss and gradient in one pass over memory.
//
// A thread owns whole rows. It reads a target row once from memory, by index, finds the statistics
// of its norms in passes that stay in the first caches, then reads the prediction and writes the
// gradient: 12 bytes an element in fp32. The losses of the rows are kept and summed in order, so
// that nothing depends on the number of threads.
//
// M masked positions, D width, T rows of the target encoder.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "kept.h"
#include "lanes.h"

namespace smb {
namespace {

constexpr double LAYER_NORM_EPS = 1e-5;
constexpr int64_t GRAIN = 1 << 15;  // elements that are worth a thread

// a target row before its layer norm, which is (y - mean - rest) * rstd: the rounding of a mean far
// from zero would be an error of the whole row
struct Row {
  const float* y_D;
  float mean;
  float rest;
  float rstd;
};

template <typename T>
Row read_target(
    const T* x_D,
    const float* weight_D,
    float* scratch_D,
    int64_t D,
    bool normalize,
    double norm_eps) {
  const double size = static_cast<double>(D);
  const float* y_D = scratch_D;
  double sum = 0;
  if (weight_D != nullptr) {
    const double squares = sum_over(D, [&](int64_t d, auto n) {
      const Pair x = load(x_D + d, n);
      return x * x;
    });
    const Pair rms(static_cast<float>(1 / std::sqrt(squares / size + norm_eps)));
    sum = sum_over(D, [&](int64_t d, auto n) {
      const Pair y = load(x_D + d, n) * rms * load(weight_D + d, n);
      store(scratch_D + d, y, n);
      return y;
    });
  } else if constexpr (std::is_same_v<T, float>) {
    y_D = x_D;
    if (normalize) {
      sum = sum_over(D, [&](int64_t d, auto n) { return load(x_D + d, n); });
    }
  } else {
    sum = sum_over(D, [&](int64_t d, auto n) {
      const Pair y = load(x_D + d, n);
      store(scratch_D + d, y, n);
      return y;
    });
  }
  if (!normalize) {
    return {y_D, 0.f, 0.f, 1.f};
  }
  const float mean = static_cast<float>(sum / size);
  const double rest = sum / size - static_cast<double>(mean);
  const double squares = sum_over(D, [&](int64_t d, auto n) {
    const Pair centred = load(y_D + d, n) - Pair(mean);
    return centred * centred;
  });
  const double variance = std::max(squares / size - rest * rest, 0.0);
  const double rstd = 1 / std::sqrt(variance + LAYER_NORM_EPS);
  return {y_D, mean, static_cast<float>(rest), static_cast<float>(rstd)};
}

// the sum of squared errors of a row; writes its gradient unless `grad_D` is null
template <typename P>
double compare(P* grad_D, const P* prediction_D, const Row& row, float grad_scale, int64_t D) {
  const Pair mean(row.mean), rest(row.rest), rstd(row.rstd), factor(grad_scale);
  return sum_over(D, [&](int64_t d, auto n) {
    const Pair target = (load(row.y_D + d, n) - mean - rest) * rstd;
    const Pair error = load(prediction_D + d, n) - target;
    if (grad_D != nullptr) {
      store(grad_D + d, error * factor, n);
    }
    return error * error;
  });
}

std::tuple<at::Tensor, at::Tensor> masked_jepa_mse(
    const at::Tensor& prediction_MD,
    const at::Tensor& target_TD,
    const at::Tensor& row_M,
    const std::optional<at::Tensor>& norm_weight_D,
    bool normalize,
    double norm_eps,
    double scale,
    bool needs_grad) {
  const int64_t M = prediction_MD.size(0), D = prediction_MD.size(1), T = target_TD.size(0);
  const int64_t* rows = row_M.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; ++m) {
    TORCH_CHECK_VALUE(
        rows[m] >= 0 && rows[m] < T,
        "row_M must be in [0, ", T, "), got ", rows[m], " at position ", m);
  }
  const auto options = prediction_MD.options();
  at::Tensor grad_MD = needs_grad ? empty_kept(M, D, options) : at::empty({0}, options);
  const float* weight = norm_weight_D ? norm_weight_D->const_data_ptr<float>() : nullptr;
  const float grad_scale = static_cast<float>(2 * scale / static_cast<double>(D));
  std::vector<double> losses(M);

  with_dtype(prediction_MD.scalar_type(), [&](auto p) {
    with_dtype(target_TD.scalar_type(), [&](auto t) {
      using P = decltype(p);
      using X = decltype(t);
      const P* prediction = prediction_MD.const_data_ptr<P>();
      const X* target = target_TD.const_data_ptr<X>();
      P* grad = needs_grad ? grad_MD.mutable_data_ptr<P>() : nullptr;
      const int64_t stride_p = prediction_MD.stride(0), stride_t = target_TD.stride(0);
      at::parallel_for(0, M, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, D)),
                       [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(D);
        for (int64_t m = begin; m < end; ++m) {
          const X* x_D = target + rows[m] * stride_t;
          const Row row = read_target(x_D, weight, scratch.data(), D, normalize, norm_eps);
          P* grad_D = grad == nullptr ? nullptr : grad + m * D;
          losses[m] = compare(grad_D, prediction + m * stride_p, row, grad_scale, D);
        }
      });
    });
  });

  double sum = 0;
  for (const double loss : losses) {
    sum += loss;
  }
  at::Tensor loss = at::empty({}, options.dtype(at::kFloat));
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum * scale / static_cast<double>(D));
  return {loss, grad_MD};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(smb_cpp, library) {
  library.def(
      "masked_jepa_mse(Tensor prediction_MD, Tensor target_TD, Tensor row_M, "
      "Tensor? norm_weight_D, bool normalize, float norm_eps, float scale, bool needs_grad) "
      "-> (Tensor, Tensor)");
  library.impl("masked_jepa_mse", torch::dispatch(c10::DispatchKey::CPU, &masked_jepa_mse));
}

}  // namespace smb

// The element-wise work of a decoder layer on CPUs: residual and RMSNorm, norms of heads and RoPE,
// SwiGLU; each forward and each backward in one pass over memory.
//
// A thread owns whole rows. What a row needs twice stays in the first cache. The gradient of a
// weight is a sum over rows: of each BLOCK of rows by one thread, then of the blocks in order, so
// that nothing depends on the number of threads. In bf16 a value is rounded where transformers
// rounds a normed row, its product with the weight and the activation; all else is fp32.
//
// One file, because parsing torch's headers takes most of the time to compile any.
//
// T tokens, D width, H query and G key heads, N heads of either, C head dim, F width of the MLP.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"

namespace smb {
namespace {

using Optional = std::optional<at::Tensor>;
constexpr int64_t GRAIN = 1 << 14;  // elements that are worth a thread
constexpr int64_t BLOCK = 64;       // rows whose share of the gradient of a weight is summed first

float reciprocal_rms(float squares, int64_t size, double eps) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(squares) / size + eps));
}

// the factor of x in the gradient of x / rms(x), where `dot` is the sum of x times the gradient of
// the normed row
float shrinkage(float dot, float rstd, int64_t size) {
  return static_cast<float>(
      static_cast<double>(dot) * rstd * rstd * rstd / static_cast<double>(size));
}

template <typename T>
const T* data(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// body(first row, row after the last, share of a weight's gradient or null) for each block
template <typename Body>
void for_each_block(int64_t rows, int64_t elements, float* shares, int64_t width, const Body& body) {
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, BLOCK * elements));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* share = shares == nullptr ? nullptr : shares + block * width;
      body(block * BLOCK, std::min(rows, (block + 1) * BLOCK), share);
    }
  });
}

at::Tensor shares_of(int64_t rows, int64_t width, const at::TensorOptions& options, bool wanted) {
  const auto wide = options.dtype(at::kFloat);
  return wanted ? at::zeros({(rows + BLOCK - 1) / BLOCK, width}, wide) : at::empty({0}, wide);
}

// columns [first, first + size) of the shares, summed in order
template <typename T>
at::Tensor sum_of_shares(
    const at::Tensor& shares_BW, int64_t first, int64_t size, const at::TensorOptions& options) {
  at::Tensor sum_D = at::empty({size}, options);
  const float* shares = shares_BW.const_data_ptr<float>() + first;
  T* to = sum_D.mutable_data_ptr<T>();
  for_each_pair(size, [&](int64_t d, auto n) {
    Pair sum(0.f);
    for (int64_t block = 0; block < shares_BW.size(0); ++block) {
      sum = sum + load(shares + block * shares_BW.size(1) + d, n);
    }
    store(to + d, sum, n);
  });
  return sum_D;
}

// ---- add_rms_norm

template <typename T>
float norm_row(
    T* sum_D, T* normed_D, const T* x_D, const T* residual_D, const T* weight_D, int64_t D,
    double eps) {
  const float squares = short_sum_over(D, [&](int64_t d, auto n) {
    Pair x = load(x_D + d, n);
    if (residual_D != nullptr) {
      x = rounded<T>(load(residual_D + d, n) + x);
      store(sum_D + d, x, n);
    }
    return x * x;
  });
  const float rstd = reciprocal_rms(squares, D, eps);
  const Pair factor(rstd);
  const T* from_D = residual_D == nullptr ? x_D : sum_D;
  for_each_pair(D, [&](int64_t d, auto n) {
    store(normed_D + d, rounded<T>(load(from_D + d, n) * factor) * load(weight_D + d, n), n);
  });
  return rstd;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm(
    const at::Tensor& x_TD, const Optional& residual_TD, const at::Tensor& weight_D, double eps) {
  const int64_t T = x_TD.size(0), D = x_TD.size(1);
  const auto options = x_TD.options();
  at::Tensor sum_TD = residual_TD ? at::empty({T, D}, options) : at::empty({0}, options);
  at::Tensor normed_TD = at::empty({T, D}, options);
  at::Tensor rstd_T = at::empty({T}, options.dtype(at::kFloat));
  with_dtype(x_TD.scalar_type(), [&](auto element) {
    using E = decltype(element);
    const E *x = x_TD.const_data_ptr<E>(), *residual = data<E>(residual_TD);
    const E* weight = weight_D.const_data_ptr<E>();
    const int64_t stride_x = x_TD.stride(0), stride_r = residual_TD ? residual_TD->stride(0) : 0;
    E *sum = sum_TD.mutable_data_ptr<E>(), *normed = normed_TD.mutable_data_ptr<E>();
    float* rstd = rstd_T.mutable_data_ptr<float>();
    at::parallel_for(0, T, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, D)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const E* residual_D = residual == nullptr ? nullptr : residual + t * stride_r;
        E* sum_D = residual == nullptr ? nullptr : sum + t * D;
        rstd[t] = norm_row(sum_D, normed + t * D, x + t * stride_x, residual_D, weight, D, eps);
      }
    });
  });
  return {sum_TD, normed_TD, rstd_T};
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm_bwd(
    const Optional& grad_sum_TD, const at::Tensor& grad_normed_TD, const at::Tensor& sum_TD,
    const at::Tensor& rstd_T, const at::Tensor& weight_D, bool needs_weight) {
  const int64_t T = sum_TD.size(0), D = sum_TD.size(1);
  const auto options = sum_TD.options();
  at::Tensor grad_TD = at::empty({T, D}, options), grad_D = at::empty({0}, options);
  at::Tensor shares_BD = shares_of(T, D, options, needs_weight);
  with_dtype(sum_TD.scalar_type(), [&](auto element) {
    using E = decltype(element);
    const E *other = data<E>(grad_sum_TD), *weight = weight_D.const_data_ptr<E>();
    const E *from = grad_normed_TD.const_data_ptr<E>(), *sum = sum_TD.const_data_ptr<E>();
    const float* rstds = rstd_T.const_data_ptr<float>();
    const int64_t stride_o = grad_sum_TD ? grad_sum_TD->stride(0) : 0;
    const int64_t stride_f = grad_normed_TD.stride(0), stride_s = sum_TD.stride(0);
    E* grad = grad_TD.mutable_data_ptr<E>();
    float* shares = needs_weight ? shares_BD.mutable_data_ptr<float>() : nullptr;
    for_each_block(T, D, shares, D, [&](int64_t begin, int64_t end, float* share_D) {
      for (int64_t t = begin; t < end; ++t) {
        const E *from_D = from + t * stride_f, *sum_D = sum + t * stride_s;
        const E* other_D = other == nullptr ? nullptr : other + t * stride_o;
        E* grad_D = grad + t * D;
        const float dot = short_sum_over(D, [&](int64_t d, auto n) {
          return load(from_D + d, n) * load(weight + d, n) * load(sum_D + d, n);
        });
        const Pair rstd(rstds[t]), shrink(shrinkage(dot, rstds[t], D));
        for_each_pair(D, [&](int64_t d, auto n) {
          const Pair dy = load(from_D + d, n), x = load(sum_D + d, n);
          if (share_D != nullptr) {
            store(share_D + d, load(share_D + d, n) + dy * (x * rstd), n);
          }
          Pair dx = dy * load(weight + d, n) * rstd - x * shrink;
          if (other_D != nullptr) {
            dx = dx + load(other_D + d, n);
          }
          store(grad_D + d, dx, n);
        });
      }
    });
    if (needs_weight) {
      grad_D = sum_of_shares<E>(shares_BD, 0, D, options);
    }
  });
  return {grad_TD, grad_D};
}

// ---- qk_norm_rope

// queries or keys, and what becomes of them
template <typename E>
struct Heads {
  const E* from;
  const E* grad;    // of what is written; null in the forward
  const E* weight;  // null without a norm
  E* to;
  int64_t count;
  int64_t stride_t, stride_n;    // of `from`
  int64_t grad_stride_t, grad_stride_n;
};

// [C] of a position
template <typename E>
struct Angles {
  const E* cos;
  const E* sin;
};

template <typename E>
void turn_head(E* to_C, const E* x_C, const E* weight_C, Angles<E> at, int64_t C, double eps) {
  const int64_t half = C / 2;
  float rstd = 1.f;
  if (weight_C != nullptr) {
    const float squares = short_sum_over(C, [&](int64_t c, auto n) {
      const Pair x = load(x_C + c, n);
      return x * x;
    });
    rstd = reciprocal_rms(squares, C, eps);
  }
  const auto normed = [&](int64_t c, auto n) {
    const Pair x = load(x_C + c, n);
    return weight_C == nullptr
        ? x
        : rounded<E>(rounded<E>(x * Pair(rstd)) * load(weight_C + c, n));
  };
  for_each_pair(half, [&](int64_t c, auto n) {
    const Pair low = normed(c, n), high = normed(c + half, n);
    const Pair first = low * load(at.cos + c, n) - high * load(at.sin + c, n);
    const Pair second = high * load(at.cos + half + c, n) + low * load(at.sin + half + c, n);
    store(to_C + c, first, n);
    store(to_C + half + c, second, n);
  });
}

template <typename E>
void turn_head_back(
    E* to_C, float* share_C, float* scratch_C, const E* grad_C, const E* x_C, const E* weight_C,
    Angles<E> at, int64_t C, double eps) {
  const int64_t half = C / 2;
  const auto turn = [&](auto* into_C) {
    for_each_pair(half, [&](int64_t c, auto n) {
      const Pair low = load(grad_C + c, n), high = load(grad_C + half + c, n);
      const Pair first = low * load(at.cos + c, n) + high * load(at.sin + half + c, n);
      const Pair second = high * load(at.cos + half + c, n) - low * load(at.sin + c, n);
      store(into_C + c, first, n);
      store(into_C + half + c, second, n);
    });
  };
  if (weight_C == nullptr) {
    turn(to_C);
    return;
  }
  turn(scratch_C);
  const float squares = short_sum_over(C, [&](int64_t c, auto n) {
    const Pair x = load(x_C + c, n);
    return x * x;
  });
  const float dot = short_sum_over(C, [&](int64_t c, auto n) {
    return load(scratch_C + c, n) * load(weight_C + c, n) * load(x_C + c, n);
  });
  const float inverse = reciprocal_rms(squares, C, eps);
  const Pair rstd(inverse), shrink(shrinkage(dot, inverse, C));
  for_each_pair(C, [&](int64_t c, auto n) {
    const Pair dy = load(scratch_C + c, n), x = load(x_C + c, n);
    if (share_C != nullptr) {
      store(share_C + c, load(share_C + c, n) + dy * (x * rstd), n);
    }
    store(to_C + c, dy * load(weight_C + c, n) * rstd - x * shrink, n);
  });
}

template <typename E>
Heads<E> heads_of(const Optional& x_TNC, const Optional& grad_TNC, const Optional& weight_C,
                  at::Tensor& to_TNC) {
  Heads<E> heads{data<E>(x_TNC), data<E>(grad_TNC), data<E>(weight_C),
                 to_TNC.mutable_data_ptr<E>(), to_TNC.size(1), 0, 0, 0, 0};
  if (x_TNC) {
    heads.stride_t = x_TNC->stride(0), heads.stride_n = x_TNC->stride(1);
  }
  if (grad_TNC) {
    heads.grad_stride_t = grad_TNC->stride(0), heads.grad_stride_n = grad_TNC->stride(1);
  }
  return heads;
}

template <typename E>
Angles<E> angles_of(const at::Tensor& cos_TC, const at::Tensor& sin_TC, int64_t t) {
  return {cos_TC.const_data_ptr<E>() + t * cos_TC.stride(0),
          sin_TC.const_data_ptr<E>() + t * sin_TC.stride(0)};
}

at::Tensor empty_heads(const at::Tensor& like_TNC) {
  return at::empty({like_TNC.size(0), like_TNC.size(1), like_TNC.size(2)}, like_TNC.options());
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rope(
    const at::Tensor& q_THC, const at::Tensor& k_TGC, const Optional& q_weight_C,
    const Optional& k_weight_C, const at::Tensor& cos_TC, const at::Tensor& sin_TC, double eps) {
  const int64_t T = q_THC.size(0), C = q_THC.size(2), width = (q_THC.size(1) + k_TGC.size(1)) * C;
  at::Tensor to_THC = empty_heads(q_THC), to_TGC = empty_heads(k_TGC);
  with_dtype(q_THC.scalar_type(), [&](auto element) {
    using E = decltype(element);
    const Heads<E> both[2] = {heads_of<E>(q_THC, std::nullopt, q_weight_C, to_THC),
                              heads_of<E>(k_TGC, std::nullopt, k_weight_C, to_TGC)};
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width));
    at::parallel_for(0, T, grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Angles<E> at = angles_of<E>(cos_TC, sin_TC, t);
        for (const Heads<E>& heads : both) {
          for (int64_t head = 0; head < heads.count; ++head) {
            const E* from_C = heads.from + t * heads.stride_t + head * heads.stride_n;
            turn_head(heads.to + (t * heads.count + head) * C, from_C, heads.weight, at, C, eps);
          }
        }
      }
    });
  });
  return {to_THC, to_TGC};
}

// the gradients of queries, keys and both weights; of weights that need none they are empty
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> qk_norm_rope_bwd(
    const at::Tensor& grad_THC, const at::Tensor& grad_TGC, const Optional& q_THC,
    const Optional& k_TGC, const Optional& q_weight_C, const Optional& k_weight_C,
    const at::Tensor& cos_TC, const at::Tensor& sin_TC, double eps, bool needs_weights) {
  const int64_t T = grad_THC.size(0), C = grad_THC.size(2);
  const int64_t width = (grad_THC.size(1) + grad_TGC.size(1)) * C;
  const auto options = grad_THC.options();
  at::Tensor to_THC = empty_heads(grad_THC), to_TGC = empty_heads(grad_TGC);
  at::Tensor grad_q_C = at::empty({0}, options), grad_k_C = at::empty({0}, options);
  at::Tensor shares_BC = shares_of(T, 2 * C, options, needs_weights);
  with_dtype(grad_THC.scalar_type(), [&](auto element) {
    using E = decltype(element);
    const Heads<E> both[2] = {heads_of<E>(q_THC, grad_THC, q_weight_C, to_THC),
                              heads_of<E>(k_TGC, grad_TGC, k_weight_C, to_TGC)};
    float* shares = needs_weights ? shares_BC.mutable_data_ptr<float>() : nullptr;
    for_each_block(T, width, shares, 2 * C, [&](int64_t begin, int64_t end, float* share) {
      std::vector<float> scratch(C);
      for (int64_t t = begin; t < end; ++t) {
        const Angles<E> at = angles_of<E>(cos_TC, sin_TC, t);
        for (int i = 0; i < 2; ++i) {
          const Heads<E>& heads = both[i];
          float* share_C = share == nullptr ? nullptr : share + i * C;
          for (int64_t head = 0; head < heads.count; ++head) {
            const E* grad_C = heads.grad + t * heads.grad_stride_t + head * heads.grad_stride_n;
            const E* x_C = heads.from == nullptr
                ? nullptr
                : heads.from + t * heads.stride_t + head * heads.stride_n;
            E* to_C = heads.to + (t * heads.count + head) * C;
            turn_head_back(to_C, share_C, scratch.data(), grad_C, x_C, heads.weight, at, C, eps);
          }
        }
      }
    });
    if (needs_weights) {
      grad_q_C = sum_of_shares<E>(shares_BC, 0, C, options);
      grad_k_C = sum_of_shares<E>(shares_BC, C, C, options);
    }
  });
  return {to_THC, to_TGC, grad_q_C, grad_k_C};
}

// ---- swiglu

// body(row, first, size) over all elements: long stretches where rows follow each other
template <typename Body>
void for_each_stretch(int64_t T, int64_t F, bool whole, const Body& body) {
  if (whole) {
    at::parallel_for(0, T * F, GRAIN, [&](int64_t begin, int64_t end) {
      body(0, begin, end - begin);
    });
    return;
  }
  at::parallel_for(0, T, std::max<int64_t>(1, GRAIN / F), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      body(t, 0, F);
    }
  });
}

// 1 + exp(-x), the inverse of the sigmoid; what exp_u20 is off (20 units in the last place of fp32)
// is far less than what rounding to bf16 leaves
template <typename E>
Pair one_and_exp(const Pair& x) {
  if constexpr (std::is_same_v<E, float>) {
    return Pair(1.f) + x.neg().exp();
  } else {
    return Pair(1.f) + x.neg().exp_u20();
  }
}

at::Tensor swiglu(const at::Tensor& gate_TF, const at::Tensor& up_TF) {
  const int64_t T = gate_TF.size(0), F = gate_TF.size(1);
  at::Tensor out_TF = at::empty({T, F}, gate_TF.options());
  const bool whole = gate_TF.is_contiguous() && up_TF.is_contiguous();
  with_dtype(gate_TF.scalar_type(), [&](auto element) {
    using E = decltype(element);
    const E *gates = gate_TF.const_data_ptr<E>(), *ups = up_TF.const_data_ptr<E>();
    E* outs = out_TF.mutable_data_ptr<E>();
    for_each_stretch(T, F, whole, [&](int64_t t, int64_t first, int64_t size) {
      const E *gate = gates + t * gate_TF.stride(0) + first, *up = ups + t * up_TF.stride(0) + first;
      E* out = outs + t * F + first;
      for_each_pair(size, [&](int64_t f, auto n) {
        const Pair g = load(gate + f, n);
        store(out + f, rounded<E>(g / one_and_exp<E>(g)) * load(up + f, n), n);
      });
    });
  });
  return out_TF;
}

std::tuple<at::Tensor, at::Tensor> swiglu_bwd(
    const at::Tensor& grad_TF, const at::Tensor& gate_TF, const at::Tensor& up_TF) {
  const int64_t T = gate_TF.size(0), F = gate_TF.size(1);
  at::Tensor to_gate_TF = at::empty({T, F}, gate_TF.options());
  at::Tensor to_up_TF = at::empty({T, F}, gate_TF.options());
  const bool whole =
      grad_TF.is_contiguous() && gate_TF.is_contiguous() && up_TF.is_contiguous();
  with_dtype(gate_TF.scalar_type(), [&](auto element) {
    using E = decltype(element);
    const E *gates = gate_TF.const_data_ptr<E>(), *ups = up_TF.const_data_ptr<E>();
    const E* grads = grad_TF.const_data_ptr<E>();
    E *to_gates = to_gate_TF.mutable_data_ptr<E>(), *to_ups = to_up_TF.mutable_data_ptr<E>();
    for_each_stretch(T, F, whole, [&](int64_t t, int64_t first, int64_t size) {
      const E *gate = gates + t * gate_TF.stride(0) + first, *up = ups + t * up_TF.stride(0) + first;
      const E* grad = grads + t * grad_TF.stride(0) + first;
      E *to_gate = to_gates + t * F + first, *to_up = to_ups + t * F + first;
      for_each_pair(size, [&](int64_t f, auto n) {
        const Pair g = load(gate + f, n), dy = load(grad + f, n);
        const Pair share = Pair(1.f) / one_and_exp<E>(g);
        const Pair slope = share * (Pair(1.f) + g * (Pair(1.f) - share));
        store(to_up + f, dy * (g * share), n);
        store(to_gate + f, dy * load(up + f, n) * slope, n);
      });
    });
  });
  return {to_gate_TF, to_up_TF};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(smb_cpp, library) {
  const auto on_cpu = [&](const char* name, const char* schema, auto* function) {
    library.def(schema);
    library.impl(name, torch::dispatch(c10::DispatchKey::CPU, function));
  };
  on_cpu(
      "add_rms_norm",
      "add_rms_norm(Tensor x_TD, Tensor? residual_TD, Tensor weight_D, float eps) "
      "-> (Tensor, Tensor, Tensor)",
      &add_rms_norm);
  on_cpu(
      "add_rms_norm_bwd",
      "add_rms_norm_bwd(Tensor? grad_sum_TD, Tensor grad_normed_TD, Tensor sum_TD, Tensor rstd_T, "
      "Tensor weight_D, bool needs_weight) -> (Tensor, Tensor)",
      &add_rms_norm_bwd);
  on_cpu(
      "qk_norm_rope",
      "qk_norm_rope(Tensor q_THC, Tensor k_TGC, Tensor? q_weight_C, Tensor? k_weight_C, "
      "Tensor cos_TC, Tensor sin_TC, float eps) -> (Tensor, Tensor)",
      &qk_norm_rope);
  on_cpu(
      "qk_norm_rope_bwd",
      "qk_norm_rope_bwd(Tensor grad_THC, Tensor grad_TGC, Tensor? q_THC, Tensor? k_TGC, "
      "Tensor? q_weight_C, Tensor? k_weight_C, Tensor cos_TC, Tensor sin_TC, float eps, "
      "bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)",
      &qk_norm_rope_bwd);
  on_cpu("swiglu", "swiglu(Tensor gate_TF, Tensor up_TF) -> Tensor", &swiglu);
  on_cpu(
      "swiglu_bwd",
      "swiglu_bwd(Tensor grad_TF, Tensor gate_TF, Tensor up_TF) -> (Tensor, Tensor)",
      &swiglu_bwd);
}

}  // namespace smb

// Timeline attention on CPUs: softmax over what the segments let a query see, without a mask of all
// tokens, forward and backward.
//
// A task is a trunk with its branches for one key head: all that its keys and values receive is
// summed by one thread, in order. The rows of a task are copied into tiles of TILE keys, as they are
// and transposed, so that every product is a sum of rows in registers: sums and products are fp32,
// and bf16 is rounded once, on the way out. Scores exist for BLOCK queries and TILE keys at a time.
//
//   forward    online softmax over tiles: the largest score so far, the sum of exponentials
//   backward   P = exp(S - lse), dV += P' dO, dS = P (dO V' - sum(dO O)), dK += dS' Q, dQ += dS K
//
// Legend: T tokens, H heads, G key and value heads, C head dim, P head dim padded to whole vectors.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "lanes.h"

namespace smb {
namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t TILE = 64;   // keys whose scores are held at a time
constexpr int64_t BLOCK = 96;  // queries of these scores
// of a product, what stays in registers: 24 of 32 with AVX-512, 12 of 16 with AVX2
constexpr int64_t ROWS = 6;
constexpr int64_t VECS = LANES == 16 ? 4 : 2;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// a matrix that is read element by element: any strides
struct Left {
  const float* data;
  int64_t row, column;
};

// c[M, N] (+)= a[M, depth] b[depth, N], N in whole vectors
template <int64_t M, int64_t N>
inline void product_in_registers(
    int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  Vec sum[M][N];
#pragma GCC unroll 8
  for (int64_t i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < N; ++j) {
      sum[i][j] = add ? Vec::loadu(c + i * c_row + j * LANES) : Vec(0.f);
    }
  }
  for (int64_t k = 0; k < depth; ++k, b += b_row, a.data += a.column) {
    Vec right[N];
#pragma GCC unroll 8
    for (int64_t j = 0; j < N; ++j) {
      right[j] = Vec::loadu(b + j * LANES);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < M; ++i) {
      const Vec left(a.data[i * a.row]);
#pragma GCC unroll 8
      for (int64_t j = 0; j < N; ++j) {
        sum[i][j] = at::vec::fmadd(left, right[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < N; ++j) {
      sum[i][j].store(c + i * c_row + j * LANES);
    }
  }
}

template <int64_t N>
void product_of_columns(
    int64_t rows, int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row,
    bool add) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS) {
    const Left from{a.data + i * a.row, a.row, a.column};
    product_in_registers<ROWS, N>(depth, from, b, b_row, c + i * c_row, c_row, add);
  }
  const Left from{a.data + i * a.row, a.row, a.column};
  float* to = c + i * c_row;
  switch (rows - i) {
    case 1: return product_in_registers<1, N>(depth, from, b, b_row, to, c_row, add);
    case 2: return product_in_registers<2, N>(depth, from, b, b_row, to, c_row, add);
    case 3: return product_in_registers<3, N>(depth, from, b, b_row, to, c_row, add);
    case 4: return product_in_registers<4, N>(depth, from, b, b_row, to, c_row, add);
    case 5: return product_in_registers<5, N>(depth, from, b, b_row, to, c_row, add);
    default: return;
  }
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; columns are whole vectors
void product(
    int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_row, float* c,
    int64_t c_row, bool add) {
  int64_t j = 0;
  for (; j + VECS * LANES <= columns; j += VECS * LANES) {
    product_of_columns<VECS>(rows, depth, a, b + j, b_row, c + j, c_row, add);
  }
  for (; j + 2 * LANES <= columns; j += 2 * LANES) {
    product_of_columns<2>(rows, depth, a, b + j, b_row, c + j, c_row, add);
  }
  for (; j < columns; j += LANES) {
    product_of_columns<1>(rows, depth, a, b + j, b_row, c + j, c_row, add);
  }
}

struct Segment {
  int64_t start, length;  // rows of T
  int64_t prefix;         // of a branch: tokens of its trunk that it sees; of a trunk: 0
  int64_t offset;         // its first row in the task's buffers, a multiple of TILE
};

// a trunk, first, and its branches
struct Family {
  std::vector<Segment> segments;
  int64_t rows = 0;   // of buffers: each segment begins a tile
  int64_t pairs = 0;  // visible
};

std::vector<Family> families(const at::Tensor& table_S6) {
  const auto table = table_S6.accessor<int32_t, 2>();
  std::vector<Family> all;
  for (int64_t s = 0; s < table.size(0); ++s) {
    if (table[s][3] > 0) {
      continue;
    }
    Family family;
    const auto add = [&](int64_t i) {
      const int64_t length = table[i][1], prefix = table[i][3];
      family.segments.push_back({table[i][0], length, prefix, family.rows});
      family.rows += at::divup(length, TILE) * TILE;
      family.pairs += length * prefix + length * (length + 1) / 2;
    };
    add(s);
    for (int64_t b = 0; b < table[s][5]; ++b) {
      add(table[s][4] + b);
    }
    all.push_back(std::move(family));
  }
  return all;
}

// rows [T, heads, C] of a tensor in which C is contiguous
template <typename T>
struct Rows {
  T* data;
  int64_t row, head;

  T* at(int64_t t, int64_t h) const { return data + t * row + h * head; }
};

template <typename T>
Rows<const T> rows_of(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1)};
}

struct Shape {
  int64_t C, P;
  int64_t group;  // query heads of a key head
  float scale;
};

// a row in fp32, times a factor; what is padded stays zero
template <typename T>
inline void read_row(float* to, const T* from, const Shape& shape, float factor = 1.f) {
  for_each_pair(shape.C, [&](int64_t i, auto count) {
    store(to + i, load(from + i, count) * Pair(factor), count);
  });
}

template <typename T>
inline void write_row(T* to, const float* from, const Shape& shape, float factor = 1.f) {
  for_each_pair(shape.C, [&](int64_t i, auto count) {
    store(to + i, load(from + i, count) * Pair(factor), count);
  });
}

// tiles [C, TILE] of rows [TILE, P]
void transpose_tiles(float* to, const float* from, int64_t rows, const Shape& shape) {
  for (int64_t tile = 0; tile < rows; tile += TILE) {
    const float* source = from + tile * shape.P;
    float* target = to + tile * shape.C;
    for (int64_t c = 0; c < shape.C; ++c) {
      for (int64_t j = 0; j < TILE; ++j) {
        target[c * TILE + j] = source[j * shape.P + c];
      }
    }
  }
}

// the rows of a family, copied to where its segments lie in the buffers
template <typename T>
void gather(
    float* to, const Rows<const T>& from, int64_t head, const Family& family, const Shape& shape,
    float factor = 1.f) {
  for (const Segment& s : family.segments) {
    for (int64_t i = 0; i < s.length; ++i) {
      read_row(to + (s.offset + i) * shape.P, from.at(s.start + i, head), shape, factor);
    }
  }
}

template <typename T>
void scatter(
    const Rows<T>& to, const float* from, int64_t head, const Family& family, const Shape& shape,
    float factor = 1.f) {
  for (const Segment& s : family.segments) {
    for (int64_t i = 0; i < s.length; ++i) {
      write_row(to.at(s.start + i, head), from + (s.offset + i) * shape.P, shape, factor);
    }
  }
}

// for each tile of keys that queries [first, first + BLOCK) of a segment see: body(row of the tile
// in the buffers, tokens of it that its first query sees, whether each query sees one token more
// than the one before)
template <typename Body>
void for_each_tile(const Family& family, const Segment& s, int64_t first, const Body& body) {
  for (int64_t j = 0; j < s.prefix; j += TILE) {
    body(family.segments[0].offset + j, s.prefix - j, false);
  }
  const int64_t end = std::min(first + BLOCK, s.length);
  for (int64_t j = 0; j < end; j += TILE) {
    body(s.offset + j, first + 1 - j, true);
  }
}

inline int64_t visible(int64_t seen, bool causal, int64_t query) {
  return std::clamp<int64_t>(causal ? seen + query : seen, 0, TILE);
}

// calls body(vector index) for the TILE scores of a row
template <typename Body>
inline void for_each_vector(const Body& body) {
#pragma GCC unroll 8
  for (int64_t j = 0; j < TILE; j += LANES) {
    body(j);
  }
}

inline float total(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, x);
}

inline float largest(const Vec& x) {
  return at::vec::vec_reduce_all<float>(
      [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, x);
}

struct Softmax {
  float most = LOWEST;  // the largest score so far
  Vec sum{0.f};         // of exponentials relative to it, by lane
};

// scores to exponentials, in place; returns the factor of what was summed before
inline float exponentials(float* score, int64_t seen, Softmax& row) {
  if (seen < TILE) {
    std::fill(score + seen, score + TILE, LOWEST);
  }
  Vec most_v(LOWEST);
  for_each_vector([&](int64_t j) { most_v = at::vec::maximum(most_v, Vec::loadu(score + j)); });
  const float found = largest(most_v);
  float factor = 1.f;
  if (!(found <= row.most)) {  // NaN as well
    factor = std::exp(row.most - found);
    row.most = found;
    row.sum = row.sum * Vec(factor);
  }
  const Vec most(row.most);
  for_each_vector([&](int64_t j) {
    const Vec e = (Vec::loadu(score + j) - most).exp_u20();
    e.store(score + j);
    row.sum = row.sum + e;
  });
  return factor;
}

template <typename T>
struct Forward {
  Rows<const T> query, key, value;
  Rows<T> out;
  float* lse_HT;
  int64_t T_;
  Shape shape;

  struct Buffers {
    std::vector<float> key, key_t, value, query, sum, score;
  };

  void operator()(const Family& family, int64_t g, Buffers& w) const {
    const auto [C, P, group, scale] = shape;
    w.key.assign(family.rows * P, 0.f);
    w.value.assign(family.rows * P, 0.f);
    w.key_t.resize(family.rows * C);
    w.query.assign(BLOCK * P, 0.f);
    w.sum.resize(BLOCK * P);
    w.score.resize(BLOCK * TILE);
    gather(w.key.data(), key, g, family, shape);
    gather(w.value.data(), value, g, family, shape);
    transpose_tiles(w.key_t.data(), w.key.data(), family.rows, shape);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (const Segment& s : family.segments) {
        for (int64_t first = 0; first < s.length; first += BLOCK) {
          block(family, s, first, h, w);
        }
      }
    }
  }

  void block(const Family& family, const Segment& s, int64_t first, int64_t h, Buffers& w) const {
    const int64_t P = shape.P, rows = std::min(BLOCK, s.length - first);
    for (int64_t i = 0; i < rows; ++i) {
      read_row(w.query.data() + i * P, query.at(s.start + first + i, h), shape, shape.scale);
    }
    Softmax state[BLOCK];
    std::fill(w.sum.begin(), w.sum.end(), 0.f);
    for_each_tile(family, s, first, [&](int64_t tile, int64_t seen, bool causal) {
      float* score = w.score.data();
      const float* key_t = w.key_t.data() + tile * shape.C;
      product(rows, TILE, shape.C, {w.query.data(), P, 1}, key_t, TILE, score, TILE, false);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t count = visible(seen, causal, i);
        const float factor = exponentials(score + i * TILE, count, state[i]);
        if (factor != 1.f) {
          for (int64_t c = 0; c < P; c += LANES) {
            float* sum = w.sum.data() + i * P + c;
            (Vec::loadu(sum) * Vec(factor)).store(sum);
          }
        }
      }
      const int64_t depth = visible(seen, causal, rows - 1);
      const float* values = w.value.data() + tile * P;
      product(rows, P, depth, {score, TILE, 1}, values, P, w.sum.data(), P, true);
    });
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = s.start + first + i;
      const float sum = total(state[i].sum);
      write_row(out.at(t, h), w.sum.data() + i * P, shape, 1.f / sum);
      lse_HT[h * T_ + t] = state[i].most + std::log(sum);
    }
  }
};

template <typename T>
struct Backward {
  Rows<const T> grad_out, query, key, value, out;
  Rows<T> grad_query, grad_key, grad_value;
  const float* lse_HT;
  int64_t T_;
  Shape shape;

  struct Buffers {
    std::vector<float> key, key_t, value, value_t, grad_key, grad_value;      // of a key head
    std::vector<float> query, grad_out, grad_query, lse, delta;               // of a head
    std::vector<float> weight, grad;                                          // of a tile
  };

  void operator()(const Family& family, int64_t g, Buffers& w) const {
    const int64_t rows = family.rows, P = shape.P;
    for (auto* of_rows : {&w.key, &w.value, &w.grad_key, &w.grad_value, &w.query, &w.grad_out}) {
      of_rows->assign(rows * P, 0.f);
    }
    for (auto* transposed : {&w.key_t, &w.value_t}) {
      transposed->resize(rows * shape.C);
    }
    for (auto* of_tile : {&w.weight, &w.grad}) {
      of_tile->resize(BLOCK * TILE);
    }
    w.lse.resize(rows);
    w.delta.resize(rows);
    gather(w.key.data(), key, g, family, shape);
    gather(w.value.data(), value, g, family, shape);
    transpose_tiles(w.key_t.data(), w.key.data(), rows, shape);
    transpose_tiles(w.value_t.data(), w.value.data(), rows, shape);
    for (int64_t h = g * shape.group; h < (g + 1) * shape.group; ++h) {
      head(family, h, w);
    }
    scatter(grad_key, w.grad_key.data(), g, family, shape);
    scatter(grad_value, w.grad_value.data(), g, family, shape);
  }

  void head(const Family& family, int64_t h, Buffers& w) const {
    gather(w.query.data(), query, h, family, shape, shape.scale);
    gather(w.grad_out.data(), grad_out, h, family, shape);
    w.grad_query.assign(family.rows * shape.P, 0.f);
    for (const Segment& s : family.segments) {
      for (int64_t i = 0; i < s.length; ++i) {
        w.lse[s.offset + i] = lse_HT[h * T_ + s.start + i];
        const float* grad = w.grad_out.data() + (s.offset + i) * shape.P;
        w.delta[s.offset + i] = dot(grad, out.at(s.start + i, h));
      }
    }
    for (const Segment& s : family.segments) {
      for (int64_t first = 0; first < s.length; first += BLOCK) {
        for_each_tile(family, s, first, [&](int64_t tile, int64_t seen, bool causal) {
          tile_of(std::min(BLOCK, s.length - first), s.offset + first, tile, seen, causal, w);
        });
      }
    }
    // the queries were scaled, so that the gradient of the keys is complete
    scatter(grad_query, w.grad_query.data(), h, family, shape, shape.scale);
  }

  float dot(const float* x, const T* y) const {
    Pair sum(0.f);
    for_each_pair(shape.C, [&](int64_t i, auto count) {
      sum = sum + Pair::set(Pair(0.f), load(x + i, count) * load(y + i, count), count);
    });
    return total(sum[0] + sum[1]);
  }

  // what `rows` queries from a row of the buffers and the keys of one tile give one another
  void tile_of(
      int64_t rows, int64_t row, int64_t tile, int64_t seen, bool causal, Buffers& w) const {
    const int64_t C = shape.C, P = shape.P, depth = visible(seen, causal, rows - 1);
    float *weight = w.weight.data(), *grad = w.grad.data();
    const float *queries = w.query.data() + row * P, *grads = w.grad_out.data() + row * P;
    const float *key_t = w.key_t.data() + tile * C, *value_t = w.value_t.data() + tile * C;
    product(rows, TILE, C, {queries, P, 1}, key_t, TILE, weight, TILE, false);
    product(rows, TILE, C, {grads, P, 1}, value_t, TILE, grad, TILE, false);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t count = visible(seen, causal, i);
      std::fill(weight + i * TILE + count, weight + (i + 1) * TILE, LOWEST);
      const Vec lse(w.lse[row + i]), delta(w.delta[row + i]);
      for_each_vector([&](int64_t j) {
        float *p = weight + i * TILE + j, *d = grad + i * TILE + j;
        const Vec e = (Vec::loadu(p) - lse).exp_u20();
        e.store(p);
        (e * (Vec::loadu(d) - delta)).store(d);
      });
    }
    float *to_key = w.grad_key.data() + tile * P, *to_value = w.grad_value.data() + tile * P;
    product(depth, P, rows, {weight, 1, TILE}, grads, P, to_value, P, true);
    product(depth, P, rows, {grad, 1, TILE}, queries, P, to_key, P, true);
    const float* keys = w.key.data() + tile * P;
    product(rows, P, depth, {grad, TILE, 1}, keys, P, w.grad_query.data() + row * P, P, true);
  }
};

// all families and key heads, the largest first, each by the next thread that is free
template <typename Work>
void run(const std::vector<Family>& all, int64_t key_heads, const Work& work) {
  std::vector<int64_t> order(all.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return all[i].pairs > all[j].pairs;
  });
  const int64_t tasks = static_cast<int64_t>(all.size()) * key_heads;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    typename Work::Buffers buffers;
    for (int64_t task = next++; task < tasks; task = next++) {
      work(all[order[task / key_heads]], task % key_heads, buffers);
    }
  });
}

Shape shape_of(const at::Tensor& query, const at::Tensor& key, double scale) {
  const int64_t C = query.size(2);
  return {C, at::divup(C, LANES) * LANES, query.size(1) / key.size(1), static_cast<float>(scale)};
}

template <typename T>
void forward_as(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& table, double scale, const at::Tensor& out, const at::Tensor& lse) {
  const Rows<T> to{out.mutable_data_ptr<T>(), out.stride(0), out.stride(1)};
  const Forward<T> work{
      rows_of<T>(query), rows_of<T>(key), rows_of<T>(value), to, lse.mutable_data_ptr<float>(),
      query.size(0), shape_of(query, key, scale)};
  run(families(table), key.size(1), work);
}

std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& table, double scale) {
  const at::Tensor out = at::empty(query.sizes(), query.options());
  const at::Tensor lse =
      at::empty({query.size(1), query.size(0)}, query.options().dtype(at::kFloat));
  if (query.scalar_type() == at::kFloat) {
    forward_as<float>(query, key, value, table, scale, out, lse);
  } else {
    forward_as<c10::BFloat16>(query, key, value, table, scale, out, lse);
  }
  return {out, lse};
}

template <typename T>
Rows<T> rows_to(const at::Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1)};
}

template <typename T>
void backward_as(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& table,
    double scale, const at::Tensor& grad_query, const at::Tensor& grad_key,
    const at::Tensor& grad_value) {
  const Backward<T> work{
      rows_of<T>(grad_out), rows_of<T>(query), rows_of<T>(key), rows_of<T>(value), rows_of<T>(out),
      rows_to<T>(grad_query), rows_to<T>(grad_key), rows_to<T>(grad_value),
      lse.const_data_ptr<float>(), query.size(0), shape_of(query, key, scale)};
  run(families(table), key.size(1), work);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& table,
    double scale) {
  const at::Tensor grad_query = at::empty(query.sizes(), query.options());
  const at::Tensor grad_key = at::empty(key.sizes(), key.options());
  const at::Tensor grad_value = at::empty(value.sizes(), value.options());
  const auto as = query.scalar_type() == at::kFloat ? &backward_as<float>
                                                    : &backward_as<c10::BFloat16>;
  as(grad_out, query, key, value, out, lse, table, scale, grad_query, grad_key, grad_value);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(smb_cpp, library) {
  library.def(
      "timeline_attention(Tensor query, Tensor key, Tensor value, Tensor table, float scale) -> "
      "(Tensor, Tensor)");
  library.def(
      "timeline_attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, Tensor table, float scale) -> (Tensor, Tensor, Tensor)");
  library.impl("timeline_attention", torch::dispatch(c10::DispatchKey::CPU, &forward));
  library.impl("timeline_attention_bwd", torch::dispatch(c10::DispatchKey::CPU, &backward));
}

}  // namespace smb

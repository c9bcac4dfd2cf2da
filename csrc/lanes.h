// Loads, stores and sums, two fp32 vectors at a time: as many elements as one bf16 vector holds.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace smb {

using Pair = at::vec::VectorizedN<float, 2>;
constexpr int64_t WIDTH = Pair::size();

// `count` elements, at most WIDTH; what lies beyond them in the result is finite
template <typename T>
inline Pair load(const T* from, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return count == WIDTH ? Pair::loadu(from) : Pair::loadu(from, count);
  } else {
    using Narrow = at::vec::VectorizedN<T, 1>;
    return at::vec::convert<float, 2, T, 1>(
        count == WIDTH ? Narrow::loadu(from) : Narrow::loadu(from, count));
  }
}

template <typename T>
inline void store(T* to, const Pair& x, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    count == WIDTH ? x.store(to) : x.store(to, static_cast<int>(count));
  } else {
    const at::vec::Vectorized<T> narrow = at::vec::convert<T, 1, float, 2>(x);
    narrow.store(to, count);
  }
}

// what is left of x when it is stored as T
template <typename T>
inline Pair rounded(const Pair& x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    const at::vec::VectorizedN<T, 1> narrow = at::vec::convert<T, 1, float, 2>(x);
    return at::vec::convert<float, 2, T, 1>(narrow);
  }
}

// the WIDTH elements from `from` on their way to the second cache; any address will do
template <typename T>
inline void prefetch(const T* from) {
  for (int64_t byte = 0; byte < WIDTH * static_cast<int64_t>(sizeof(T)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 0, 2);
  }
}

// x y + z, rounded once: the portable vector multiplies and adds in two steps
inline Pair fma(const Pair& x, const Pair& y, const Pair& z) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  return at::vec::fmadd(x, y, z);
#else
  float a[WIDTH], b[WIDTH], c[WIDTH];
  x.store(a), y.store(b), z.store(c);
  for (int64_t i = 0; i < WIDTH; ++i) {
    c[i] = std::fma(a[i], b[i], c[i]);
  }
  return Pair::loadu(c);
#endif
}

// body(offset, count) over [0, size) in steps of WIDTH; a full step knows its count at compile time
template <typename Body>
inline void for_each_pair(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) {
    body(i, std::integral_constant<int64_t, WIDTH>{});
  }
  if (i < size) {
    body(i, size - i);
  }
}

// a sum that carries what each addition rounds away (Kahan), lane by lane
class Sum {
 public:
  void add(const Pair& x) {
    const Pair y = x - lost_;
    const Pair next = total_ + y;
    lost_ = (next - total_) - y;
    total_ = next;
  }

  double value() const {
    float total[WIDTH], lost[WIDTH];
    total_.store(total), lost_.store(lost);
    double sum = 0;
    for (int64_t i = 0; i < WIDTH; ++i) {
      sum += static_cast<double>(total[i]) - static_cast<double>(lost[i]);
    }
    return sum;
  }

 private:
  Pair total_{0.f}, lost_{0.f};
};

// the sum of term(offset, count) over [0, size) in steps of WIDTH; four terms are added as a tree
// first, because carrying is slow
template <typename Term>
inline double sum_over(int64_t size, const Term& term) {
  constexpr std::integral_constant<int64_t, WIDTH> full{};
  Sum sum;
  int64_t i = 0;
  for (; i + 4 * WIDTH <= size; i += 4 * WIDTH) {
    const Pair first = term(i, full) + term(i + WIDTH, full);
    const Pair second = term(i + 2 * WIDTH, full) + term(i + 3 * WIDTH, full);
    sum.add(first + second);
  }
  for (; i + WIDTH <= size; i += WIDTH) {
    sum.add(term(i, full));
  }
  if (i < size) {
    sum.add(Pair::set(Pair(0.f), term(i, size - i), size - i));
  }
  return sum.value();
}

// the same in fp32 and without carrying, for rows so short that carrying would cost more than they
// do: every lane of four adds a part of the terms, and the lanes are added as a tree
template <typename Term>
inline float short_sum_over(int64_t size, const Term& term) {
  constexpr std::integral_constant<int64_t, WIDTH> full{};
  Pair sum[4] = {Pair(0.f), Pair(0.f), Pair(0.f), Pair(0.f)};
  int64_t i = 0;
  for (; i + 4 * WIDTH <= size; i += 4 * WIDTH) {
    for (int64_t part = 0; part < 4; ++part) {
      sum[part] = sum[part] + term(i + part * WIDTH, full);
    }
  }
  for (; i + WIDTH <= size; i += WIDTH) {
    sum[0] = sum[0] + term(i, full);
  }
  if (i < size) {
    sum[1] = sum[1] + Pair::set(Pair(0.f), term(i, size - i), size - i);
  }
  const Pair all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  const auto add = [](const auto& x, const auto& y) { return x + y; };
  return at::vec::vec_reduce_all<float>(add, all[0] + all[1]);
}

// f(an element of that dtype)
template <typename F>
void with_dtype(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) {
    f(float{});
  } else {
    TORCH_CHECK(dtype == at::kBFloat16, "dtype must be fp32 or bf16, got ", dtype);
    f(c10::BFloat16{});
  }
}

}  // namespace smb

// Between the stable ABI and attention.h: what the launchers of attention ops share.
#pragma once

#include <algorithm>
#include <string>

#include "common/attention.h"
#include "glue.h"

namespace pyvideo::attention {

// [B, S, heads, D] by pointers.
struct Heads {
  const char* data = nullptr;
  int64_t batch = 0, token = 0, head = 0;  // strides in bytes

  const char* row(int64_t b, int64_t s, int64_t h) const { return data + b * batch + s * token + h * head; }
};

inline Heads heads_of(const char* op, const char* name, const Tensor& t, const Tensor& like, bool same_heads) {
  PYVIDEO_CHECK(t.is_cpu() && t.dim() == 4, op, ": `", name, "` must be a CPU tensor of 4 dimensions");
  PYVIDEO_CHECK(t.scalar_type() == like.scalar_type(), op, ": `", name, "` must have the dtype of `q`");
  dtype_of(op, name, t);
  PYVIDEO_CHECK(t.size(0) == like.size(0) && t.size(1) == like.size(1) && t.size(3) == like.size(3), op, ": `", name,
                "` must have the sizes of `q`");
  PYVIDEO_CHECK(same_heads ? t.size(2) == like.size(2) : t.size(2) >= 1 && like.size(2) % t.size(2) == 0, op, ": `",
                name, "` must have as many heads as `q`, or a divisor of that");
  PYVIDEO_CHECK(t.size(3) <= 1 || t.stride(3) == 1, op, ": `", name, "` must have a contiguous last dimension");
  const int64_t size = static_cast<int64_t>(t.element_size());
  return {static_cast<const char*>(t.const_data_ptr()), t.stride(0) * size, t.stride(1) * size, t.stride(2) * size};
}

// int32 or int64 by index.
struct Integers {
  const void* data = nullptr;
  bool wide = false;
  int64_t step = 1;

  int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * step] : static_cast<const int32_t*>(data)[i * step];
  }
};

inline Integers integers_of(const char* op, const char* name, const Tensor& t) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  PYVIDEO_CHECK(t.is_cpu() && (wide || t.scalar_type() == ScalarType::Int), op, ": `", name,
                "` must be int32 or int64 on the CPU");
  return {t.const_data_ptr(), wide};
}

inline const Level& level_for(const char* op, DType dtype, const std::string& name) {
  const Level* level = find_level(dtype, name.c_str());
  PYVIDEO_CHECK(level != nullptr, op, ": this CPU has no ", name, ", or no kernel needs it for this dtype");
  return *level;
}

// work(worker, item) for every item, by torch's threads. They take the next item as they come to it, for items differ
// in length; each is computed in its own order whoever takes it, so results do not depend on the number of threads.
template <class Work>
void for_each_tile(int64_t items, const Level& level, int64_t head_dim, double scale, const Work& work) {
  if (items == 0) {
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, items, 1, [&](int64_t, int64_t) {
    int64_t item = next.fetch_add(1, std::memory_order_relaxed);
    if (item >= items) {
      return;
    }
    // A factor of 0 or inf would make NaN of the -inf that a maximum begins with.
    const double factor = std::clamp(scale * 1.4426950408889634, 1.2e-38, 3.4e38);
    Worker worker(level, head_dim, static_cast<float>(factor));
    for (; item < items; item = next.fetch_add(1, std::memory_order_relaxed)) {
      work(worker, item);
    }
  });
}

}  // namespace pyvideo::attention

// spacetime_attention on the CPU: dense, windowed and causal in time, text before or after the video.
//
// A tile is a run of queries where everything is seen, a box of the grid where windows cut: its queries read the span
// of keys that any of them sees, each key with the bits of those that do. Memory: some 100 to 500 KiB a thread.
#include <vector>

#include "common/attention_glue.h"
#include "spacetime_attention/window.h"

namespace pyvideo {
namespace {

using namespace attention;

struct Args {
  Heads q, k, v;
  char* out;
  float* lse;  // null: not wanted
  int64_t heads, group, tokens, head_dim, size;
  Triple grid;
  int64_t video, text, video_start, text_start;
  std::vector<Windows> windows;     // the kinds that heads have; empty: dense
  std::vector<int64_t> kind;        // by head
  std::vector<int64_t> first_item;  // by head, of one sample; and their number
  Integers kv_lens;
};

// Where a tile is.
struct Place {
  int64_t b, h, kv_head;
};

void add_query(const Args& a, Tile& tile, const Place& at, int64_t token) {
  tile.query[tile.queries] = a.q.row(at.b, token, at.h);
  tile.out[tile.queries] = a.out + ((at.b * a.tokens + token) * a.heads + at.h) * a.head_dim * a.size;
  ++tile.queries;
}

void add_keys(const Args& a, Worker& worker, const Place& at, int64_t begin, int64_t end, uint64_t seen, uint64_t all) {
  for (int64_t token = begin; token < end; ++token) {
    worker.add(a.k.row(at.b, token, at.kv_head), a.v.row(at.b, token, at.kv_head), seen, all);
  }
}

int64_t valid_text(const Args& a, int64_t b) {
  return a.kv_lens.data == nullptr ? a.text : std::clamp<int64_t>(a.kv_lens.at(b), 0, a.text);
}

// Queries that see everything: tokens begin ... end - 1.
void run_tile(const Args& a, Worker& worker, const Place& at, int64_t begin, int64_t end) {
  worker.tile.queries = 0;
  for (int64_t token = begin; token < end; ++token) {
    add_query(a, worker.tile, at, token);
  }
  worker.begin();
  add_keys(a, worker, at, a.video_start, a.video_start + a.video, kAll, kAll);
  add_keys(a, worker, at, a.text_start, a.text_start + valid_text(a, at.b), kAll, kAll);
  worker.finish();
  for (int64_t i = 0; a.lse != nullptr && i < end - begin; ++i) {
    a.lse[(at.b * a.heads + at.h) * a.tokens + begin + i] = worker.tile.lse[i];
  }
}

// A box of queries with windows.
void box_tile(const Args& a, Worker& worker, const Place& at, const Windows& windows, int64_t box) {
  const Triple index{box / (windows.boxes[2] * windows.boxes[1]), box / windows.boxes[2] % windows.boxes[1],
                     box % windows.boxes[2]};
  Triple begin, side, key, keys;
  for (int d = 0; d < 3; ++d) {
    begin[d] = index[d] * windows.box[d];
    side[d] = std::min(windows.box[d], a.grid[d] - begin[d]);
    key[d] = windows.axis[d].first[begin[d]];
    keys[d] = windows.axis[d].last[begin[d] + side[d] - 1] - key[d] + 1;
  }
  // By axis and position within the span: the queries that see it.
  std::vector<uint64_t> seen[3];
  const uint64_t all =
      side[0] * side[1] * side[2] == kQueries ? kAll : (uint64_t{1} << (side[0] * side[1] * side[2])) - 1;
  for (int d = 0; d < 3; ++d) {
    seen[d].assign(static_cast<size_t>(keys[d]), 0);
  }
  worker.tile.queries = 0;
  for (int64_t t = 0; t < side[0]; ++t) {
    for (int64_t h = 0; h < side[1]; ++h) {
      for (int64_t w = 0; w < side[2]; ++w) {
        const uint64_t bit = uint64_t{1} << worker.tile.queries;
        const Triple query{begin[0] + t, begin[1] + h, begin[2] + w};
        for (int d = 0; d < 3; ++d) {
          const Axis& axis = windows.axis[d];
          for (int64_t i = axis.first[query[d]]; i <= axis.last[query[d]]; ++i) {
            seen[d][i - key[d]] |= bit;
          }
        }
        add_query(a, worker.tile, at, a.video_start + (query[0] * a.grid[1] + query[1]) * a.grid[2] + query[2]);
      }
    }
  }
  worker.begin();
  add_keys(a, worker, at, a.text_start, a.text_start + valid_text(a, at.b), all, all);
  for (int64_t t = 0; t < keys[0]; ++t) {
    for (int64_t h = 0; h < keys[1]; ++h) {
      const uint64_t row = seen[0][t] & seen[1][h];
      const int64_t start = a.video_start + ((key[0] + t) * a.grid[1] + key[1] + h) * a.grid[2] + key[2];
      for (int64_t w = 0; row != 0 && w < keys[2]; ++w) {
        const uint64_t here = row & seen[2][w];
        if (here != 0) {
          add_keys(a, worker, at, start + w, start + w + 1, here, all);
        }
      }
    }
  }
  worker.finish();
  int64_t i = 0;
  for (int64_t t = 0; a.lse != nullptr && t < side[0]; ++t) {
    for (int64_t h = 0; h < side[1]; ++h) {
      for (int64_t w = 0; w < side[2]; ++w) {
        const int64_t token = ((begin[0] + t) * a.grid[1] + begin[1] + h) * a.grid[2] + begin[2] + w;
        a.lse[(at.b * a.heads + at.h) * a.tokens + a.video_start + token] = worker.tile.lse[i++];
      }
    }
  }
}

void tile_item(const Args& a, Worker& worker, int64_t item) {
  const int64_t per_sample = a.first_item.back();
  Place at{item / per_sample, 0, 0};
  item %= per_sample;
  at.h = std::upper_bound(a.first_item.begin(), a.first_item.end(), item) - a.first_item.begin() - 1;
  at.kv_head = at.h / a.group;
  item -= a.first_item[at.h];
  const bool dense = a.windows.empty();
  // Of a window, text first: its queries see everything.
  const int64_t runs = dense ? 0 : (a.text + kQueries - 1) / kQueries;
  if (dense || item < runs) {
    const int64_t start = dense ? 0 : a.text_start;
    const int64_t end = dense ? a.tokens : a.text_start + a.text;
    run_tile(a, worker, at, start + item * kQueries, std::min(start + (item + 1) * kQueries, end));
  } else {
    box_tile(a, worker, at, a.windows[a.kind[at.h]], item - runs);
  }
}

std::tuple<Tensor, Tensor> spacetime_attention(Tensor q, Tensor k, Tensor v, std::vector<int64_t> grid,
                                               std::optional<std::vector<int64_t>> window, std::vector<int64_t> stride,
                                               bool causal_time, int64_t text_len, std::string text_side,
                                               std::optional<Tensor> kv_lens, double scale, bool return_lse,
                                               std::string precision, std::string level_name) {
  const char* op = "spacetime_attention";
  PYVIDEO_CHECK(q.dim() == 4 && grid.size() == 3 && stride.size() == 3, op,
                ": `q` must be [B, S, heads, head_dim], `grid` and `stride` three sizes");
  PYVIDEO_CHECK(precision == "native", op, ": `precision` must be native for the compiled CPU kernel");
  Args a;
  a.q = heads_of(op, "q", q, q, true);
  a.k = heads_of(op, "k", k, q, false);
  a.v = heads_of(op, "v", v, k, true);
  a.tokens = q.size(1);
  a.heads = q.size(2);
  a.group = a.heads / k.size(2);
  a.head_dim = q.size(3);
  a.size = static_cast<int64_t>(q.element_size());
  a.grid = {grid[0], grid[1], grid[2]};
  a.video = grid[0] * grid[1] * grid[2];
  a.text = text_len;
  PYVIDEO_CHECK(text_len >= 0 && a.video + text_len == a.tokens, op, ": `q` must have T*H*W + text_len tokens");
  a.video_start = text_side == "prefix" ? text_len : 0;
  a.text_start = text_side == "prefix" ? 0 : a.video;
  if (kv_lens.has_value()) {
    PYVIDEO_CHECK(kv_lens->dim() == 1 && kv_lens->size(0) == q.size(0), op, ": `kv_lens` must be [B]");
    a.kv_lens = integers_of(op, "kv_lens", *kv_lens);
    a.kv_lens.step = kv_lens->stride(0);
  }
  const std::vector<int64_t> rows = window.has_value() ? *window : grid;
  PYVIDEO_CHECK(rows.size() == 3 || rows.size() == static_cast<size_t>(3 * a.heads), op,
                ": `window` must be three sizes, or three a head");
  bool dense = a.video == 0 || !(causal_time && grid[0] > 1);
  for (size_t i = 0; i < rows.size() && a.video > 0; ++i) {
    PYVIDEO_CHECK(rows[i] >= 1 && stride[i % 3] >= 1, op, ": `window` and `stride` must be positive");
    dense &= rows[i] >= grid[i % 3];
  }
  a.kind.assign(static_cast<size_t>(a.heads), 0);
  if (!dense) {
    std::vector<Triple> known;
    for (int64_t h = 0; h < a.heads; ++h) {
      const size_t at = rows.size() == 3 ? 0 : static_cast<size_t>(3 * h);
      const Triple row{std::min(rows[at], grid[0]), std::min(rows[at + 1], grid[1]), std::min(rows[at + 2], grid[2])};
      const auto found = std::find(known.begin(), known.end(), row);
      a.kind[h] = found - known.begin();
      if (found == known.end()) {
        known.push_back(row);
        a.windows.emplace_back(a.grid, row, Triple{stride[0], stride[1], stride[2]}, causal_time);
      }
    }
  }
  a.first_item.push_back(0);
  for (int64_t h = 0; h < a.heads; ++h) {
    const int64_t run = dense ? a.tokens : a.text;
    const int64_t items = (run + kQueries - 1) / kQueries + (dense ? 0 : a.windows[a.kind[h]].count());
    a.first_item.push_back(a.first_item.back() + items);
  }
  Tensor out = new_contiguous(q);
  a.out = static_cast<char*>(out.mutable_data_ptr());
  const std::vector<int64_t> shape =
      return_lse ? std::vector<int64_t>{q.size(0), a.heads, a.tokens} : std::vector<int64_t>{0};
  Tensor lse = torch::stable::new_empty(q, shape, ScalarType::Float);
  a.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  const Level& level = level_for(op, dtype_of(op, "q", q), level_name);
  for_each_tile(q.size(0) * a.first_item.back(), level, a.head_dim, scale,
                [&](Worker& worker, int64_t item) { tile_item(a, worker, item); });
  return {out, lse};
}

// The instruction set that the kernel of a dtype takes on this CPU, or whether it has the one of that name.
std::string attention_level(Tensor like, std::string name) {
  const Level* level = find_level(dtype_of("attention_level", "like", like), name.c_str());
  return level == nullptr ? "" : level->name;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def(
      "spacetime_attention(Tensor q, Tensor k, Tensor v, int[] grid, int[]? window, int[] stride, bool causal_time, "
      "int text_len, str text_side, Tensor? kv_lens, float scale, bool return_lse, str precision, "
      "str level='') -> (Tensor, Tensor)");
  m.def("attention_level(Tensor like, str name='') -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) {
  m.impl("spacetime_attention", TORCH_BOX(&spacetime_attention));
  m.impl("attention_level", TORCH_BOX(&attention_level));
}

}  // namespace pyvideo

// block_sparse_attention on the CPU: each block of queries over the blocks of keys in its list.
//
// A tile is a block of queries, or half of one of 128; its keys are the tokens of the listed blocks, where they lie.
// Memory: some 100 to 500 KiB a thread.
#include <algorithm>
#include <array>

#include "common/attention_glue.h"

namespace pyvideo {
namespace {

using namespace attention;

struct Args {
  Heads q, k, v, gate;
  char* out;
  float* lse;  // null: not wanted
  const float* coarse;
  DType gate_dtype;
  int64_t gate_step;
  int64_t heads, group, tokens, head_dim, size;
  std::array<int64_t, 3> grid, tile, boxes;
  int64_t blocks, listed, parts;
  Integers indices, counts, lens;
};

// The tokens of a box, the whole of its rows along W in the grid, as far as place < `places` in a whole box.
template <class Row>
void rows_of(const Args& a, int64_t block, int64_t places, const Row& row) {
  const std::array<int64_t, 3> index{block / (a.boxes[2] * a.boxes[1]), block / a.boxes[2] % a.boxes[1],
                                     block % a.boxes[2]};
  std::array<int64_t, 3> begin, side;
  for (int d = 0; d < 3; ++d) {
    begin[d] = index[d] * a.tile[d];
    side[d] = std::min(a.tile[d], a.grid[d] - begin[d]);
  }
  for (int64_t t = 0; t < side[0]; ++t) {
    for (int64_t h = 0; h < side[1]; ++h) {
      const int64_t place = (t * a.tile[1] + h) * a.tile[2];
      const int64_t token = ((begin[0] + t) * a.grid[1] + begin[1] + h) * a.grid[2] + begin[2];
      row(token, token + std::clamp<int64_t>(places - place, 0, side[2]));
    }
  }
}

void tile_item(const Args& a, Worker& worker, int64_t item) {
  const int64_t part = item % a.parts;
  const int64_t list = item / a.parts;  // of [B, heads, blocks]
  const int64_t block = list % a.blocks;
  const int64_t h = list / a.blocks % a.heads;
  const int64_t b = list / (a.blocks * a.heads);
  Tile& tile = worker.tile;
  std::array<int64_t, kQueries> tokens;
  tile.queries = 0;
  int64_t seen = 0;
  rows_of(a, block, a.tile[0] * a.tile[1] * a.tile[2], [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token, ++seen) {
      if (seen / kQueries != part) {
        continue;
      }
      tokens[tile.queries] = token;
      tile.query[tile.queries] = a.q.row(b, token, h);
      tile.gate[tile.queries] = a.coarse == nullptr ? nullptr : a.gate.row(b, token, h);
      tile.out[tile.queries] = a.out + ((b * a.tokens + token) * a.heads + h) * a.head_dim * a.size;
      ++tile.queries;
    }
  });
  if (tile.queries == 0) {
    return;
  }
  tile.coarse = a.coarse == nullptr ? nullptr : a.coarse + list * a.head_dim;
  tile.gate_dtype = a.gate_dtype;
  tile.gate_step = a.gate_step;
  worker.begin();
  const int64_t count = std::clamp<int64_t>(a.counts.at(list), 0, a.listed);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t keys = std::clamp<int64_t>(a.indices.at(list * a.listed + i), 0, a.blocks - 1);
    const int64_t whole = a.tile[0] * a.tile[1] * a.tile[2];
    rows_of(a, keys, a.lens.data == nullptr ? whole : a.lens.at(keys), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        worker.add(a.k.row(b, token, h / a.group), a.v.row(b, token, h / a.group), kAll, kAll);
      }
    });
  }
  worker.finish();
  for (int i = 0; a.lse != nullptr && i < tile.queries; ++i) {
    a.lse[(b * a.heads + h) * a.tokens + tokens[i]] = tile.lse[i];
  }
}

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices,
                                                  Tensor block_counts, std::vector<int64_t> grid,
                                                  std::vector<int64_t> tile, std::optional<Tensor> kv_block_lens,
                                                  std::optional<Tensor> coarse, std::optional<Tensor> gate,
                                                  double scale, bool return_lse, std::string level_name) {
  const char* op = "block_sparse_attention";
  PYVIDEO_CHECK(q.dim() == 4 && grid.size() == 3 && tile.size() == 3, op,
                ": `q` must be [B, S, heads, head_dim], `grid` and `tile` three sizes");
  Args a;
  a.q = heads_of(op, "q", q, q, true);
  a.k = heads_of(op, "k", k, q, false);
  a.v = heads_of(op, "v", v, k, true);
  a.tokens = q.size(1);
  a.heads = q.size(2);
  a.group = a.heads / k.size(2);
  a.head_dim = q.size(3);
  a.size = static_cast<int64_t>(q.element_size());
  a.blocks = 1;
  for (int d = 0; d < 3; ++d) {
    PYVIDEO_CHECK(grid[d] >= 1 && tile[d] >= 1, op, ": `grid` and `tile` must be positive");
    a.grid[d] = grid[d];
    a.tile[d] = tile[d];
    a.boxes[d] = (grid[d] + tile[d] - 1) / tile[d];
    a.blocks *= a.boxes[d];
  }
  PYVIDEO_CHECK(grid[0] * grid[1] * grid[2] == a.tokens, op, ": `q` must have T*H*W tokens");
  a.parts = (tile[0] * tile[1] * tile[2] + kQueries - 1) / kQueries;
  const std::vector<int64_t> lists{q.size(0), a.heads, a.blocks};
  PYVIDEO_CHECK(block_indices.dim() == 4 && block_counts.dim() == 3, op,
                ": `block_indices` must have 4 dimensions, `block_counts` 3");
  for (int d = 0; d < 3; ++d) {
    PYVIDEO_CHECK(block_indices.size(d) == lists[d] && block_counts.size(d) == lists[d], op,
                  ": `block_indices` and `block_counts` must have a list for each sample, head and block");
  }
  a.listed = block_indices.size(3);
  block_indices = torch::stable::contiguous(block_indices);
  block_counts = torch::stable::contiguous(block_counts);
  a.indices = integers_of(op, "block_indices", block_indices);
  a.counts = integers_of(op, "block_counts", block_counts);
  if (kv_block_lens.has_value()) {
    PYVIDEO_CHECK(kv_block_lens->dim() == 1 && kv_block_lens->size(0) == a.blocks, op,
                  ": `kv_block_lens` must be [blocks]");
    a.lens = integers_of(op, "kv_block_lens", *kv_block_lens);
    a.lens.step = kv_block_lens->stride(0);
  }
  a.coarse = nullptr;
  std::optional<Tensor> rows;
  if (coarse.has_value() && gate.has_value()) {
    PYVIDEO_CHECK(coarse->is_cpu() && coarse->scalar_type() == ScalarType::Float && coarse->dim() == 4 &&
                      coarse->size(0) == q.size(0) && coarse->size(1) == a.heads && coarse->size(2) == a.blocks &&
                      coarse->size(3) == a.head_dim,
                  op, ": `coarse` must be [B, heads, blocks, head_dim] float32");
    rows = torch::stable::contiguous(*coarse);
    a.coarse = static_cast<const float*>(rows->const_data_ptr());
    PYVIDEO_CHECK(gate->is_cpu() && gate->dim() == 4, op, ": `gate` must be a CPU tensor of 4 dimensions");
    a.gate_dtype = dtype_of(op, "gate", *gate);
    const std::array<int64_t, 4> sizes{q.size(0), a.tokens, a.heads, a.head_dim};
    std::array<int64_t, 4> steps;
    for (int d = 0; d < 4; ++d) {
      PYVIDEO_CHECK(gate->size(d) == sizes[d] || gate->size(d) == 1, op, ": `gate` dimension ", d, " must be ",
                    sizes[d], " or 1; got ", gate->size(d));
      steps[d] = gate->size(d) == 1 ? 0 : gate->stride(d);
    }
    const int64_t size = static_cast<int64_t>(gate->element_size());
    a.gate = {static_cast<const char*>(gate->const_data_ptr()), steps[0] * size, steps[1] * size, steps[2] * size};
    a.gate_step = steps[3];
  }
  Tensor out = new_contiguous(q);
  a.out = static_cast<char*>(out.mutable_data_ptr());
  const std::vector<int64_t> shape =
      return_lse ? std::vector<int64_t>{q.size(0), a.heads, a.tokens} : std::vector<int64_t>{0};
  Tensor lse = torch::stable::new_empty(q, shape, ScalarType::Float);
  a.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  const Level& level = level_for(op, dtype_of(op, "q", q), level_name);
  for_each_tile(q.size(0) * a.heads * a.blocks * a.parts, level, a.head_dim, scale,
                [&](Worker& worker, int64_t item) { tile_item(a, worker, item); });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor block_counts, int[] grid, "
      "int[] tile, Tensor? kv_block_lens, Tensor? coarse, Tensor? gate, float scale, bool return_lse, str level='') "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
}

}  // namespace pyvideo

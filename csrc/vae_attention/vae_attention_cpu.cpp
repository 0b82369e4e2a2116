// vae_attention on the CPU: the tokens of a frame over those of the frame, or over those of the frames up to it.
//
// Frames stand where other attention has heads. Memory: at 384 channels some 400 KiB a thread.
#include <algorithm>

#include "common/attention_glue.h"

namespace pyvideo {
namespace {

using namespace attention;

Tensor vae_attention(Tensor q, Tensor k, Tensor v, bool causal, double scale, std::string level_name) {
  const char* op = "vae_attention";
  const auto frames_of = [&](const char* name, const Tensor& t) {
    Heads rows = heads_of(op, name, t, q, true);  // [B, frames, tokens, D]
    std::swap(rows.token, rows.head);
    return rows;
  };
  const Heads queries = frames_of("q", q), keys = frames_of("k", k), values = frames_of("v", v);
  const int64_t frames = q.size(1), tokens = q.size(2), channels = q.size(3);
  const int64_t tiles = (tokens + kQueries - 1) / kQueries;
  Tensor out = new_contiguous(q);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = channels * static_cast<int64_t>(q.element_size());
  const Level& level = level_for(op, dtype_of(op, "q", q), level_name);
  for_each_tile(q.size(0) * frames * tiles, level, channels, scale, [&](Worker& worker, int64_t item) {
    // The frames that see most come first: the last to be taken should not be the longest.
    const int64_t frame = frames - 1 - item / tiles % frames, b = item / tiles / frames;
    const int64_t begin = item % tiles * kQueries, end = std::min(begin + kQueries, tokens);
    worker.tile.queries = 0;
    for (int64_t token = begin; token < end; ++token) {
      worker.tile.query[worker.tile.queries] = queries.row(b, token, frame);
      worker.tile.out[worker.tile.queries] = data + ((b * frames + frame) * tokens + token) * row_bytes;
      ++worker.tile.queries;
    }
    worker.begin();
    for (int64_t seen = causal ? 0 : frame; seen <= frame; ++seen) {
      for (int64_t token = 0; token < tokens; ++token) {
        worker.add(keys.row(b, token, seen), values.row(b, token, seen), kAll, kAll);
      }
    }
    worker.finish();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def("vae_attention(Tensor q, Tensor k, Tensor v, bool causal, float scale, str level='') -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("vae_attention", TORCH_BOX(&vae_attention)); }

}  // namespace pyvideo

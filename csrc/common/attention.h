// Flash attention on the CPU, one tile of at most 64 queries at a time, over keys that come from anywhere.
//
// A tile keeps its queries in the lanes of vectors: scores are computed transposed, [keys][queries], so softmax runs
// without a sum or a maximum across a register, a row of keys is read as it lies in memory, and what a key is seen by
// is one word of bits. Whoever drives a tile lists keys by their rows: all of a sequence, a window, a block; the keys
// of a step need not be neighbours. Nothing here knows torch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "common/dtype.h"

namespace pyvideo::attention {

constexpr int kQueries = 64;  // of a tile: the bits of a mask
constexpr int kKeys = 128;    // of a step, at most
constexpr uint64_t kAll = ~uint64_t{0};

// One tile: its queries, the keys of the next step, and scratch that only the level's functions look at.
struct Tile {
  int64_t head_dim = 0;
  float factor = 0;  // of the scores, in base 2: scale * log2(e)
  int queries = 0;
  const char* query[kQueries];
  char* out[kQueries];
  // Added to each result before it is rounded, where coarse is not null: gate * coarse.
  const float* coarse = nullptr;
  const char* gate[kQueries];
  DType gate_dtype = DType::f32;
  int64_t gate_step = 0;  // elements from one channel to the next
  float lse[kQueries];    // natural logarithm

  // Of the step. A query sees key i where bit `query` of seen[i] is set; looked at where `masked`.
  int keys = 0;
  bool masked = false;
  const char* key[kKeys];
  const char* value[kKeys];
  uint64_t seen[kKeys];

  // Of the level.
  int vecs = 0;    // vectors of queries in a panel
  int panels = 0;  // of the tile
  float* packed_queries = nullptr;
  float* packed_keys = nullptr;
  float* packed_values = nullptr;
  float* scores = nullptr;
  float* sums = nullptr;     // [panels][head_dim, rounded up][queries of a panel]
  float* highest = nullptr;  // [kQueries] each: running maximum, running sum, and two of the step
  float* total = nullptr;
  float* shrink = nullptr;
  float* top = nullptr;
};

// The functions of one instruction set for one dtype.
struct Level {
  const char* name;
  int keys;                              // of a step
  int64_t (*scratch)(int64_t head_dim);  // floats
  void (*place)(Tile&, float* scratch);  // after head_dim is set; 64-byte aligned
  void (*begin)(Tile&);                  // after the queries are set
  void (*step)(Tile&);
  void (*finish)(Tile&);  // writes `out` and `lse`; zeros and -inf for a query that saw no key
};

// The best level that this CPU has, or the one of that name; null if it has none such.
const Level* find_level(DType dtype, const char* name);

// Scratch of a thread and its tile.
class Worker {
 public:
  Worker(const Level& level, int64_t head_dim, float factor) : level_(level) {
    const size_t bytes = static_cast<size_t>(level.scratch(head_dim)) * sizeof(float);
    scratch_.reset(static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
    tile.head_dim = head_dim;
    tile.factor = factor;
    level.place(tile, scratch_.get());
  }

  void begin() {
    tile.keys = 0;
    tile.masked = false;
    level_.begin(tile);
  }

  void add(const char* key, const char* value, uint64_t seen, uint64_t all) {
    tile.key[tile.keys] = key;
    tile.value[tile.keys] = value;
    tile.seen[tile.keys] = seen;
    tile.masked |= seen != all;
    if (++tile.keys == level_.keys) {
      flush();
    }
  }

  void finish() {
    flush();
    level_.finish(tile);
  }

  Tile tile;

 private:
  void flush() {
    if (tile.keys > 0) {
      level_.step(tile);
    }
    tile.keys = 0;
    tile.masked = false;
  }

  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  const Level& level_;
  std::unique_ptr<float[], Free> scratch_;
};

}  // namespace pyvideo::attention

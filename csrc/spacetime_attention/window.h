// What a query sees along each axis of a grid (docs/ops/spacetime_attention.md), and the boxes of queries to take
// together.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "common/attention.h"

namespace pyvideo::attention {

using Triple = std::array<int64_t, 3>;

// First and last key by position. Neither ever falls from one position to the next.
struct Axis {
  std::vector<int64_t> first, last;

  Axis() = default;
  Axis(int64_t length, int64_t window, int64_t stride, bool causal) : first(length), last(length) {
    const int64_t k = std::min(window, length);
    for (int64_t i = 0; i < length; ++i) {
      if (causal) {
        const int64_t leader = std::min(i / stride * stride + stride - 1, length - 1);
        first[i] = std::max<int64_t>(leader - k + 1, 0);
        last[i] = i;
        continue;
      }
      const int64_t leader = std::min(i / stride * stride + stride / 2, length - 1);
      const int64_t right = k / 2 + k % 2 - 1;
      const int64_t centre = std::min(std::max(leader, k / 2), length - 1 - right);
      first[i] = centre - k / 2;
      last[i] = centre + right;
    }
  }

  // Keys that the queries of boxes of `side` read, all boxes together.
  int64_t read(int64_t side) const {
    const int64_t length = static_cast<int64_t>(first.size());
    int64_t keys = 0;
    for (int64_t i = 0; i < length; i += side) {
      keys += last[std::min(i + side, length) - 1] - first[i] + 1;
    }
    return keys;
  }
};

// One kind of window on a grid.
struct Windows {
  std::array<Axis, 3> axis;
  Triple box;    // of queries
  Triple boxes;  // along each axis

  Windows(const Triple& grid, const Triple& window, const Triple& stride, bool causal) {
    for (int d = 0; d < 3; ++d) {
      axis[d] = Axis(grid[d], window[d], stride[d], causal && d == 0);
    }
    choose(grid);
    for (int d = 0; d < 3; ++d) {
      boxes[d] = (grid[d] + box[d] - 1) / box[d];
    }
  }

  int64_t count() const { return boxes[0] * boxes[1] * boxes[2]; }

 private:
  // A larger box shares each key among more queries, and reads more keys that only some of them see. A key costs a
  // pass of products for each 16 queries and about a seventh of one to be fetched.
  void choose(const Triple& grid) {
    std::array<std::vector<int64_t>, 3> reads;
    for (int d = 0; d < 3; ++d) {
      for (int64_t side = 1; side <= std::min<int64_t>(grid[d], kQueries); ++side) {
        reads[d].push_back(axis[d].read(side));
      }
    }
    double best = -1;
    box = {1, 1, 1};
    for (int64_t t = 1; t <= static_cast<int64_t>(reads[0].size()); ++t) {
      for (int64_t h = 1; h <= static_cast<int64_t>(reads[1].size()) && t * h <= kQueries; ++h) {
        for (int64_t w = 1; w <= static_cast<int64_t>(reads[2].size()) && t * h * w <= kQueries; ++w) {
          const int64_t vectors = (t * h * w + 15) / 16;
          const double keys = static_cast<double>(reads[0][t - 1]) * reads[1][h - 1] * reads[2][w - 1];
          const double cost = keys * static_cast<double>(7 * vectors + 1);
          if (best < 0 || cost <= best) {
            best = cost;
            box = {t, h, w};
          }
        }
      }
    }
  }
};

}  // namespace pyvideo::attention

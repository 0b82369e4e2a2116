// The packing before patch_embed3d's matrix product on the CPU: patches of a video as the rows of a matrix.
#include <cstring>
#include <vector>

#include "glue.h"

namespace pyvideo {
namespace {

struct Args {
  const char* video;
  char* out;
  int64_t stride[5];  // of video, in bytes
  int64_t channels;
  int64_t tokens[3];  // in T, H, W
  int64_t patch[3];
};

// `width` runs of `run` elements, `from` and `to` bytes apart; the elements of a run lie `step` bytes apart.
template <class E>
PYVIDEO_INLINE void gather(const char* in, char* out, int64_t width, int64_t run, int64_t step, int64_t from,
                           int64_t to) {
  for (int64_t w = 0; w < width; ++w) {
    for (int64_t i = 0; i < run; ++i) {
      std::memcpy(out + w * to + i * static_cast<int64_t>(sizeof(E)), in + w * from + i * step, sizeof(E));
    }
  }
}

// One line of tokens: every run of a patch's pixels is copied for the whole line, so that the video is read in order.
template <class E>
void lines(const Args& a, int64_t begin, int64_t end) {
  constexpr int64_t size = sizeof(E);
  const int64_t columns = a.channels * a.patch[0] * a.patch[1] * a.patch[2];
  for (int64_t line = begin; line < end; ++line) {
    const int64_t h = line % a.tokens[1];
    const int64_t t = line / a.tokens[1] % a.tokens[0];
    const int64_t b = line / (a.tokens[1] * a.tokens[0]);
    const char* in = a.video + b * a.stride[0] + t * a.patch[0] * a.stride[2] + h * a.patch[1] * a.stride[3];
    char* out = a.out + line * a.tokens[2] * columns * size;
    for (int64_t c = 0; c < a.channels; ++c) {
      for (int64_t i = 0; i < a.patch[0]; ++i) {
        for (int64_t j = 0; j < a.patch[1]; ++j) {
          const char* row = in + c * a.stride[1] + i * a.stride[2] + j * a.stride[3];
          const int64_t from = a.patch[2] * a.stride[4];
          if (a.patch[2] == 2 && a.stride[4] == size) {
            struct Pair {
              E both[2];
            };
            gather<Pair>(row, out, a.tokens[2], 1, 0, from, columns * size);
          } else {
            gather<E>(row, out, a.tokens[2], a.patch[2], a.stride[4], from, columns * size);
          }
          out += a.patch[2] * size;
        }
      }
    }
  }
}

Tensor patchify(Tensor video, std::vector<int64_t> patch) {
  const char* op = "patchify";
  PYVIDEO_CHECK(video.is_cpu(), op, ": `video` must be a CPU tensor");
  PYVIDEO_CHECK(video.dim() == 5 && patch.size() == 3, op, ": `video` must have 5 dimensions and `patch` 3 sizes");
  Args a;
  a.channels = video.size(1);
  int64_t columns = a.channels;
  for (int d = 0; d < 3; ++d) {
    PYVIDEO_CHECK(patch[d] > 0 && video.size(d + 2) % patch[d] == 0, op, ": `video` dimension ", d + 2,
                  " must be a multiple of ", patch[d], "; got ", video.size(d + 2));
    a.patch[d] = patch[d];
    a.tokens[d] = video.size(d + 2) / patch[d];
    columns *= patch[d];
  }
  const int64_t size = static_cast<int64_t>(video.element_size());
  for (int d = 0; d < 5; ++d) {
    a.stride[d] = video.stride(d) * size;
  }
  const std::vector<int64_t> shape{video.size(0), a.tokens[0] * a.tokens[1] * a.tokens[2], columns};
  Tensor out = torch::stable::new_empty(video, shape);
  if (out.numel() == 0) {
    return out;  // has no address to count from
  }
  a.video = static_cast<const char*>(video.const_data_ptr());
  a.out = static_cast<char*>(out.mutable_data_ptr());
  const auto run = dtype_of(op, "video", video) == DType::f32 ? lines<float> : lines<bf16>;
  parallel_rows(shape[0] * a.tokens[0] * a.tokens[1], a.tokens[2] * columns,
                [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) { m.def("patchify(Tensor video, int[] patch) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("patchify", TORCH_BOX(&patchify)); }

}  // namespace pyvideo

"""Causal 3-D convolution as a GEMM over shifted boxes of pixels, one box per tap and group of input channels.

Two variants of one algorithm: boxes moved by tensor descriptors (TMA, whose zero fill is the padding with zeros) and
by pointers (everything else, and views a descriptor cannot address). Where edges are repeated or mirrored, descriptors
move the boxes that touch none and pointers the others, in two launches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pyvideo_kernels.configs import arch_for
from pyvideo_kernels.configs import rms_norm_silu as norm_configs
from pyvideo_kernels.configs.causal_conv3d import MAX_NORM_CHANNELS, ConvConfig, select
from pyvideo_kernels.errors import UnsupportedError
from pyvideo_kernels.ops.causal_conv3d import fold_time, pack_weight
from pyvideo_kernels.reference.causal_conv3d import output_shape, repeats_frames, shuffle_factor, spatial_mode

from . import rms_norm_silu as norm_kernels
from .causal_conv3d_fwd import _causal_conv3d_descriptor_fwd_kernel, _causal_conv3d_fwd_kernel
from .launch import cdiv, on_device

_EDGES = {"zeros": 0, "replicate": 1, "reflect": 2}
_Inside = tuple[tuple[int, int], tuple[int, int]]


def descriptors_can_address(*tensors: Tensor | None) -> bool:
    """Whether TMA can read these channels-last views: bases and strides in units of 16 bytes."""
    for x in tensors:
        if x is None:
            continue
        strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
        row = x.shape[-1] * x.element_size()
        if x.data_ptr() % 16 or row % 16 or any(s <= 0 or s * x.element_size() % 16 for s in strides):
            return False
    return True


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    # The stride of a dimension of size 1 is arbitrary, and may be one that a descriptor refuses.
    strides = [stride if size > 1 else 16 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block)


def _precision(x: Tensor) -> str:
    """What cuDNN would be allowed: TF32, or near-fp32 products from three TF32 ones (AMD multiplies fp32 itself)."""
    if arch_for(x).startswith("gfx"):
        return "ieee"
    # Ignored for 16-bit operands.
    return "tf32" if x.dtype != torch.float32 or _tf32_allowed() else "tf32x3"


def _tf32_allowed() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        # Set operator by operator through the newer fp32_precision, which the older flag cannot express.
        return torch.backends.cudnn.conv.fp32_precision == "tf32"


def tile_span(x: Tensor, config: ConvConfig, kernel: tuple[int, int] = (1, 1), stride: tuple[int, int] = (1, 1)) -> int:
    """Largest offset, in elements, from a tile's origin that a program computes in int32."""
    rows = (config.block_h - 1) * stride[0] + kernel[0]
    cols = (config.block_w - 1) * stride[1] + kernel[1]
    return rows * abs(x.stride(2)) + cols * abs(x.stride(3)) + x.shape[4]


def _check_span(
    config: ConvConfig, read: Sequence[Tensor | None], residual: Tensor | None, shape: Sequence[int],
    unfold: Sequence[int], kernel: tuple[int, int], stride: Sequence[int],
) -> None:  # fmt: skip
    """Refuse what int32 offsets cannot reach, before anything is allocated."""
    sizes = [tile_span(view, config, kernel, (stride[1], stride[2])) for view in read if view is not None]
    if residual is not None:
        sizes.append(tile_span(residual, config, (1, 1), (unfold[1], unfold[2])))
    rows, cols = config.block_h * unfold[1], config.block_w * unfold[2]
    sizes.append((rows * shape[3] + cols) * shape[4])
    if max(sizes) >= 2**31:
        raise UnsupportedError("causal_conv3d: impl 'triton' needs tiles within 2^31 elements; copy the view")


@dataclasses.dataclass(frozen=True)
class Call:
    """What both variants are told beside the tensors they read.

    Args:
        packed: the weight in the memory of `pack_weight`.
        unfold: (ft, fh, fw), frames, rows and columns of the result that one position becomes.
        rows: of the weight, from one place of that to the next and from one channel to the next.
        norm: weight, eps; None where no norm is made in registers.
        y, z: where results go; None where they do not.
    """

    x: Tensor
    packed: Tensor
    bias: Tensor | None
    cache: Tensor | None
    stride: Sequence[int]
    edge: str
    repeat: bool
    pad_end: int
    residual: Tensor | None
    unfold: tuple[int, int, int]
    rows: tuple[int, int]
    norm: tuple[Tensor, float] | None
    y: Tensor | None
    z: Tensor | None

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """B, T, H, W of the positions that are computed: those of the result before it is unfolded."""
        out = self.y if self.y is not None else self.z
        assert out is not None
        b, *sizes = out.shape[:4]
        return (b, *(size // n for size, n in zip(sizes, self.unfold, strict=True)))  # type: ignore[return-value]

    def groups(self, config: ConvConfig) -> tuple[int, int, int]:
        """Output channels at one place, groups of channels in all, and groups at one place."""
        places = self.unfold[0] * self.unfold[1] * self.unfold[2]
        o = self.packed.shape[0] // places
        per_place = cdiv(o, config.block_n + config.block_n2)
        return o, places * per_place, per_place

    def outputs(self) -> tuple[Tensor | None, ...]:
        """Pointers of the epilogue; one that is not written is never read either."""
        norm = None if self.norm is None else self.norm[0]
        return self.bias, self.residual, norm, self.y, self.z

    def strides(self, o: int) -> tuple[int | float, ...]:
        residual = (0, 0, 0, 0) if self.residual is None else self.residual.stride()[:4]
        return *residual, *self.rows, 0.0 if self.norm is None else self.norm[1], o**0.5

    def flags(self) -> tuple[bool | str, ...]:
        norm = self.norm is not None
        return self.bias is not None, self.residual is not None, norm, self.y is not None, _precision(self.x)


def interior(size: tuple[int, int], config: ConvConfig, kernel: tuple[int, int]) -> _Inside:
    """Rows and columns of boxes, first and past the last, that read no pixel outside of a frame of this size."""
    found = []
    for pixels, taps, block in zip(size, kernel, (config.block_h, config.block_w), strict=True):
        pad = taps // 2
        last = cdiv(pixels, block) if pad == 0 else max(0, (pixels - pad) // block)
        found.append((min(cdiv(pad, block), last), last))
    return found[0], found[1]


def _with_border(
    config: ConvConfig, pointers: ConvConfig, size: tuple[int, int], kernel: tuple[int, int]
) -> tuple[ConvConfig, ConvConfig | None]:
    """Two launches, of boxes that touch no edge and of those that do; one where all of them touch one."""
    (h_first, h_last), (w_first, w_last) = interior(size, config, kernel)
    if h_first == h_last or w_first == w_last:
        return pointers, None
    return config, dataclasses.replace(pointers, block_h=config.block_h, block_w=config.block_w)


def launch_fwd(call: Call, border: ConvConfig | None, config: ConvConfig) -> None:
    """Launch one variant; ``border``: by pointers, for the boxes that touch an edge, beside the other.

    ``border`` has the boxes of ``config``.
    """
    with on_device(call.x):
        if border is None:
            variant = _launch_descriptors if config.descriptors else _launch_pointers
            variant(call, config, None)
            return
        inside = interior(call.grid[2:], config, call.packed.shape[3:])
        _launch_descriptors(call, config, inside)
        _launch_pointers(call, border, inside)


def _launch_descriptors(call: Call, config: ConvConfig, inside: _Inside | None) -> None:
    b, frames, h_out, w_out = call.grid
    o, c, kt, kh, kw = call.packed.shape
    n, n2, k = config.block_n, config.block_n2, config.block_k
    tiles = (cdiv(h_out, config.block_h), cdiv(w_out, config.block_w))
    (h_first, h_last), (w_first, w_last) = inside or ((0, tiles[0]), (0, tiles[1]))
    wide, groups, per_place = call.groups(config)
    box = [1, 1, config.block_h, config.block_w, k]
    taps = call.packed.permute(0, 2, 3, 4, 1).reshape(o, kt * kh * kw, c)
    # Rows by place: a view, in whichever order the model has them.
    taps = taps.as_strided(
        (o // wide, wide, kt * kh * kw, c), (call.rows[0] * taps.stride(0), call.rows[1] * taps.stride(0), c, 1)
    )
    x_desc, weight_desc = _descriptor(call.x, box), _descriptor(taps, [1, n, 1, k])
    _causal_conv3d_descriptor_fwd_kernel[(b * frames * (h_last - h_first) * (w_last - w_first) * groups,)](
        x_desc, x_desc if call.cache is None else _descriptor(call.cache, box),
        weight_desc, _descriptor(taps, [1, n2, 1, k]) if n2 else weight_desc, *call.outputs(),
        0 if call.cache is None else call.cache.shape[1], call.x.shape[1], wide, frames, h_out, w_out,
        h_last - h_first, w_last - w_first, groups, per_place, h_first, w_first, *call.strides(wide),
        call.stride[0], kt, kh, kw, c, *call.unfold,
        call.cache is not None, call.repeat, call.pad_end > 0, *call.flags(),
        config.block_h, config.block_w, k, n, n2, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_pointers(call: Call, config: ConvConfig, inside: _Inside | None) -> None:
    b, frames, h_out, w_out = call.grid
    _, t, h, w, c = call.x.shape
    tiles = (cdiv(h_out, config.block_h), cdiv(w_out, config.block_w))
    wide, groups, per_place = call.groups(config)
    (h_first, h_last), (w_first, w_last) = inside or ((0, 0), (0, 0))
    boxes = tiles[0] * tiles[1] - (h_last - h_first) * (w_last - w_first)
    past = call.x if call.cache is None else call.cache
    _causal_conv3d_fwd_kernel[(b * frames * boxes * groups,)](
        call.x, past, call.packed, *call.outputs(),
        0 if call.cache is None else call.cache.shape[1], t, h, w, wide, frames, h_out, w_out, *tiles,
        groups, per_place, boxes, h_first, h_last, w_first, w_last,
        *call.x.stride()[:4], *past.stride()[:4], *call.strides(wide),
        *call.stride, *call.packed.shape[2:], c, *call.unfold,
        _EDGES[call.edge], call.repeat, call.pad_end > 0, inside is not None, *call.flags(),
        config.block_h, config.block_w, config.block_k, config.block_n, config.block_n2,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    stride: Sequence[int],
    pad_mode: str,
    pad_end: int,
    residual: Tensor | None,
    epilogue: str | None,
    factor: Sequence[int],
    norm_weight: Tensor | None,
    norm_eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """``impl="triton"`` of the op."""
    if x.dtype == torch.float64:
        raise UnsupportedError("causal_conv3d: impl 'triton' has no float64; use impl='reference'")
    shape, unfold = output_shape(x, weight, stride, pad_end, epilogue, factor), shuffle_factor(epilogue, factor)
    if cache is not None and cache.shape[1] == 0:
        cache = None
    if repeats_frames(pad_mode):
        x, weight, cache, pad_end = fold_time(x, weight, cache, pad_mode, pad_end)
    o, c, _, kh, kw = weight.shape
    packed, wide = pack_weight(weight), shape[-1]
    edge = spatial_mode(pad_mode) if kh * kw > 1 else "zeros"
    aligned = tuple(stride[1:]) == (1, 1) and x.shape[1] > 0
    aligned = aligned and descriptors_can_address(x, cache, packed.permute(0, 2, 3, 4, 1))
    normed = epilogue == "rms_norm_silu"
    arch, key = arch_for(x), {"c": c, "o": wide, "itemsize": x.element_size()}
    if normed and x.element_size() == 2 and wide <= MAX_NORM_CHANNELS:
        key["norm"] = True
    config, border = select(arch, **key, aligned=aligned), None
    if config.descriptors and edge != "zeros":
        config, border = _with_border(config, select(arch, **key, aligned=False), x.shape[2:4], (kh, kw))
    _check_span(config, (x, cache), residual, shape, unfold, (kh, kw), stride)
    # The norm is taken in registers where one program has all channels of a pixel, and by a pass of its own elsewhere.
    held = min(each.block_n + each.block_n2 for each in (config, border) if each is not None)
    fused = normed and wide <= held
    nothing = x.new_empty((0,))
    y = x.new_empty(shape) if keep or not fused else nothing
    z = x.new_empty(shape) if normed else nothing
    if 0 not in shape:
        places = o // wide
        call = Call(
            x, packed, bias, cache, tuple(stride), edge, repeats_frames(pad_mode), pad_end, residual, unfold,
            (wide, 1) if epilogue == "interleave" else (1, places), (norm_weight, norm_eps) if fused else None,
            y if y.numel() else None, z if fused else None,
        )  # fmt: skip
        launch_fwd(call, border, config)
        if normed and not fused:
            norm_kernels.launch_fwd(
                y, z, norm_weight, norm_eps, True, norm_configs.select(arch, width=wide, itemsize=y.element_size())
            )
    return (y if keep else nothing), z

"""Every op's schema, fake and implementations in one table: the contract.

A row names the op, its torch schema (no defaults: the public function in ``ops/`` supplies them), the fake that
mirrors what an implementation allocates, and where each implementation lives as ``"module:function"``, loaded on
first use. Every implementation takes the schema's arguments without the trailing ``impl``. Importing this module
registers the ops under ``torch.ops.pyvideo``; it imports torch alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import fakes

NAMESPACE = "pyvideo"


@dataclass(frozen=True)
class Op:
    """One row of the contract."""

    name: str
    schema: str
    fake: Callable[..., Any]
    impls: Mapping[str, str]
    # Arguments that may receive a gradient, in schema order; empty: the op has no backward.
    differentiable: tuple[str, ...] = ()
    # Whether the backward is given the forward's outputs, after the gradients.
    saves_outputs: bool = False
    # Order in which ``impl="auto"`` tries implementations, by device type; absent: dispatch.AUTO_ORDER.
    auto: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # ``"module:function"`` of (choices, args) -> (choices in the order for these args, why); empty: as in ``auto``.
    in_order: str = ""
    # Device types on which the order depends on the call.
    in_order_on: tuple[str, ...] = ("cuda", "cpu")
    # The argument ``[B, S, heads, head_dim]`` of an op whose kernels are compiled for one head_dim; None: no such op.
    heads: str | None = None

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """Argument names in schema order, ``impl`` included."""
        inner = self.schema[1 : self.schema.index(")", self.schema.rindex("str impl"))]
        return tuple(part.split()[-1] for part in inner.split(", "))

    def head_dim(self, args: Sequence[Any]) -> int | None:
        """head_dim of a call's arguments, in schema order; None for an op that has none."""
        return None if self.heads is None else int(args[self.arguments.index(self.heads)].shape[-1])

    def bind(self, **kwargs: Any) -> tuple[Any, ...]:
        """Positional arguments for an implementation (without ``impl``) from keywords."""
        names = self.arguments[:-1]
        unknown = set(kwargs) - set(names)
        missing = set(names) - set(kwargs)
        if unknown or missing:
            raise TypeError(f"{self.name}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        return tuple(kwargs[name] for name in names)


def _impls(name: str, *kinds: str, home: str | None = None) -> dict[str, str]:
    """Where the implementations of ``name`` live; ``home`` if it shares another op's files."""
    home = home or name
    places = {
        "reference": f"pyvideo_kernels.reference.{home}:{name}",
        "triton": f"pyvideo_kernels.kernels.{home}:{name}",
        "cpu": f"pyvideo_kernels._native:{name}",
        "cuda": f"pyvideo_kernels._native:{name}_cuda",
        "sdpa": f"pyvideo_kernels.ops.{home}:{name}_sdpa",
    }
    return {kind: places[kind] for kind in ("reference", *kinds)}


_CODES_ATTENTION = (
    "(Tensor q8, Tensor k8, Tensor v, Tensor q_scale, Tensor k_scale, Tensor? lse_shift, SymInt[] grid, "
    "int[]? window, int[] stride, bool causal_time, SymInt text_len, str text_side, Tensor? kv_lens, float scale, "
    "bool return_lse, str impl) -> (Tensor, Tensor)"
)
_ROPE = (
    "Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? cos, Tensor? sin, "
    "str norm, str norm_type, str layout, SymInt rotary_start, SymInt rotary_stop, float eps, str impl"
)

_ROWS: tuple[Op, ...] = (
    Op(
        "layer_norm_modulate",
        "(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps, str impl) -> Tensor",
        fakes.like_first,
        _impls("layer_norm_modulate", "triton", "cpu"),
        differentiable=("x", "scale", "shift", "weight", "bias"),
    ),
    Op(
        "gate_residual",
        "(Tensor x, Tensor y, Tensor? gate, str impl) -> Tensor",
        fakes.like_first,
        _impls("gate_residual", "triton", "cpu"),
        differentiable=("x", "y", "gate"),
    ),
    Op(
        "gate_residual_norm_modulate",
        "(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps, "
        "str impl) -> (Tensor, Tensor)",
        fakes.like_first_twice,
        _impls("gate_residual_norm_modulate", "triton", "cpu"),
        differentiable=("x", "y", "gate", "scale", "shift", "weight", "bias"),
    ),
    Op(
        "rms_norm",
        "(Tensor x, Tensor? weight, float eps, str impl) -> Tensor",
        fakes.like_first,
        _impls("rms_norm", "triton", "cpu"),
        differentiable=("x", "weight"),
    ),
    Op(
        "qk_norm_rope",
        f"(Tensor q, Tensor k, {_ROPE}) -> (Tensor, Tensor)",
        fakes.qk_norm_rope,
        _impls("qk_norm_rope", "triton", "cpu"),
        differentiable=("q", "k", "q_weight", "k_weight", "q_bias", "k_bias"),
        heads="q",
    ),
    Op(
        "qk_norm_rope_",
        f"(Tensor(a!) q, Tensor(b!) k, {_ROPE}) -> ()",
        fakes.nothing,
        _impls("qk_norm_rope_", "triton", "cpu", home="qk_norm_rope"),
        heads="q",
    ),
    Op(
        "qk_norm_rope_int8",
        f"(Tensor q, Tensor k, {_ROPE.replace('str impl', 'str precision, str impl')}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.quantize_qk,
        _impls("qk_norm_rope_int8", "triton"),
        heads="q",
    ),
    Op(
        "qk_norm_rope_means",
        "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? cos, "
        "Tensor? sin, str norm, str norm_type, str layout, SymInt[] grid, int[] tile, float eps, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        fakes.qk_norm_rope_means,
        _impls("qk_norm_rope_means", "triton"),
        heads="q",
    ),
    Op(
        "patch_embed3d",
        "(Tensor video, Tensor weight, Tensor? bias, int[] patch, str impl) -> Tensor",
        fakes.patch_embed3d,
        {**_impls("patch_embed3d", "triton"), "cpu": "pyvideo_kernels.ops.patch_embed3d:patch_embed3d_cpu"},
        differentiable=("video", "weight", "bias"),
    ),
    Op(
        "final_layer",
        "(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor? bias, SymInt[] grid, int[] patch, float eps, "
        "str impl) -> Tensor",
        fakes.final_layer,
        {**_impls("final_layer", "triton"), "cpu": "pyvideo_kernels.ops.final_layer:final_layer_cpu"},
        differentiable=("x", "scale", "shift", "weight", "bias"),
    ),
    Op(
        "linear_gelu",
        "(Tensor x, Tensor weight, Tensor? bias, str approximate, str impl) -> Tensor",
        fakes.linear_gelu,
        # On the CPU oneDNN's product is the kernel; on CUDA the library's stands first, as it does for other products.
        {
            **_impls("linear_gelu", "triton"),
            "cublas": "pyvideo_kernels.ops.linear_gelu_library:linear_gelu_cublas",
            "cpu": "pyvideo_kernels.ops.linear_gelu_library:linear_gelu_cpu",
        },
        auto={"cuda": ("cublas", "triton", "reference")},
        in_order="pyvideo_kernels.ops.linear_gelu_library:in_order",
        differentiable=("x", "weight", "bias"),
    ),
    Op(
        "spacetime_attention",
        "(Tensor q, Tensor k, Tensor v, SymInt[] grid, int[]? window, int[] stride, bool causal_time, "
        "SymInt text_len, str text_side, Tensor? kv_lens, float scale, bool return_lse, str precision, str impl) "
        "-> (Tensor, Tensor)",
        fakes.spacetime_attention,
        {
            **_impls("spacetime_attention", "triton", "cpu", "sdpa"),
            "flash": "pyvideo_kernels.ops.flash_attention:spacetime_attention_flash",
        },
        # Dense attention is handed to a library's kernel until ours is measured to be faster on a card
        # (attention_libraries.MEASURED).
        auto={"cuda": ("flash", "sdpa", "triton", "reference"), "cpu": ("cpu", "sdpa", "reference")},
        in_order="pyvideo_kernels.ops.attention_cpu:in_order",
        in_order_on=("cpu",),
        differentiable=("q", "k", "v"),
        saves_outputs=True,
        heads="q",
    ),
    Op(
        "quantize_qk",
        "(Tensor q, Tensor k, SymInt mean_start, SymInt mean_stop, str precision, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        fakes.quantize_qk,
        _impls("quantize_qk", "triton"),
        heads="q",
    ),
    Op(
        "int8_attention",
        _CODES_ATTENTION,
        fakes.int8_attention,
        _impls("int8_attention", "triton"),
        heads="v",
    ),
    Op(
        "fp8_attention",
        _CODES_ATTENTION,
        fakes.int8_attention,
        _impls("fp8_attention", "triton"),
        # A card without such products is told so, not given the oracle.
        auto={"cuda": ("triton",)},
        heads="v",
    ),
    Op(
        "block_mean",
        "(Tensor x, SymInt[] grid, int[] tile, str impl) -> Tensor",
        fakes.block_mean,
        _impls("block_mean", "triton"),
        heads="x",
    ),
    Op(
        "block_sparse_attention",
        "(Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor block_counts, SymInt[] grid, int[] tile, "
        "Tensor? kv_block_lens, Tensor? coarse, Tensor? gate, float scale, bool return_lse, str impl) "
        "-> (Tensor, Tensor)",
        fakes.block_sparse_attention,
        _impls("block_sparse_attention", "triton", "cpu"),
        heads="q",
    ),
    Op(
        "rms_norm_silu",
        "(Tensor x, Tensor weight, float eps, bool silu, str impl) -> Tensor",
        fakes.like_first,
        _impls("rms_norm_silu", "triton", "cpu"),
    ),
    Op(
        "group_norm_silu",
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, bool silu, "
        "bool per_frame, str impl) -> Tensor",
        fakes.like_first,
        _impls("group_norm_silu", "triton", "cpu"),
    ),
    Op(
        "pixel_norm_silu",
        "(Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, float eps, bool silu, str impl) -> Tensor",
        fakes.like_first,
        _impls("pixel_norm_silu", "triton", "cpu"),
    ),
    Op(
        "causal_conv3d",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, int[] stride, str pad_mode, int pad_end, "
        "Tensor? residual, str? epilogue, int[] factor, Tensor? norm_weight, float norm_eps, bool keep, str impl) "
        "-> (Tensor, Tensor)",
        fakes.causal_conv3d,
        # On the CPU the library's convolution is the kernel, called past torch's own choice of algorithm.
        {
            **_impls("causal_conv3d", "triton"),
            "cudnn": "pyvideo_kernels.ops.causal_conv3d_library:causal_conv3d_cudnn",
            "cpu": "pyvideo_kernels.ops.causal_conv3d_library:causal_conv3d_cpu",
        },
        auto={"cuda": ("triton", "cudnn", "reference")},
        in_order="pyvideo_kernels.ops.causal_conv3d_library:in_order",
    ),
    Op(
        "blend_tile_",
        "(Tensor(a!) out, Tensor(b!)? below, Tensor(c!)? right, Tensor tile, Tensor? above, Tensor? left, int grain, "
        "bool clamp, str impl) -> ()",
        fakes.nothing,
        {**_impls("blend_tile_", "triton"), "cpu": "pyvideo_kernels.ops.blend_tile_:blend_tile_cpu"},
    ),
    Op(
        "upsample_conv2d",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, int time_factor, Tensor? cache, bool first, "
        "str pad_mode, Tensor? residual, str impl) -> Tensor",
        fakes.upsample_conv2d,
        # On the CPU the library's transposed convolution is the kernel; on a GPU it is there for want of ours.
        {
            **_impls("upsample_conv2d", "triton"),
            "cudnn": "pyvideo_kernels.ops.upsample_conv2d_library:upsample_conv2d_cudnn",
            "cpu": "pyvideo_kernels.ops.upsample_conv2d_library:upsample_conv2d_cpu",
        },
        auto={"cuda": ("triton", "cudnn", "reference")},
        in_order="pyvideo_kernels.ops.upsample_conv2d_library:in_order",
    ),
    Op(
        "vae_attention",
        "(Tensor q, Tensor k, Tensor v, bool causal, float scale, str impl) -> Tensor",
        fakes.like_first,
        _impls("vae_attention", "triton", "cpu", "sdpa"),
        # A head this wide is no library's fast path, but PyTorch's memory-efficient kernel serves it; ours is next
        # until it has been timed beside that on a card.
        auto={"cuda": ("sdpa", "triton", "reference"), "cpu": ("cpu", "sdpa", "reference")},
        in_order="pyvideo_kernels.ops.attention_cpu:vae_in_order",
        in_order_on=("cpu",),
    ),
    Op(
        "decode_head_",
        "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? cache, str pad_mode, SymInt pad_end, "
        "int[] patch, bool clamp, str impl) -> ()",
        fakes.nothing,
        {
            **_impls("decode_head_", "triton", home="decode_head"),
            "cpu": "pyvideo_kernels.ops.decode_head:decode_head_cpu",
        },
    ),
    Op(
        "guidance_step",
        "(Tensor latent, Tensor cond, Tensor? uncond, float guidance_scale, float sigma, float sigma_next, "
        "str impl) -> Tensor",
        fakes.like_first,
        _impls("guidance_step", "triton", "cpu", "cuda"),
    ),
    Op(
        "unipc_step",
        "(Tensor sample, Tensor cond, Tensor? uncond, Tensor? last_sample, Tensor[] history, float guidance_scale, "
        "float sigma, float[] corrector, float[] predictor, str impl) -> (Tensor, Tensor, Tensor)",
        fakes.unipc_step,
        _impls("unipc_step", "triton", "cpu"),
    ),
)


def _backward_row(op: Op) -> Op:
    """The op ``<name>_backward``: gradients of the arguments marked in ``needs``, in ``differentiable`` order."""

    def fake(grads: Any, *args: Any) -> list[Tensor]:
        values = dict(zip(op.arguments[:-1], args[op.saves_outputs : -2], strict=True))
        wanted = [n for n, need in zip(op.differentiable, args[-2], strict=True) if need]
        return [values[name].new_empty(values[name].shape) for name in wanted]

    arguments = op.schema[1 : op.schema.index(", str impl)")]
    outputs = "Tensor[] outputs, " if op.saves_outputs else ""
    return Op(
        f"{op.name}_backward",
        f"(Tensor?[] grads, {outputs}{arguments}, bool[] needs, str impl) -> Tensor[]",
        fake,
        {"reference": f"pyvideo_kernels.reference.{op.name}:{op.name}_backward"},
        heads=op.heads,
    )


OPS: dict[str, Op] = {row.name: row for row in _ROWS}
# Backwards with a Triton kernel: listed here, the rest run the closed form in torch.
_TRITON_BACKWARDS: tuple[str, ...] = ("layer_norm_modulate", "rms_norm", "qk_norm_rope", "spacetime_attention")


def _register_autograd(op: Op) -> None:
    names = op.arguments[:-1]
    slots = [names.index(name) for name in op.differentiable]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *args, ctx.impl = inputs
        outputs = [output] if isinstance(output, Tensor) else list(output)
        ctx.outputs = len(outputs) if op.saves_outputs else 0
        ctx.save_for_backward(*outputs[: ctx.outputs], *[a for a in args if isinstance(a, Tensor)])
        ctx.template = tuple(None if isinstance(a, Tensor) else (a,) for a in args)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        outputs = [next(saved) for _ in range(ctx.outputs)]
        args = [next(saved) if slot is None else slot[0] for slot in ctx.template]
        needs = [bool(ctx.needs_input_grad[i]) and args[i] is not None for i in slots]
        # An explicit implementation is kept where the backward has it; the closed form serves the rest.
        impl = ctx.impl if ctx.impl in OPS[f"{op.name}_backward"].impls else "auto"
        function = getattr(torch.ops.pyvideo, f"{op.name}_backward")
        given = [outputs, *args] if op.saves_outputs else args
        results = iter(function(list(grads), *given, needs, impl))
        out: list[Tensor | None] = [None] * (len(names) + 1)
        for i, need in zip(slots, needs, strict=True):
            out[i] = next(results) if need else None
        return tuple(out)

    torch.library.register_autograd(f"{NAMESPACE}::{op.name}", backward, setup_context=setup_context, lib=_LIB)


_LIB = torch.library.Library(NAMESPACE, "DEF")


def _register(op: Op) -> None:
    from .dispatch import run

    def kernel(*args: Any) -> Any:
        return run(op, args)

    _LIB.define(op.name + op.schema)
    for key in ("CPU", "CUDA"):
        _LIB.impl(op.name, kernel, key)
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=_LIB)


for _row in _ROWS:
    _register(_row)
    if _row.differentiable:
        _back = _backward_row(_row)
        if _row.name in _TRITON_BACKWARDS:
            _places = {**_back.impls, "triton": f"pyvideo_kernels.kernels.{_row.name}:{_back.name}"}
            _back = dataclasses.replace(_back, impls=_places)
        OPS[_back.name] = _back
        _register(_back)
        _register_autograd(_row)

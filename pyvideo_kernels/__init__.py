"""GPU kernels for the hot path of video diffusion models, as drop-in torch ops.

Importing this package imports torch and nothing else; Triton, diffusers and the compiled extension load on
first need. Public names resolve lazily:

    import pyvideo_kernels as pv
    y = pv.layer_norm_modulate(x, scale, shift)      # one op
    report = pv.accelerate(pipe)                     # a diffusers pipeline, in place
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. A name is imported when it is first read.
_EXPORTS = {
    "layer_norm_modulate": "pyvideo_kernels.ops.layer_norm_modulate",
    "gate_residual": "pyvideo_kernels.ops.gate_residual",
    "gate_residual_norm_modulate": "pyvideo_kernels.ops.gate_residual_norm_modulate",
    "rms_norm": "pyvideo_kernels.ops.rms_norm",
    "qk_norm_rope": "pyvideo_kernels.ops.qk_norm_rope",
    "qk_norm_rope_": "pyvideo_kernels.ops.qk_norm_rope",
    "patch_embed3d": "pyvideo_kernels.ops.patch_embed3d",
    "final_layer": "pyvideo_kernels.ops.final_layer",
    "linear_gelu": "pyvideo_kernels.ops.linear_gelu",
    "spacetime_attention": "pyvideo_kernels.ops.spacetime_attention",
    "merge_attention": "pyvideo_kernels.ops.spacetime_attention",
    "spacetime_attention_cost": "pyvideo_kernels.ops.attention_cost",
    "qk_norm_rope_int8": "pyvideo_kernels.ops.qk_norm_rope_int8",
    "qk_norm_rope_means": "pyvideo_kernels.ops.qk_norm_rope_means",
    "quantize_qk": "pyvideo_kernels.ops.quantize_qk",
    "int8_attention": "pyvideo_kernels.ops.int8_attention",
    "fp8_attention": "pyvideo_kernels.ops.int8_attention",
    "block_mean": "pyvideo_kernels.ops.block_mean",
    "block_sparse_attention": "pyvideo_kernels.ops.block_sparse_attention",
    "video_sparse_attention": "pyvideo_kernels.ops.video_sparse_attention",
    "rms_norm_silu": "pyvideo_kernels.ops.rms_norm_silu",
    "group_norm_silu": "pyvideo_kernels.ops.group_norm_silu",
    "pixel_norm_silu": "pyvideo_kernels.ops.pixel_norm_silu",
    "causal_conv3d": "pyvideo_kernels.ops.causal_conv3d",
    "blend_tile_": "pyvideo_kernels.ops.blend_tile_",
    "upsample_conv2d": "pyvideo_kernels.ops.upsample_conv2d",
    "pack_upsample_weight": "pyvideo_kernels.ops.upsample_conv2d",
    "vae_attention": "pyvideo_kernels.ops.vae_attention",
    "decode_head": "pyvideo_kernels.ops.decode_head",
    "decode_head_": "pyvideo_kernels.ops.decode_head",
    "guidance_step": "pyvideo_kernels.ops.guidance_step",
    "unipc_step": "pyvideo_kernels.ops.unipc_step",
    "solver_for": "pyvideo_kernels.schedule",
    "accelerate": "pyvideo_kernels.integrations",
    "restore": "pyvideo_kernels.integrations",
    "warmup": "pyvideo_kernels.integrations",
    "Report": "pyvideo_kernels.integrations",
    "StreamingVaeDecoder": "pyvideo_kernels.nn",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from .integrations import Report as Report
    from .integrations import accelerate as accelerate
    from .integrations import restore as restore
    from .integrations import warmup as warmup
    from .nn import StreamingVaeDecoder as StreamingVaeDecoder
    from .ops.attention_cost import spacetime_attention_cost as spacetime_attention_cost
    from .ops.blend_tile_ import blend_tile_ as blend_tile_
    from .ops.block_mean import block_mean as block_mean
    from .ops.block_sparse_attention import block_sparse_attention as block_sparse_attention
    from .ops.causal_conv3d import causal_conv3d as causal_conv3d
    from .ops.decode_head import decode_head as decode_head
    from .ops.decode_head import decode_head_ as decode_head_
    from .ops.final_layer import final_layer as final_layer
    from .ops.gate_residual import gate_residual as gate_residual
    from .ops.gate_residual_norm_modulate import gate_residual_norm_modulate as gate_residual_norm_modulate
    from .ops.group_norm_silu import group_norm_silu as group_norm_silu
    from .ops.guidance_step import guidance_step as guidance_step
    from .ops.int8_attention import fp8_attention as fp8_attention
    from .ops.int8_attention import int8_attention as int8_attention
    from .ops.layer_norm_modulate import layer_norm_modulate as layer_norm_modulate
    from .ops.linear_gelu import linear_gelu as linear_gelu
    from .ops.patch_embed3d import patch_embed3d as patch_embed3d
    from .ops.pixel_norm_silu import pixel_norm_silu as pixel_norm_silu
    from .ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
    from .ops.qk_norm_rope import qk_norm_rope_ as qk_norm_rope_
    from .ops.qk_norm_rope_int8 import qk_norm_rope_int8 as qk_norm_rope_int8
    from .ops.qk_norm_rope_means import qk_norm_rope_means as qk_norm_rope_means
    from .ops.quantize_qk import quantize_qk as quantize_qk
    from .ops.rms_norm import rms_norm as rms_norm
    from .ops.rms_norm_silu import rms_norm_silu as rms_norm_silu
    from .ops.spacetime_attention import merge_attention as merge_attention
    from .ops.spacetime_attention import spacetime_attention as spacetime_attention
    from .ops.unipc_step import unipc_step as unipc_step
    from .ops.upsample_conv2d import pack_upsample_weight as pack_upsample_weight
    from .ops.upsample_conv2d import upsample_conv2d as upsample_conv2d
    from .ops.vae_attention import vae_attention as vae_attention
    from .ops.video_sparse_attention import video_sparse_attention as video_sparse_attention
    from .schedule import solver_for as solver_for


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyvideo_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

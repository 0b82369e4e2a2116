"""The sizes that video models run at, by name: model, then clip.

Tokens are those of one sample after the patch embedding. ``gpu`` shapes are the models' own; ``cpu`` shapes have their
widths and as many tokens or pixels as a laptop does in a moment: of an op that only moves memory, one shape at least
with more than [1, 4096, 1536] elements, which is where `goals` judges it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

Shapes = Mapping[str, Mapping[str, Any]]

# Tokens (time, height, width) of a clip.
WAN_480P = (21, 30, 52)  # 81 frames of 480 x 832
WAN_720P = (21, 45, 80)  # 81 frames of 720 x 1280
WAN_5B_704P = (31, 22, 40)  # 121 frames of 704 x 1280 in the 16x16x4 latent space of Wan 2.2 5B
HUNYUAN_720P = (30, 48, 80)  # 117 frames of 768 x 1280
LTX_512P = (16, 16, 24)  # 121 frames of 512 x 768
COG_480P = (13, 30, 45)  # 49 frames of 480 x 720
COG_TEXT = 226

# Width and heads of a transformer.
WAN_1B = {"width": 1536, "heads": 12}
WAN_14B = {"width": 5120, "heads": 40}
WAN_5B = {"width": 3072, "heads": 24}
HUNYUAN = {"width": 3072, "heads": 24}
LTX = {"width": 2048, "heads": 32}
COG = {"width": 3072, "heads": 48}

_WAN = {
    "wan-1.3b-480p": {"tokens": prod(WAN_480P), **WAN_1B},
    "wan-14b-480p": {"tokens": prod(WAN_480P), **WAN_14B},
    "wan-1.3b-720p": {"tokens": prod(WAN_720P), **WAN_1B},
    "wan-14b-720p": {"tokens": prod(WAN_720P), **WAN_14B},
}
_SMALL = {"wan-1.3b-4k": {"tokens": 4096, **WAN_1B}}

# ``style`` is whose code the layer follows (registry): where it rounds, what it leaves out.
MODULATE_GPU: Shapes = {
    **_WAN,
    "wan-5b-704p": {"tokens": prod(WAN_5B_704P), **WAN_5B, "style": "per token"},
    "hunyuan-720p": {"tokens": prod(HUNYUAN_720P), **HUNYUAN, "style": "hunyuan"},
    "cogvideox-480p": {"tokens": prod(COG_480P), **COG, "style": "cogvideox"},
}
MODULATE_CPU: Shapes = {**_SMALL, "hunyuan-4k": {"tokens": 4096, **HUNYUAN, "style": "hunyuan"}}

RESIDUAL_GPU: Shapes = {
    **_WAN,
    "wan-5b-704p": {"tokens": prod(WAN_5B_704P), **WAN_5B, "style": "per token"},
    "hunyuan-720p": {"tokens": prod(HUNYUAN_720P), **HUNYUAN, "style": "hunyuan"},
}
RESIDUAL_CPU: Shapes = MODULATE_CPU

RMS_GPU: Shapes = {
    **_WAN,
    "wan-5b-704p": {"tokens": prod(WAN_5B_704P), **WAN_5B},
    "hunyuan-720p": {"tokens": prod(HUNYUAN_720P), **HUNYUAN, "style": "per head"},
    "ltx-512p": {"tokens": prod(LTX_512P), **LTX, "style": "no weight"},
}
RMS_CPU: Shapes = {**_SMALL, "hunyuan-4k": {"tokens": 4096, **HUNYUAN, "style": "per head"}}

QK_GPU: Shapes = {
    **_WAN,
    "wan-5b-704p": {"tokens": prod(WAN_5B_704P), **WAN_5B},
    "hunyuan-720p": {"tokens": prod(HUNYUAN_720P), **HUNYUAN, "style": "per head"},
    "ltx-512p": {"tokens": prod(LTX_512P), **LTX, "style": "tables per head"},
    "cogvideox-480p": {"tokens": prod(COG_480P) + COG_TEXT, **COG, "style": "cogvideox"},
}
QK_CPU: Shapes = {**_SMALL, "hunyuan-4k": {"tokens": 4096, **HUNYUAN, "style": "per head"}}
QK_IN_PLACE_GPU: Shapes = {name: QK_GPU[name] for name in ("wan-1.3b-480p", "wan-14b-480p", "hunyuan-720p")}
QK_IN_PLACE_CPU: Shapes = _SMALL

EMBED_GPU: Shapes = {
    "wan-1.3b-480p": {"grid": WAN_480P, "width": 1536, "channels": 16},
    "wan-14b-720p": {"grid": WAN_720P, "width": 5120, "channels": 16},
    "wan-5b-704p": {"grid": WAN_5B_704P, "width": 3072, "channels": 48},
    "hunyuan-720p": {"grid": HUNYUAN_720P, "width": 3072, "channels": 16},
    "cogvideox-480p": {"grid": COG_480P, "width": 3072, "channels": 16},
}
FINAL_GPU: Shapes = {name: EMBED_GPU[name] for name in ("wan-1.3b-480p", "wan-14b-720p", "wan-5b-704p")}
EMBED_CPU: Shapes = {"wan-1.3b-256": {"grid": (5, 16, 16), "width": 1536, "channels": 16}}

# The first half of a feed-forward network.
FFN_GPU: Shapes = {
    "wan-1.3b-480p": {"tokens": prod(WAN_480P), "width": 1536, "ffn": 8960},
    "wan-14b-480p": {"tokens": prod(WAN_480P), "width": 5120, "ffn": 13824},
    "wan-5b-704p": {"tokens": prod(WAN_5B_704P), "width": 3072, "ffn": 14336},
}
FFN_CPU: Shapes = {"wan-1.3b-1k": {"tokens": 1024, "width": 1536, "ffn": 8960}}

ATTENTION_GPU: Shapes = {
    "wan-1.3b-480p": {"grid": WAN_480P, "heads": 12, "head_dim": 128},
    "wan-14b-480p": {"grid": WAN_480P, "heads": 40, "head_dim": 128},
    "wan-1.3b-720p": {"grid": WAN_720P, "heads": 12, "head_dim": 128},
    "wan-5b-704p": {"grid": WAN_5B_704P, "heads": 24, "head_dim": 128},
    "hunyuan-720p": {"grid": HUNYUAN_720P, "heads": 24, "head_dim": 128},
    "ltx-512p": {"grid": LTX_512P, "heads": 32, "head_dim": 64},
    "cogvideox-480p": {"grid": COG_480P, "heads": 48, "head_dim": 64, "text": COG_TEXT},
    # Windows that leave out the named share of all pairs. In tiles: a stride, as sliding tile attention has it.
    "wan-1.3b-480p-window-50%": {"grid": WAN_480P, "heads": 12, "head_dim": 128, "window": (21, 20, 39)},
    "wan-1.3b-480p-window-80%": {"grid": WAN_480P, "heads": 12, "head_dim": 128, "window": (15, 15, 29)},
    "wan-1.3b-480p-window-91%": {"grid": WAN_480P, "heads": 12, "head_dim": 128, "window": (9, 15, 22)},
    "hunyuan-720p-window-50%": {"grid": HUNYUAN_720P, "heads": 24, "head_dim": 128, "window": (24, 36, 68)},
    "hunyuan-720p-window-80%": {"grid": HUNYUAN_720P, "heads": 24, "head_dim": 128, "window": (18, 24, 54)},
    "hunyuan-720p-window-91%": {"grid": HUNYUAN_720P, "heads": 24, "head_dim": 128, "window": (18, 24, 24)},
    "hunyuan-720p-tiles-91%": {"grid": HUNYUAN_720P, "heads": 24, "head_dim": 128, "window": (18, 24, 24),
                               "stride": (6, 8, 8)},
}  # fmt: skip
ATTENTION_CPU: Shapes = {
    "wan-1.3b-256": {"grid": (5, 16, 16), "heads": 12, "head_dim": 128},
    "wan-1.3b-256-window-80%": {"grid": (5, 16, 16), "heads": 12, "head_dim": 128, "window": (3, 9, 9)},
    "wan-1.3b-4k": {"grid": (4, 32, 32), "heads": 12, "head_dim": 128},
    "wan-1.3b-4k-window-90%": {"grid": (8, 16, 32), "heads": 12, "head_dim": 128, "window": (4, 8, 13)},
}

INT8_GPU: Shapes = {
    "wan-1.3b-480p": ATTENTION_GPU["wan-1.3b-480p"],
    "wan-14b-720p": {"grid": WAN_720P, "heads": 40, "head_dim": 128},
    "hunyuan-720p": ATTENTION_GPU["hunyuan-720p"],
    "ltx-512p": ATTENTION_GPU["ltx-512p"],
}
INT8_CPU: Shapes = {"wan-1.3b-256": ATTENTION_CPU["wan-1.3b-256"]}
QK_INT8_GPU: Shapes = {name: QK_GPU[name] for name in ("wan-1.3b-480p", "wan-14b-480p", "hunyuan-720p")}

# Blocks of 64 tokens, boxes as in VSA, and of 128; lists hold so many that ``sparsity`` of all blocks are left out.
_WAN_1B_HEADS = {"grid": WAN_480P, "heads": 12, "head_dim": 128}
_HUNYUAN_HEADS = {"grid": HUNYUAN_720P, "heads": 24, "head_dim": 128}
SPARSE_GPU: Shapes = {
    "wan-1.3b-480p-64-80%": {**_WAN_1B_HEADS, "tile": (4, 4, 4), "sparsity": 0.80},
    "wan-1.3b-480p-64-91%": {**_WAN_1B_HEADS, "tile": (4, 4, 4), "sparsity": 0.91},
    "wan-1.3b-480p-flat-128-91%": {**_WAN_1B_HEADS, "grid": (1, 1, prod(WAN_480P)), "tile": (1, 1, 128),
                                   "sparsity": 0.91},
    "wan-14b-720p-128-91%": {"grid": WAN_720P, "heads": 40, "head_dim": 128, "tile": (4, 4, 8), "sparsity": 0.91},
    "hunyuan-720p-64-91%": {**_HUNYUAN_HEADS, "tile": (4, 4, 4), "sparsity": 0.91},
    "hunyuan-720p-128-80%": {**_HUNYUAN_HEADS, "tile": (4, 4, 8), "sparsity": 0.80},
    "hunyuan-720p-128-91%": {**_HUNYUAN_HEADS, "tile": (4, 4, 8), "sparsity": 0.91},
    "cogvideox-480p-64-91%": {"grid": COG_480P, "heads": 48, "head_dim": 64, "tile": (4, 4, 4), "sparsity": 0.91},
}  # fmt: skip
SPARSE_CPU: Shapes = {
    "wan-1.3b-1280-64-80%": {"grid": (5, 16, 16), "heads": 12, "head_dim": 128, "tile": (4, 4, 4), "sparsity": 0.80},
    "wan-1.3b-1280-128-80%": {"grid": (5, 16, 16), "heads": 12, "head_dim": 128, "tile": (4, 4, 8), "sparsity": 0.80},
    "wan-1.3b-4k-64-80%": {"grid": (8, 16, 32), "heads": 12, "head_dim": 128, "tile": (4, 4, 4), "sparsity": 0.80},
    "wan-1.3b-4k-64-90%": {"grid": (8, 16, 32), "heads": 12, "head_dim": 128, "tile": (4, 4, 4), "sparsity": 0.90},
}
_MEAN_ONLY = ("grid", "heads", "head_dim", "tile")
MEAN_GPU: Shapes = {
    name: {part: SPARSE_GPU[shape][part] for part in _MEAN_ONLY}
    for name, shape in (
        ("wan-1.3b-480p-64", "wan-1.3b-480p-64-91%"),
        ("wan-14b-720p-128", "wan-14b-720p-128-91%"),
        ("hunyuan-720p-64", "hunyuan-720p-64-91%"),
        ("cogvideox-480p-64", "cogvideox-480p-64-91%"),
    )
}
MEAN_CPU: Shapes = {"wan-1.3b-1280-64": {"grid": (5, 16, 16), "heads": 12, "head_dim": 128, "tile": (4, 4, 4)}}
QK_MEANS_GPU: Shapes = {
    "wan-1.3b-480p-64": MEAN_GPU["wan-1.3b-480p-64"],
    "wan-14b-480p-64": {"grid": WAN_480P, "heads": 40, "head_dim": 128, "tile": (4, 4, 4)},
    "wan-14b-720p-128": MEAN_GPU["wan-14b-720p-128"],
    "hunyuan-720p-64": {**MEAN_GPU["hunyuan-720p-64"], "style": "per head"},
}

# Four frames at a time: what the decoder makes of one latent frame.
VAE_GPU: Shapes = {
    "wan-480p-full-96": {"grid": (4, 480, 832), "channels": 96},
    "wan-480p-half-192": {"grid": (4, 240, 416), "channels": 192},
    "wan-480p-quarter-384": {"grid": (2, 120, 208), "channels": 384},
    "wan-720p-full-96": {"grid": (4, 720, 1280), "channels": 96},
    "wan-5b-704p-full-256": {"grid": (4, 352, 640), "channels": 256},
}
VAE_CPU: Shapes = {"wan-128-full-96": {"grid": (4, 128, 128), "channels": 96}}

# A residual block: its first convolution with the norm behind it, its second with the sum, and with the next block's
# norm. Then upsampling in time, HunyuanVideo's repeated edges, and LTX's upsampling in time and space.
CONV_GPU: Shapes = {
    **VAE_GPU,
    "wan-480p-full-96-norm": {"grid": (4, 480, 832), "channels": 96, "style": "norm"},
    "wan-480p-full-96-residual": {"grid": (4, 480, 832), "channels": 96, "style": "residual"},
    "wan-480p-full-96-residual-norm": {"grid": (4, 480, 832), "channels": 96, "style": "residual-norm"},
    "wan-480p-half-192-residual-norm": {"grid": (4, 240, 416), "channels": 192, "style": "residual-norm"},
    "wan-480p-quarter-384-residual-norm": {"grid": (2, 120, 208), "channels": 384, "style": "residual-norm"},
    "wan-480p-quarter-384-interleave": {"grid": (2, 120, 208), "channels": 384, "style": "interleave"},
    "hunyuan-tile-full-128": {"grid": (17, 256, 256), "channels": 128, "style": "hunyuanvideo"},
    "ltx-512p-quarter-256": {"grid": (16, 64, 96), "channels": 256, "style": "ltx"},
}
CONV_CPU: Shapes = {
    **VAE_CPU,
    "wan-128-full-96-residual-norm": {"grid": (4, 128, 128), "channels": 96, "style": "residual-norm"},
}

# A tile of HunyuanVideo's 720p, 17 frames of 256 x 256; CogVideoX's batches of 9 and 8 frames of 480 x 720.
GROUP_NORM_GPU: Shapes = {
    "hunyuan-tile-full-128": {"grid": (17, 256, 256), "channels": 128},
    "hunyuan-tile-half-256": {"grid": (17, 128, 128), "channels": 256},
    "hunyuan-tile-eighth-512": {"grid": (5, 32, 32), "channels": 512},
    "cogvideox-480p-first-128": {"grid": (9, 480, 720), "channels": 128, "style": "cogvideox"},
    "cogvideox-480p-half-256": {"grid": (8, 240, 360), "channels": 256, "style": "cogvideox"},
}
GROUP_NORM_CPU: Shapes = {
    "hunyuan-96-full-128": {"grid": (9, 96, 96), "channels": 128},
    "cogvideox-96-full-128": {"grid": (9, 96, 96), "channels": 128, "style": "cogvideox"},
}
# LTX at 512 x 768: 121 frames leave the decoder as patches of 4 x 4 pixels. LTX-2 is twice as wide.
PIXEL_NORM_GPU: Shapes = {
    "ltx-512p-full-128": {"grid": (121, 128, 192), "channels": 128},
    "ltx-512p-half-256": {"grid": (61, 64, 96), "channels": 256, "style": "ltx-timestep"},
    "ltx-512p-quarter-512": {"grid": (31, 32, 48), "channels": 512, "style": "ltx-timestep"},
    "ltx2-512p-latent-1024": {"grid": (16, 16, 24), "channels": 1024},
}
PIXEL_NORM_CPU: Shapes = {"ltx-96-full-128": {"grid": (9, 96, 96), "channels": 128}}

# Small frames, their channels and those of the result. HunyuanVideo's are the tiles that diffusers decodes.
UPSAMPLE_GPU: Shapes = {
    "wan-480p-60p-384": {"grid": (2, 60, 104), "channels": 384, "out": 192},
    "wan-480p-120p-384": {"grid": (4, 120, 208), "channels": 384, "out": 192},
    "wan-480p-240p-192": {"grid": (4, 240, 416), "channels": 192, "out": 96},
    "wan-5b-704p-176p-512": {"grid": (4, 176, 320), "channels": 512, "out": 512},
    "hunyuanvideo-tile-512": {"grid": (5, 64, 64), "channels": 512, "out": 512, "style": "hunyuanvideo"},
    "hunyuanvideo-tile-256": {"grid": (9, 128, 128), "channels": 256, "out": 256, "style": "hunyuanvideo"},
    "cogvideox-480p-512": {"grid": (3, 60, 90), "channels": 512, "out": 512, "style": "cogvideox"},
}
UPSAMPLE_CPU: Shapes = {
    "wan-128-192": {"grid": (4, 64, 64), "channels": 192, "out": 96},
    "hunyuanvideo-tile-128": {"grid": (3, 24, 24), "channels": 128, "out": 128, "style": "hunyuanvideo"},
}

# The middle blocks of the decoders, frames as latents: channels are those of the one head.
MIDDLE_GPU: Shapes = {
    "wan-480p-384": {"grid": (1, 60, 104), "channels": 384},
    "wan-720p-384": {"grid": (1, 90, 160), "channels": 384},
    "wan-5b-704p-1024": {"grid": (1, 44, 80), "channels": 1024},
    "hunyuan-tile-512": {"grid": (5, 32, 32), "channels": 512, "style": "hunyuanvideo"},
}
MIDDLE_CPU: Shapes = {
    "wan-256-384": {"grid": (1, 32, 32), "channels": 384},
    "hunyuan-64-512": {"grid": (3, 8, 8), "channels": 512, "style": "hunyuanvideo"},
}
# Their last layers: positions before patches are unfolded, and the channels that come in.
HEAD_GPU: Shapes = {
    "wan-480p-96": {"grid": (4, 480, 832), "channels": 96},
    "wan-720p-96": {"grid": (4, 720, 1280), "channels": 96},
    "wan-5b-704p-256": {"grid": (4, 352, 640), "channels": 256, "style": "wan-2.2"},
    "hunyuan-tile-128": {"grid": (17, 256, 256), "channels": 128, "style": "hunyuanvideo"},
    "ltx-512p-128": {"grid": (121, 128, 192), "channels": 128, "style": "ltx"},
}
HEAD_CPU: Shapes = {
    "wan-128-96": {"grid": (4, 128, 128), "channels": 96},
    "ltx-64-128": {"grid": (9, 16, 16), "channels": 128, "style": "ltx"},
}

# A tile of frames: diffusers' own size, and half of the width of 720p.
TILE_GPU: Shapes = {"wan-256": {"grid": (4, 256, 256)}, "wan-720p-half": {"grid": (4, 720, 768)}}
TILE_CPU: Shapes = {"wan-256": {"grid": (4, 256, 256)}, "wan-720p-half": TILE_GPU["wan-720p-half"]}

LATENT_GPU: Shapes = {
    "wan-480p": {"shape": (1, 16, 21, 60, 104)},
    "wan-720p": {"shape": (1, 16, 21, 90, 160)},
    "wan-5b-704p": {"shape": (1, 48, 31, 44, 80)},
}
EULER_GPU: Shapes = {**LATENT_GPU, "ltx-512p": {"shape": (1, prod(LTX_512P), 128)}}
LATENT_CPU: Shapes = {
    "wan-480p": LATENT_GPU["wan-480p"],
    "wan-720p-121": {"shape": (1, 16, 31, 90, 160)},  # 121 frames
}

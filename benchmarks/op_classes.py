"""Which class of work an op or a kernel belongs to: the tables behind "where the time goes".

Two steps. An op's or a kernel's *kind* (attention, gemm, conv, pointwise, transfer, bookkeeping) is what it computes,
wherever it runs. Its *class* is the bar of the breakdown that it is counted under, which depends on the phase: the
same norm is part of "norm/modulation/rope" in a denoising step and of "vae other" in the decoder.

Kernels are recognised by the op that launched them. Their names serve where there is no op: in a replayed CUDA graph,
and for libraries that are called past torch's dispatcher.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

SELF, CROSS, GEMM = "self-attention", "cross-attention", "gemm"
POINTWISE, VAE_CONV, VAE_OTHER, OTHER = "norm/modulation/rope", "vae conv", "vae other", "other"
GAPS = "launch gaps"
# The bars of each phase, in the order of plots and tables.
PHASES: dict[str, tuple[str, ...]] = {
    "denoise": (SELF, CROSS, GEMM, POINTWISE, OTHER, GAPS),
    "decode": (VAE_CONV, VAE_OTHER, SELF, GEMM, OTHER, GAPS),
}
CLASSES = (SELF, CROSS, GEMM, POINTWISE, VAE_CONV, VAE_OTHER, OTHER, GAPS)

# Our ops, one by one. patch_embed3d is a GEMM over patches. final_layer is a norm with a projection to 64 channels
# behind it: it is bound by reading its input, as the norm is, and takes the place of one. The scheduler's steps are
# elementwise, and the stock schedulers' elementwise ops are counted there too.
PYVIDEO_KINDS = {
    "layer_norm_modulate": "pointwise",
    "gate_residual": "pointwise",
    "gate_residual_norm_modulate": "pointwise",
    "rms_norm": "pointwise",
    "rms_norm_silu": "pointwise",
    "group_norm_silu": "pointwise",
    "pixel_norm_silu": "pointwise",
    "qk_norm_rope": "pointwise",
    "qk_norm_rope_": "pointwise",
    "qk_norm_rope_int8": "pointwise",
    "qk_norm_rope_means": "pointwise",
    "quantize_qk": "pointwise",
    "blend_tile_": "pointwise",
    "final_layer": "pointwise",
    "guidance_step": "pointwise",
    "unipc_step": "pointwise",
    "patch_embed3d": "gemm",
    "linear_gelu": "gemm",
    "spacetime_attention": "attention",
    "int8_attention": "attention",
    "fp8_attention": "attention",
    "block_sparse_attention": "attention",
    # The means of tiles choose what sparse attention looks at: a part of its price.
    "block_mean": "attention",
    "causal_conv3d": "conv",
    "upsample_conv2d": "conv",
    "decode_head_": "conv",
    "vae_attention": "attention",
}

_ATTENTION_OP = re.compile(
    r"aten::(_?scaled_dot_product_\w+|_fused_sdp_choice|_(flash|efficient|cudnn)_attention_\w+|_native_multi_head\w*|"
    r"_?(safe_)?softmax)$"
    r"|(?!aten::|pyvideo::)\w*::\w*(attn|attention|fmha|flash_fwd|flash_varlen|na[123]d)\w*"
    r"|flex_attention|(flash_attn|_flash_attn|natten|sageattn|sageattention)\w*::"
)
_GEMM_OP = re.compile(
    r"aten::(_?(mm|addmm|bmm|baddbmm|addbmm|linear|matmul|einsum|mv|addmv|dot)|_scaled_(grouped_)?mm\w*|_int_mm|"
    r"_addmm_activation|_grouped_mm|_weight_int\dpack_mm|mkldnn_linear\w*|inner|tensordot)$"
    r"|mkldnn::_linear_pointwise|mkl::_mkl_linear|(quantized|onednn)::q?linear\w*|\w+::\w*(scaled_mm|gemm)\w*"
)
_CONV_OP = re.compile(
    r"aten::_?(conv[123]d|convolution\w*|conv_transpose[123]d|(cudnn|mkldnn|miopen)_convolution\w*|slow_conv\w*|"
    r"thnn_conv\w*|_slow_conv\w*|conv_depthwise3d)$|mkldnn::_convolution_\w+"
)
# Host-device traffic, random numbers, linear solves, communication: not the model's arithmetic.
_TRANSFER_OP = re.compile(
    r"aten::(item|_local_scalar_dense|is_nonzero|normal_|randn?|randn_like|rand_like|uniform_|bernoulli_|random_|"
    r"randint|_?linalg_(solve|lu|inv|cholesky|lstsq|qr|svd|eig)\w*|sort|topk|nonzero|_fft_\w+)$|(c10d|_c10d_functional|nccl)::"
)
# Allocation and views: they touch no data.
_BOOKKEEPING_OP = re.compile(
    r"aten::(view|_unsafe_view|_reshape_alias|reshape|view_as|expand|expand_as|permute|transpose|t|numpy_T|movedim|"
    r"squeeze|unsqueeze|select|slice|narrow|split|split_with_sizes|tensor_split|chunk|unbind|unflatten|flatten|"
    r"as_strided_?|alias|detach_?|lift_fresh|empty|empty_like|empty_strided|new_empty|new_empty_strided|resize_|set_|"
    r"result_type|resolve_conj|resolve_neg|can_cast|is_same_size|_to|unfold|diagonal|swapaxes)$"
)
_OP_KINDS = (
    ("attention", _ATTENTION_OP),
    ("gemm", _GEMM_OP),
    ("conv", _CONV_OP),
    ("transfer", _TRANSFER_OP),
)
# These own whatever runs beneath them: the softmax of unfused attention, the layout copies of a convolution.
OWNERS = frozenset({"attention", "conv"})

_OUR_NAMESPACES = ("pyvideo::", "pyvideo_native::")

# Kernel names, first match wins. Attention comes before conv (cuDNN's attention is "..._sdpa_sm90_flash_fprop_...")
# and conv before gemm (its implicit-GEMM kernels are "sm90_xmma_fprop_implicit_gemm_...").
_KERNEL_KINDS = (
    ("transfer", re.compile(r"Memcpy (HtoD|DtoH)|nccl|distribution_elementwise|philox|cusolver|getrf|trsm", re.I)),
    ("attention", re.compile(
        r"flash_(fwd|bwd)|flash::|FlashAttn|FlashAttention|fmha|_sdpa_|attn|attention|AttentionKernel|natten|"
        r"BatchPrefillWith|softmax", re.I)),
    ("conv", re.compile(
        r"implicit_?gemm|implicit_?convolve|convolve|xmma_(fprop|dgrad|wgrad)|_fprop|conv_?(depthwise)?[123]d|"
        r"convolution|vol2col|im2col|winograd|nchwToNhwc|nhwcToNchw|ncdhw|ndhwc|cudnn::", re.I)),
    ("gemm", re.compile(
        r"gemm|nvjet|gemv|xmma|cublas|cutlass|s16816|s1688|Cijk_|matmul|splitK(reduce)?_|_scaled_mm|dot_kernel", re.I)),
    ("pointwise", re.compile(
        r"elementwise|reduce_kernel|layer_?norm|rms_?norm|RowwiseMoments|group_?norm|CatArray|upsample|index|gather|"
        r"copy|gelu|silu|pad|modulat|rope|rotary|residual|_key_mean|_delta_kernel|Memcpy DtoD|Memset|"
        r"at::native|at_cuda_detail|transpose", re.I)),
)  # fmt: skip
# Kernels bear the name of their op, without the mark of one that is in place.
_KINDS = {name.rstrip("_"): kind for name, kind in PYVIDEO_KINDS.items()}
_NAMES = sorted(_KINDS, key=len, reverse=True)
_OURS = re.compile("|".join(rf"(?:\b_?){name}(?:_\w*)?_kernel" for name in _NAMES))
_OUR_NAME = re.compile("|".join(_NAMES))
_INDUCTOR_FUSED = re.compile(r"triton_(poi|red|per|for|mix|split)\w*_fused|cpp_fused|graph_\d+_cpp_fused")
_INDUCTOR_TEMPLATE = re.compile(r"triton_tem_fused")


@lru_cache(maxsize=4096)
def op_kind(name: str) -> str | None:
    """What an op computes, by its name in the trace; None: the table does not know it.

    >>> op_kind("pyvideo::rms_norm"), op_kind("aten::addmm"), op_kind("aten::view"), op_kind("aten::mul")
    ('pointwise', 'gemm', 'bookkeeping', None)
    """
    if name.startswith(_OUR_NAMESPACES):
        # A backward is of its op's kind.
        return PYVIDEO_KINDS.get(name.partition("::")[2].removesuffix("_backward"))
    for kind, pattern in _OP_KINDS:
        if pattern.match(name):
            return kind
    if _BOOKKEEPING_OP.match(name):
        return "bookkeeping"
    return _compiled_kind(name)


def _compiled_kind(name: str) -> str | None:
    """Kinds of torch.compile's own kernels."""
    if _INDUCTOR_TEMPLATE.search(name):
        if "flex_attention" in name or "flex_decoding" in name:
            return "attention"
        return "conv" if "convolution" in name else "gemm"
    if _INDUCTOR_FUSED.search(name):
        # Its name lists every op that was fused: "triton_poi_fused_mm_..." is what surrounds the product, not it.
        return "pointwise"
    return None


@lru_cache(maxsize=4096)
def kernel_kind(name: str) -> str | None:
    """What a device kernel computes, by its name alone; None: not recognised.

    >>> kernel_kind("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT"), kernel_kind("triton_red_fused_mean_3")
    ('gemm', 'pointwise')
    """
    kind = _compiled_kind(name)
    if kind:
        return kind
    ours = _OURS.search(name)
    if ours:
        found = _OUR_NAME.search(ours.group())
        assert found is not None  # the two patterns are made of the same names
        return _KINDS[found.group()]
    if name.startswith("_fold_modulation_kernel"):  # prepares final_layer's modulation
        return "pointwise"
    for kind, pattern in _KERNEL_KINDS:
        if pattern.search(name):
            return kind
    return None


def is_op(name: str) -> bool:
    """Whether a CPU event is an op, rather than an annotation around Python code."""
    return "::" in name or _compiled_kind(name) is not None


def is_cpu_work(name: str) -> bool:
    """Whether a CPU event's own time is work on a CPU: ops, and compiled graphs, whose fused C++ kernels have no event
    of their own (the Python between them is counted with them)."""
    return is_op(name) or name.startswith("## Call CompiledFxGraph")


def owner(chain: Sequence[str]) -> int | None:
    """Which of an event's ops (itself first, then its parents) decides its class; None: none of them is in the table.

    The outermost attention, convolution or op of ours owns everything beneath it; else the innermost known op decides.
    """
    inner = None
    outer = None
    for i, name in enumerate(chain):
        kind = op_kind(name)
        if kind is None or kind == "bookkeeping":
            continue
        inner = i if inner is None else inner
        if kind in OWNERS or name.startswith(_OUR_NAMESPACES):
            outer = i
    return outer if outer is not None else inner


def chain_kind(chain: Sequence[str]) -> str:
    """The kind of an event by its ops: what the table does not know is elementwise, a reduction or a copy."""
    found = owner(chain)
    if found is not None:
        return op_kind(chain[found]) or "pointwise"
    ops = [name for name in chain if is_op(name)]
    return "bookkeeping" if ops and all(op_kind(name) == "bookkeeping" for name in ops) else "pointwise"


def is_cross(op: str, shapes: Sequence[Sequence[int]]) -> bool:
    """Cross-attention has another number of keys than of queries; without shapes the answer is no.

    Joint attention of video and text is self-attention: its queries are its keys.
    """
    tensors = [shape for shape in shapes if len(shape) >= 3]
    if len(tensors) < 2:
        return False
    query, key = tensors[:2]
    # [B, heads, S, head_dim] for torch's public op, cuDNN and inductor's template; [B, S, heads, head_dim] or, packed,
    # [S, heads, head_dim] for everything else.
    heads_first = any(part in op for part in ("scaled_dot_product", "flex_attention", "cudnn_attention"))
    axis = -2 if heads_first else 1 if len(query) > 3 else 0
    return query[axis] != key[axis]


def class_of(kind: str | None, phase: str, cross: bool = False) -> str:
    """The bar of the breakdown that work of ``kind`` is counted under.

    A convolution outside the decoder is the patch embedding, which is a matrix product.
    """
    if kind == "attention":
        return CROSS if cross and phase == "denoise" else SELF
    if kind == "gemm":
        return GEMM
    if kind == "conv":
        return VAE_CONV if phase == "decode" else GEMM
    if kind == "pointwise":
        return VAE_OTHER if phase == "decode" else POINTWISE
    return OTHER

"""Combinations of torch, cuDNN, Triton and numpy that give wrong pictures, crash or crawl, and what to do about each.

Shown by ``pyvideo doctor`` and ``python -m pyvideo_kernels.collect_env``. A row states the versions that its source
names; where no source says that a later version is right, the range is open. Torch-free.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WRONG, BROKEN, GRADIENTS, SLOW, UNTESTED = (
    "wrong results", "crashes", "wrong gradients", "slow", "untested pair",
)  # fmt: skip
EFFECTS = (WRONG, BROKEN, GRADIENTS, SLOW, UNTESTED)
"""Worst first, for somebody who samples."""


@dataclass(frozen=True)
class Setup:
    """What a row is held against.

    Args:
        versions: package -> version or None: ``torch``, ``cudnn``, ``triton``, ``numpy``.
        archs: of the cards here, as `dispatch.arch_of` gives them; empty without a GPU.
        interpreting: Triton runs in its interpreter (TRITON_INTERPRET=1).
        torch_wants: package -> the exact version that the installed torch asks for.
    """

    versions: Mapping[str, str | None]
    archs: Sequence[str] = ()
    interpreting: bool = False
    torch_wants: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """One known problem.

    Args:
        name: short, stable: for tests and bug reports.
        effect: one of EFFECTS.
        what: one sentence: which code, in which dtype or layout, does what.
        remedy: what a user does.
        sources: where it was read.
        versions: package -> (first affected, first right again), either of them open as None. All must hold; a package
            that is not there is not affected.
        archs: only these; empty: any machine.
        gpu: only where there is a GPU.
        interpreter: only while TRITON_INTERPRET=1 (or only while not); None: both.
    """

    name: str
    effect: str
    what: str
    remedy: str
    sources: tuple[str, ...]
    versions: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    archs: tuple[str, ...] = ()
    gpu: bool = True
    interpreter: bool | None = None

    def applies(self, setup: Setup) -> bool:
        """Whether ``setup`` is affected."""
        if self.gpu and not setup.archs:
            return False
        if self.archs and not set(self.archs) & set(setup.archs):
            return False
        if self.interpreter is not None and self.interpreter != setup.interpreting:
            return False
        return all(_within(setup.versions.get(name), *bounds) for name, bounds in self.versions.items())

    def affected(self) -> str:
        """The condition in words: ``torch >= 2.9, cuDNN >= 9.8, < 9.15``."""
        parts = []
        for name, (first, fixed) in self.versions.items():
            bounds = [text for text in (f">= {first}" if first else "", f"< {fixed}" if fixed else "") if text]
            parts.append(f"{_NAMES.get(name, name)} {', '.join(bounds)}".strip())
        parts += [" or ".join(self.archs)] if self.archs else []
        parts += ["TRITON_INTERPRET=1"] if self.interpreter else []
        return "; ".join(parts)


_NAMES = {"cudnn": "cuDNN", "triton": "Triton"}
_PYTORCH = "https://github.com/pytorch/pytorch/issues/"
_TRITON = "https://github.com/triton-lang/triton/"

PROBLEMS: tuple[Problem, ...] = (
    Problem(
        "conv3d-wrong",
        WRONG,
        "torch.nn.functional.conv3d on bf16 and fp16 clips in the default (contiguous) layout returns wrong values: "
        "decoded pictures of a stock VAE are not to be trusted.",
        "use torch >= 2.9.1 with cuDNN >= 9.15, or channels_last_3d clips; ops=('causal_conv3d',) does not call it",
        (f"{_PYTORCH}163539",),
        {"torch": (None, "2.9"), "cudnn": ("9.8", "9.15")},
    ),
    Problem(
        "conv3d-tf32-wrong",
        WRONG,
        "torch.nn.functional.conv3d on fp32 clips can return wrong values where cuDNN may use TF32, torch's default: a "
        "stock VAE in fp32 decodes so.",
        "use torch >= 2.9.1, or torch.backends.cudnn.allow_tf32 = False; causal_conv3d's own kernels are not affected",
        ("https://github.com/pytorch/pytorch/pull/167024",),
        {"torch": (None, "2.9.1"), "cudnn": ("9.10.2", None)},
    ),
    Problem(
        "conv3d-2.9.0-slow",
        SLOW,
        "torch 2.9.0 keeps every bf16 and fp16 conv3d away from cuDNN, whichever it is and in any layout: stock VAE "
        "decoding takes several times the memory and time.",
        "pip install -U 'torch>=2.9.1' and 'nvidia-cudnn-cu13>=9.15' (cu12 for CUDA 12); causal_conv3d leaves it out",
        (
            "https://github.com/pytorch/pytorch/pull/163581",
            f"{_PYTORCH}166643",
            "https://github.com/nvidia-cosmos/cosmos-transfer2.5/pull/227",
        ),
        {"torch": ("2.9", "2.9.1"), "cudnn": ("9.8", None)},
    ),
    Problem(
        "conv3d-slow",
        SLOW,
        "torch keeps bf16 and fp16 conv3d in the default (contiguous) layout away from this cuDNN, whose results would "
        "be wrong: stock VAE decoding falls back to a path that takes several times the memory and time.",
        "pip install -U 'nvidia-cudnn-cu13>=9.15' (cu12 for CUDA 12), or channels_last_3d clips; causal_conv3d is not "
        "affected",
        (f"{_PYTORCH}166643", f"{_PYTORCH}163539"),
        {"torch": ("2.9", None), "cudnn": ("9.8", "9.15")},
    ),
    Problem(
        "conv3d-as-patches",
        SLOW,
        "Conv3d whose stride equals its kernel (the stock patch embedding of every video transformer) can take seconds "
        "a call in bf16 instead of microseconds.",
        "pip install -U 'nvidia-cudnn-cu13>=9.15' (cu12 for CUDA 12); patch_embed3d never calls a convolution",
        (
            "https://github.com/huggingface/transformers/issues/45750",
            "https://github.com/sgl-project/sglang-omni/pull/539",
            f"{_PYTORCH}168167",
            f"{_PYTORCH}174051",
        ),
        {"torch": ("2.9", None), "cudnn": ("9.8", "9.15")},
    ),
    Problem(
        "sdpa-cudnn-backward-nan",
        GRADIENTS,
        "The backward of cuDNN's scaled_dot_product_attention gives NaN in the gradient of q when a "
        "mask is passed, the length is 64 modulo 128 and a row's log-sum-exp is below -88.",
        "torch.backends.cuda.enable_cudnn_sdp(False) while training; inference is not affected",
        (f"{_PYTORCH}196678",),
        {"torch": ("2.11", None), "cudnn": ("9.0", None)},
        archs=("sm_90",),
    ),
    Problem(
        "triton-blackwell-accumulator",
        WRONG,
        "Triton pipelines matrix products that follow each other into one accumulator wrongly in loops of some forms; "
        "patch_embed3d's Triton kernel has such products.",
        "leave impl='auto', whose self-check decides, or use impl='reference'; fixed on Triton's main in July 2026",
        (f"{_TRITON}issues/10821", f"{_TRITON}pull/10988", "https://github.com/linkedin/Liger-Kernel/pull/1435"),
        {"triton": ("3.6", "3.9")},
        archs=("sm_100", "sm_103"),
        interpreter=False,
    ),
    Problem(
        "triton-hopper-many-dots",
        BROKEN,
        "Some kernels with several matrix products on tiles 32 wide end in an illegal memory access.",
        "if a run ends so, name the op in a bug report and use impl='reference' (or 'sdpa') for it",
        (f"{_TRITON}issues/11366", f"{_TRITON}issues/10486"),
        {"triton": ("3.7.1", None)},
        archs=("sm_90",),
        interpreter=False,
    ),
    Problem(
        "interpreter-numpy",
        BROKEN,
        "Triton's interpreter stops with 'only 0-dimensional arrays can be converted to Python scalars' in kernels "
        "that use tensor descriptors.",
        "pip install 'numpy<2.4', or Triton >= 3.7",
        (f"{_TRITON}issues/9171", f"{_TRITON}pull/9172"),
        {"triton": (None, "3.7"), "numpy": ("2.4", None)},
        gpu=False,
        interpreter=True,
    ),
    Problem(
        "interpreter-bf16",
        WRONG,
        "Triton's interpreter multiplies the bit patterns of bf16 matrices, not their values.",
        "interpret in fp16 or fp32",
        (f"{_TRITON}issues/11584", f"{_TRITON}issues/4972"),
        {"triton": (None, None)},
        gpu=False,
        interpreter=True,
    ),
)


_CONV3D = ("conv3d-wrong", "conv3d-2.9.0-slow", "conv3d-slow")
"""Rows about a 3-D convolution in bf16 or fp16 by cuDNN, the worst first."""


def conv3d_trouble(setup: Setup) -> Problem | None:
    """Why a 3-D convolution in bf16 or fp16 is not to be handed to this torch's cuDNN; None: it may be.

    On any card, and in channels-last layout too: torch sends that to every cuDNN from 2.9.1 on, and nobody says since
    when it is right. Looked up once for each pair of versions, so that a call may ask.
    """
    return _conv3d_trouble(setup.versions.get("torch"), setup.versions.get("cudnn"))


@functools.lru_cache
def _conv3d_trouble(torch: str | None, cudnn: str | None) -> Problem | None:
    setup = Setup({"torch": torch, "cudnn": cudnn}, archs=("any",))
    rows = {problem.name: problem for problem in PROBLEMS if problem.name in _CONV3D and problem.applies(setup)}
    return next((rows[name] for name in _CONV3D if name in rows), None)


def problems(setup: Setup) -> list[Problem]:
    """The known problems that this setup has, worst first."""
    found = [problem for problem in PROBLEMS if problem.applies(setup)]
    found += [_mismatch(name, wanted, setup) for name, wanted in setup.torch_wants.items() if _differs(name, setup)]
    return sorted(found, key=lambda problem: EFFECTS.index(problem.effect))


def _differs(name: str, setup: Setup) -> bool:
    have = setup.versions.get(name)
    return have is not None and numbers(have) != numbers(setup.torch_wants[name])


def _mismatch(name: str, wanted: str, setup: Setup) -> Problem:
    have = setup.versions[name]
    return Problem(
        f"{name}-is-not-torchs",
        UNTESTED,
        f"{name} {have} is installed, and torch {setup.versions.get('torch')} asks for {name} {wanted}: torch.compile "
        "and flex_attention mostly work with another release, and sometimes fail.",
        f"pip install {name}=={wanted}",
        ("https://github.com/openai/triton/issues/4460",),
        gpu=False,
    )


# Versions ---------------------------------------------------------------------------------------------------------


def numbers(version: str) -> tuple[int, ...]:
    """The release of a version, without trailing zeros: ``2.11.0+cu130`` and ``2.11`` are (2, 11)."""
    match = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in match.group().split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _within(version: str | None, first: str | None, fixed: str | None) -> bool:
    if version is None:
        return False
    have = numbers(version)
    return (first is None or have >= numbers(first)) and (fixed is None or have < numbers(fixed))

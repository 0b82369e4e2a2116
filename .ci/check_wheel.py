"""The installed wheel, in its own environment and outside the checkout: everything is there and nothing leaks in."""

import sys
from pathlib import Path

import kernels
import torch

import pyvideo_kernels as pv
import pyvideo_kernels.kernels.rms_norm as triton_rms_norm
from pyvideo_kernels import _native, dispatch

for module in (pv, triton_rms_norm):
    if not Path(module.__file__).is_relative_to(sys.prefix):
        sys.exit(f"{module.__name__} comes from {module.__file__}, not from the wheel")
if not hasattr(kernels, "get_kernel"):
    sys.exit(f"`kernels` is {kernels.__path__}, not Hugging Face's package")
if not _native.available():
    sys.exit(f"the wheel has no working extension: {_native.why_not()}")
pv.rms_norm(torch.randn(3, 8))
if dispatch.calls() != {("rms_norm", "cpu"): 1}:
    sys.exit(f"the compiled kernel did not run: {dispatch.calls()}")
print(f"wheel of pyvideo-kernels {pv.__version__}: compiled by {_native.build_info()['compiler']}")

"""The self-check's own samples get through Triton's front end: sizes of 1 are constants there, and not tensors.

The interpreter cannot see this and the model shapes of the tables have no such size; on a card a sample that does not
compile turns the kernel off. Only the front end runs (AST to Triton IR), which takes milliseconds a launch.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CODE = """
import itertools, sys, torch
from triton.runtime.jit import JITFunction
from triton.backends.nvidia.compiler import CUDABackend
from pyvideo_kernels import dispatch
from pyvideo_kernels.schemas import OPS
from pyvideo_kernels.testing.compare import samples
from pyvideo_kernels.testing.static import compiling_for

class Stop(Exception): pass

def stop(*_):
    raise Stop

def stages(self, stages, options, *rest, before=CUDABackend.add_stages):
    before(self, stages, options, *rest)
    first, *others = stages
    stages.update(dict.fromkeys(others, stop))

CUDABackend.add_stages = stages

def meta(value):
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(meta, value)) if isinstance(value, (list, tuple)) else value

launches = 0
for name, op in OPS.items():
    if "triton" not in op.impls:
        continue
    function = dispatch.load(op, "triton")
    # The samples of an op with a head_dim are checked at that of the call.
    for dtype, head_dim in itertools.product(
        (torch.bfloat16, torch.float32), (None,) if op.heads is None else (None, *dispatch.HEAD_DIMS)
    ):
        for index, kwargs in enumerate(samples(op, dtype, head_dim=head_dim)):
            with compiling_for("sm_90"):
                inner = JITFunction.run
                def run(self, *args, **kwargs):
                    global launches
                    launches += 1
                    try:
                        inner(self, *args, **kwargs)
                    except Stop:
                        pass
                JITFunction.run = run
                try:
                    function(*op.bind(**{k: meta(v) for k, v in kwargs.items()}))
                except Exception as error:
                    last = error
                    while last.__cause__ is not None:
                        last = last.__cause__
                    print(name, dtype, head_dim, "sample", index, repr(str(last)[-300:]))
                    sys.exit(1)
print(launches)
"""


def test_every_sample_gets_through_the_front_end(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 150

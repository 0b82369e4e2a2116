"""Ulysses context parallelism on two CPU processes: the sequence is split over the ranks inside the model."""

import pytest
import torch

import pyvideo_kernels as pv

from .helpers import WAN_OPS, inputs, run, tiny, used

SPLIT = {"the sequence is not the whole grid": 1}


def work(rank, store):
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, even to compute on CPUs
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    try:
        arguments = inputs()
        expected = run(tiny(), arguments)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
        for first in ("accelerate", "parallel"):
            model = tiny()
            steps = [
                lambda each: pv.accelerate(each, attention="dense"),
                lambda each: each.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh)),
            ]
            for step in steps if first == "accelerate" else reversed(steps):
                step(model)
            report = pv.accelerate(model, attention="dense")
            with torch.no_grad():
                (out,) = model(**arguments, return_dict=False)
            torch.testing.assert_close(out, expected)
            # A rank has half the tokens until proj_out gathers them, so its unpatchify must wait.
            assert used(report) == WAN_OPS - {"final_layer"}, report.calls()
            fallbacks = {"final_layer": SPLIT, "spacetime_attention": {"context parallelism": 2}}
            assert report.fallbacks() == fallbacks, report.fallbacks()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ulysses_on_two_ranks(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.multiprocessing.spawn(work, args=(str(tmp_path / "store"),), nprocs=2)

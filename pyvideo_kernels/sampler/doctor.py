"""``pyvideo doctor``: what is installed, what was built, and what each op would bind here."""

from __future__ import annotations

from typing import Any


def facts() -> dict[str, Any]:
    """Everything the report shows, as data."""
    import torch

    from .. import _native, collect_env, dispatch
    from . import kernels
    from .loading import pick_device, pick_dtype

    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.device("cuda", index)
            properties = torch.cuda.get_device_properties(gpu)
            gpus.append({"name": properties.name, "arch": dispatch.arch_of(gpu), "memory": properties.total_memory})
    ops = {}
    for name in kernels.forward_ops():
        bound, rows = kernels.binding(name, device, dtype)
        ops[name] = {"binds": bound, "why": [{"impl": i, "usable": ok, "why": why} for i, ok, why in rows]}
    return {
        "versions": collect_env.versions(),
        "torch_cuda": torch.version.cuda or torch.version.hip,
        "gpus": gpus,
        "extension": {
            "cpu": _native.why_not("cpu") or "built",
            "cuda": _native.why_not("cuda") or f"built for {', '.join(_native.cuda_archs())}",
            "build": _native.build_info(),
        },
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "ops": ops,
    }


def report() -> None:
    """Print the facts."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    data = facts()
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(show_header=False, title="pyvideo doctor", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("versions", ", ".join(f"{name} {v or 'missing'}" for name, v in data["versions"].items()))
    gpus = [f"{g['name']} ({g['arch']}, {g['memory'] / 2**30:.0f} GiB)" for g in data["gpus"]]
    built = f"torch built for {data['torch_cuda']}" if data["torch_cuda"] else "torch built without CUDA or ROCm"
    table.add_row("GPU", (", ".join(gpus) or "none") + f"; {built}")
    for kind in ("cpu", "cuda"):
        table.add_row(f"extension, {kind}", escape(data["extension"][kind]))
    console.print(table)
    ops = Table("op", "binds", "why", title=f"auto on {data['device']}, {data['dtype']}", title_justify="left")
    for name, op in data["ops"].items():
        why = "; ".join(f"{row['impl']}: {row['why']}" for row in op["why"])
        ops.add_row(name, op["binds"], escape(why))
    console.print(ops)

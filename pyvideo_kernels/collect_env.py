"""``python -m pyvideo_kernels.collect_env``: what a bug report or a measurement must say of its machine.

Needs torch alone. ``pyvideo doctor`` shows the same facts and what each op would bind.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import __version__, _native
from .dispatch import arch_of

_PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "av", "numpy")


def versions() -> dict[str, str | None]:
    """Installed versions of what a run depends on; None for what is not there."""
    out: dict[str, str | None] = {"python": platform.python_version(), "pyvideo_kernels": __version__}
    for name in _PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = None
    return out


def cpu_name() -> str:
    """Model name of this machine's CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def cudnn_version() -> str | None:
    """Version of the cuDNN that torch loads, e.g. ``"9.15.1"``; None without one."""
    number = torch.backends.cudnn.version() if torch.version.cuda else None
    if number is None:
        return None
    thousand = 10000 if number >= 90000 else 1000
    return f"{number // thousand}.{number % thousand // 100}.{number % 100}"


def nvidia_smi(device: torch.device) -> dict[str, str | None]:
    """Name, driver and present clocks of a CUDA device; None where the tool does not answer."""
    names = ("name", "driver_version", "clocks.sm", "clocks.mem")
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    if uuid := getattr(properties, "uuid", None):
        command.append(f"--id=GPU-{uuid}")  # the order of nvidia-smi is not CUDA's
    values: list[str | None] = [None] * len(names)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            values = list(done.stdout.strip().splitlines()[0].split(", "))
    except (OSError, subprocess.TimeoutExpired):
        pass
    name, driver, sm, memory = values
    return {"gpu": name or properties.name, "driver": driver, "clock_sm": sm, "clock_memory": memory}


def revision() -> dict[str, Any]:
    """Git revision of the checkout this package runs from, and whether tracked files differ from it; {} outside one."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not (root / "csrc" / "module.cpp").is_file():
        return {}
    head = git("rev-parse", "--short", "HEAD")
    status = git("status", "--porcelain", "--untracked-files=no")
    return {} if head is None else {"revision": head, "dirty": bool(status)}


def collect() -> dict[str, Any]:
    """Every fact, as data."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            memory = torch.cuda.get_device_properties(device).total_memory
            gpus.append({"arch": arch_of(device), "memory": memory, **nvidia_smi(device)})
    return {
        "versions": versions(),
        **revision(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda or torch.version.hip,
        "gpus": gpus,
        "extension": {
            "cpu": _native.why_not("cpu") or "built",
            "cuda": _native.why_not("cuda") or f"built for {', '.join(_native.cuda_archs())}",
            "build": _native.build_info(),
        },
    }


if __name__ == "__main__":
    print(json.dumps(collect(), indent=2, default=str))

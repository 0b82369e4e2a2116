"""``python -m pyvideo_kernels.collect_env [--json]``: what a bug report or a measurement must say of its machine.

Needs torch alone. ``pyvideo doctor`` shows the same facts, imports the external kernels, and says what each op binds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, _native, known_bad
from .dispatch import arch_of, interpreting

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


# GPUs ---------------------------------------------------------------------------------------------------------------


def _ask(*command: str) -> list[str]:
    """Lines that a tool prints; none where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def nvidia_smi(device: torch.device) -> dict[str, str | None]:
    """Name, driver and present clocks of a CUDA device; None where the tool does not answer."""
    names = ("name", "driver_version", "clocks.sm", "clocks.mem")
    properties = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    if uuid := getattr(properties, "uuid", None):
        command.append(f"--id=GPU-{uuid}")  # the order of nvidia-smi is not CUDA's
    lines = _ask(*command)
    values: list[str | None] = list(lines[0].split(", ")) if lines else [None] * len(names)
    name, driver, sm, memory = values
    return {"gpu": name or properties.name, "driver": driver, "clock_sm": sm, "clock_memory": memory}


def gpus() -> list[dict[str, Any]]:
    """The cards torch can use, each with whether the extension's machine code runs on it (None: it has none)."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        memory = torch.cuda.get_device_properties(device).total_memory
        served = not _native._check_card(index) if _native.cuda_archs() else None
        found.append({"arch": arch_of(device), "memory": memory, "extension": served, **nvidia_smi(device)})
    return found


def why_no_gpu() -> str | None:
    """Why torch can use no GPU; None where it can."""
    if torch.cuda.is_available():
        return None
    cards = [line.strip() for line in _ask("nvidia-smi", "-L")] if shutil.which("nvidia-smi") else []
    seen = f"; nvidia-smi sees {cards[0].partition(' (')[0]}" if cards else ""
    if not (torch.version.cuda or torch.version.hip):
        return "this torch was built without CUDA or ROCm" + seen
    try:
        torch.cuda.init()
    except Exception as error:  # no driver, one too old, no permission: torch says which
        return " ".join(str(error).split()) + seen
    return "torch finds no device" + seen


# Known problems, peers, the checkout ----------------------------------------------------------------------------


def setup(archs: Iterable[str]) -> known_bad.Setup:
    """This machine, as `known_bad` judges it."""
    found = versions()
    wanted = {}
    for line in _requirements("torch"):
        # What the CUDA builds of torch pin to the digit; its CPU builds pin no Triton.
        if match := re.match(r"(triton)\s*==\s*([\w.]+)\s*(;|$)", line):
            wanted[match[1]] = match[2]
    return known_bad.Setup(
        {"torch": torch.__version__, "cudnn": cudnn_version(), "triton": found["triton"], "numpy": found["numpy"]},
        tuple(archs),
        interpreting(),
        wanted,
    )


def _requirements(distribution: str) -> Sequence[str]:
    try:
        return importlib.metadata.requires(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


def peers(load: bool = False) -> list[dict[str, str | None]]:
    """External kernels: name, version, why not; ``load`` imports those that are installed, to see whether they do."""
    from .benchmarks.peers import detect

    return [{"name": name, "version": version, "why_not": why} for name, version, why in detect(load)]


# What a campaign writes while it measures: found in the results, and no change of what is measured.
_MEASURED = ("benchmarks/results", "docs/numbers.md", "docs/plots", "pyvideo_kernels/configs/*.json",
             "pyvideo_kernels/verified.json")  # fmt: skip


def revision() -> dict[str, Any]:
    """Git revision of the checkout this package runs from, and whether tracked files differ from it; {} outside one.

    Results, tuned tables and the record of verified kernels may differ: the second slice of a campaign would else be
    of another state than the first.

    A checkout that was copied without its .git is told by ``PYVIDEO_REVISION`` (``campaign --revision``).
    """
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
    status = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in _MEASURED))
    if head is None:
        told = os.environ.get("PYVIDEO_REVISION")
        return {"revision": told} if told else {}
    return {"revision": head, "dirty": bool(status)}


def collect(load_peers: bool = False) -> dict[str, Any]:
    """Every fact, as data that JSON can hold."""
    cards = gpus()
    problems = known_bad.problems(setup(card["arch"] for card in cards))
    return {
        "versions": versions(),
        **revision(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "torch_rocm": torch.version.hip,
        "cudnn": cudnn_version(),
        "interpreting": interpreting(),
        "gpus": cards,
        "why_no_gpu": why_no_gpu(),
        "extension": {
            "cpu": _native.why_not("cpu") or "built",
            "cuda": _native.why_not("cuda") or f"built for sm_{', sm_'.join(_native.cuda_archs())}",
            "build": _native.build_info(),
        },
        "peers": peers(load_peers),
        "known_bad": [
            {key: getattr(problem, key) for key in ("name", "effect", "what", "remedy", "sources")}
            | {"affected": problem.affected()}
            for problem in problems
        ],
    }


# Text ---------------------------------------------------------------------------------------------------------------


def rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts as (heading, sentence), known problems left out."""
    found = facts["versions"]
    platforms = [f"{name} {facts[key]}" for name, key in (("CUDA", "torch_cuda"), ("ROCm", "torch_rocm")) if facts[key]]
    built = f"built for {platforms[0]}" if platforms else "built without CUDA or ROCm"
    modified = ", modified" if facts.get("dirty") else ""
    checkout = f" (revision {facts['revision']}{modified})" if facts.get("revision") else ""
    rest = [f"{name} {version or 'missing'}" for name, version in found.items() if name not in _SAID]
    lines = [
        ("pyvideo-kernels", f"{found['pyvideo_kernels']}{checkout}"),
        ("python", f"{found['python']} on {facts['platform']}"),
        ("torch", f"{found['torch']}, {built}" + (f", cuDNN {facts['cudnn']}" if facts["cudnn"] else "")),
        ("packages", ", ".join(rest) + (", TRITON_INTERPRET=1" if facts["interpreting"] else "")),
        ("CPU", f"{facts['cpu']}, {facts['threads']} threads"),
    ]
    lines += [(f"GPU {index}", card_text(card)) for index, card in enumerate(facts["gpus"])]
    if facts["why_no_gpu"]:
        lines.append(("GPU", f"none: {facts['why_no_gpu']}"))
    for kind in ("cpu", "cuda"):
        lines.append((f"extension, {kind}", facts["extension"][kind]))
    return [*lines, ("peers", peers_text(facts["peers"]))]


_SAID = ("pyvideo_kernels", "python", "torch")


def card_text(card: Mapping[str, Any]) -> str:
    parts = [f"{card['gpu']} ({card['arch']}, {card['memory'] / 2**30:.0f} GiB)"]
    parts.append(f"driver {card['driver'] or 'unknown'}")
    if card["clock_sm"]:
        parts.append(f"clocks now {card['clock_sm']} SM, {card['clock_memory']} memory")
    if card["extension"] is not None:
        parts.append("the extension " + ("has machine code for it" if card["extension"] else "was NOT built for it"))
    return ", ".join(parts)


def peers_text(found: Iterable[Mapping[str, str | None]]) -> str:
    """Those that are here with their versions, and what keeps one from loading; the others by name."""
    here, absent = [], []
    for peer in found:
        if peer["version"] is None:
            absent.append(str(peer["name"]))
        else:
            here.append(f"{peer['name']} {peer['version']}" + (f" ({peer['why_not']})" if peer["why_not"] else ""))
    return (", ".join(here) or "none") + (f"; not installed: {', '.join(absent)}" if absent else "")


def text(facts: Mapping[str, Any]) -> str:
    """The facts for a bug report: a line each."""
    lines = [f"{heading}: {sentence}" for heading, sentence in rows(facts)]
    for problem in facts["known_bad"]:
        mark = "!!! " if problem["effect"] == known_bad.WRONG else ""
        lines.append(f"{mark}known problem ({problem['effect']}; {problem['affected']}): {problem['what']}")
        lines.append(f"    remedy: {problem['remedy']}")
        lines.append(f"    read: {' '.join(problem['sources'])}")
    if not facts["known_bad"]:
        lines.append("known problems: none for these versions")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pyvideo_kernels.collect_env", description="Facts for a bug report."
    )
    parser.add_argument("--json", action="store_true", help="as JSON, to attach or to compare")
    options = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else text(facts))


if __name__ == "__main__":
    main()

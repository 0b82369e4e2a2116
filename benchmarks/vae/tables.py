"""A result of ``bench vae`` as markdown, and what the command shows while it runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from pyvideo_kernels.configs import slug

from ..report import tables
from ..report.tables import NOTHING, number


def title(settings: Mapping[str, Any]) -> str:
    size = f"{settings['height']}×{settings['width']}×{settings['frames']}"
    tiled = ", tiled" if settings["tiling"] else ""
    return f"VAE of {settings['model']}, {size}, {tables.short_dtype(settings['dtype'])}{tiled}"


def stem(result: Mapping[str, Any]) -> str:
    """``vae-<model>-<size>-<dtype>-<device>``, what a result's files are called."""
    settings, where = result["settings"], result["provenance"]
    device = slug(where["gpu"]) if where["device"] == "cuda" else where["device"]
    size = "x".join(str(settings[side]) for side in ("height", "width", "frames"))
    return f"vae-{settings['model']}-{size}-{tables.short_dtype(settings['dtype'])}-{device}"


def markdown(result: Mapping[str, Any]) -> str:
    """The table of variants, what the decode asks for, and the table of layers."""
    parts = [f"# {title(result['settings'])}, {tables.machine(result)}", *sections(result["rows"])]
    return "\n\n".join(parts) + "\n"


def sections(rows: list[dict[str, Any]]) -> list[str]:
    """The tables that there are."""
    return [part for part in (variants(rows), counts(rows), layers(rows)) if part]


def variants(rows: list[dict[str, Any]]) -> str:
    """Seconds, ratios, memory and quality; the text of errors below."""
    lines = [
        "| variant | s | ± | × eager | GiB | error | PSNR to eager, dB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "seconds" not in row:
            lines.append(f"| {row['variant']} |" + f" {NOTHING} |" * 6)
            continue
        median, spread = tables.with_spread(row["seconds"], row["spread"])
        found = row.get("quality", {})
        error = f"{found['error']:.2e}" if "error" in found else NOTHING
        psnr = found.get("psnr", {}).get("min")
        same = "identical" if found.get("identical") else NOTHING if psnr is None else f"{psnr:.1f}"
        ratio = tables.ratio(row["ratio"]) if "ratio" in row else NOTHING
        cells = [row["variant"], median, spread, ratio, tables.gib(row.get("memory")), error, same]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{row['variant']}: {row['error']}" for row in rows if "error" in row]
    return "\n".join(lines)


def counts(rows: list[dict[str, Any]]) -> str:
    """Kernels, bytes and FLOPs, and what a measured machine's ceilings make of them."""
    counted = [row for row in rows if "counts" in row]
    if not counted:
        return ""
    measured = all("floor" in row for row in counted)
    head = ["asked for", "kernels", "GB", "TFLOP", *(["s at copy speed", "s at matrix speed"] if measured else [])]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in counted:
        asked = row["counts"]
        cells = [row["variant"], str(asked["kernels"]), number(asked["bytes"] / 1e9), number(asked["flops"] / 1e12)]
        if measured:
            cells += [number(row["floor"][kind]) for kind in ("bytes", "flops")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layers(rows: list[dict[str, Any]]) -> str:
    """Seconds of each layer, a column a variant; the longest of the first variant first."""
    timed = {row["variant"]: {layer["layer"]: layer for layer in row["layers"]} for row in rows if row.get("layers")}
    if not timed:
        return ""
    names = list(timed)
    first = timed[names[0]]
    known = dict.fromkeys(layer for table in timed.values() for layer in table)
    order = sorted(known, key=lambda layer: -first.get(layer, {"seconds": 0.0})["seconds"])
    lines = [
        "| layer | calls | " + " | ".join(f"{name}, ms" for name in names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for layer in order:
        calls = next(table[layer]["calls"] for table in timed.values() if layer in table)
        cells = [number(timed[name][layer]["seconds"] * 1e3) if layer in timed[name] else NOTHING for name in names]
        lines.append(f"| {layer} | {calls} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def console(name: str, facts: Mapping[str, Any]) -> str:
    """Show an event on stderr; returns what is going on now, for the message of an interruption."""
    say = lambda text: print(text, file=sys.stderr, flush=True)
    if name == "loaded":
        say(title(facts["settings"]))
        return "the first decodes"
    if name == "done":
        say(facts["page"])
        return "the end"
    variant, entry = facts["variant"], facts["entry"]
    if name == "failed":
        say(f"{variant}: {entry.error}")
    elif name == "warm":
        say(f"{variant}: first decode {number(entry.first)} s")
    elif name == "round":
        say(f"{variant}: {number(entry.seconds[-1])} s")
    return "the first decodes" if name == "warm" else "the rounds"

"""``pyvideo doctor``: what is installed, what was built, what is known to be bad, and what each op would bind here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..known_bad import BROKEN, SLOW, WRONG
from .problems import Exit

if TYPE_CHECKING:
    import torch
    from rich.console import Console


def facts() -> dict[str, Any]:
    """Everything the report shows, as data that JSON can hold."""
    from .. import _native, collect_env, configs, verdicts
    from ..configs import tuned
    from . import kernels
    from .loading import pick_device, pick_dtype

    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    ops = {}
    for name in kernels.forward_ops():
        bound, rows = kernels.binding(name, device, dtype)
        ops[name] = {"binds": bound, "why": [{"impl": i, "usable": ok, "why": why} for i, ok, why in rows]}
    target = configs.target_of(device)
    found = {
        **collect_env.collect(load_peers=True),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "cpu_dtype": _cpu_dtype(),
        "self_check": {"record": str(verdicts.record_path()), "verdicts": _verdicts(device)},
        "tuned": tuned.describe(target.gpu, str(target)) if target.gpu else "tables are for GPUs; rules choose",
        "dense_attention": _dense_attention(device),
        "ops": ops,
    }
    broken = [f"{name}: no implementation can be had" for name, op in ops.items() if op["binds"] == "none"]
    if "does not load" in _native.why_not():
        broken.append(f"{_native.why_not()}; reinstall pyvideo-kernels")
    return found | {"broken": broken}


def _cpu_dtype() -> list[dict[str, str]]:
    """What ``--dtype auto`` is on this machine's CPU, by the width of the model, and why."""
    from . import cpu_dtype
    from .loading import dtype_name

    rows = []
    for models, width in ((f"width {cpu_dtype.NARROW} and more", cpu_dtype.NARROW), ("narrower", None)):
        chosen = cpu_dtype.choose(width)
        why = chosen.why if width is not None else "products are not what takes the time"
        rows.append({"models": models, "dtype": dtype_name(chosen.dtype), "why": why})
    return rows


def _dense_attention(device: torch.device) -> list[dict[str, str]]:
    """For each card and dtype: which implementation serves dense attention, by which kernel, and why that one."""
    import torch

    from ..ops import attention_libraries
    from ..schemas import OPS
    from . import kernels

    cards = [device]
    if device.type == "cuda":
        cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    for card in cards:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.empty(1, 1, 1, 128, dtype=dtype)
            call = OPS[attention_libraries.OP].bind(
                q=x, k=x, v=x, grid=[1, 1, 1], window=None, stride=[1, 1, 1], causal_time=False, text_len=0,
                text_side="suffix", kv_lens=None, scale=1.0, return_lse=False, precision="native",
            )  # fmt: skip
            bound, walk = kernels.binding(attention_libraries.OP, card, dtype, call)
            why = next((reason for impl, _, reason in walk if impl == bound), "")
            measured = attention_libraries.source(card, dtype, bound)
            rows.append(
                {
                    "device": str(card),
                    "dtype": str(dtype).removeprefix("torch."),
                    "impl": bound,
                    "why": f"{why}; fastest in {measured}" if measured else why,
                }
            )
    return rows


def _verdicts(device: torch.device) -> dict[str, bool]:
    """Self-checks of the kernels as they now are, on this architecture: ``"rms_norm triton bfloat16"`` -> verdict."""
    import torch

    from .. import dispatch, verdicts
    from ..schemas import OPS

    return {
        verdicts.name_of(op, impl, dtype, head_dim): verdict
        for op in OPS.values()
        for impl in op.impls
        if verdicts.needs_check(impl)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for head_dim, verdict in verdicts.head_dims_known(op, impl, dispatch.arch_of(device), dtype).items()
    }


def report(as_json: bool = False) -> Exit:
    """Print the facts; FAILED if something is broken, which a known problem of other software is not."""
    data = facts()
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        try:
            from rich.console import Console
        except ImportError:
            _print_plain(data)
        else:
            console = Console()
            _print(data, console if console.is_terminal else Console(width=160))
    return Exit.FAILED if data["broken"] else Exit.OK


def _rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    from .. import collect_env

    found = data["self_check"]["verdicts"]
    failed = [name for name, verdict in found.items() if not verdict]
    said = f"{len(found) - len(failed)} passed, {len(failed)} failed" if found else "none made so far on this device"
    rows = [*collect_env.rows(data), ("tuned tiles", data["tuned"])]
    rows.append(("self-checks", f"{said}; kept in {data['self_check']['record']}"))
    rows.append(
        ("dtype on a CPU", "; ".join(f"{row['models']}: {row['dtype']} ({row['why']})" for row in data["cpu_dtype"]))
    )
    rows += _attention_rows(data["dense_attention"])
    rows += [("self-check FAILED", f"{name}: auto does not run it here") for name in failed]
    return rows + [("BROKEN", sentence) for sentence in data["broken"]]


def _attention_rows(found: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """A row a card; dtypes that the same kernel serves are named together."""
    cards: dict[str, dict[str, list[str]]] = {}
    for row in found:
        kernel = f"{row['impl']} ({row['why']})"
        cards.setdefault(row["device"], {}).setdefault(kernel, []).append(row["dtype"])
    return [
        (f"dense attention, {device}", "; ".join(f"{', '.join(dtypes)}: {kernel}" for kernel, dtypes in by.items()))
        for device, by in cards.items()
    ]


def _why(name: str, op: Mapping[str, Any]) -> str:
    return "; ".join(f"{row['impl']}: {row['why'].removeprefix(f'{name}: ')}" for row in op["why"])


_STYLES = {WRONG: "bold white on red", BROKEN: "bold red", SLOW: "yellow"}


def _print(data: Mapping[str, Any], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title="pyvideo doctor", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for heading, sentence in _rows(data):
        table.add_row(
            heading, escape(sentence), style="bold red" if heading in ("BROKEN", "self-check FAILED") else None
        )
    console.print(table)
    if data["known_bad"]:
        bad = Table("effect", "what, where, and what to do", title="known problems here", title_justify="left")
        for problem in data["known_bad"]:
            mark = f"!!! {problem['effect'].upper()}" if problem["effect"] == WRONG else problem["effect"]
            bad.add_row(
                f"[{_STYLES.get(problem['effect'], 'default')}]{mark}[/]",
                f"{escape(problem['what'])}\n[dim]{escape(problem['affected'])}[/]\n"
                f"remedy: {escape(problem['remedy'])}\n[dim]{' '.join(problem['sources'])}[/]",
            )
        console.print(bad)
    else:
        console.print("known problems: none for these versions")
    ops = Table("op", "binds", "why", title=f"auto on {data['device']}, {data['dtype']}", title_justify="left")
    for name, op in data["ops"].items():
        ops.add_row(name, op["binds"], escape(_why(name, op)))
    console.print(ops)


def _print_plain(data: Mapping[str, Any]) -> None:
    """For an installation without rich."""
    from .. import collect_env

    print(collect_env.text(data))
    for heading, sentence in _rows(data)[len(collect_env.rows(data)) :]:
        print(f"{heading}: {sentence}")
    for name, op in data["ops"].items():
        print(f"{name} binds {op['binds']} ({_why(name, op)})")

"""Result files as tables, for a page (`markdown`) and for a terminal (`rich_table`): the same cells in both.

What could not be measured stays in sight: a wrong row says so in its cells, and the text of every error, and of every
baseline that was left out, stands under the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyvideo_kernels.errors import ValueOptionError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NOTHING = "–"
# The order of columns and bars; other baselines follow in the order in which the file has them.
BASELINES = ("eager", "compile")


# Numbers: one way to write each, here and in the plots -----------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, written out.

    >>> number(0.012345), number(9.999), number(1234.5), number(0.0)
    ('0.0123', '10.0', '1234', '0')
    """
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "nan"
    return f"{value:.{decimals(value, digits)}f}" if value else "0"


def decimals(value: float, digits: int = 3) -> int:
    """Decimal places that show ``digits`` significant digits of ``value``."""
    if not value or not math.isfinite(value):
        return 0
    # By way of the rounded value: 9.999 is 10.0, not 10.00.
    exponent = int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    return max(0, digits - 1 - exponent)


def with_spread(value: float, spread: float, scale: float = 1.0) -> tuple[str, str]:
    """A median and its spread to the same decimals; a spread that rounds to nothing is given as a bound.

    >>> with_spread(0.0026301, 0.000046, 1e3), with_spread(1.5, 0.0001)
    (('2.63', '0.05'), ('1.50', '<0.01'))
    """
    places = decimals(value * scale)
    text = f"{spread * scale:.{places}f}"
    if spread > 0 and not float(text):
        text = f"<{10.0**-places:.{places}f}"
    return number(value * scale), text


def rate(value: float, unit: str) -> str:
    """
    >>> rate(3.1e12, "B/s"), rate(4.8e14, "FLOP/s"), rate(2.8e10, "B/s"), rate(4e11, "FLOP/s")
    ('3.10 TB/s', '480 TFLOP/s', '28.0 GB/s', '400 GFLOP/s')
    """
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{number(value / scale)} {prefix}{unit}"


def ratio(value: float) -> str:
    """
    >>> ratio(1.0), ratio(0.8023), ratio(24.03)
    ('1.00', '0.80', '24.0')
    """
    return f"{value:.2f}" if value < 9.995 else number(value)


def gib(count: int | None) -> str:
    return NOTHING if count is None else f"{number(count / 2**30)}"


def short_dtype(dtype: str) -> str:
    """
    >>> short_dtype("bfloat16"), short_dtype("float8_e4m3fn")
    ('bf16', 'float8_e4m3fn')
    """
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}.get(dtype, dtype)


def short_kernel(name: str) -> str:
    """A kernel's or an op's name without return type, template arguments and parameters.

    >>> short_kernel("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 64>, false>(P)")
    'pytorch_flash::flash_fwd_kernel'
    >>> short_kernel("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::C> > >(P)")
    'flash::FlashAttnFwdSm90'
    >>> short_kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0")
    'cudnn_generated_fort_native_sdpa_sm90_flash_fprop'
    >>> short_kernel("aten::_scaled_dot_product_flash_attention_for_cpu")
    '_scaled_dot_product_flash_attention_for_cpu'
    """
    name = name.removeprefix("void ").removeprefix("aten::")
    name = re.sub(r"(_sdpa_sm\d+_flash_[fb]prop)_.*", r"\1", name)
    # Launchers that take the kernel as a template argument say nothing themselves.
    wrapped = re.match(r"(?:cutlass::(?:device_kernel|Kernel2?)|flash::enable_\w+)<\s*([\w:]+.*)", name)
    if wrapped:
        return short_kernel(wrapped.group(1))
    name = name.replace("(anonymous namespace)::", "")
    return re.split(r"[<(,>]", name, maxsplit=1)[0].strip()


# The machine -------------------------------------------------------------------------------------------------------


def machine(result: Mapping[str, Any]) -> str:
    """The device's name."""
    where = result["provenance"]
    if where["device"] == "cuda":
        return str(where["gpu"])
    return f"{where['cpu']}, {where['threads']} thread{'s' if where['threads'] != 1 else ''} (CPU)"


def clip(settings: Mapping[str, Any]) -> str:
    """An end-to-end run's model and clip, in a line."""
    weights = " with random weights" if settings.get("weights") == "random" else ""
    layers, steps = settings.get("layers"), settings["steps"]
    model = f"{layers} layer{'s' * (layers != 1)} of {settings['model']}" if layers else settings["model"]
    return (
        f"{model}{weights}, {settings['height']}×{settings['width']}, {settings['frames']} frames, "
        f"{steps} step{'s' * (steps != 1)}, {short_dtype(str(settings['dtype']))}"
    )


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A heading, and whether its cells are numbers (set flush right)."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Cells as text; ``notes`` is what does not fit a cell, a sentence each."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def table(result: Mapping[str, Any]) -> Table:
    """The table of a result file of kind ``ops`` or ``e2e``."""
    kind = result.get("kind")
    if kind == "ops":
        return _ops(result)
    if kind == "e2e":
        return _e2e(result)
    raise ValueOptionError(f"table: `kind` must be ops or e2e; got {kind!r}")


def baselines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every baseline that a row names, eager and compile first."""
    named = dict.fromkeys(name for row in rows for name in row.get("baselines", {}))
    return [name for name in BASELINES if name in named] + [name for name in named if name not in BASELINES]


def versioned(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """A baseline's name with its version, where the rows give one."""
    versions = {row["baselines"][name].get("version") for row in rows if name in row.get("baselines", {})} - {None}
    return f"{name} {versions.pop()}" if len(versions) == 1 else name


def _ops(result: Mapping[str, Any]) -> Table:
    rows = result["rows"]
    # A baseline that ran nowhere gets a line under the table, not an empty column.
    shown = [
        name
        for name in baselines(rows)
        if any({"ratio", "error"} & row.get("baselines", {}).get(name, {}).keys() for row in rows)
    ]
    columns = (
        Column("op", False), Column("shape", False), Column("dtype", False), Column("implementation", False),
        Column("median ms"), Column("±"), Column("rate"), Column("of ceiling"),
        *(Column(f"× {versioned(name, rows)}") for name in shown),
    )  # fmt: skip
    lines: list[tuple[str, ...]] = []
    notes: list[str] = []
    for row in rows:
        head = (row["op"], row["shape"], short_dtype(row["dtype"]), row.get("impl") or NOTHING)
        where = f"{row['op']}, {row['shape']}, {short_dtype(row['dtype'])}"
        if "error" in row:
            lines.append((*head, "WRONG", *[NOTHING] * (3 + len(shown))))
            notes.append(f"{where}: WRONG: {_line(row['error'])}")
            continue
        against = row.get("baselines", {})
        lines.append(
            (
                *head,
                *with_spread(row["seconds"], row["spread"], 1e3),
                rate(row["rate"], row["unit"]),
                f"{row['share_of_ceiling']:.0%}",
                *(_against(against.get(name, {})) for name in shown),
            )
        )
        notes += [f"{where}: {name}: {_line(found['error'])}" for name, found in against.items() if "error" in found]
    return Table(columns, tuple(lines), (*notes, *_skipped(rows)))


def _against(found: Mapping[str, Any]) -> str:
    if "ratio" in found:
        return ratio(found["ratio"])
    return "error" if "error" in found else NOTHING


def _skipped(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """One note a baseline and reason, naming the ops; a reason that holds for all of its rows names none."""
    reasons: dict[tuple[str, str], list[str]] = {}
    count: dict[str, int] = {}
    for row in rows:
        for name, found in row.get("baselines", {}).items():
            count[name] = count.get(name, 0) + 1
            if "skipped" in found:
                reasons.setdefault((name, _line(found["skipped"])), []).append(row["op"])
    return [
        f"{name} was skipped{'' if len(ops) == count[name] else ' for ' + ', '.join(dict.fromkeys(ops))}: {why}"
        for (name, why), ops in reasons.items()
    ]


_E2E_HEAD = ("step s", "denoise s", "decode s", "total s")


def _e2e(result: Mapping[str, Any]) -> Table:
    columns = (
        Column("variant", False), *(Column(name) for name in _E2E_HEAD), Column("× eager"), Column("peak GiB"),
        Column("attention kernel", False), Column("PSNR min dB"), Column("SSIM min"), Column("float32 error"),
    )  # fmt: skip
    lines: list[tuple[str, ...]] = []
    notes: list[str] = []
    for row in result["rows"]:
        if "error" in row:
            lines.append((row["variant"], "ERROR", *[NOTHING] * (len(columns) - 2)))
            notes.append(f"{row['variant']}: {_line(row['error'])}")
            continue
        attention = row.get("attention") or {}
        quality = row.get("quality") or {}
        lines.append(
            (
                row["variant"],
                *(_seconds(row["seconds"].get(name.split()[0])) for name in _E2E_HEAD),
                _maybe((row.get("ratio") or {}).get("total"), ratio),
                gib(row.get("peak_memory_bytes")),
                short_kernel(attention["self"][0]) if attention.get("self") else NOTHING,
                psnr(quality),
                _maybe((quality.get("ssim") or {}).get("min"), lambda value: f"{value:.4f}"),
                _maybe(quality.get("float32_error"), lambda value: f"{value:.1e}" if value else "0"),
            )
        )
        fallbacks = row.get("fallbacks")
        if fallbacks:
            notes.append(f"{row['variant']}: fell back to stock code: {_fallbacks(fallbacks)}")
    return Table(columns, tuple(lines), tuple(notes))


def psnr(quality: Mapping[str, Any]) -> str:
    """The worst frame's PSNR; a video that is equal in every value has none."""
    found = (quality.get("psnr") or {}).get("min")
    if found is None or found == math.inf:
        return "identical" if identical(quality) else NOTHING
    return f"{found:.1f}"


def identical(quality: Mapping[str, Any]) -> bool:
    """Whether the decoded video equals eager's in every value."""
    return bool(quality.get("identical", quality.get("max_error") == 0))


def _fallbacks(fallbacks: Mapping[str, Mapping[str, int]]) -> str:
    """op -> reason -> calls, in a line."""
    return "; ".join(
        f"{op}, {count} call{'s' if count != 1 else ''}: {_line(why)}"
        for op, reasons in fallbacks.items()
        for why, count in reasons.items()
    )


def _seconds(found: Mapping[str, Any] | None) -> str:
    return number(found["median"]) if found and found.get("median") is not None else NOTHING


def _maybe(value: Any, form: Any) -> str:
    return NOTHING if value is None else str(form(value))


def _line(text: str) -> str:
    """The text on one line, cut where it stops to be one sentence's length."""
    text = " ".join(str(text).split())
    return text if len(text) <= 300 else text[:299] + "…"


# Output -------------------------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """A result's table in GitHub's markdown, its notes as a list under it."""
    return to_markdown(table(result))


def to_markdown(made: Table) -> str:
    """A table in GitHub's markdown."""
    lines = [
        _row(column.title for column in made.columns),
        "|" + "|".join("---:" if column.numeric else "---" for column in made.columns) + "|",
        *(_row(row) for row in made.rows),
    ]
    if made.notes:
        lines += ["", *(f"- {_escape(note)}" for note in made.notes)]
    return "\n".join(lines) + "\n"


def rich_table(result: Mapping[str, Any]) -> RichTable:
    """A result's table for a terminal, with its notes as the caption."""
    return to_rich(table(result))


def to_rich(made: Table) -> RichTable:
    """A table for a terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    # Text, not strings: a kernel's name may contain what rich takes for markup.
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for column in made.columns:
        drawn.add_column(
            Text(column.title), justify="right" if column.numeric else "left", no_wrap=column.numeric, overflow="fold"
        )
    for row in made.rows:
        drawn.add_row(*(Text(cell, style="bold red" if cell in ("WRONG", "ERROR", "error") else "") for cell in row))
    if made.notes:
        drawn.caption = Text("\n".join(made.notes))
    return drawn


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(cell: str) -> str:
    """What GitHub would take for a column, emphasis or a tag, as text; underscores within a word are none."""
    return re.sub(r"([|*<>`\[\]\\]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", cell)

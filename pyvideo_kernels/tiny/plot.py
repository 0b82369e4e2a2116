"""Draw the loss curves of a run.

python -m pyvideo_kernels.tiny.plot --run runs/tiny --output docs/tiny-loss.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

TITLES = {"dit": "transformer", "decoder": "decoder", "encoder": "encoder"}


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a training log; where a run was resumed from an older step, the later row counts."""
    rows = {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--output", type=Path, default=Path("docs/tiny-loss.png"))
    args = parser.parse_args(argv)

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {name: args.run / name / "log.jsonl" for name in TITLES}
    logs = {name: path for name, path in logs.items() if path.exists()}
    figure, axes = pyplot.subplots(1, len(logs), figsize=(3.6 * len(logs), 2.6), squeeze=False)
    for axis, (name, path) in zip(axes[0], logs.items(), strict=True):
        rows = read_log(path)
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
        axis.set(title=TITLES[name], xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(args.output, dpi=90)
    print(args.output)


if __name__ == "__main__":
    main()

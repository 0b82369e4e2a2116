"""The plots contain the numbers they are drawn from, say when they are stale, and are the same every time."""

import re
import sys
import xml.etree.ElementTree as ET

import pytest

from pyvideo_kernels.benchmarks.report import drawing, plots
from pyvideo_kernels.benchmarks.report.tables import number, rate, ratio
from pyvideo_kernels.errors import UnsupportedError, ValueOptionError

from . import sample_results

pytest.importorskip("matplotlib", reason="plots need matplotlib (the bench extra)")
TEXT = "{http://www.w3.org/2000/svg}text"


def texts(path):
    """Every piece of text in a plot."""
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iter(TEXT)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """name -> texts of every plot of both kinds."""
    folder = tmp_path_factory.mktemp("plots")
    found = {}
    for result in (sample_results.ops(), sample_results.e2e()):
        for path in plots.write_all(result, folder, result["kind"]):
            found[path.stem] = texts(path)
    return found


def test_every_plot_is_there(drawn):
    assert sorted(drawn) == ["e2e-breakdown", "e2e-speed-psnr", "e2e-speedup", "ops-roofline", "ops-speedup"]


def test_every_plot_names_the_machine_and_what_ran(drawn):
    for name, found in drawn.items():
        (line,) = [text for text in found if "Imaginary GPU" in text]
        assert "bf16" in line and "torch 2.11.0" in line
        assert ("wan2.1-1.3b with random weights, 480×832" in line) == name.startswith("e2e")


def test_speedups_of_ops(drawn):
    found = drawn["ops-speedup"]
    assert "Speed against eager, compile and sdpa-cudnn" in found
    assert {"eager", "compile", "sdpa-cudnn 9.1", "wrong", "error"} <= set(found)
    for row in sample_results.ops()["rows"]:
        assert f"{row['op']}  {row['shape']}" in found
        for baseline in row.get("baselines", {}).values():
            assert "ratio" not in baseline or ratio(baseline["ratio"]) in found
    assert "times as fast as the baseline (log)" in found  # from 0.79 to 11.7
    assert not any("sage" in text for text in found)  # skipped: nothing to draw


def test_speedups_of_variants(drawn):
    found = drawn["e2e-speedup"]
    assert {"Speed against eager", "denoising step", "decode", "whole clip", "times as fast as eager"} <= set(found)
    assert "eager" not in found and "ours:attention=int8" in found and "error" in found
    for row in sample_results.e2e()["rows"][1:4]:
        assert row["variant"] in found
        for name in ("step", "decode", "total"):
            assert ratio(row["ratio"][name]) in found


def test_the_breakdown(drawn):
    found = drawn["e2e-breakdown"]
    assert {"one denoising step", "decode", "launch gaps", "vae conv", "norm/modulation/rope"} <= set(found)
    for row in sample_results.e2e()["rows"][:4]:
        for phase in ("denoise", "decode"):
            assert f"{number(row['breakdown'][phase]['wall'])} s" in found
    assert {"0.520", "0.260", "1.03"} <= set(found)  # of the wide segments
    assert "0.0300" not in found  # cross-attention's is too narrow for its number


def test_the_bars_of_the_breakdown_are_as_long_as_their_seconds():
    figure = plots.stacked_breakdown(sample_results.e2e())
    for axes, phase in zip(figure.axes, ("denoise", "decode"), strict=True):
        ends = {}
        for bar in axes.patches:
            y = round(bar.get_y() + bar.get_height() / 2)
            assert bar.get_x() == pytest.approx(ends.get(y, 0.0))
            ends[y] = bar.get_x() + bar.get_width()
        rows = sample_results.e2e()["rows"][:4]
        assert ends == {i: pytest.approx(row["breakdown"][phase]["wall"]) for i, row in enumerate(rows)}


def test_the_roofline(drawn):
    found = drawn["ops-roofline"]
    assert {"copy 3.00 TB/s", "matrix product 790 TFLOP/s"} <= set(found)
    for row in sample_results.ops()["rows"]:
        if "error" in row:
            assert not any(row["op"] in text for text in found)
        elif row["unit"] == "B/s":
            assert f"{row['op']}  {row['shape']}" in found
            assert f"{rate(row['rate'], 'B/s')}, {row['share_of_ceiling']:.0%}" in found
        else:
            assert f"{row['op']}  {row['shape']}: {rate(row['rate'], 'FLOP/s')}" in found


def test_the_roof_is_where_both_ceilings_meet():
    result = sample_results.ops()
    axes = plots.roofline(result).axes[0]
    x, y = axes.lines[0].get_data()
    copy, gemm = result["ceilings"]["copy"], result["ceilings"]["gemm"]
    assert [b / a for a, b in zip(x[:2], y[:2], strict=True)] == pytest.approx([copy, copy])
    assert list(y[1:]) == [gemm, gemm]
    points = {tuple(float(v[0]) for v in line.get_data()) for line in axes.lines[1:]}
    assert points == {(row["flops"] / row["bytes"], row["rate"]) for row in result["rows"] if row.get("flops")}


def test_a_row_held_to_another_product_has_its_own_roof(tmp_path):
    """Convolutions in fp32 run in TF32."""
    result = sample_results.ops()
    result["ceilings"]["gemms"] = {"float32": 7.9e14, "float32 (TF32)": 9.0e14, "float8_e4m3fn": 1.5e15}
    conv = result["rows"][5]
    conv["share_of_ceiling"] = conv["rate"] / 9.0e14
    found = texts(plots.write_all(result, tmp_path, "x")[1])
    assert {"matrix product 790 TFLOP/s", "matrix product, float32 (TF32) 900 TFLOP/s"} <= set(found)
    assert not any("float8" in text for text in found)


def many():
    """Sixteen shapes of every op that works, of ratios 1/8 to 8, one wrong and one that a baseline failed at."""
    result = sample_results.ops()
    kept = [row for row in result["rows"] if "error" not in row and row["shape"] != "wan-14b-480p"]
    result["rows"] = rows = []
    for row in kept:
        for i in range(16):
            shape = {**row, "shape": f"shape-{i}", "rate": row["rate"] * (1 + i / 100)}
            shape["baselines"] = {name: {**found} for name, found in row["baselines"].items()}
            shape["baselines"]["eager"]["ratio"] = 2.0 ** (i % 4 * 2 - 3)
            rows.append(shape)
    rows[0] = {key: rows[0][key] for key in ("op", "shape", "dtype", "impl")} | {"error": "wrong"}
    rows[16]["baselines"]["compile"] = {"error": "no"}
    return result


def test_many_rows_are_a_line_an_op(tmp_path):
    """A card has dozens of shapes: the mean is written, every shape is a dot."""
    result = many()
    speedup, roof = (texts(path) for path in plots.write_all(result, tmp_path, "x"))
    assert "rms_norm  (16 shapes)" in speedup and "1 of 16 wrong" in speedup and not any("shape-" in x for x in speedup)
    assert "1.00" in speedup  # the geometric mean of 1/8, 1/2, 2 and 8
    assert "0.82, 1 of 16 failed" in speedup
    assert "causal_conv3d: 330 to 380 TFLOP/s" in roof and "2.10 to 2.42 TB/s, 70%" in roof
    axes = plots.speedup_bars(result).axes[0]
    dots = sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o")
    assert dots == sum("ratio" in found for row in result["rows"] for found in row.get("baselines", {}).values())


def test_many_baselines_are_named_in_the_legend(tmp_path):
    result = sample_results.ops()
    more = {f"peer-{i}": {"seconds": 1.0, "spread": 0.1, "ratio": 1.0 + i / 10} for i in range(6)}
    result["rows"][4]["baselines"] |= more
    found = texts(plots.write_all(result, tmp_path, "x")[0])
    assert "Speed against eager, compile and 7 other kernels" in found and set(more) <= set(found)


def test_rows_without_bytes_have_no_place_under_the_roof():
    """Older result files do not say how many bytes a compute-bound op moves."""
    result = sample_results.ops()
    for row in result["rows"]:
        row.pop("bytes", None)
    assert len(plots.roofline(result).axes) == 1


def test_speed_and_psnr(drawn):
    found = drawn["e2e-speed-psnr"]
    assert {"eager: 1.00×, identical", "compile: 1.21×, 41.2 dB", "ours: 1.29×, 43.7 dB"} <= set(found)
    assert "ours:ops=rms_norm: 1.10×, identical" in found and "identical" in found


def test_what_equals_eager_is_at_the_top_edge():
    axes = plots.speed_psnr(sample_results.e2e()).axes[0]
    top = axes.get_ylim()[1]
    places = {round(float(line.get_xdata()[0]), 2): float(line.get_ydata()[0]) for line in axes.lines[:4]}
    assert places[1.0] == places[1.1] == top
    assert places[1.21] == 41.2 and places[1.29] == 43.7 and top > 43.7


def test_labels_do_not_cover_each_other():
    """Four points on one spot, and their labels side by side within the axes."""
    result = sample_results.e2e()
    for row in result["rows"][:4]:
        row["ratio"]["total"] = 1.0
        row["quality"] = sample_results._quality(40.0, 0.99, 1e-3)
    figure = plots.speed_psnr(result)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert not [(i, j) for i in range(4) for j in range(i) if boxes[i].overlaps(boxes[j])]
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


@pytest.mark.parametrize("name", ["roofline", "speedup_bars", "stacked_breakdown", "speed_psnr"])
def test_no_text_is_cut_off(name):
    """Names twice as long as ours still lie within the picture."""
    result = sample_results.ops() if name in ("roofline", "speedup_bars") else sample_results.e2e()
    for row in result["rows"]:
        key = "shape" if "shape" in row else "variant"
        row[key] += "-and-some-more-words" * (row[key] != "eager")
    with drawing.styled():
        figure = getattr(plots, name)(result)
        figure.draw_without_rendering()
        width, height = figure.get_size_inches() * figure.dpi
        shown = [figure._suptitle, *figure.texts, *(text for legend in figure.legends for text in legend.texts)]
        for axes in figure.axes:
            shown += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
            # A locator gives ticks past the ends too, which are not drawn.
            for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
                shown += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        assert len(shown) > 20
        for text in shown:
            box = text.get_window_extent()
            if text.get_text().strip() and text.get_visible():
                assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, text.get_text()


# Files ----------------------------------------------------------------------------------------------------------


def test_the_same_result_gives_the_same_bytes_whatever_matplotlib_is_set_to(tmp_path):
    import matplotlib

    result = sample_results.e2e()
    first = {path.name: path.read_bytes() for path in plots.write_all(result, tmp_path / "a", "x")}
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "other", "axes.facecolor": "black"}):
        second = {path.name: path.read_bytes() for path in plots.write_all(result, tmp_path / "b", "x")}
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second
    assert not any(b"<dc:date>" in data for data in first.values())


def test_a_stale_plot_is_known_by_its_digest(tmp_path):
    result = sample_results.ops()
    for path in plots.write_all(result, tmp_path, "x"):
        assert plots.plot_digest(path) == plots.digest(result)
    result["rows"][0]["seconds"] *= 1.0001
    assert plots.plot_digest(path) != plots.digest(result)


def test_the_digest_knows_content_not_order_and_the_way_of_drawing(monkeypatch):
    result = sample_results.ops()
    before = plots.digest(result)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", before)
    assert plots.digest(dict(reversed(result.items()))) == before
    monkeypatch.setattr(drawing, "DRAWING", drawing.DRAWING + 1)
    assert plots.digest(result) != before


def test_a_foreign_picture_has_no_digest(tmp_path):
    path = tmp_path / "x.svg"
    path.write_text("<svg/>")
    assert plots.plot_digest(path) is None


def test_only_whole_files_appear(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def half(self, path, **_):
        path.write_text("<svg")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        plots.write_all(sample_results.ops(), tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_measured_is_drawn(tmp_path):
    result = sample_results.e2e()
    for row in result["rows"]:
        row.pop("quality", None)
        row.pop("breakdown", None)
    assert [path.name for path in plots.write_all(result, tmp_path, "x")] == ["x-speedup.svg"]
    result["rows"] = result["rows"][:1]  # eager alone
    assert plots.write_all(result, tmp_path, "y") == []
    wrong = sample_results.ops()
    wrong["rows"] = [row for row in wrong["rows"] if "error" in row]
    assert plots.write_all(wrong, tmp_path, "z") == []


def test_a_clip_that_was_not_decoded(tmp_path):
    result = sample_results.e2e()
    for row in result["rows"][:4]:
        del row["breakdown"]["decode"], row["ratio"]["decode"], row["seconds"]["decode"]
        row["quality"] = None
    written = plots.write_all(result, tmp_path, "x")
    assert [path.name for path in written] == ["x-speedup.svg", "x-breakdown.svg"]
    assert "one denoising step" in texts(written[1]) and "decode" not in texts(written[1])


def test_a_clip_of_one_step_has_one_bar_and_no_phase_that_nobody_ran(tmp_path):
    result = sample_results.e2e()
    result["settings"] |= {"steps": 1, "decode": False}
    for row in result["rows"]:
        row.get("ratio", {}).pop("decode", None)
    found = texts(next(path for path in plots.write_all(result, tmp_path, "x") if "speedup" in path.name))
    assert "denoising step" in found and not {"decode", "whole clip"} & set(found)
    shown = [text for text in found if re.fullmatch(r"\d\.\d\d", text)]
    assert {ratio(row["ratio"]["step"]) for row in result["rows"] if "ratio" in row} - {"1.00"} <= set(shown)


def test_kinds_without_plots_are_refused(tmp_path):
    with pytest.raises(ValueOptionError, match="must be ops or e2e; got 'tuning'"):
        plots.write_all({"kind": "tuning"}, tmp_path, "x")
    with pytest.raises(ValueOptionError, match="must be e2e; got 'ops'"):
        plots.stacked_breakdown(sample_results.ops())


def test_without_matplotlib_one_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"plots need matplotlib: pip install 'pyvideo-kernels\[bench\]'"):
        plots.write_all(sample_results.ops(), tmp_path, "x")
    with pytest.raises(UnsupportedError, match="plots need matplotlib"):
        plots.speed_psnr(sample_results.e2e())

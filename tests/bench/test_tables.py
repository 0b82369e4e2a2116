"""The tables say what the results say: every number, every error, one way of writing them."""

import doctest
import io
import json

import pytest

from pyvideo_kernels.benchmarks import op_classes
from pyvideo_kernels.benchmarks.report import tables
from pyvideo_kernels.benchmarks.report.tables import (
    markdown,
    number,
    rate,
    ratio,
    rich_table,
    short_kernel,
    with_spread,
)
from pyvideo_kernels.errors import ValueOptionError

from . import sample_results

OPS_GOLDEN = r"""
| op | shape | dtype | implementation | median ms | ± | rate | of ceiling | × eager | × compile | × sdpa-cudnn 9.1 |
|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|
| rms_norm | wan-1.3b-480p | bf16 | triton | 0.100 | 0.002 | 2.60 TB/s | 87% | 5.31 | 1.24 | – |
| rms_norm | wan-14b-480p | bf16 | triton | 0.300 | 0.006 | 2.80 TB/s | 93% | 5.52 | error | – |
| qk_norm_rope | wan-1.3b-480p | bf16 | triton | 0.200 | 0.004 | 2.10 TB/s | 70% | 11.7 | 0.82 | – |
| guidance_step | wan-480p | bf16 | cuda | WRONG | – | – | – | – | – | – |
| spacetime_attention | wan-1.3b-480p | bf16 | triton | 420 | 8 | 481 TFLOP/s | 61% | 1.01 | – | 0.79 |
| causal_conv3d | wan-480p-full-96 | bf16 | triton | 50.0 | 1.0 | 330 TFLOP/s | 42% | 1.90 | – | – |
| patch_embed3d | wan-1.3b-480p | bf16 | triton | 0.0400 | 0.0008 | 160 TFLOP/s | 20% | 6.00 | – | – |

- rms_norm, wan-14b-480p, bf16: compile: BackendError: no \|kernel\|
- guidance_step, wan-480p, bf16: WRONG: guidance_step: 3 of 64 values beyond the bound
- sage was skipped: sageattention is not installed
"""

E2E_GOLDEN = r"""
| variant | step s | denoise s | decode s | total s | × eager | peak GiB | attention kernel | PSNR min dB | SSIM min | float32 error |
|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|
| eager | 1.12 | 56.0 | 2.00 | 58.0 | 1.00 | 20.0 | pytorch_flash::flash_fwd_kernel | identical | 1.0000 | 4.1e-03 |
| compile | 0.920 | 46.0 | 1.90 | 47.9 | 1.21 | 20.0 | pytorch_flash::flash_fwd_kernel | 41.2 | 0.9910 | 4.0e-03 |
| ours | 0.880 | 44.0 | 0.900 | 44.9 | 1.29 | – | cudnn_generated_fort_native_sdpa_sm90_flash_fprop | 43.7 | 0.9940 | 3.9e-03 |
| ours:ops=rms_norm | 1.01 | 50.5 | 2.00 | 52.5 | 1.10 | 20.0 | pytorch_flash::flash_fwd_kernel | identical | 1.0000 | 4.1e-03 |
| ours:attention=int8 | ERROR | – | – | – | – | – | – | – | – | – |

- ours: fell back to stock code: rms_norm, 12 calls: a LoRA is attached
- ours:attention=int8: UnsupportedError: attention='int8' is not built for sm_90
"""  # noqa: E501


def test_ops_golden():
    assert markdown(sample_results.ops()) == OPS_GOLDEN.lstrip("\n")


def test_e2e_golden():
    assert markdown(sample_results.e2e()) == E2E_GOLDEN.lstrip("\n")


@pytest.mark.parametrize("result", [sample_results.ops(), sample_results.e2e()], ids=["ops", "e2e"])
def test_the_terminal_shows_the_same_cells(result):
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=240).print(rich_table(result))
    shown = " ".join(out.getvalue().split())
    made = tables.table(result)
    for row in made.rows:
        assert " ".join(" ".join(row).split()) in shown
    for note in made.notes:
        assert note in shown


def test_a_narrow_terminal_keeps_the_numbers_whole():
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=110).print(rich_table(sample_results.ops()))
    assert "481 TFLOP/s" in out.getvalue() and "0.0008" in out.getvalue()


def test_what_is_not_there_is_a_dash():
    """A clip that was not decoded has neither quality nor memory on a CPU."""
    result = sample_results.e2e()
    row = result["rows"][1]
    row["quality"] = row["peak_memory_bytes"] = None
    row["attention"] = {"self": [], "cross": []}
    del row["seconds"]["decode"], row["ratio"]["decode"]
    line = markdown(result).splitlines()[3]
    assert line == "| compile | 0.920 | 46.0 | – | 47.9 | 1.21 | – | – | – | – | – |"


def test_a_result_survives_its_file():
    result = sample_results.e2e()
    assert markdown(json.loads(json.dumps(result))) == markdown(result)


def test_a_reason_that_holds_for_some_ops_names_them():
    result = sample_results.ops()
    for row, why in zip(result["rows"], ("no graph", "no graph", None), strict=False):
        row["baselines"]["compile"] = {"skipped": why} if why else row["baselines"]["compile"]
    assert "- compile was skipped for rms_norm: no graph" in markdown(result).splitlines()


def test_ops_without_any_measured_row():
    result = sample_results.ops()
    result["rows"] = [row for row in result["rows"] if "error" in row]
    assert "| WRONG | – | – | – |" in markdown(result)


def test_kinds_without_a_table_are_refused():
    with pytest.raises(ValueOptionError, match="must be ops or e2e; got 'tuning'"):
        markdown({"kind": "tuning", "rows": []})


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012345, "0.0123"), (0.9996, "1.00"), (9.999, "10.0"), (99.96, "100"), (12345.6, "12346"),
     (-1.5, "-1.50"), (float("inf"), "inf"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_spreads_have_the_decimals_of_their_median():
    assert with_spread(0.0026301, 0.000046, 1e3) == ("2.63", "0.05")
    assert with_spread(0.420, 0.0084, 1e3) == ("420", "8")
    assert with_spread(1.5, 0.0001) == ("1.50", "<0.01")
    assert with_spread(1.5, 0.0) == ("1.50", "0.00")
    assert with_spread(0.42, 1e-4, 1e3) == ("420", "<1")


def test_rates_and_ratios():
    assert rate(3.1e12, "B/s") == "3.10 TB/s" and rate(2.8e10, "B/s") == "28.0 GB/s"
    assert rate(4.8e14, "FLOP/s") == "480 TFLOP/s" and rate(4e11, "FLOP/s") == "400 GFLOP/s"
    assert [ratio(x) for x in (0.8023, 1.0, 9.994, 9.996, 24.03)] == ["0.80", "1.00", "9.99", "10.0", "24.0"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (sample_results.FLASH, "pytorch_flash::flash_fwd_kernel"),
        (sample_results.CUDNN, "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::C<1> > > >(P)",
         "flash::FlashAttnFwdSm90"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(P)",
         "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
         "fmha_cutlassF_bf16_aligned_64x128_rf_sm80"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 4>(float*)",
         "at::native::CatArrayBatchedCopy"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu"),
        ("_spacetime_attention_fwd_kernel", "_spacetime_attention_fwd_kernel"),
    ],
)  # fmt: skip
def test_kernel_names_are_cut_to_what_tells_them_apart(name, short):
    assert short_kernel(name) == short


def test_markdown_keeps_text_text():
    result = sample_results.ops()
    result["rows"][0]["impl"] = "a|b *c* <d> _e_ f_g"
    assert r"| a\|b \*c\* \<d\> \_e\_ f_g |" in markdown(result)


def test_long_errors_are_cut_to_one_line():
    result = sample_results.ops()
    result["rows"][3]["error"] = "first line\nsecond " + "x" * 1000
    (note,) = [line for line in markdown(result).splitlines() if "WRONG:" in line]
    assert "first line second xxx" in note and note.endswith("…") and len(note) < 400


def test_the_machine_and_the_clip_in_a_line():
    assert tables.machine(sample_results.e2e()) == "Imaginary GPU"
    assert (
        tables.machine({"provenance": {"device": "cpu", "cpu": "Some CPU", "threads": 1}}) == "Some CPU, 1 thread (CPU)"
    )
    line = "wan2.1-1.3b with random weights, 480×832, 81 frames, 50 steps, bf16"
    assert tables.clip(sample_results.e2e()["settings"]) == line


@pytest.mark.parametrize("module", [tables, op_classes], ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_examples_in_the_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0

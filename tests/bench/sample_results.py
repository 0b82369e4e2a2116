"""Small results in the schema of `pyvideo_kernels.benchmarks.results`, with one of everything that a reader must see.

The numbers are made up and the machine says so.
"""

import copy

PROVENANCE = {
    "device": "cuda",
    "arch": "sm_90",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "python": "3.12.3",
    "pyvideo_kernels": "0.1.0",
    "diffusers": "0.42.1",
    "date": "2026-01-01",
    "revision": "0123456",
    "dirty": False,
    "gpu": "Imaginary GPU",
    "driver": "1.2",
    "clock_sm": 1000,
}


def _op(op, shape, seconds, rate, unit, share, baselines, impl="triton", **more):
    return {
        "op": op,
        "shape": shape,
        "dtype": "bfloat16",
        "impl": impl,
        "seconds": seconds,
        "spread": seconds / 50,
        "rounds": 7,
        "graph": True,
        "bytes": 1 << 28,
        "flops": 0.0,
        "rate": rate,
        "unit": unit,
        "share_of_ceiling": share,
        "baselines": baselines,
        **more,
    }


def _baseline(ours, ratio, **more):
    return {"seconds": ours * ratio, "spread": ours / 40, "graph": False, "ratio": ratio, **more}


def ops():
    """Memory-bound and compute-bound rows, a wrong row, a baseline that raised and one that is not installed."""
    skipped = {"skipped": "sageattention is not installed"}
    rows = [
        _op("rms_norm", "wan-1.3b-480p", 1e-4, 2.6e12, "B/s", 0.87,
            {"eager": _baseline(1e-4, 5.31), "compile": _baseline(1e-4, 1.24)}),
        _op("rms_norm", "wan-14b-480p", 3e-4, 2.8e12, "B/s", 0.93,
            {"eager": _baseline(3e-4, 5.52), "compile": {"error": "BackendError: no |kernel|"}}),
        _op("qk_norm_rope", "wan-1.3b-480p", 2e-4, 2.1e12, "B/s", 0.70,
            {"eager": _baseline(2e-4, 11.7), "compile": _baseline(2e-4, 0.82)}),
        {"op": "guidance_step", "shape": "wan-480p", "dtype": "bfloat16", "impl": "cuda",
         "error": "guidance_step: 3 of 64 values beyond the bound"},
        _op("spacetime_attention", "wan-1.3b-480p", 0.42, 4.81e14, "FLOP/s", 0.61,
            {"eager": _baseline(0.42, 1.01), "sdpa-cudnn": _baseline(0.42, 0.79, version="9.1"), "sage": skipped},
            impl="triton", flops=2.0e14, bytes=400 << 20),
        _op("causal_conv3d", "wan-480p-full-96", 0.05, 3.3e14, "FLOP/s", 0.42,
            {"eager": _baseline(0.05, 1.9)}, flops=1.65e13, bytes=6 << 30),
        _op("patch_embed3d", "wan-1.3b-480p", 4e-5, 1.6e14, "FLOP/s", 0.2,
            {"eager": _baseline(4e-5, 6.0)}, flops=6.4e9, bytes=110 << 20),
    ]  # fmt: skip
    return copy.deepcopy({
        "schema": 1,
        "kind": "ops",
        "provenance": PROVENANCE,
        "settings": {"dtype": "bfloat16", "rounds": 7},
        "ceilings": {"copy": 3.0e12, "gemm": 7.9e14},
        "rows": rows,
    })  # fmt: skip


def _variant(variant, step, decode, *, classes, decoder, kernel, quality=None, peak=20 << 30):
    timings = {"step": step, "denoise": 50 * step, "decode": decode, "total": 50 * step + decode}
    base = {"step": 1.12, "denoise": 56.0, "decode": 2.0, "total": 58.0}
    return {
        "variant": variant,
        "accelerate": None if variant in ("eager", "compile") else {"attention": "dense"},
        "compile": "compile" in variant,
        "seconds": {name: {"median": value, "spread": value / 100} for name, value in timings.items()}
        | {"first": 60.0},
        "peak_memory_bytes": peak,
        "ratio": {name: base[name] / value for name, value in timings.items()},
        "breakdown": {
            "denoise": {"wall": sum(classes.values()), "classes": classes},
            "decode": {"wall": sum(decoder.values()), "classes": decoder},
        },
        "attention": {"self": [kernel], "cross": [kernel]},
        "quality": quality,
        "calls": {},
        "fallbacks": {},
    }


def _quality(psnr, ssim, error):
    return {
        "max_error": 0.0 if psnr is None else 0.1,
        "identical": psnr is None,
        "psnr": {"mean": psnr and psnr + 1, "min": psnr},
        "ssim": {"mean": ssim, "min": ssim},
        "frames": [],
        "float32_error": error,
        "eager_float32_error": 4.1e-3,
    }


CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
FLASH = (
    "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, "
    "cutlass::bfloat16_t>, false, false>(pytorch_flash::Flash_fwd_params)"
)


def e2e():
    """Eager, a variant equal to it, two that are close, and one that could not run."""

    def classes(pointwise, attention=0.52, gaps=0.01):
        return {"self-attention": attention, "cross-attention": 0.03, "gemm": 0.26, "norm/modulation/rope": pointwise,
                "other": 0.004, "launch gaps": gaps}  # fmt: skip

    def decoder(conv, rest):
        return {"vae conv": conv, "vae other": rest, "self-attention": 0.01, "gemm": 0.01, "other": 0.0,
                "launch gaps": 0.05}  # fmt: skip

    rows = [
        _variant("eager", 1.12, 2.0, classes=classes(0.296), decoder=decoder(0.9, 1.03), kernel=FLASH,
                 quality=_quality(None, 1.0, 4.1e-3)),
        _variant("compile", 0.92, 1.9, classes=classes(0.096), decoder=decoder(0.9, 0.93), kernel=FLASH,
                 quality=_quality(41.2, 0.991, 4.0e-3)),
        _variant("ours", 0.88, 0.9, classes=classes(0.06), decoder=decoder(0.62, 0.21), kernel=CUDNN,
                 quality=_quality(43.7, 0.994, 3.9e-3), peak=None),
        _variant("ours:ops=rms_norm", 1.01, 2.0, classes=classes(0.19), decoder=decoder(0.9, 1.03), kernel=FLASH,
                 quality=_quality(None, 1.0, 4.1e-3)),
        {"variant": "ours:attention=int8", "accelerate": {"attention": "int8"}, "compile": False,
         "error": "UnsupportedError: attention='int8' is not built for sm_90"},
    ]  # fmt: skip
    rows[2]["fallbacks"] = {"rms_norm": {"a LoRA is attached": 12}}
    return copy.deepcopy({
        "schema": 1,
        "kind": "e2e",
        "provenance": PROVENANCE,
        "settings": {"model": "wan2.1-1.3b", "weights": "random", "pipeline": "WanPipeline", "height": 480,
                     "width": 832, "frames": 81, "steps": 50, "guidance": 5.0, "dtype": "bfloat16", "seed": 0,
                     "rounds": 3, "prompt": "a ball", "tokens": 32760},
        "ceilings": {"copy": 3.0e12, "gemm": 7.9e14},
        "rows": rows,
    })  # fmt: skip

"""Where the time goes: every op has a class, the classes add up to the wall, and attention is named."""

from types import SimpleNamespace

import pytest
import torch

import pyvideo_kernels as pv
from pyvideo_kernels.benchmarks import op_classes, profile
from pyvideo_kernels.benchmarks.op_classes import kernel_kind, op_kind
from pyvideo_kernels.benchmarks.profile import CpuEvent, DeviceEvent, Trace, account, nest, shares, trace_of
from pyvideo_kernels.errors import UnsupportedError, ValueOptionError
from pyvideo_kernels.schemas import OPS

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FLASH = "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 64>>(P)"
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
NVJET = "nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT"
FPROP = "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1"
ELEMENTWISE = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>"
)


class Recorder:
    """Builds a GPU's trace: an op with its parents, and the kernels that it launched, in milliseconds."""

    def __init__(self):
        self.ops, self.kernels, self.clock = [], [], 0.0

    def op(self, *names, shapes=()):
        """Nested ops, outermost first; ``shapes`` are those of all of them."""
        start, self.clock = self.clock, self.clock + 100.0
        for depth, name in enumerate(names):
            self.ops.append(CpuEvent(name, start + depth, 100.0 - 2 * depth, shapes))
        self.last = self.ops[-1]
        return self

    def kernel(self, name, start, duration, stream=7, launched=True):
        self.kernels.append(DeviceEvent(name, start, duration, self.last if launched else None, stream))
        return self

    def account(self, phase="denoise", wall=100.0, **kwargs):
        nest(self.ops)
        return account(Trace(wall, self.ops, self.kernels), phase, **kwargs)


def positive(result):
    return {name: seconds for name, seconds in result["classes"].items() if seconds}


# Tables -------------------------------------------------------------------------------------------------------------


def test_every_op_of_ours_has_a_kind():
    assert {name for name in OPS if not name.endswith("_backward")} == set(op_classes.PYVIDEO_KINDS)
    for name in OPS:
        assert op_kind(f"pyvideo::{name}") in ("attention", "gemm", "conv", "pointwise"), name
    assert op_kind("pyvideo::no_such_op") is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("attention", "aten::scaled_dot_product_attention"),
        ("attention", "aten::_scaled_dot_product_cudnn_attention"),
        ("attention", "aten::_scaled_dot_product_fused_attention_overrideable"),
        ("attention", "aten::_efficient_attention_forward"),
        ("attention", "flash_attn::_flash_attn_forward"),
        ("attention", "flash_attn_3::fwd"),
        ("attention", "_diffusers_flash_attn_3::_flash_attn_forward"),
        ("attention", "xformers::efficient_attention_forward_cutlass"),
        ("attention", "xformers_flash::flash_fwd"),
        ("attention", "sageattention_qattn_sm80::qk_int8_sv_f16_accum_f32_attn"),
        ("attention", "triton_tem_fused_flex_attention_0"),
        ("gemm", "aten::mm"),
        ("gemm", "aten::addmm"),
        ("gemm", "aten::bmm"),
        ("gemm", "aten::linear"),
        ("gemm", "aten::_scaled_mm"),
        ("gemm", "aten::mkldnn_linear"),
        ("gemm", "mkldnn::_linear_pointwise"),
        ("gemm", "triton_tem_fused_addmm_gelu_3"),
        ("conv", "aten::convolution"),
        ("conv", "aten::cudnn_convolution"),
        ("conv", "aten::mkldnn_convolution"),
        ("conv", "aten::slow_conv3d_forward"),
        ("conv", "triton_tem_fused_convolution_2"),
        ("pointwise", "triton_poi_fused_mm_scaled_dot_product_attention_1"),
        ("pointwise", "cpp_fused_native_layer_norm_mul_0"),
        ("transfer", "aten::_local_scalar_dense"),
        ("transfer", "aten::normal_"),
        ("bookkeeping", "aten::view"),
        ("bookkeeping", "aten::empty_strided"),
        ("transfer", "aten::_linalg_solve_ex"),
        (None, "aten::linalg_vector_norm"),
        (None, "aten::mul"),
        (None, "aten::linear_something"),
        (None, "aten::native_layer_norm"),
        (None, "Torch-Compiled Region: 0/0"),
    ],
)
def test_ops_are_recognised(kind, name):
    assert op_kind(name) == kind


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("attention", FLASH),
        ("attention", CUDNN),
        ("attention", "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::C>>>(P)"),
        (
            "attention",
            "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
        ),
        ("attention", "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__0"),
        ("attention", "qk_int8_sv_f16_accum_f32_attn_kernel"),
        ("attention", "triton_tem_fused_flex_attention_0"),
        ("attention", "_spacetime_attention_descriptor_fwd_kernel"),
        ("gemm", NVJET),
        ("gemm", "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN"),
        ("gemm", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_execute_kernel"),
        ("gemm", "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(P)"),
        ("gemm", "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn"),
        ("gemm", "void cublasLt::splitKreduce_kernel<32, 16, int, float>(...)"),
        ("gemm", "triton_tem_fused_mm_0"),
        ("gemm", "_patch_embed3d_fwd_kernel"),
        ("conv", FPROP),
        ("conv", "void implicit_convolveNd_sgemm<float, 3, 1024, 5, 5, 3, 3, 3, 1, true, false, true>(...)"),
        ("conv", "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>(...)"),
        ("conv", "void at::native::vol2col_kernel<float>(long, float const*, int)"),
        ("conv", "_causal_conv3d_descriptor_fwd_kernel"),
        ("pointwise", ELEMENTWISE),
        ("pointwise", "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int)"),
        ("pointwise", "void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>(...)"),
        ("pointwise", "triton_red_fused__to_copy_add_mul_native_layer_norm_0"),
        ("pointwise", "_gate_residual_norm_modulate_fwd_kernel"),
        ("pointwise", "_rms_norm_silu_fwd_kernel"),
        ("pointwise", "_final_layer_two_loops_fwd_kernel"),
        ("pointwise", "_fold_modulation_kernel"),
        ("pointwise", "void pyvideo::guidance_step_kernel<__nv_bfloat16>(...)"),
        ("pointwise", "Memcpy DtoD (Device -> Device)"),
        ("pointwise", "Memset (Device)"),
        ("transfer", "Memcpy HtoD (Pageable -> Device)"),
        ("transfer", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"),
        ("transfer", "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4>"),
        (None, "somebodys_secret"),
    ],
)
def test_kernels_are_recognised_by_name(kind, name):
    assert kernel_kind(name) == kind


def test_every_kernel_of_ours_is_recognised_by_name():
    """Read from the sources: a graph replays them without their op."""
    import re
    from pathlib import Path

    root = Path(__file__).parents[2]
    found = {
        name
        for path in [*root.glob("kernels/*.py"), *root.glob("csrc/**/*.cuh")]
        for name in re.findall(r"^def (_\w+_kernel)\(|^(?:__global__ .*\n)?(\w+_kernel)\(", path.read_text(), re.M)
        for name in name
        if name
    }
    assert len(found) >= 20
    assert {name for name in found if kernel_kind(name) is None} == set()
    assert {kernel_kind(name) for name in found if "attention" in name} == {"attention"}
    assert {kernel_kind(name) for name in found if "conv3d" in name} == {"conv"}


@pytest.mark.parametrize(
    ("op", "shapes", "cross"),
    [
        ("aten::scaled_dot_product_attention", [[2, 12, 32760, 128]] * 3 + [[]], False),
        ("aten::scaled_dot_product_attention", [[2, 12, 32760, 128], [2, 12, 512, 128], [2, 12, 512, 128], []], True),
        ("aten::_scaled_dot_product_cudnn_attention", [[2, 12, 64, 128], [2, 2, 64, 128], [2, 2, 64, 128]], False),
        ("pyvideo::spacetime_attention", [[1, 4096, 12, 128], [1, 4096, 4, 128], [1, 4096, 4, 128]], False),
        ("flash_attn::_flash_attn_forward", [[1, 4096, 12, 128], [1, 77, 12, 128], [1, 77, 12, 128]], True),
        ("flash_attn::_flash_attn_varlen_forward", [[4096, 12, 128], [77, 12, 128], [77, 12, 128]], True),
        ("aten::scaled_dot_product_attention", [], False),
    ],
)  # fmt: skip
def test_self_and_cross_attention_are_told_apart_by_lengths(op, shapes, cross):
    assert op_classes.is_cross(op, shapes) is cross


# The account ---------------------------------------------------------------------------------------------------------


def test_kernels_count_under_the_op_that_launched_them():
    self_shapes = [[2, 12, 64, 128]] * 3
    cross_shapes = [[2, 12, 64, 128], [2, 12, 8, 128], [2, 12, 8, 128]]
    r = Recorder()
    sdpa = "aten::scaled_dot_product_attention"
    r.op("aten::linear", "aten::addmm").kernel(NVJET, 0, 10)
    r.op(sdpa, "aten::_scaled_dot_product_cudnn_attention", shapes=self_shapes).kernel(CUDNN, 10, 30)
    r.op(sdpa, "aten::_scaled_dot_product_flash_attention", shapes=cross_shapes).kernel(FLASH, 40, 5)
    r.op("aten::layer_norm", "aten::native_layer_norm").kernel("vectorized_layer_norm_kernel", 45, 7)
    r.op("pyvideo::rms_norm").kernel("_rms_norm_fwd_kernel", 52, 1)
    r.op("aten::to", "aten::_to_copy", "aten::copy_").kernel("Memcpy HtoD (Pageable -> Device)", 53, 2)
    r.op("aten::conv3d", "aten::convolution", "aten::cudnn_convolution").kernel(FPROP, 55, 4)
    result = r.account(wall=80.0)
    assert positive(result) == pytest.approx(
        {"gemm": 14, "self-attention": 30, "cross-attention": 5, "norm/modulation/rope": 8, "other": 2,
         "launch gaps": 21}
    )  # fmt: skip
    assert result["attention"] == {"self": [CUDNN], "cross": [FLASH]}
    assert result["kernels"][0] == {"name": CUDNN, "seconds": 30, "calls": 1, "class": "self-attention"}
    assert sum(result["classes"].values()) == pytest.approx(result["wall"]) == 80.0


def test_the_decoder_has_classes_of_its_own():
    r = Recorder()
    r.op("aten::conv3d", "aten::cudnn_convolution").kernel("nchwToNhwcKernel", 0, 2).kernel(FPROP, 2, 20)
    r.op("pyvideo::causal_conv3d").kernel("_causal_conv3d_fwd_kernel", 22, 8)
    r.op("pyvideo::rms_norm_silu").kernel("_rms_norm_silu_fwd_kernel", 30, 3)
    r.op("aten::silu").kernel(ELEMENTWISE, 33, 4)
    r.op("aten::conv2d", "aten::convolution", "aten::bmm").kernel(NVJET, 37, 1)  # a 1x1 convolution as a product
    r.op("aten::scaled_dot_product_attention", shapes=[[4, 1, 60, 384]] * 3).kernel(FLASH, 38, 2)
    result = r.account("decode", wall=40.0)
    assert positive(result) == pytest.approx({"vae conv": 31, "vae other": 7, "self-attention": 2})
    assert list(result["classes"]) == list(op_classes.PHASES["decode"])


def test_unfused_attention_is_attention_down_to_its_softmax():
    shapes = [[1, 2, 64, 16]] * 3
    math = ("aten::scaled_dot_product_attention", "aten::_scaled_dot_product_attention_math")
    r = Recorder()
    r.op(*math, "aten::matmul", "aten::bmm", shapes=shapes).kernel(NVJET, 0, 10)
    r.op(*math, "aten::softmax", "aten::_softmax", shapes=shapes).kernel("softmax_warp_forward", 10, 20)
    r.op(*math, "aten::mul", shapes=shapes).kernel(ELEMENTWISE, 30, 1)
    result = r.account(wall=31.0)
    assert positive(result) == pytest.approx({"self-attention": 31})
    assert result["attention"]["self"] == ["softmax_warp_forward", NVJET, ELEMENTWISE]


def test_time_of_overlapping_streams_is_shared_and_counted_once():
    r = Recorder()
    r.op("aten::mm").kernel(NVJET, 0, 10, stream=7)
    r.op("aten::mul").kernel(ELEMENTWISE, 5, 10, stream=8)  # alone from 10 on
    result = r.account(wall=20.0)
    assert positive(result) == pytest.approx({"gemm": 7.5, "norm/modulation/rope": 7.5, "launch gaps": 5})


def test_replayed_graphs_count_by_the_kernels_names():
    """No op, or the compiled graph's annotation alone, is what launched them."""
    r = Recorder()
    r.op("Torch-Compiled Region: 0/0", "## Call CompiledFxGraph fabc ##")
    for launched in (False, True):
        at = 50 * launched
        r.kernel(NVJET, at, 10, launched=launched).kernel(CUDNN, at + 10, 20, launched=launched)
        r.kernel("triton_poi_fused_mm_1", at + 30, 5, launched=launched)
        r.kernel("somebodys_secret", at + 40, 1, launched=launched)
    result = r.account(wall=100.0)
    assert positive(result) == pytest.approx(
        {"gemm": 20, "self-attention": 40, "norm/modulation/rope": 10, "other": 2, "launch gaps": 28}
    )
    assert result["attention"] == {"self": [CUDNN], "cross": []}


def test_compiled_code_counts_by_what_its_kernels_are():
    region = ("Torch-Compiled Region: 0/0", "## Call CompiledFxGraph fabc ##")
    flex = [[1, 2, 64, 16], [1, 2, 64, 16], [1, 2, 64, 16]]
    r = Recorder()
    r.op(*region, "aten::mm").kernel(NVJET, 0, 10)
    r.op(*region, "triton_red_fused_native_layer_norm_0").kernel("triton_red_fused_native_layer_norm_0", 10, 4)
    r.op(*region, "triton_tem_fused_addmm_1").kernel("triton_tem_fused_addmm_1", 14, 6)
    r.op(*region, "triton_tem_fused_flex_attention_2", shapes=flex).kernel("triton_tem_fused_flex_attention_2", 20, 9)
    r.op(*region, "pyvideo::qk_norm_rope").kernel("_qk_norm_rope_fwd_kernel", 29, 1)
    assert positive(r.account(wall=30.0)) == pytest.approx({"gemm": 16, "norm/modulation/rope": 5, "self-attention": 9})


def test_unknown_kernels_of_known_torch_ops_are_elementwise_and_of_nobody_other():
    r = Recorder()
    r.op("aten::cumsum").kernel("somebodys_secret", 0, 3)
    r.kernel("somebodys_secret", 3, 4, launched=False)
    assert positive(r.account(wall=7.0)) == pytest.approx({"norm/modulation/rope": 3, "other": 4})


def test_kernels_longer_than_the_unprofiled_wall_leave_no_negative_gap():
    result = Recorder().op("aten::mm").kernel(NVJET, 0, 10).account(wall=9.0)
    assert result["wall"] == 10 and result["classes"]["launch gaps"] == 0


def test_only_the_longest_kernels_are_listed():
    r = Recorder().op("aten::mm")
    for i in range(30):
        r.kernel(f"gemm_{i}", i, 0.5 + i / 100)
    found = r.account(top=5)["kernels"]
    assert [row["name"] for row in found] == [f"gemm_{i}" for i in (29, 28, 27, 26, 25)]


def test_shares_add_up_to_the_union():
    found = shares([(0, 4, 1), (2, 6, 2), (2, 6, 2), (8, 9, 1), (9, 9, 3)])
    assert found == pytest.approx({1: 2 + 2 / 3 + 1, 2: 2 * (2 / 3) + 2})
    assert sum(found.values()) == pytest.approx(7)


def test_cpu_time_is_each_ops_own_and_python_is_the_gap():
    shapes = [[1, 2, 6, 8], [1, 2, 3, 8], [1, 2, 3, 8]]
    events = nest([
        CpuEvent("user range", 0, 100),
        CpuEvent("aten::linear", 0, 30), CpuEvent("aten::t", 2, 3), CpuEvent("aten::addmm", 6, 22),
        CpuEvent("aten::scaled_dot_product_attention", 40, 20, shapes),
        CpuEvent("aten::_scaled_dot_product_flash_attention_for_cpu", 42, 16, shapes), CpuEvent("aten::empty", 43, 2),
        CpuEvent("aten::mul", 65, 5), CpuEvent("aten::empty", 66, 1),
        CpuEvent("aten::view", 75, 2),
        CpuEvent("aten::mul", 66, 8, thread=2),
    ])  # fmt: skip
    result = account(Trace(100.0, events), "denoise")
    # Two threads in elementwise ops from 66 to 70: half each, the same class.
    assert positive(result) == pytest.approx(
        {"gemm": 30, "cross-attention": 20, "norm/modulation/rope": 9, "other": 2, "launch gaps": 39}
    )
    backend = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert result["attention"] == {"self": [], "cross": [backend]}
    assert {"name": backend, "seconds": 20, "calls": 1, "class": "cross-attention"} in result["kernels"]


def test_a_phase_that_does_not_exist_is_refused():
    with pytest.raises(ValueOptionError, match="denoise or decode; got 'encode'"):
        account(Trace(1.0, []), "encode")
    with pytest.raises(ValueOptionError, match="got 'encode'"):
        profile.breakdown(lambda: pytest.fail("ran"), phase="encode", device="cpu")
    with pytest.raises(UnsupportedError, match="must be cuda or cpu; got mps"):
        profile.breakdown(lambda: pytest.fail("ran"), phase="denoise", device="mps")


# The adapter --------------------------------------------------------------------------------------------------------


def raw(name, start, duration, *, device="CPU", correlation=0, linked=0, shapes=(), annotation=False, thread=1):
    """An event as the profiler has it."""
    values = {
        "name": name, "start_ns": 1_795_000_000_000_000_000 + start, "duration_ns": duration,
        "device_type": getattr(torch.autograd.DeviceType, device), "correlation_id": correlation,
        "linked_correlation_id": linked, "shapes": list(shapes), "is_user_annotation": annotation, "is_async": False,
        "start_thread_id": thread, "device_resource_id": 7,
    }  # fmt: skip
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_raw_gpu_events_become_a_trace():
    events = [
        raw("aten::linear", 0, 1000, correlation=1),
        raw("aten::addmm", 100, 800, correlation=2, shapes=[[4], [8, 8]]),
        raw("cudaLaunchKernel", 200, 100, correlation=77, linked=2),
        raw("cudaDeviceSynchronize", 2000, 100, correlation=2),  # a number of the runtime's own series
        raw("[memory]", 0, 0, correlation=2),
        raw(NVJET, 5000, 3000, device="CUDA", correlation=77, linked=2),
        raw("ProfilerStep#1", 0, 9000, device="CUDA", annotation=True),
        raw(CUDNN, 8000, 500, device="CUDA", correlation=78),
    ]
    trace = trace_of(events, 1e-5, CUDA)
    assert [event.name for event in trace.cpu] == ["aten::linear", "aten::addmm"]
    gemm, replayed = trace.device
    assert [event.name for event in gemm.launcher.chain()] == ["aten::addmm", "aten::linear"]
    assert gemm.launcher.shapes == [[4], [8, 8]]
    assert gemm.duration == pytest.approx(3e-6) and replayed.launcher is None
    assert positive(account(trace, "denoise")) == pytest.approx(
        {"gemm": 3e-6, "self-attention": 5e-7, "launch gaps": 6.5e-6}
    )


def test_a_gpu_trace_without_kernels_is_refused(monkeypatch):
    """Rather than shown as nothing but gaps."""
    monkeypatch.setattr(profile, "trace_of", lambda *_: Trace(1.0, [], []))
    monkeypatch.setattr(profile, "_synchronize", lambda _: None)
    with pytest.raises(UnsupportedError, match="saw no kernel"):
        profile.record(lambda: None, CPU)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("diffusers", reason="the model is diffusers'")
    from ..integrations.helpers import inputs, tiny

    return tiny(layers=2), inputs()


def run(model):
    net, arguments = model
    with torch.inference_mode():
        return net(**arguments)


def counted(result, name):
    return sum(row["calls"] for row in result["kernels"] if row["name"] == name)


def test_a_real_model_in_eager_and_accelerated(model):
    run(model)
    eager = profile.breakdown(lambda: run(model), phase="denoise", device="cpu", top=1000)
    report = pv.accelerate(model[0])
    try:
        run(model)
        ours = profile.breakdown(lambda: run(model), phase="denoise", device="cpu", top=1000)
    finally:
        pv.restore(model[0])
    assert report.calls()
    backend = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for result in (eager, ours):
        classes = result["classes"]
        assert sum(classes.values()) == pytest.approx(result["wall"], rel=0.01)
        assert set(classes) == set(op_classes.PHASES["denoise"]) and all(value > 0 for value in classes.values())
        assert result["attention"] == {"self": [backend], "cross": [backend]}
        assert counted(result, backend) == 4  # self and cross in two layers
    # Patches are embedded by a product instead of a convolution; two feed-forward networks begin with a fused one.
    assert counted(ours, "aten::addmm") == counted(eager, "aten::addmm") + 1 - 2 > 10
    assert counted(ours, "mkldnn::_linear_pointwise") == counted(eager, "aten::gelu") - 1 == 2
    assert {row["class"] for row in eager["kernels"] if row["name"] == "aten::mkldnn_convolution"} == {"gemm"}
    assert not [row for row in eager["kernels"] if row["name"].startswith("pyvideo::")]
    found = {row["name"]: row["class"] for row in ours["kernels"] if row["name"].startswith("pyvideo::")}
    assert found["pyvideo::qk_norm_rope"] == "norm/modulation/rope" and found["pyvideo::patch_embed3d"] == "gemm"
    assert found["pyvideo::linear_gelu"] == "gemm"


def test_a_compiled_function_on_the_cpu():
    @torch.compile
    def block(x, weight):
        x = torch.nn.functional.layer_norm(x, x.shape[-1:]) * 2 + 1
        return torch.nn.functional.gelu(x @ weight)

    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    with torch.inference_mode():
        block(x, weight)
        result = profile.breakdown(lambda: block(x, weight), phase="denoise", device="cpu")
    assert sum(result["classes"].values()) == pytest.approx(result["wall"], rel=0.01)
    assert result["classes"]["gemm"] > 0 and result["classes"]["norm/modulation/rope"] > 0
    assert any(row["name"].startswith("## Call CompiledFxGraph") for row in result["kernels"])


@pytest.fixture(scope="module")
def gpu_block():
    """A call with a kernel of every kind, in bf16."""
    torch.manual_seed(0)
    x, weight, context = (torch.randn(1, n, 1024, device="cuda", dtype=torch.bfloat16) for n in (2048, 1024, 77))
    video = torch.randn(1, 32, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    filters = torch.randn(32, 32, 3, 3, 3, device="cuda", dtype=torch.bfloat16)

    def heads(tokens):
        return tokens.view(1, -1, 8, 128).transpose(1, 2)

    def call():
        with torch.inference_mode():
            y = torch.nn.functional.layer_norm(x, x.shape[-1:]) @ weight[0]
            q, k = heads(y), heads(context)
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            z = torch.nn.functional.scaled_dot_product_attention(q, k, k)
            return y + z, torch.nn.functional.silu(torch.nn.functional.conv3d(video, filters, padding=1))

    for _ in range(3):
        call()
    return call


@pytest.mark.gpu
def test_a_gpu(gpu_block):
    """What the ops say of this card's kernels, their names say too: a replayed graph has nothing else."""
    for phase in op_classes.PHASES:
        result = profile.breakdown(gpu_block, phase=phase, device="cuda", top=1000)
        classes = result["classes"]
        assert sum(classes.values()) == pytest.approx(result["wall"], rel=0.01) and classes["launch gaps"] >= 0
        assert classes["gemm"] > 0 and classes["self-attention"] > 0 and classes["other"] == 0
        assert all(kernel_kind(row["name"]) is not None for row in result["kernels"]), result["kernels"]
        assert (
            kernel_kind(result["attention"]["self"][0]) == kernel_kind(result["attention"]["cross"][0]) == "attention"
        )
    assert classes["vae conv"] > 0 and classes["vae other"] > 0
    kinds = {kernel_kind(row["name"]) for row in result["kernels"] if row["class"] == "vae conv"}
    assert "conv" in kinds


@pytest.mark.gpu
def test_a_replayed_graph_on_a_gpu(gpu_block):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu_block()
    graph.replay()
    eager = profile.breakdown(gpu_block, phase="decode", device="cuda")["classes"]
    replayed = profile.breakdown(graph.replay, phase="decode", device="cuda")["classes"]
    for name in ("gemm", "self-attention", "vae conv", "vae other"):
        assert replayed[name] == pytest.approx(eager[name], rel=0.5), (name, eager, replayed)

"""Random pipelines, small enough to sample in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = "a red green blue ball square moves left right on black gray background".split()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def transformer(**overrides: Any) -> Any:
    from diffusers import WanTransformer3DModel

    config: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**(config | overrides))


def components(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    words = tokenizer()
    text = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.0, 0.8, 1.2, 0.9],
    )  # fmt: skip
    # A fresh decoder paints everything one gray; make the pictures worth comparing.
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(20)
    return {
        "tokenizer": words,
        "text_encoder": UMT5EncoderModel(text).eval(),
        "vae": vae.eval(),
        "transformer": transformer(**overrides).eval(),
        "scheduler": UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    }


def wan(**options: Any) -> Any:
    """A text-to-video pipeline; ``boundary_ratio`` adds a second expert, ``expand_timesteps`` makes a TI2V."""
    from diffusers import WanPipeline

    parts = components()
    if "boundary_ratio" in options:
        parts["transformer_2"] = transformer().eval()
    pipe = WanPipeline(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: Any, path: Path) -> Path:
    pipe.save_pretrained(path, safe_serialization=True)
    return path

"""The modules of the embedded pipeline, at random initialisation.

diffusers and transformers are imported by the functions that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .grammar import vocabulary

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

Z_DIM = 12
TEXT_DIM = 64
FLOW_SHIFT = 3.0
MAX_PROMPT_TOKENS = 12
PIPELINE_PROMPT_TOKENS = 512
"""Length to which ``WanPipeline`` pads the prompt embedding by default."""

TRANSFORMER: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": Z_DIM,
    "out_channels": Z_DIM,
    "text_dim": TEXT_DIM,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 128,
}

VAE: dict[str, Any] = {
    "base_dim": 16,
    "decoder_base_dim": 16,
    "z_dim": Z_DIM,
    "dim_mult": [1, 3, 6],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the grammar's vocabulary: lower-cases, drops punctuation, ends with </s>."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=PIPELINE_PROMPT_TOKENS,
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


@torch.no_grad()
def build_vae(latents_mean: list[float], latents_std: list[float], **overrides: Any) -> AutoencoderKLWan:
    """The autoencoder; every residual branch starts at zero, so that depth costs nothing at first."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(**(VAE | overrides), latents_mean=latents_mean, latents_std=latents_std)
    for name, module in vae.named_modules():
        if name.endswith((".conv2", "attentions.0.proj")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return vae


@torch.no_grad()
def build_transformer(**overrides: Any) -> WanTransformer3DModel:
    """The transformer, initialised so that cross-attention starts out ignoring the padding.

    ``WanPipeline`` pads every prompt with zeros to 512 tokens and attends to them: with a plain
    initialisation ten words share two per cent of the attention and learn at that rate.  Here one channel
    a head is reserved: zero embeddings map to a key that lies along it, and every query points away.
    """
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**(TRANSFORMER | overrides))
    text = model.condition_embedder.text_embedder
    torch.nn.init.zeros_(text.linear_1.bias)
    torch.nn.init.zeros_(text.linear_2.bias)
    for block in model.blocks:
        attention = block.attn2
        reserved = torch.arange(attention.heads) * (attention.inner_dim // attention.heads)
        for projection in (attention.to_q, attention.to_k):
            projection.bias.zero_()
            projection.weight[reserved] = 0
        attention.to_q.bias[reserved] = -3.0
        attention.to_k.bias[reserved] = 0.05
        attention.norm_k.weight[reserved] = 2.5
    _pass_input_through(model)
    return model


def _pass_input_through(model: WanTransformer3DModel) -> None:
    """Start as the identity on every patch: most of the velocity is the noise that came in."""
    embedding, head = model.patch_embedding, model.proj_out
    inner, outer = embedding.weight.shape[0], head.weight.shape[0]
    directions = torch.linalg.qr(torch.randn(inner, outer)).Q
    # The embedding reads (channel, 1, 2, 2), the head writes (1, 2, 2, channel).
    channels = embedding.weight.shape[1]
    embedding.weight.copy_(directions.reshape(inner, channels, *embedding.weight.shape[2:]))
    embedding.bias.zero_()
    order = torch.arange(outer).reshape(channels, -1).T.flatten()
    head.weight.copy_(0.4 * (outer / inner) ** 0.5 * directions[:, order].T)
    head.bias.zero_()

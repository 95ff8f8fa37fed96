"""A complete random StableDiffusion3Pipeline of 2 MB: every class is the real one, only small.

Nothing is downloaded: the tokenizers are made from a word list in memory. The weights come from explicit
generators, and the global ones stay as they were.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "a",
    "of",
    "in",
    "red",
    "blue",
    "gold",
    "sun",
    "moon",
    "star",
    "tower",
    "cup",
    "tarot",
    "card",
    "style",
)
CLIP_TOKENS, T5_TOKENS = 16, 8
CLIP_WIDTH, CLIP_2_WIDTH, T5_WIDTH = 32, 32, 64


def transformer(seed: int = 0, *, straddle: bool = False) -> SD3Transformer2DModel:
    """SD3.5's form: rms qk-norm, one layer with dual attention (as in Medium), 16 latent channels.

    Every in_features is a multiple of 64, as in SD3.5; with `straddle` most are 48 (and 192 or 288), so that
    quantisation blocks of 64 weights straddle rows.
    """
    heads, head_dim = (3, 16) if straddle else (2, 32)
    width = heads * head_dim
    return _built(
        seed,
        SD3Transformer2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=CLIP_WIDTH + CLIP_2_WIDTH,
        out_channels=16,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def vae(seed: int = 0) -> AutoencoderKL:
    """8 pixels a latent, 16 channels, with SD3.5's scaling and shift factors."""
    return _built(
        seed,
        AutoencoderKL,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def pipeline(seed: int = 0, *, straddle: bool = False) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=transformer(seed, straddle=straddle),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed),
        text_encoder=_clip(seed, CLIP_WIDTH),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(seed + 1, CLIP_2_WIDTH),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(seed),
        tokenizer_3=_t5_tokenizer(),
    )


def save_pipeline(folder: Path, seed: int = 0, *, straddle: bool = False) -> Path:
    """A whole pipeline folder, as save_pretrained writes it."""
    pipeline(seed, straddle=straddle).save_pretrained(folder, safe_serialization=True)
    return folder


def inputs(batch: int = 2, seed: int = 0, *, height: int = 4, width: int = 4) -> dict[str, torch.Tensor]:
    """Latents [batch, 16, height, width], text [batch, 24, 64], pooled [batch, 64], time [batch]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = CLIP_TOKENS + T5_TOKENS
    return {
        "hidden_states": torch.randn(batch, 16, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, T5_WIDTH, generator=generator),
        "pooled_projections": torch.randn(batch, CLIP_WIDTH + CLIP_2_WIDTH, generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
    }


def _built(seed: int, cls: type, *args, **kwargs) -> torch.nn.Module:
    """Weights are random but lively: some start at zero, and the output would be blind to what is before."""
    with torch.random.fork_rng(devices=[]):
        module = cls(*args, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def _clip_tokenizer() -> CLIPTokenizer:
    # Without merges, a word falls apart into letters.
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=CLIP_TOKENS
    )


def _clip(seed: int, width: int) -> CLIPTextModelWithProjection:
    tokenizer = _clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _built(seed, CLIPTextModelWithProjection, config)


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in WORDS), *LETTERS]
    return T5TokenizerFast(
        vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=T5_TOKENS
    )


def _t5(seed: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return _built(seed, T5EncoderModel, config)

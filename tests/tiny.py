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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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


# Language models

END, START, PAD = "<|im_end|>", "<|im_start|>", "<|pad|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "none": None,
    "chatml": CHATML,
    # the assistant's turns are marked
    "marked": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}",
    # no generation prompt, no system message
    "brackets": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message here') }}"
    "{% elif m['role'] == 'user' %}{{ '[ ' + m['content'] + ' ]' }}{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}",
    # writes earlier answers shorter than the last one
    "forgetful": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not "
    "loop.last %}{{ '...' }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # says at its beginning how many turns there are: no prompt is a beginning of its conversation
    "counting": "{{ messages | length }}" + CHATML,
}  # fmt: skip


def tokenizer(template: str = "chatml") -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, START, END, *alphabet])}
    bytes_of_text = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_of_text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of_text.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_of_text,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[START],
        chat_template=TEMPLATES[template],
        model_max_length=512,
    )


_LLAMA_LIKE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
LANGUAGE_MODELS = {
    "opt": (OPTForCausalLM, OPTConfig, {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64,
                                        "num_attention_heads": 2}),
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA_LIKE),
    "mistral": (MistralForCausalLM, MistralConfig, _LLAMA_LIKE | {"sliding_window": 128}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _LLAMA_LIKE),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _LLAMA_LIKE | {"head_dim": 32}),
    "gemma": (GemmaForCausalLM, GemmaConfig, _LLAMA_LIKE | {"head_dim": 32}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _LLAMA_LIKE | {"head_dim": 32}),
    "phi": (PhiForCausalLM, PhiConfig, {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}),
    "phi3": (Phi3ForCausalLM, Phi3Config, _LLAMA_LIKE),
}  # fmt: skip


def language_model(kind: str = "llama", seed: int = 0, *, tied: bool = False) -> torch.nn.Module:
    """A random model of a real class: 64 wide, 4 blocks, 128 positions."""
    cls, config, shape = LANGUAGE_MODELS[kind]
    words = tokenizer()
    settings = config(
        vocab_size=len(words),
        num_hidden_layers=4,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **shape,
    )
    model = _built(seed, cls, settings)
    model.tie_weights()
    return model


def save_language_model(folder: Path, kind: str = "llama", *, tied: bool = False) -> Path:
    """A model folder with its tokenizer, as save_pretrained writes it."""
    language_model(kind, tied=tied).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder

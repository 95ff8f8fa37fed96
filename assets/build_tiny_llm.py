"""Makes the embedded language model: a small Llama with its own tokenizer, trained on text that world.py makes.

    python assets/build_tiny_llm.py --minutes 18 --seed 0 --out assets/models/tiny-llm

The learning rate follows the elapsed share of the time given, which is the processor's, so that a run ends annealed on
any machine and may be suspended. No text is seen twice: every batch is made when it is needed. The figures of the run
go to assets/TINY_LLM.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, LENGTH = 1024, 256  # tokens; of one text
BEGIN, END, PAD, ROLES = "<|begin|>", "<|end|>", "<|pad|>", ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE = {  # every in_features is a multiple of 64: a quantisation block never straddles two rows
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}


def make_tokenizer(seed: int, texts: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learnt from the world's own text."""
    tokenizer = Tokenizer(models.BPE())
    # digits one by one, so that sums can be learnt
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, BEGIN, END, *ROLES], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    rng = np.random.default_rng([seed, 1])
    tokenizer.train_from_iterator((_raw(rng) for _ in range(texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, chat_template=TEMPLATE,
        model_max_length=LENGTH, padding_side="right", clean_up_tokenization_spaces=False,
        extra_special_tokens=list(ROLES),
    )  # fmt: skip


def _raw(rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        return world.paragraph(rng)
    return " ".join(message["content"] for message in world.chat(rng))


def document(tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> str:
    """A text as the model reads it: three in ten are plain paragraphs, the others chats."""
    if rng.random() < 0.3:
        return BEGIN + world.paragraph(rng) + END
    return tokenizer.apply_chat_template(world.chat(rng), tokenize=False)


def batches(tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, tokens: int, pool: int = 1024):
    """Endless (tokens [B, T], labels [B, T]) of about `tokens` each; texts of like length stand together."""
    while True:
        texts = tokenizer([document(tokenizer, rng) for _ in range(pool)], add_special_tokens=False).input_ids
        texts = sorted((text[:LENGTH] for text in texts), key=len)
        groups, start = [], 0
        while start < len(texts):
            rows = 1
            while start + rows < len(texts) and (rows + 1) * len(texts[start + rows]) <= tokens:
                rows += 1
            groups.append(texts[start : start + rows])
            start += rows
        for i in rng.permutation(len(groups)):
            group = groups[i]
            ids = torch.full((len(group), max(map(len, group))), tokenizer.pad_token_id)
            labels = torch.full_like(ids, -100)
            for row, text in enumerate(group):
                ids[row, : len(text)] = labels[row, : len(text)] = torch.tensor(text)
            yield ids, labels  # right-padded and causal: no attention mask is needed


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def shape(width: int, blocks: int) -> dict[str, int]:
    """SHAPE, in another size: `width` is a multiple of 64."""
    heads = width // SHAPE["head_dim"]
    wide = {"hidden_size": width, "intermediate_size": 64 * round(width * 8 / 3 / 64)}
    return SHAPE | wide | {"num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": heads // 2}


def train(
    model: LlamaForCausalLM, tokenizer, minutes: float, steps: int | None, tokens: int, seed: int, log
) -> list[list[float]]:
    """Muon for the matrices of the blocks, AdamW for the rest, for so many minutes or steps; gives
    [step, minutes, loss] along the way."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [
        torch.optim.Muon(hidden, lr=0.01, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    highest = [o.param_groups[0]["lr"] for o in optimisers]
    source = batches(tokenizer, np.random.default_rng([seed, 2]), tokens)
    recent, figures, step, start = [], [], 0, _now()

    def told() -> None:
        figures.append([step, round((_now() - start) / 60, 2), round(sum(recent) / len(recent), 4)])
        log("step {}  {} min  loss {}".format(*figures[-1]))
        recent.clear()

    while (done := step / steps if steps else (_now() - start) / (60 * minutes)) < 1:
        for optimiser, high in zip(optimisers, highest, strict=True):  # warm-up, flat, then straight down to zero
            optimiser.param_groups[0]["lr"] = high * min(1, (step + 1) / 50, (1 - done) / 0.5)
        loss = loss_of(model, *next(source))
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        recent.append(loss.item())
        step += 1
        if step % 50 == 0:
            told()
    if recent:
        told()
    return figures


def _now() -> float:
    """Seconds that each thread has worked."""
    return time.process_time() / torch.get_num_threads()


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer, chats: list[list[world.Message]], most: int = 48) -> list[str]:
    """Greedy answers."""
    found = []
    for messages in chats:
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        tokens = model.generate(**asked, max_new_tokens=most, do_sample=False)[0, asked["input_ids"].shape[1] :]
        found.append(tokenizer.decode(tokens, skip_special_tokens=True))
    return found


@torch.no_grad()
def held_out(model: LlamaForCausalLM, tokenizer, seed: int, count: int = 40) -> float:
    """Mean loss a token over texts that training did not draw."""
    source = batches(tokenizer, np.random.default_rng([seed, 3]), 2048)
    return float(np.mean([loss_of(model, *next(source)).item() for _ in range(count)]))


def samples(model: LlamaForCausalLM, tokenizer) -> list[tuple[str, str]]:
    asked = ["What colour is the bell?", "Where is the fish?", "What is the tower made of?", "What is 3 plus 4?",
             "What is 12 minus 5?", "Thank you.", "I hate my new hat.", "What a lovely boat, I like it.",
             "Describe the key.", "Give the facts of the moon."]  # fmt: skip
    chats = [[{"role": "user", "content": text}] for text in asked]
    for voice in world.SPEAKERS.values():
        system = {"role": "system", "content": f"Speak as {voice[0]}."}
        chats.append([system, {"role": "user", "content": "Where is the anchor?"}])
    shown = [" / ".join(m["content"] for m in chat) for chat in chats]
    return list(zip(shown, answers(model, tokenizer, chats), strict=True))


def save(model: LlamaForCausalLM, tokenizer, out: Path) -> None:
    """In float16 under a temporary name, then in place of an older one; it loads as float32 where no dtype is asked."""
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    model.half().save_pretrained(new)
    tokenizer.save_pretrained(new)
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    shutil.copy(Path(__file__).with_name("tiny_llm_card.md"), new / "README.md")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    model.float()


def write_figures(path: Path, args: argparse.Namespace, model, figures: list, loss: float, shown: list) -> None:
    seen = [figures[i] for i in sorted({0, len(figures) // 8, len(figures) // 4, len(figures) // 2, len(figures) - 1})]
    size, config = sum(f.stat().st_size for f in args.out.iterdir()) / 1e6, model.config
    length = f"--steps {args.steps}" if args.steps else f"--minutes {args.minutes:g}"
    lines = [
        "# How tiny-llm was trained", "",
        f"`python assets/build_tiny_llm.py {length} --seed {args.seed}`: {args.threads} thread, "
        f"torch {torch.__version__}, no GPU, {time.strftime('%d %B %Y')}.", "",
        f"Llama, {sum(p.numel() for p in model.parameters()):,} parameters: {config.hidden_size} wide, "
        f"{config.num_hidden_layers} blocks, {config.num_attention_heads} heads of {config.head_dim} "
        f"({config.num_key_value_heads} for keys and values), embeddings tied; {VOCABULARY} byte-level BPE tokens; "
        f"{size:.1f} MB on disk in float16.", "",
        f"Text made by `world.py`, never the same twice; about {args.tokens} tokens a step. Loss a token on texts that "
        f"training did not draw: {loss:.4f}.", "",
        "| step | minutes of the processor | loss, mean since the last line, at most 50 steps |", "|---|---|---|",
        *(f"| {s} | {m} | {x} |" for s, m, x in seen), "",
        "A run follows the clock: the same seed gives the same texts, but other weights.", "",
        "| asked | greedy answer |", "|---|---|", *(f"| {q} | {x} |" for q, x in shown), "",
    ]  # fmt: skip
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=18, help="of the processor, for each thread")
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--width", type=int, default=SHAPE["hidden_size"], help="a multiple of 64")
    parser.add_argument("--blocks", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--tokens", type=int, default=2048, help="of one step, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("assets/models/tiny-llm"))
    parser.add_argument("--figures", type=Path, default=Path("assets/TINY_LLM.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def log(line: str) -> None:
        print(line, flush=True)

    with torch.random.fork_rng(devices=[]):  # the model class draws its first weights from the global generator
        torch.manual_seed(args.seed)  # noqa: TID251
        tokenizer = make_tokenizer(args.seed)
        config = LlamaConfig(
            **shape(args.width, args.blocks), vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
            tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    figures = train(model, tokenizer, args.minutes, args.steps, args.tokens, args.seed, log)
    model.eval()
    loss, shown = held_out(model, tokenizer, args.seed), samples(model, tokenizer)
    save(model, tokenizer, args.out)
    write_figures(args.figures, args, model, figures, loss, shown)
    log(f"held-out loss {loss:.4f}; done")


if __name__ == "__main__":
    main()

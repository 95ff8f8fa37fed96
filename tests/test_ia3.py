"""A style as a PEFT adapter: stock peft on the stock model has the logits of ours, and what has no equal is refused."""

import bitsandbytes as bnb
import pytest
import tiny
import torch
from test_text_task import some_tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from zo_engine import ia3
from zo_engine.models import load_language_model
from zo_engine.probes import GainSpace, GroupSpace
from zo_engine.scales import find_scales, formats_of
from zo_engine.style import StyleError
from zo_engine.tasks.text import stack


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_language_model(tmp_path_factory.mktemp("language") / "model", "llama")


def noise(size: int) -> torch.Tensor:
    return 0.2 * torch.randn(size, generator=torch.Generator().manual_seed(3))


def peft_logits(folder, adapter, given):
    """Of the model as transformers quantises it, with the adapter as peft loads it."""
    peft = pytest.importorskip("peft")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(stock, adapter)(**given).logits


@pytest.mark.parametrize("columns", [False, True])
def test_stock_peft_has_the_logits_of_the_style(folder, tmp_path, monkeypatch, columns):
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    model = load_language_model(folder)
    space = GainSpace(find_scales(model, formats_of("nf4", final_norm=True)), columns=columns)
    theta = noise(space.layout.size)
    if columns:  # some layers by their inputs, the others by their outputs
        for number, (name, part) in enumerate(space.layout.split(theta).items()):
            inputs = number % 2 and f"{name.rpartition('.')[0]}.columns" in space.layout.shapes
            if name.endswith("rows") == bool(inputs):
                part.zero_()
            if name.endswith("columns") and space.layout.split(theta)[name.replace("columns", "rows")].any():
                part.zero_()
    batch = stack(some_tokens())
    given = {"input_ids": batch.tokens, "attention_mask": batch.mask}
    with torch.no_grad(), space.folded(theta):
        expected = model(**given).logits
    adapter = ia3.save_to(tmp_path / "adapter", model, space, theta, str(folder))
    torch.testing.assert_close(peft_logits(folder, adapter, given), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(**given).logits, expected, atol=1e-2)
    with pytest.raises(StyleError, match="exists already"):
        ia3.save_to(tmp_path / "adapter", model, space, theta, str(folder))


def test_what_has_no_equal_is_refused_by_layer(folder, tmp_path):
    biased = load_language_model(tiny.save_language_model(tmp_path / "opt", "opt"))
    space = GainSpace(find_scales(biased))
    with pytest.raises(StyleError, match=r"24 layers have no equal in IA3: model\.decoder.* \(bias\)"):
        ia3.vectors(biased, space, noise(space.layout.size))
    with pytest.raises(StyleError, match="moves nothing"):
        ia3.vectors(biased, space, torch.zeros(space.layout.size))
    plain = load_language_model(folder)
    views = find_scales(plain)
    both = GainSpace(views, columns=True)
    with pytest.raises(StyleError, match="rows and columns"):
        ia3.vectors(plain, both, noise(both.layout.size))
    apart = tiny.language_model()
    norm = GainSpace(find_scales(apart, ("dense", "norm")))
    with pytest.raises(StyleError, match=r"model\.norm \(as lm_head has gains of its own\)"):
        ia3.vectors(apart, norm, noise(norm.layout.size))
    groups = GroupSpace(views)
    with pytest.raises(StyleError, match="has no equal there"):
        ia3.vectors(plain, groups, noise(groups.layout.size))
    assert not (tmp_path / "adapter").exists()

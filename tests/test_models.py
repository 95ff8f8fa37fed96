"""Finding, loading, quantising and exporting models, on a tiny Stable Diffusion 3 of real classes."""

import json
import shutil
import threading
import weakref
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import huggingface_hub
import pytest
import tiny
import torch
from diffusers import BitsAndBytesConfig, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from safetensors.torch import load_file, save_file

from zo_engine import hub, models, quantize
from zo_engine.hub import ModelError, check, locate, pipeline_files
from zo_engine.models import (
    code_hash,
    export,
    load_text_encoders,
    load_transformer,
    load_vae,
    quantized_layers,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A copy of the base to break."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def diffusers_on_cpu(monkeypatch):
    """diffusers' own bitsandbytes loader on a CPU: without its refusal of machines that have no GPU, and
    without bitsandbytes' bf16 kernel for some CPUs, which repacks the weights. All else is as it ships."""
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    return partial(SD3Transformer2DModel.from_pretrained, device_map={"": "cpu"}, torch_dtype=torch.float32)


def config(format: str, **options) -> BitsAndBytesConfig:
    if format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=format, bnb_4bit_compute_dtype=torch.float32, **options
    )


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs()).sample


# Quantising


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_a_quantised_model_is_what_diffusers_makes_of_it(base, diffusers_on_cpu, format):
    theirs = diffusers_on_cpu(base / "transformer", quantization_config=config(format))
    ours = load_transformer(base, quantization=format)
    assert_same_state(ours, theirs)
    assert len(quantized_layers(ours)) == sum(isinstance(m, torch.nn.Linear) for m in tiny.transformer().modules())


@pytest.mark.parametrize("piece", [320, 1 << 16])
@pytest.mark.parametrize("straddle", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_bitsandbytes(tmp_path, monkeypatch, format, straddle, piece):
    monkeypatch.setattr(quantize, "PIECE", piece)
    model = load_transformer(tiny.save_pipeline(tmp_path, straddle=straddle), quantization=format)
    weights = load_file(tmp_path / "transformer" / WEIGHTS)
    for name, layer in quantized_layers(model).items():
        param = bnb.nn.Params4bit(weights[f"{name}.weight"], compress_statistics=False, quant_type=format).to("cpu")
        assert torch.equal(layer.weight.data, param.data)
        assert torch.equal(layer.weight.quant_state.absmax, param.quant_state.absmax)


@pytest.mark.parametrize("piece", [320, 1 << 16])
def test_int8_codes_and_scales_are_those_of_bitsandbytes(base, monkeypatch, piece):
    monkeypatch.setattr(quantize, "PIECE", piece)
    weights = load_file(base / "transformer" / WEIGHTS)
    for name, layer in quantized_layers(load_transformer(base, quantization="int8")).items():
        param = bnb.nn.Int8Params(weights[f"{name}.weight"], has_fp16_weights=False, requires_grad=False).to("cpu")
        assert torch.equal(layer.weight.data, param.CB)
        assert torch.equal(layer.state.SCB, param.SCB)


def test_without_quantisation_the_model_is_the_one_that_was_saved(base):
    model = load_transformer(base, quantization="none")
    assert_same_state(model, tiny.transformer())
    assert torch.equal(outputs(model), outputs(tiny.transformer()))


@pytest.mark.parametrize(("format", "error"), [("int8", 0.002), ("nf4", 0.05), ("fp4", 0.1)])
def test_a_quantised_model_draws_nearly_the_same(base, format, error):
    exact = outputs(tiny.transformer())
    assert (outputs(load_transformer(base, quantization=format)) - exact).pow(2).mean() < error * exact.pow(2).mean()


def test_a_loaded_model_is_frozen_and_its_scales_plain(base):
    model = load_transformer(base)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for layer in quantized_layers(model).values():
        state = layer.weight.quant_state
        assert state.absmax.dtype == torch.float32
        assert state.absmax.is_contiguous()
        assert not state.nested
        assert not layer.support_avx512bf16_for_cpu
        assert layer.compute_dtype == state.dtype == torch.float32


def test_a_forward_leaves_codes_and_scales_alone(base):
    model = load_transformer(base)
    before = code_hash(model)
    outputs(model)
    assert code_hash(model) == before
    assert_same_state(model, load_transformer(base))


def test_codes_do_not_depend_on_the_dtype_of_the_computation(folder):
    file = folder / "transformer" / WEIGHTS
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    loaded = {dtype: load_transformer(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert len({code_hash(model) for model in loaded.values()}) == 1
    for dtype, model in loaded.items():
        assert {p.dtype for n, p in model.named_parameters() if p.dtype != torch.uint8} == {dtype}
        assert {layer.compute_dtype for layer in quantized_layers(model).values()} == {dtype}


def test_loading_leaves_the_global_generator_alone(base):
    before = torch.get_rng_state()
    load_transformer(base)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_double_quantised_folders_load_bit_for_bit(base, tmp_path, diffusers_on_cpu, format):
    options = config(format, bnb_4bit_use_double_quant=True)
    theirs = diffusers_on_cpu(base / "transformer", quantization_config=options)
    theirs.save_pretrained(tmp_path / "transformer")
    ours = load_transformer(tmp_path, quantization=format)
    assert all(not layer.weight.quant_state.nested for layer in quantized_layers(ours).values())
    assert torch.equal(outputs(ours), outputs(theirs))


def test_shards_load_as_one_file_does(base, tmp_path):
    tiny.transformer().save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3
    assert_same_state(load_transformer(tmp_path), load_transformer(base))


def test_the_files_are_let_go_after_loading(folder):
    model = load_transformer(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = folder / "transformer" / WEIGHTS
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("quantization", quantize.MADE)
def test_one_tensor_at_a_time_is_in_host_memory(base, monkeypatch, quantization):
    """Of the tensors read from the file, all are dropped before the next but one is read, and what stays is
    the model alone."""
    alive, most = [], 0
    read = quantize.Checkpoint.read

    def counted(checkpoint, name):
        nonlocal most
        tensor = read(checkpoint, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(quantize.Checkpoint, "read", counted)
    load_transformer(base, quantization=quantization)
    assert len(alive) > 50
    assert most <= 2  # the one just read and the one it takes the place of


def test_the_hash_tells_codes_scales_and_formats_apart(base, tmp_path):
    model = load_transformer(base)
    first = code_hash(model)
    assert code_hash(load_transformer(base)) == first
    assert code_hash(load_transformer(base, quantization="fp4")) != first
    assert code_hash(load_transformer(tiny.save_pipeline(tmp_path, seed=1))) != first
    layer = next(iter(quantized_layers(model).values()))
    layer.weight.quant_state.absmax[0] *= 1.01
    assert code_hash(model) != first


def test_the_hash_of_int8_is_the_same_before_and_after_a_forward(base):
    model = load_transformer(base, quantization="int8")
    first = code_hash(model)
    outputs(model)
    assert code_hash(model) == first


# The other parts


def encoded(encoders: StableDiffusion3Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = encoders.encode_prompt(
            "a red sun", None, None, do_classifier_free_guidance=False, max_sequence_length=tiny.T5_TOKENS
        )
    return embeds, pooled


def test_text_encoders_encode_as_the_whole_pipeline_does(base):
    for ours, theirs in zip(encoded(load_text_encoders(base)), encoded(tiny.pipeline()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_t5_alone_is_quantised(base, quantization):
    encoders = load_text_encoders(base, quantization=quantization)
    assert quantized_layers(encoders.text_encoder_3)
    assert not quantized_layers(encoders.text_encoder)
    exact, near = encoded(tiny.pipeline())[0], encoded(encoders)[0]
    clip = tiny.CLIP_TOKENS
    assert torch.equal(near[:, :clip], exact[:, :clip])
    assert 0 < (near - exact).pow(2).mean() < 0.1 * exact[:, clip:].pow(2).mean()


@pytest.mark.parametrize(
    ("load", "part", "file"),
    [(load_text_encoders, "text_encoder_2", "model.safetensors"), (load_vae, "vae", WEIGHTS)],
)
def test_a_gap_in_a_part_is_an_error_not_random_numbers(folder, load, part, file):
    tensors = load_file(folder / part / file)
    tensors.pop(min(tensors))
    save_file(tensors, folder / part / file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{part} lacks"):
        load(folder)


def draw(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    given = tiny.inputs(1)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=given["encoder_hidden_states"],
        pooled_prompt_embeds=given["pooled_projections"],
        negative_prompt_embeds=torch.zeros_like(given["encoder_hidden_states"]),
        negative_pooled_prompt_embeds=torch.zeros_like(given["pooled_projections"]),
        height=32,
        width=48,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


# Exporting


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_plain_diffusers_loads_an_export_and_draws_the_same_pixels(base, tmp_path, diffusers_on_cpu, format):
    model = load_transformer(base, quantization=format)
    for layer in quantized_layers(model).values():  # a style: changed scales
        scales = layer.state.SCB if format == "int8" else layer.weight.quant_state.absmax
        scales.mul_(1.1)
    out = export(base, model, tmp_path / "styled")
    theirs = diffusers_on_cpu(out / "transformer")
    assert_same_state(theirs, model)
    whole = StableDiffusion3Pipeline.from_pretrained(out, transformer=theirs)
    assert torch.equal(draw(whole), draw(models.pipeline(base, model, load_vae(base))))


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_an_export_is_laid_out_as_diffusers_saves_it(base, tmp_path, diffusers_on_cpu, format):
    theirs = diffusers_on_cpu(base / "transformer", quantization_config=config(format))
    theirs.save_pretrained(tmp_path / "theirs")
    out = export(base, load_transformer(base, quantization=format), tmp_path / "ours")
    ours, saved = load_file(out / "transformer" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[name], saved[name]) for name in ours)
    read = [json.loads((f / "config.json").read_text()) for f in (out / "transformer", tmp_path / "theirs")]
    assert read[0]["quantization_config"] == read[1]["quantization_config"]
    assert {p.relative_to(out) for p in out.rglob("*")} == {p.relative_to(base) for p in base.rglob("*")}
    check(out)


def test_an_export_loads_again_as_a_base(base, tmp_path):
    model = load_transformer(base)
    again = load_transformer(export(base, model, tmp_path / "out"))
    assert code_hash(again) == code_hash(model)
    assert torch.equal(outputs(again), outputs(model))


def test_an_export_never_overwrites_and_leaves_nothing_half_written(base, tmp_path, monkeypatch):
    model = load_transformer(base)
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        export(base, model, tmp_path / "there")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        export(base, model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_an_export_that_differs_is_not_kept(base, tmp_path, monkeypatch):
    model = load_transformer(base)
    monkeypatch.setattr(models, "load_transformer", lambda *args, **kwargs: tiny.transformer(1))
    with pytest.raises(ModelError, match="differs"):
        export(base, model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# What can be wrong with a folder


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(folder: Path) -> Path:
    """Turn the transformer into shards; the first of them."""
    part = folder / "transformer"
    shutil.rmtree(part)
    tiny.transformer().save_pretrained(part, max_shard_size="300KB")
    return min(part.glob("*-of-*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def name_a_lost_tensor(folder: Path) -> None:
    index = shard(folder).parent / f"{WEIGHTS}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"lost.weight": min(weight_map.values())})


def only_a_pickle(folder: Path) -> None:
    (folder / "transformer" / WEIGHTS).rename(folder / "transformer" / "diffusion_pytorch_model.bin")


def only_a_lora(folder: Path) -> None:
    save_file({"blocks.0.lora_A.weight": torch.zeros(2, 2)}, folder / "transformer" / WEIGHTS)


BROKEN = {
    "no folder": (shutil.rmtree, "is missing"),
    "no config": (lambda f: (f / "transformer" / "config.json").unlink(), "config.json is missing"),
    "config is not JSON": (lambda f: (f / "transformer" / "config.json").write_text("{"), "damaged"),
    "config is not UTF-8": (
        lambda f: (f / "transformer" / "config.json").write_bytes(b"\xff\xfe{}"),
        "damaged",
    ),
    "config is a list": (lambda f: (f / "transformer" / "config.json").write_text("[]"), "holds a list"),
    "no weights": (lambda f: (f / "transformer" / WEIGHTS).unlink(), "has no weights"),
    "pickle": (only_a_pickle, "pickle, .* never loaded"),
    "missing shard": (lambda f: shard(f).unlink(), "is missing, and the index"),
    "shards without index": (lambda f: (shard(f).parent / f"{WEIGHTS}.index.json").unlink(), "no index"),
    "index without map": (
        lambda f: edit(shard(f).parent / f"{WEIGHTS}.index.json", weight_map={}),
        "no weight_map",
    ),
    "index of a lost tensor": (name_a_lost_tensor, "lists lost.weight, which no shard has"),
    "truncated": (lambda f: truncate(f / "transformer" / WEIGHTS), "truncated"),
    "zero bytes": (lambda f: (f / "transformer" / WEIGHTS).write_bytes(b""), "truncated"),
    "LFS pointer": (
        lambda f: (f / "transformer" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
}
WRONG_TRANSFORMER = {
    "unknown class": (
        lambda f: edit(f / "transformer" / "config.json", _class_name="Mystery"),
        "class 'Mystery'",
    ),
    "class is no model": (
        lambda f: edit(f / "transformer" / "config.json", _class_name="utils"),
        "class 'utils'",
    ),
    "other quantiser": (
        lambda f: edit(f / "transformer" / "config.json", quantization_config={"quant_method": "torchao"}),
        "quantised by 'torchao'",
    ),
    "missing tensor": (
        lambda f: rewrite(f / "transformer" / WEIGHTS, lambda t: t.pop("proj_out.bias")),
        "lacks proj_out.bias",
    ),
    "unexpected tensor": (
        lambda f: rewrite(f / "transformer" / WEIGHTS, lambda t: t.update(odd=torch.zeros(1))),
        "has odd, which its SD3Transformer2DModel does not know",
    ),
    "shape mismatch": (
        lambda f: rewrite(f / "transformer" / WEIGHTS, lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
        r"proj_out.bias has the shape \[3\] where config.json asks for \[64\]",
    ),
    "LoRA": (only_a_lora, "LoRA"),
}


@pytest.mark.parametrize("case", BROKEN | WRONG_TRANSFORMER)
def test_a_broken_transformer_is_refused_in_one_sentence(folder, case):
    spoil, message = (BROKEN | WRONG_TRANSFORMER)[case]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as error:
        load_transformer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_noticed_before_anything_is_loaded(folder, case):
    BROKEN[case][0](folder)
    with pytest.raises(ModelError):
        check(folder)


def test_scales_that_do_not_fit_their_codes_are_refused(base, tmp_path):
    out = export(base, load_transformer(base), tmp_path / "out")
    rewrite(
        out / "transformer" / WEIGHTS,
        lambda t: t.update({"proj_out.weight.absmax": t["proj_out.weight.absmax"][:-1]}),
    )
    with pytest.raises(ModelError, match="do not fit"):
        load_transformer(out)


def test_a_quantised_folder_says_its_format(base, tmp_path):
    out = export(base, load_transformer(base), tmp_path / "out")
    for other in ("fp4", "int8", "none"):
        with pytest.raises(ModelError, match="already quantised .nf4."):
            load_transformer(out, quantization=other)
    with pytest.raises(ModelError, match="possible are nf4, fp4, int8, none"):
        load_transformer(base, quantization="q8")


def test_what_is_no_pipeline_folder_is_refused(base, folder, tmp_path):
    pickle, lora, single = tmp_path / "a.ckpt", tmp_path / "lora.safetensors", tmp_path / "sd3.safetensors"
    pickle.write_bytes(b"\x80\x04N.")
    save_file({"unet.lora_down.weight": torch.zeros(1)}, lora)
    save_file({"model.weight": torch.zeros(1)}, single)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    for path, message in [
        (pickle, "pickle"),
        (lora, "is a LoRA"),
        (single, "single file"),
        (adapter, "is a LoRA"),
        (base / "transformer", "give the folder above"),
        (base.parent, "no model_index.json"),
        (folder, "is a FluxPipeline"),
    ]:
        with pytest.raises(ModelError, match=message):
            locate(str(path))


# Finding


def test_a_local_folder_is_found_without_the_hub(base, monkeypatch):
    monkeypatch.setattr(hub, "auth_check", None)
    assert locate(str(base)) == base


def test_a_misspelt_model_is_told_the_right_name(monkeypatch):
    with pytest.raises(ModelError, match="did you mean 'tiny-sd3'"):
        locate("tiny-sd")
    with pytest.raises(ModelError, match="known are tiny-sd3, sd3.5-medium, sd3.5-large, sd3.5-large-nf4"):
        locate("???")


def test_only_the_files_of_the_pipeline_are_downloaded(base):
    ours = [p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()]
    others = [
        "README.md",
        "sd3.5_large.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.fp16.json",
        "transformer/diffusion_pytorch_model.bin",
        "vae/deep/config.json",
    ]
    assert pipeline_files([*ours, *others, "LICENSE.md"]) == sorted([*ours, "LICENSE.md"])
    with pytest.raises(ModelError, match="no safetensors weights in transformer"):
        pipeline_files([name for name in [*ours, *others] if name != f"transformer/{WEIGHTS}"])


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs: org/model is open, org/gated asks to accept its licence."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        if "org/gated" in path:
            known = "authorization" in self.headers
            return self.answer(403 if known else 401, b"", {"X-Error-Code": "GatedRepo"})
        if "org/model" not in path:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if path.endswith("/auth-check"):
            return self.answer(200, b"{}")
        files = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
        if "/tree/" in path:
            tree = [{"type": "file", "path": self.relative(p), "size": p.stat().st_size, "oid": "0"} for p in files]
            return self.answer(200, json.dumps(tree).encode())
        if path.startswith("/api/"):
            siblings = [{"rfilename": self.relative(p), "size": p.stat().st_size} for p in files]
            info = {"id": "org/model", "modelId": "org/model", "sha": "1" * 40, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode())
        body = (self.folder / path.split("/resolve/")[1].split("/", 1)[1]).read_bytes()
        return self.answer(200, body, {"ETag": f'"{abs(hash(body))}"', "X-Repo-Commit": "1" * 40})

    def relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def local_hub(folder, tmp_path, monkeypatch):
    """A hub on this machine, and an empty cache; gives its handler and the function that shuts it down."""
    handler = type("LocalHub", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    cache = str(tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)

    def shut():
        server.shutdown()
        server.server_close()

    yield handler, shut
    shut()


def test_a_model_is_downloaded_once_and_then_found_without_network(local_hub, folder):
    handler, shut = local_hub
    (folder / "sd3.5_large.safetensors").write_bytes(b"a duplicate")
    with pytest.raises(ModelError, match="not on this machine, and downloading was not asked for"):
        locate("org/model", download=False)
    sizes = []
    found = locate("org/model", begin=sizes.append)
    assert sizes == [sum(p.stat().st_size for p in found.rglob("*") if p.is_file())]
    assert 0 < hub.arrived("org/model") <= sizes[0] and hub.find("org/model") == found
    assert not any("sd3.5_large" in path for path in handler.asked)
    assert code_hash(load_transformer(found)) == code_hash(load_transformer(folder))
    shut()
    assert locate("org/model", download=False) == found


def test_an_interrupted_download_is_completed(local_hub):
    found = locate("org/model")
    (found / "vae" / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="has no weights"):
        locate("org/model", download=False)
    assert locate("org/model") == found
    check(found)


def test_the_hub_says_no_in_one_sentence(local_hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ModelError, match="accept its licence first: .*`hf auth login`"):
        locate("org/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_of-somebody-who-has-not-accepted")
    with pytest.raises(ModelError, match="accept its licence first: .*accept it, then try again"):
        locate("org/gated")
    with pytest.raises(ModelError, match="no folder and no hub repository 'org/nothing'"):
        locate("org/nothing")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ModelError, match="GB free"):
        locate("org/model")


def test_without_network_a_missing_model_says_so(local_hub, monkeypatch):
    local_hub[1]()
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        locate("org/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        locate("org/model")

"""The doctor: true facts of this machine, and the right verdict about machines that are not here."""

import copy
import json
import subprocess
import sys

import psutil
import pytest
import torch

from zo_engine import doctor, gpu
from zo_engine.hub import MODELS

GB = doctor.GB


@pytest.fixture(scope="module")
def facts():
    return doctor.report()


@pytest.fixture
def machine(facts):
    """machine(card, ram, disk): facts of another machine, in GB, with the models `here` on it."""

    def make(card=0, ram=16, disk=100, here=("tiny-sd3",)):
        other = copy.deepcopy(facts)
        other["torch"]["devices"] = [{"name": "cpu", "nf4": "works"}]
        if card:
            memory = {"total": card * GB, "free": card * GB}
            other["torch"]["devices"].append(
                {"name": "cuda:0", "title": "Card", "memory": memory, "capability": [8, 9], "nf4": "works"}
            )
        other["ram"] = {"total": ram * GB, "free": ram * GB}
        other["disk"]["models"]["free"] = disk * GB
        other["hub"]["models"] = {name: name in here for name in MODELS}
        return other

    return make


def verdict(facts, model):
    return next(entry for entry in doctor.can_run(facts) if entry["model"] == model)


def test_the_import_is_light():
    heavy = "{'torch', 'diffusers', 'transformers', 'bitsandbytes', 'huggingface_hub'}"
    code = f"import sys, zo_engine.doctor; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_facts_are_true_and_plain(facts):
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["ram"]["total"] == psutil.virtual_memory().total
    assert len(facts["torch"]["devices"]) == 1 + torch.cuda.device_count()
    assert facts["torch"]["devices"][0] == {"name": "cpu", "nf4": "works"}
    assert set(facts["hub"]["models"]) == set(MODELS)


def test_the_token_is_never_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    facts = doctor.report()
    assert facts["hub"]["token"] is True
    assert "hf_secret" not in json.dumps(facts) + doctor.describe(facts)


def test_disk_of_a_folder_that_is_yet_to_be_made(tmp_path):
    disk = doctor._disk(tmp_path / "not" / "yet")
    assert disk["free"] > 0 and disk["folder"].endswith("yet") and not (tmp_path / "not").exists()


def test_a_library_that_cannot_work_is_said(monkeypatch):
    import bitsandbytes.functional

    def missing(*args, **kwargs):
        raise RuntimeError("Configured CUDA binary not found\nTraceback")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", missing)
    assert doctor._nf4("cpu") == "Configured CUDA binary not found"
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", lambda w, **_: (w, None))
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda codes, state: codes + 1)
    assert "wrong numbers" in doctor._nf4("cpu")


# What can run


def test_the_embedded_model_runs_everywhere(machine):
    assert verdict(machine(ram=4, disk=0), "tiny-sd3")["device"] == "cpu"
    assert verdict(machine(here=()), "tiny-sd3")["device"] is None


@pytest.mark.parametrize(
    ("card", "ram", "disk", "device"),
    [
        (24, 16, 100, "cuda:0"),
        (8, 64, 100, "cpu"),
        (0, 64, 100, "cpu"),
        (0, 8, 100, None),
        (24, 64, 20, None),
    ],
)
def test_large_model(machine, card, ram, disk, device):
    assert verdict(machine(card, ram, disk), "sd3.5-large")["device"] == device


def test_what_is_here_needs_no_disk(machine):
    assert verdict(machine(card=24, disk=1, here=("sd3.5-large",)), "sd3.5-large")["device"] == "cuda:0"


def test_every_model_of_the_hub_has_its_needs():
    online = {name for name, model in MODELS.items() if not model.repo.startswith("assets/")}
    assert online == set(doctor.TRANSFORMERS) | set(doctor.LANGUAGE) == set(doctor.DOWNLOADS)
    weights, embeddings = doctor.LANGUAGE["mistral-7b"]  # its config: 32 blocks, 4096 wide, 14336 inside, 8 of 32 heads
    assert weights == pytest.approx(32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), rel=0.01)
    assert embeddings == pytest.approx(2 * 32768 * 4096, rel=0.01)


def test_nothing_runs_where_four_bits_do_not_work(machine):
    other = machine()
    other["torch"]["devices"][0]["nf4"] = "no library"
    assert {entry["device"] for entry in doctor.can_run(other)} == {None}
    assert "4-bit weights do not work on cpu: no library" in doctor.notes(other)


def test_a_card_that_torch_cannot_see_is_noticed(machine, monkeypatch):
    monkeypatch.setattr(gpu, "cards", lambda: [gpu.Card("NVIDIA L4", 580, (8, 9))])
    other = machine()
    other["packages"]["torch"], other["torch"]["cuda"] = "2.13.0+cpu", None
    assert "torch==2.13.0+cu1" in doctor.notes(other)[0]
    other["torch"]["cuda"] = "13.0"
    assert "does not see the NVIDIA L4" in doctor.notes(other)[0]
    assert doctor.notes(machine(card=24)) == []


def test_describes_all_of_it(machine):
    other = machine(card=24)
    other["cards"], other["notes"], other["can_run"] = [], ["Something is wrong."], doctor.can_run(other)
    text = doctor.describe(other)
    for part in ("24.0 GB free of 24.0 GB", "Note: Something is wrong.", "sd3.5-large", torch.__version__):
        assert part in text

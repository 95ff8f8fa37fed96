"""What the tests share: tiny real models, made once."""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch

from zo_engine.__main__ import main
from zo_engine.models import load_transformer
from zo_engine.tasks import text

# Tests run side by side (start.py): each process gets its share of the cores.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def few_own_texts():
    """The base writes few and short texts of its own: for modules whose tests do not ask how many there are. A random
    model never ends one by itself, and 64 tokens take a streamed one longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "OWN", 8)
        patch.setattr(text, "OWN_TOKENS", 8)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A complete random Stable Diffusion 3 pipeline on disk. Not to be written to."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory) -> Path:
    """A random language model with its tokenizer on disk. Not to be written to."""
    return tiny.save_language_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="session")
def straddling_folder(tmp_path_factory) -> Path:
    """The same with layers 48 wide, where blocks of 64 weights straddle rows."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("straddling") / "model", straddle=True)


@pytest.fixture(scope="session")
def transformer(tiny_folder) -> Callable[[str], torch.nn.Module]:
    """transformer(format): the tiny SD3 transformer in "nf4", "fp4" or "int8". Shared: leave it as it was."""
    return cache(lambda format: load_transformer(tiny_folder, quantization=format))


@pytest.fixture
def qzo(monkeypatch, capsys, tmp_path):
    """qzo(*words) -> (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["qzo", "--runs-dir", str(tmp_path / "runs"), *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call

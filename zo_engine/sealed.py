"""Safetensors files that notice damage: a digest of everything inside stands in their metadata.

The format itself only notices a wrong length: a bit that flips in a tensor is read as another number. The digest is
of names, types, shapes, bytes and metadata, in order of their names. No pickle is ever read.
"""

import hashlib
import json
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zo_engine.hub import first_line
from zo_engine.run import write_atomic

DIGEST = "sha256"  # the metadata's key
LARGEST = 2**34  # bytes of a file that is read: scales of a model of 100 billion weights


class DamageError(ValueError):
    """A file that is not what was written; what is wrong, made to stand behind the file's name."""


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a sealed file, whole or not at all."""
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(Path(path), save(flat, metadata | {DIGEST: digest(flat, metadata)}))


def read(path: Path, unsealed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file, the digest among the latter. With `unsealed`, one without is taken as well.

    Raises DamageError for whatever is not as it was written, OSError for what cannot be read at all.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise DamageError("is not a regular file")
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size > LARGEST:
            raise DamageError(f"has {size / 1e9:.0f} GB, more than any such file")
        file.seek(0)
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length + 8 > size:  # said before all of it is read
            raise DamageError("is not a readable safetensors file (its header is longer than the file)")
        file.seek(0)
        data = file.read()
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, KeyError, ValueError, RecursionError, AttributeError) as error:
        raise DamageError(f"is not a readable safetensors file ({first_line(error)})") from None
    if DIGEST not in metadata and not unsealed:
        raise DamageError("has no checksum")
    if DIGEST in metadata and metadata[DIGEST] != digest(tensors, metadata):
        raise DamageError("is damaged: its checksum does not fit what is in it")
    return tensors, metadata


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of what a file holds, itself left out."""
    found = hashlib.sha256(json.dumps(sorted((k, v) for k, v in metadata.items() if k != DIGEST)).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()

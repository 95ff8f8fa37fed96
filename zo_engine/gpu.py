"""The GPU of this machine, and the build of torch that can use it.

Standard library only: start.py asks before anything is installed. What the CUDA builds of torch 2.13 need:

    build   cards (compute capability)            driver
    cu130   7.5 and later (Turing to Blackwell)   580 and later
    cu126   6.0 to 9.0 (Pascal to Hopper)         525 and later on Linux, 528 on Windows

from the CUDA support matrix of torch (RELEASE.md), NVIDIA's table of minor-version compatibility, and
bitsandbytes, whose kernels begin at 6.0.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INDEX = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Card:
    name: str
    driver: int  # major version, 0 if it could not be read
    capability: tuple[int, int] | None  # (8, 9) for 8.9; None if it could not be read


def cards() -> list[Card]:
    """The NVIDIA cards that this process may use, in nvidia-smi's order; an empty list if there is none."""
    if smi := shutil.which("nvidia-smi"):
        for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # old drivers lack the last
            query = [smi, f"--query-gpu={fields}", "--format=csv,noheader"]
            try:
                answer = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=30)
            except (OSError, subprocess.TimeoutExpired):
                return []
            if answer.returncode == 0:
                return parse(answer.stdout)
        return []
    # A container without nvidia-smi: /proc shows the host's driver anyway, /dev whether the card is let in.
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists() and Path("/dev/nvidiactl").exists():
        version = re.search(r"\b(\d{3})\.\d+", driver.read_text(errors="replace"))
        return [Card("NVIDIA card", int(version[1]) if version else 0, None)]
    return []


def parse(table: str) -> list[Card]:
    """Cards from nvidia-smi's lines, such as `NVIDIA L4, 580.95.05, 8.9`."""
    found = []
    for line in filter(str.strip, table.splitlines()):
        name, driver, *rest = (field.strip() for field in line.split(","))
        capability = re.fullmatch(r"(\d+)\.(\d+)", rest[0]) if rest else None
        major = re.match(r"\d+", driver)
        found.append(
            Card(
                name=name,
                driver=int(major[0]) if major else 0,
                capability=(int(capability[1]), int(capability[2])) if capability else None,
            )
        )
    return found


def build(card: Card, system: str = sys.platform) -> str | None:
    """The build of torch for this card and driver, `cu130` or `cu126`; None if there is none (`obstacle`)."""
    capability = card.capability or (7, 5)
    if capability >= (7, 5) and card.driver >= 580:
        return "cu130"
    if (6, 0) <= capability <= (9, 0) and card.driver >= (528 if system == "win32" else 525):
        return "cu126"
    return None


def obstacle(card: Card) -> str:
    """Why no build of torch can use this card, and what to do, in one sentence."""
    if card.capability and card.capability < (6, 0):
        number = ".".join(map(str, card.capability))
        return f"the {card.name} (compute capability {number}) is too old: 4-bit weights need 6.0 or more"
    return f"the driver of the {card.name} ({card.driver or 'unknown'}) is too old: install 580 or later"


def advice(card: Card, torch: str, python: str, system: str = sys.platform) -> str:
    """What to say where there is a card, and the installed torch was built without CUDA and cannot see it.

    `torch` is its version, `python` the interpreter that pip is to be run with.
    """
    tag = build(card, system)
    if tag is None:
        return f"The GPU is not used: {obstacle(card)}."
    python = f'"{python}"' if " " in python else python
    return (
        f"The GPU is not used: there is an {card.name}, but torch {torch} has no CUDA. To change it:\n"
        f"    {python} -m pip install torch=={torch.split('+')[0]}+{tag} --index-url {INDEX}/{tag}"
    )


def others(torch: str, python: str, system: str = sys.platform) -> str:
    """What to expect of a GPU that is not NVIDIA's; empty if there is no sign of one."""
    if system == "darwin":
        return "Apple's GPU is not used: everything runs on the processor."
    if system == "linux" and Path("/dev/kfd").exists():
        return (
            "AMD's GPUs are not used by default: bitsandbytes has kernels for them, but this project was\n"
            "never tried on one. To try it:\n"
            f"    {python} -m pip install torch=={torch.split('+')[0]}+rocm7.2 --index-url {INDEX}/rocm7.2"
        )
    return ""

"""What every benchmark writes beside its figures: date, machine, commit, versions."""

import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"
CHECKOUT = Path(__file__).parent.parent
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "assets")]  # scripts of the repository import from here


def circumstances() -> dict[str, Any]:
    """Where and on what the figures were measured."""
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", *words], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout.strip()
    commit = git("describe", "--always")
    if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"):
        commit += "-dirty"  # by more than what measurements write
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "cpu": _cpu(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def save(name: str, figures: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"circumstances": circumstances(), **figures}, indent=1) + "\n")
    return path

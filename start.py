#!/usr/bin/env python3
"""Makes the environment, installs, and hands over to the command line: all that a fresh checkout needs.

    python start.py demo     fine-tune the embedded model on a set of tarot cards, and see the style arrive
    python start.py test     install the test tools and run the tests; more words go to pytest
    python start.py          open the page
    python start.py WORDS    the same as `qzo WORDS`; try --help

The environment is .venv beside this file, with the versions of constraints.txt; it is brought up to date only
when these have changed. Needs Python 3.11 or later and nothing else. (This file keeps to what Python 3.6 can
read, so that an older one gets as far as the sentence that says so.)
"""

import hashlib
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "start.json"
CONSTRAINTS = ROOT / "constraints.txt"
SIDE_BY_SIDE = ["-n", "logical", "--maxprocesses", "4", "--dist", "worksteal"]  # of tests: they share the cores


def too_old(version):
    """The sentence for a Python below 3.11; empty for the others."""
    if version >= (3, 11):
        return ""
    return (
        f"QZO Studio needs Python 3.11 or later, and this is {version[0]}.{version[1]} ({sys.executable}). "
        "Install a newer one from https://www.python.org/downloads/ or with your package manager, and start "
        "again with it, for instance: python3.12 start.py"
    )


class Failure(Exception):
    """Something that stops the start; its text says what, and what to do."""


def main(words):
    """Bring the environment up to date and hand over. Returns the exit code."""
    if too_old(sys.version_info[:2]):
        say(too_old(sys.version_info[:2]))
        return 2
    extras, command = plan(words)
    try:
        prepare(extras)
    except Failure as failure:
        say(str(failure))
        return 1
    except KeyboardInterrupt:
        say("\nStopped. The same command goes on with the installation.")
        return 130
    warn_of_idle_gpu()
    if words[:1] == ["test"]:
        os.chdir(str(ROOT))  # where pytest finds the tests
    return hand_over(command)


def plan(words):
    """What the words need: the extras of the package, and the arguments of the environment's Python."""
    if words[:1] == ["test"]:
        return {"app", "dev", "llm"}, ["-m", "pytest", *SIDE_BY_SIDE, *words[1:]]
    # -P: what lies in the current folder must not shadow packages
    words = words or ["ui"]
    return {"app"} if words[0] == "ui" else set(), ["-P", "-m", "zo_engine", *words]


def hand_over(command, become=os.name == "posix"):
    """Become the environment's Python; on Windows, which cannot, wait for it and return its exit code."""
    command = [str(PYTHON), *command]
    if become:
        sys.stderr.flush()
        os.execv(command[0], command)
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            pass  # the child has got it too, and is saving its work


# The environment


def prepare(extras):
    """Make .venv and install into it what is not there yet. Raises Failure."""
    before = read_stamp()
    wanted = stamp(extras.union(before.get("extras", [])))
    if before == wanted and PYTHON.exists():
        return
    started = time.monotonic()
    if venv_version() != sys.version_info[:2]:
        make_venv()
    STAMP.unlink(missing_ok=True)  # an interrupted installation counts for nothing
    install_torch()
    install("installing the packages", "-e", editable(wanted["extras"]), "-c", str(CONSTRAINTS))
    compile_packages()
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted), encoding="utf-8")
    os.replace(temporary, STAMP)
    say(f"ready after {time.monotonic() - started:.0f} s\n")


def compile_packages():
    """Write the bytecode of all packages, on every core, which pip (see `install`) would do on one.

    What cannot be compiled, as templates, is left for whoever reads it; so the exit code says nothing.
    """
    title = "compiling the packages"
    say(title)
    watch(title, [str(PYTHON), "-m", "compileall", "-qq", "-j", "0", str(site_packages())])


def editable(extras):
    """This checkout with its extras, as pip wants it named."""
    return "{}[{}]".format(ROOT, ",".join(extras)) if extras else str(ROOT)


def stamp(extras):
    """All that the installation depends on; while it is what .venv/start.json says, nothing is installed."""
    files = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        files.update(path.read_bytes())
    return {
        "files": files.hexdigest(),
        "extras": sorted(extras),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]} {platform.machine()}",
        "root": str(ROOT),
    }


def read_stamp():
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def site_packages():
    return Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(VENV)}))


def venv_version():
    """(major, minor) of the Python in .venv, or None if there is no whole environment."""
    config = VENV / "pyvenv.cfg"
    if not (config.exists() and PYTHON.exists() and (site_packages() / "pip").exists()):
        return None
    text = config.read_text(encoding="utf-8")
    found = re.search(r"^version(?:_info)? *= *(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found.group(1)), int(found.group(2))) if found else None


def make_venv():
    say("making .venv for Python {}.{}".format(*sys.version_info[:2]))
    code, lines = watch("making .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
    if code:
        shutil.rmtree(VENV, ignore_errors=True)
        raise Failure(failure_text("The environment could not be made.", lines))


def install_torch():
    """torch first, in the build that fits this machine; one that is there already and fits is left alone."""
    from zo_engine import gpu  # standard library only, as this file

    version = torch_pin(CONSTRAINTS.read_text(encoding="utf-8"))
    cards = gpu.cards()
    if cards:
        obstacle = "" if gpu.build(cards[0]) else f", but {gpu.obstacle(cards[0])}"
        say(f"found an {cards[0].name}{obstacle}")
    elif gpu.others(version, str(PYTHON)):
        say(gpu.others(version, str(PYTHON)))
    tag = torch_tag(gpu.build(cards[0]) if cards else None, sys.platform)
    there, on_gpu = torch_build()
    if there.split("+")[0] == version and (on_gpu or tag in (None, "cpu")):
        return
    if tag:
        wheel, index = f"torch=={version}+{tag}", f"{gpu.INDEX}/{tag}"
        try:
            # Nothing else from that index: what torch needs comes with the packages, from the usual one.
            return install(f"installing {wheel}", wheel, "--no-deps", "--extra-index-url", index)
        except Failure as failure:
            if "No matching distribution found for torch" not in str(failure):
                raise
            say(f"{wheel} cannot be had from {index}; taking the build of the usual index instead")
    install(f"installing torch {version}", "torch", "-c", str(CONSTRAINTS))


def torch_pin(constraints):
    return re.search(r"^torch==([^\s;+]+)", constraints, re.MULTILINE).group(1)


def torch_tag(cuda, system):
    """The build of torch to ask for, given the one for the card: `cu130`, `cpu`, or None for PyPI's.

    PyPI's build has CUDA 13 on Linux, gigabytes that a machine without a card can spare itself, and none on
    Windows and macOS.
    """
    if system == "darwin":
        return None
    return cuda or ("cpu" if system == "linux" else None)


def torch_build():
    """Version of the torch in .venv ("" if none), and whether it was built for a GPU; read, not imported."""
    packages = site_packages()
    if not list(packages.glob("torch-[0-9]*.dist-info/RECORD")):  # pip writes it last
        return "", False
    return parse_build((packages / "torch" / "version.py").read_text(encoding="utf-8"))


def parse_build(text):
    version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.MULTILINE)
    on_gpu = re.search(r"^(cuda|hip|xpu)\b[^=\n]*=\s*'", text, re.MULTILINE)
    return (version.group(1) if version else "", on_gpu is not None)


def warn_of_idle_gpu():
    """Say so, and what to do, if there is an NVIDIA card and a torch that cannot see it."""
    version, on_gpu = torch_build()
    if version and not on_gpu and sys.platform != "darwin":
        from zo_engine import gpu

        for card in gpu.cards()[:1]:
            say(gpu.advice(card, version, str(PYTHON)) + "\n")


# pip, and what it says


def install(title, *words):
    """pip install. Raises Failure with pip's last words and what to do."""
    say(title)
    pip = [str(PYTHON), "-m", "pip", "install", "--no-compile", "--progress-bar", "off", "--no-input"]
    code, lines = watch(title, pip + list(words))
    if code:
        raise Failure(failure_text("The installation failed.", lines))


def watch(title, command):
    """Run a command and show how it goes. Returns its exit code and its lines.

    On a terminal one line that keeps changing, with the seconds; elsewhere a line for each package.
    """
    environment = dict(os.environ, PYTHONIOENCODING="utf-8", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_USER="0")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    arrived = queue.Queue()

    def read():
        for raw in child.stdout:
            arrived.put(raw.decode("utf-8", "replace").rstrip())
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    started, lines, doing = time.monotonic(), [], title
    try:
        while True:
            try:
                line = arrived.get(timeout=1)
            except queue.Empty:
                line = ""  # nothing new, but a second has gone by
            if line is None:
                break
            if line:
                lines.append(line)
            before, doing = doing, condense(line) or doing
            text = f"  [{time.monotonic() - started:4.0f} s] {doing}"
            if sys.stderr.isatty():
                rewrite(text)
            elif doing != before:
                say(text)
        return child.wait(), lines
    except KeyboardInterrupt:
        child.wait()  # it has got the signal as well
        raise
    finally:
        if sys.stderr.isatty():
            rewrite("")


def condense(line):
    """What a line of pip's tells about the progress, in a few words; empty if nothing."""
    for pattern, words in (
        (r"\s*Collecting ([A-Za-z0-9._-]+)", "{}"),
        (r"\s*Processing (?:\S*/)?([^/\s-]+)-\S+\.whl", "{}"),
        (r"\s*Downloading (?:\S*/)?([^/\s-]+-[^/\s-]+)\S* \(([\d.]+ [MG]B)\)", "downloading {}: {}"),
        (r"\s*Installing build dependencies", "preparing this project"),
    ):
        found = re.match(pattern, line)
        if found:
            return words.format(*found.groups())
    if line.startswith("Installing collected packages: "):
        names = line.split(": ", 1)[1].split(", ")
        return "unpacking " + (names[0] if len(names) == 1 else f"{len(names)} packages")
    return ""


def failure_text(title, lines):
    """The last lines of what failed, and one sentence of what to do."""
    last = [line for line in lines if line.strip()][-10:]
    return "\n".join([title, *("    " + line for line in last), remedy("\n".join(lines))])


def remedy(output):
    """What to do about a failed installation, from what it said; the first cause that fits."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    causes = {
        r"No space left on device|Errno 28\b|not enough space on the disk|WinError 112\b": (
            f"The disk is full: {ROOT} has {shutil.disk_usage(ROOT).free / 1e9:.1f} GB left. Make room and start again."
        ),
        r"ensurepip is not|No module named '?(venv|ensurepip)|ensurepip.*non-zero": (
            "This Python cannot make environments: on Debian and Ubuntu `sudo apt install python3-venv` (or "
            f"python{python}-venv) adds what is missing; elsewhere take https://www.python.org/downloads/."
        ),
        r"Permission denied|Access is denied|Errno 13\b|WinError (5|32)\b|Read-only file system": (
            f"A file may not be written: close what uses {VENV}, and see that the folder is yours."
        ),
        r"NewConnectionError|NameResolutionError|Name or service not known|getaddrinfo failed|"
        r"Network is unreachable|ConnectTimeout|ReadTimeout|Read timed out|ConnectionResetError|ProxyError|"
        r"SSLError|IncompleteRead|ProtocolError": (
            "The package index could not be reached: connect to the internet (or set HTTPS_PROXY or "
            "PIP_INDEX_URL, where a company has its own) and start again; what has arrived is kept."
        ),
        r"No matching distribution found": (
            f"There is no build for Python {python} on {platform.system()} {platform.machine()}: take a "
            "64-bit Python 3.11 to 3.14 (for Macs with Intel processors, torch is no longer made)."
        ),
    }
    for pattern, sentence in causes.items():
        if re.search(pattern, output):
            return sentence
    return f"Start again; if it fails in the same way, delete {VENV} and start once more."


def say(text):
    """To the error stream, so that what a command prints can still be piped on."""
    print(text, file=sys.stderr, flush=True)


def rewrite(text):
    """Replace the one changing line of a terminal."""
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write("\r" + text[:width].ljust(width) + ("" if text else "\r"))
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

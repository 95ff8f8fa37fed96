"""start.py: it must reach every machine, so its parts are held to what people would see there. No network."""

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest

import start
from zo_engine import gpu

ROOT = Path(start.__file__).parent
posix_only = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")

RTX_4090 = gpu.Card("NVIDIA GeForce RTX 4090", 581, (8, 9))


# What is asked for


def test_words_become_a_command():
    assert start.plan(["demo", "--seed", "3"]) == (set(), ["-P", "-m", "zo_engine", "demo", "--seed", "3"])
    assert start.plan([]) == start.plan(["ui"]) == ({"app"}, ["-P", "-m", "zo_engine", "ui"])
    tests = ["-m", "pytest", *start.SIDE_BY_SIDE, "-k", "noise"]
    assert start.plan(["test", "-k", "noise"]) == ({"app", "dev", "llm"}, tests)


def test_an_old_python_can_read_the_file_and_is_told_so():
    ast.parse((ROOT / "start.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    assert "needs Python 3.11 or later, and this is 3.8" in start.too_old((3, 8))
    assert not start.too_old((3, 11)) and not start.too_old((3, 14))


def test_needs_only_the_standard_library():
    """-S leaves out site-packages: a bare Python. zo_engine.gpu is what start.py asks before installing."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import start, zo_engine.gpu"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


# What is installed


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what start.py looks at, with an environment that is made by hand and holds no packages."""
    for name in ("start.py", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "zo_engine").mkdir()
    (tmp_path / "zo_engine/__init__.py").touch()
    (tmp_path / "zo_engine/gpu.py").write_bytes((ROOT / "zo_engine/gpu.py").read_bytes())
    for name, place in {
        "ROOT": "",
        "VENV": ".venv",
        "STAMP": ".venv/start.json",
        "CONSTRAINTS": "constraints.txt",
    }.items():
        monkeypatch.setattr(start, name, tmp_path / place)
    monkeypatch.setattr(start, "PYTHON", tmp_path / ".venv" / start.PYTHON.relative_to(ROOT / ".venv"))
    venv.create(tmp_path / ".venv", with_pip=False, symlinks=os.name == "posix")
    (start.site_packages() / "pip").mkdir()
    (start.site_packages() / "checkout.pth").write_text(f"{tmp_path}\n")
    start.STAMP.write_text(json.dumps(start.stamp(set())))
    return tmp_path


@pytest.fixture
def installed(monkeypatch):
    """Instead of pip: the arguments it would have got."""
    calls = []
    monkeypatch.setattr(start, "install", lambda title, *words: calls.append(words))
    monkeypatch.setattr(gpu, "cards", lambda: [])
    return calls


def test_nothing_is_installed_twice(checkout, installed):
    start.prepare(set())
    assert installed == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_is_installed_once(checkout, installed, name):
    with open(checkout / name, "a") as file:
        file.write("\n# changed\n")
    start.prepare(set())
    assert installed[-1][:2] == ("-e", str(checkout))
    installed.clear()
    start.prepare(set())
    assert installed == []


def test_extras_are_added_and_stay(checkout, installed):
    start.prepare({"dev"})
    assert installed[-1][:2] == ("-e", f"{checkout}[dev]")
    start.prepare({"app"})
    assert installed[-1][:2] == ("-e", f"{checkout}[app,dev]")
    installed.clear()
    start.prepare({"dev"})
    start.prepare(set())
    assert installed == []


def test_what_is_installed_is_compiled(checkout, installed):
    (start.site_packages() / "package.py").write_text("a = 1\n")
    (start.site_packages() / "template.py").write_text("{{ a }} =\n")  # which is no reason to fail
    start.prepare({"dev"})
    compiled = [path.name.partition(".")[0] for path in (start.site_packages() / "__pycache__").iterdir()]
    assert compiled == ["package"]


def test_a_failed_installation_is_tried_again(checkout, installed, monkeypatch):
    def fail(title, *words):
        raise start.Failure("no network")

    monkeypatch.setattr(start, "install", fail)
    with pytest.raises(start.Failure):
        start.prepare({"dev"})
    assert start.read_stamp() == {}


def test_a_damaged_stamp_counts_for_nothing(checkout, installed):
    start.STAMP.write_text('{"files": ')
    start.prepare(set())
    assert installed and start.read_stamp() == start.stamp(set())


def test_only_a_whole_environment_of_this_python_is_kept(checkout):
    assert start.venv_version() == sys.version_info[:2]
    config = checkout / ".venv/pyvenv.cfg"
    config.write_text(config.read_text().replace(f"version = 3.{sys.version_info[1]}", "version = 3.10"))
    assert start.venv_version() == (3, 10)
    (start.site_packages() / "pip").rmdir()  # as when making it was interrupted
    assert start.venv_version() is None


# Which torch


@pytest.mark.parametrize(
    ("capability", "driver", "system", "tag"),
    [
        ((8, 9), 580, "win32", "cu130"),
        ((12, 0), 590, "linux", "cu130"),
        ((8, 9), 550, "linux", "cu126"),  # the driver is too old for CUDA 13
        ((6, 1), 580, "linux", "cu126"),  # CUDA 13 has left Pascal behind
        (None, 580, "linux", "cu130"),
        ((8, 6), 527, "linux", "cu126"),
        ((8, 6), 527, "win32", None),
        ((12, 0), 570, "linux", None),  # CUDA 12.6 does not know Blackwell
        ((5, 2), 580, "linux", None),
        (None, 0, "linux", None),
    ],
)
def test_build_of_torch_for_a_card(capability, driver, system, tag):
    assert gpu.build(gpu.Card("card", driver, capability), system) == tag


def test_build_of_torch_without_a_card():
    assert start.torch_tag(None, "linux") == "cpu"
    assert start.torch_tag(None, "win32") is None
    assert start.torch_tag("cu130", "win32") == "cu130"
    assert start.torch_tag(None, "darwin") is None


def test_torch_is_installed_first_and_in_the_build_for_the_card(checkout, installed, monkeypatch):
    monkeypatch.setattr(gpu, "cards", lambda: [RTX_4090])
    monkeypatch.setattr(sys, "platform", "linux")
    start.prepare({"dev"})
    version = start.torch_pin((checkout / "constraints.txt").read_text())
    assert installed[0] == (f"torch=={version}+cu130", "--no-deps", "--extra-index-url", f"{gpu.INDEX}/cu130")
    assert installed[1][:2] == ("-e", f"{checkout}[dev]")


@pytest.mark.parametrize(
    ("local", "cuda", "cards", "kept"),
    [("+cpu", "None", [], True), ("+cpu", "None", [RTX_4090], False), ("+cu126", "'12.6'", [RTX_4090], True)],
)
def test_a_torch_that_fits_is_left_alone(checkout, installed, monkeypatch, local, cuda, cards, kept):
    monkeypatch.setattr(gpu, "cards", lambda: cards)
    version = start.torch_pin((checkout / "constraints.txt").read_text())
    put_torch(version + local, cuda)
    start.install_torch()
    assert (installed == []) == (kept or sys.platform == "darwin")


def test_without_the_index_of_torch_the_usual_one_is_taken(checkout, installed, monkeypatch):
    def only_pypi(title, *words):
        if "--extra-index-url" in words:
            raise start.Failure("ERROR: No matching distribution found for torch==2.13.0+cu130")
        installed.append(words)

    monkeypatch.setattr(start, "install", only_pypi)
    monkeypatch.setattr(gpu, "cards", lambda: [RTX_4090])
    start.install_torch()
    assert installed == [("torch", "-c", str(checkout / "constraints.txt"))]


def put_torch(version, cuda, whole=True):
    """What torch_build looks at, as torch's own build and pip write it."""
    info = start.site_packages() / f"torch-{version}.dist-info"
    for folder in (info, start.site_packages() / "torch"):
        folder.mkdir()
    text = f"__version__ = '{version}'\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = None\n"
    (start.site_packages() / "torch/version.py").write_text(text)
    if whole:
        (info / "RECORD").touch()


def test_a_half_installed_torch_counts_for_nothing(checkout):
    assert start.torch_build() == ("", False)
    put_torch("2.13.0+cu130", "'13.0'", whole=False)
    assert start.torch_build() == ("", False)


def test_reads_the_build_of_the_real_torch():
    """The text that torch_build reads is not an interface: this sees it change."""
    import torch

    assert list(Path(torch.__file__).parent.parent.glob("torch-[0-9]*.dist-info/RECORD"))
    text = Path(torch.version.__file__).read_text()
    assert start.parse_build(text) == (torch.__version__, bool(torch.version.cuda or torch.version.hip))


def test_an_idle_card_is_explained(checkout, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "cards", lambda: [RTX_4090])
    monkeypatch.setattr(sys, "platform", "linux")
    put_torch("2.13.0+cpu", "None")
    start.warn_of_idle_gpu()
    said = capsys.readouterr().err
    assert "The GPU is not used: there is an NVIDIA GeForce RTX 4090" in said
    assert "-m pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130" in said


def test_a_card_that_is_used_is_not_spoken_of(checkout, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "cards", lambda: [RTX_4090])
    put_torch("2.13.0+cu130", "'13.0'")
    start.warn_of_idle_gpu()
    assert capsys.readouterr().err == ""


def test_advice_names_the_obstacle():
    assert "driver" in gpu.advice(gpu.Card("NVIDIA L4", 470, (8, 9)), "2.13.0+cpu", "python")
    assert "compute capability 5.2" in gpu.advice(gpu.Card("NVIDIA GTX 970", 580, (5, 2)), "2.13.0+cpu", "python")


def test_reads_what_nvidia_smi_says():
    table = "NVIDIA L4, 580.95.05, 8.9\nNVIDIA GeForce GTX 1080, 535.183.01, 6.1\n"
    assert gpu.parse(table) == [
        gpu.Card("NVIDIA L4", 580, (8, 9)),
        gpu.Card("NVIDIA GeForce GTX 1080", 535, (6, 1)),
    ]
    assert gpu.parse("Tesla K80, 470.82\n") == [gpu.Card("Tesla K80", 470, None)]
    assert gpu.parse("NVIDIA X, [N/A], [N/A]\n") == [gpu.Card("NVIDIA X", 0, None)]


# What is said


@pytest.mark.parametrize(
    ("line", "news"),
    [
        ("Collecting torch==2.13.0", "torch"),
        (
            "  Downloading torch-2.13.0-cp311-cp311-win_amd64.whl (118.3 MB)",
            "downloading torch-2.13.0: 118.3 MB",
        ),
        ("  Downloading https://host/a/b-1.tar.gz (1.1 GB)", "downloading b-1.tar.gz: 1.1 GB"),
        ("  Downloading click-8.5.1-py3-none-any.whl (108 kB)", ""),
        ("Processing /wheels/torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl", "torch"),
        ("Installing collected packages: mpmath, urllib3, typing-extensions, tqdm", "unpacking 4 packages"),
        ("Installing collected packages: torch", "unpacking torch"),
        ("Requirement already satisfied: torch in ./lib", ""),
    ],
)
def test_progress_in_a_few_words(line, news):
    assert start.condense(line) == news


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk is full"),
        (
            "[Errno -2] Name or service not known\nERROR: No matching distribution found for torch",
            "connect to",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "64-bit Python 3.11 to 3.14"),
        ("was not created successfully because ensurepip is not\navailable.", "apt install python3-venv"),
        ("ERROR: Could not install packages: [WinError 5] Access is denied", "close what uses"),
        ("Segmentation fault", "start once more"),
    ],
)
def test_a_failure_says_what_to_do(output, words):
    text = start.failure_text("The installation failed.", output.split("\n"))
    assert text.startswith("The installation failed.\n    ") and words in text.splitlines()[-1]


def test_watch_returns_the_code_and_the_lines(capfd):
    code = "print('Collecting torch==2.13.0'); print('ERROR: no'); raise SystemExit(4)"
    assert start.watch("trying", [sys.executable, "-c", code]) == (
        4,
        ["Collecting torch==2.13.0", "ERROR: no"],
    )
    assert capfd.readouterr().err == "  [   0 s] torch\n"


# Handing over


def put_command_line(checkout, code):
    (checkout / "zo_engine/__main__.py").write_text(textwrap.dedent(code))


@pytest.mark.parametrize("become", [False, pytest.param(True, marks=posix_only)])
def test_words_and_exit_code_are_passed_on(checkout, become):
    put_command_line(checkout, "import sys; print('given', *sys.argv[1:]); sys.exit(7)")
    code = f"import start; raise SystemExit(start.hand_over(start.plan(['demo', '--x'])[1], become={become}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "given demo --x\n", "")


def test_a_second_start_only_hands_over(checkout, tmp_path):
    put_command_line(checkout, "import os, sys; print(os.getcwd()); sys.exit(3)")
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, str(checkout / "start.py"), "demo"]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path / 'elsewhere'}\n", "")


@posix_only
@pytest.mark.parametrize("become", [False, True])
def test_ctrl_c_waits_for_the_child_to_save(checkout, become):
    put_command_line(
        checkout,
        """
        import sys, time
        try:
            print("ready", flush=True)
            time.sleep(30)
        except KeyboardInterrupt:
            time.sleep(0.2)
            print("saved")
            sys.exit(130)
        """,
    )
    code = (
        "import signal, start; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a suite run in the background ignores it
        f"raise SystemExit(start.hand_over(start.plan(['demo'])[1], become={become}))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of the group
    assert child.communicate(timeout=20) == ("saved\n", "") and child.returncode == 130

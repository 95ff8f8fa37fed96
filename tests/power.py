"""What a power cut leaves of what a process wrote: what was flushed, and of the rest whatever chance would have it.

A file's contents are safe once the file was flushed (fsync), its name once the folder was: POSIX promises no more. This
notes both while a process writes, and at the cut makes the folder what it may then look like: names that were not
flushed are the old ones or the new, contents that were not flushed are there in part, or not at all.
"""

import os
import random
import shutil
from pathlib import Path


class Disk:
    """Files below `root`; what is there at the beginning is safe, and so is what this never hears of."""

    def __init__(self, root: str, seed: object = 0):
        self.root, self.random = root, random.Random(f"power {seed}")
        self.ids: dict[str, int] = {}  # path -> which file it names now
        self.safe: dict[int, bytes] = {}  # file -> its contents at the last flush
        self.names: dict[str, int | None] = {}  # path -> the file that it names after a cut; None: no file
        self.folders: set[str] = set()  # made or renamed, and not flushed yet
        self.count = 0

    def opening(self, path: str) -> None:
        """A file is about to be opened for writing, or replaced."""
        there = os.path.isfile(path)
        if path.startswith(self.root) and (path not in self.ids or not there):
            number = self.ids[path] = self._new()
            if there:
                self.safe[number] = Path(path).read_bytes()
            self.names.setdefault(path, number if there else None)

    def flushed(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.startswith(self.root):
            return
        if not os.path.isdir(path):
            self.opening(path)
            self.safe[self.ids[path]] = Path(path).read_bytes()
            return
        self.folders = {folder for folder in self.folders if os.path.dirname(folder) != path}
        for name in self.names:
            if os.path.dirname(name) == path:
                self.names[name] = self.ids[name] if os.path.exists(name) else None

    def made(self, folder: str) -> None:
        if folder.startswith(self.root):
            self.folders.add(folder)

    def replacing(self, source: str, target: str) -> None:
        """A file, or a folder with all in it, is about to get another name."""
        if not target.startswith(self.root):
            return
        if os.path.isdir(source):
            for old in [os.path.join(at, file) for at, _, files in os.walk(source) for file in files]:
                new = target + old.removeprefix(source)
                self.ids[new] = self.names[new] = self.ids.pop(old, None) or self._new()
                self.names.pop(old, None)
            self.folders = {f for f in self.folders if not f.startswith(source)} | {target}
        else:
            self.opening(source)
            self.opening(target)
            self.ids[target] = self.ids.pop(source)
            self.names.pop(source, None)  # a temporary name is nobody's loss

    def cut(self) -> None:
        """The power goes: the files below `root` become what is left."""
        chance = self.random.random
        for path, safe in self.names.items():
            now = self.ids.get(path) if os.path.isfile(path) else None
            number = safe if chance() < 0.5 else now
            there = Path(path).read_bytes() if now else b""
            Path(path).unlink(missing_ok=True)
            if number is None:
                continue
            content = self.safe.get(number, b"")
            if number == now and chance() < 0.5:
                least = len(content) if there.startswith(content) else 0
                content = there[: self.random.randint(least, len(there))] if there != content else there
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)
        for folder in self.folders:
            if chance() < 0.5:
                shutil.rmtree(folder, ignore_errors=True)

    def _new(self) -> int:
        self.count += 1
        return self.count

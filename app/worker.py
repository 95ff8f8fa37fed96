"""Waits for the device, then becomes the command line: `python -m app.worker LOCKFILE HELD WORDS...`.

The lock is the kernel's and passes to the command line with the process, so it is free again however that ends, and
a run that waits goes on waiting when the page is closed or killed. Whoever starts the worker may hand it the lock
(`taken`, and HELD is its descriptor): then nobody who comes later is faster. Imports nothing heavy.
"""

import os
import subprocess
import sys
from pathlib import Path

WAITING = "waiting for the device: another run has it"


def taken(lock: Path) -> int | None:
    """A descriptor that holds the lock, to be inherited; None where another process has it, or on Windows."""
    if os.name != "posix":
        return None
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def main(lock: str, held: str, *words: str) -> int:
    """Take the lock, however long that takes, unless it is `held`, and run `python -m zo_engine WORDS`."""
    command = [sys.executable, "-m", "zo_engine", *words]
    Path(lock).parent.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        from filelock import FileLock, Timeout

        held = FileLock(lock)
        try:
            held.acquire(timeout=0)
        except Timeout:
            print(WAITING, flush=True)
            held.acquire()
        return subprocess.call(command)
    import fcntl

    descriptor = int(held) if held else taken(Path(lock))
    if descriptor is None:
        print(WAITING, flush=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.set_inheritable(descriptor, True)
    print("starting", flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Waits for the device, then becomes the command line: `python -m app.worker LOCKFILE WORDS...`.

The lock is the kernel's and passes to the command line with the process, so it is free again however that ends, and
a run that waits goes on waiting when the page is closed or killed. Imports nothing heavy.
"""

import os
import subprocess
import sys
from pathlib import Path

WAITING = "waiting for the device: another run has it"


def main(lock: str, *words: str) -> int:
    """Take the lock, however long that takes, and run `python -m zo_engine WORDS`."""
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

    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(WAITING, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.set_inheritable(descriptor, True)
    print("starting", flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

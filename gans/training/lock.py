"""One run at a time in a folder, by a lock that the kernel takes away when the process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gans.common.files import missing, remove_empty

NAME = ".lock"


def check_folder(folder: Path) -> None:
    """NotADirectoryError where `folder` cannot be one, since something else has its name or that of one it is in."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(f"out {str(folder)!r} cannot be a folder: {str(path)!r} is something else")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process is inside with this folder, which is made. FileExistsError names the one that is.

    The lock is on the file `.lock`, which says whose it is and stays behind, unlocked. Where the file system has no
    locks, a line on stderr says so. What was made is taken away after an exception before anything else was written.
    """
    check_folder(folder)
    made = missing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Programs started inside do not inherit the file, so none of them can hold the lock longer than this process.
    with (folder / NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # a run that was refused took it away since it was opened
                raise BlockingIOError
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise FileExistsError(
                f"out {str(folder)!r} is in use by {owner}; wait for its end, stop it, or give another out"
            ) from error
        except OSError as error:
            print(f"{folder} cannot be locked ({error}): do not start a second run in it", file=sys.stderr)
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with suppress(OSError):  # a full disk is reported where it matters
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), owner.encode())
        try:
            yield
        except BaseException:
            if os.listdir(folder) == [NAME]:
                (folder / NAME).unlink()
                remove_empty(made)
            raise

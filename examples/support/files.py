"""Files that never exist in part, and folders that one run at a time writes to."""

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import psutil

from s3n_timm.files import replace_path, replacing_file, synchronize_to_disk

LOCK = ".lock"
HEARTBEAT = 60  # seconds between two signs of life of a lock; without one for ten times as long its owner is gone


# files


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader, or a crash, finds either the old content or the new one."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_folder(partial: Path, folder: Path) -> None:
    """Put a complete folder in the place of another, which is deleted."""
    for path in (*partial.rglob("*"), partial):
        synchronize_to_disk(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        replace_path(folder, old)
    try:
        replace_path(partial, folder)
    except OSError:
        if old.exists():
            replace_path(old, folder)
        raise
    synchronize_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


# locks


def _describe_process() -> dict[str, str | int | float]:
    return dict(host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time())


def _seconds_since_sign(lock: Path) -> float:
    """By the clock of the disk, which may be that of another machine."""
    probe = lock.with_name(f".partial-{os.getpid()}-{secrets.token_hex(4)}.lock")
    probe.touch()
    try:
        return probe.stat().st_mtime - lock.stat().st_mtime
    finally:
        probe.unlink()


def _give_signs(lock: Path, ended: Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(lock)


def _find_owner(lock: Path) -> str | None:
    """Who holds a lock, in words; None if that process has ended."""
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        host, pid, started = str(owner["host"]), int(owner["pid"]), float(owner["started"])
        silent = _seconds_since_sign(lock)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return "an unknown process"  # perhaps just being written
    if host == socket.gethostname():
        try:
            if abs(psutil.Process(pid).create_time() - started) > 1:
                return None  # another process got the same number
        except psutil.NoSuchProcess:
            return None
    elif silent > 10 * HEARTBEAT:
        return None
    return f"process {pid} on {host}"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder and keep other runs out of it until this block ends.

    Raises:
        ValueError: another run writes to the folder.
        OSError: the folder cannot be written.
    """
    lock = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock.exists() and _find_owner(lock) is None:  # left by a process that was killed
            _remove_stale(lock)
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        if not lock.exists():  # a file stands in the folder's place
            raise OSError(f"{folder} cannot be written: it, or a folder that it lies in, is a file.") from None
        raise ValueError(
            f"{folder} is being written by {_find_owner(lock) or 'another run'}: wait until it ends or choose another "
            f"folder. If that run is gone for certain, delete {lock}."
        ) from None
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}.") from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(_describe_process(), file)
    ended = Event()
    signs = Thread(target=_give_signs, args=(lock, ended), daemon=True)
    signs.start()
    try:
        for rest in folder.glob(".partial-*"):  # of writers that were killed
            rest.unlink(missing_ok=True)
        yield
    finally:
        ended.set()
        signs.join()
        lock.unlink(missing_ok=True)


def _remove_stale(lock: Path) -> None:
    """Remove a stale lock, but not one that another run has meanwhile put in its place."""
    aside = lock.with_name(f"{lock.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        lock.rename(aside)
    except FileNotFoundError:
        return
    if _find_owner(aside) is not None:
        os.link(aside, lock)
    aside.unlink()

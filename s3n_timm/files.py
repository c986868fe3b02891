"""Files that never exist in part."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def synchronize_to_disk(path: Path) -> None:
    """Return once the content of a file, or the entries of a folder, would survive a power failure.

    Does nothing on Windows, which synchronizes no folders, and only files that are open for writing.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# on Windows a file that another program has open, as a virus scanner has a new one, can't be replaced just then
PATIENCE = 5.0 if os.name == "nt" else 0.0


def replace_path(source: Path, target: Path) -> None:
    """Give a file or folder the name of another file, which it replaces, or a free name.

    Raises:
        OSError: it can't be done, on Windows after some seconds of trying.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.1)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary file to write to, which takes the place of `path` once it is complete and on disk."""
    # the name is this writer's own; the suffix stays, because some writers derive the format from it
    partial = path.with_name(f".partial-{os.getpid()}-{secrets.token_hex(4)}.{path.name}")
    partial.touch()
    mode = partial.stat().st_mode  # as the user's umask has it: safetensors makes files that only their owner can read
    try:
        yield partial
        synchronize_to_disk(partial)
        partial.chmod(mode)
        replace_path(partial, path)
        synchronize_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)

"""Files that never exist in part."""

import os
import secrets
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
        partial.replace(path)
        synchronize_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)

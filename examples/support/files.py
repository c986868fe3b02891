"""Files that are never there in part."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A file to write to that takes the place of `path` once it is whole."""
    partial = path.with_name(f".partial.{path.name}")  # the suffix stays: some writers look at it
    yield partial
    partial.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is either the old or the new one, whenever this process ends."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")

"""Packages that come with an extra of this one, such as `s3n_timm[train]`."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Imports within `with` that fail for want of a package say in one sentence which extra brings it.

    Raises:
        ImportError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"{error.name} is missing" if error.name else str(error)
        raise ImportError(f'{missing}: pip install "s3n_timm[{extra}]"', name=error.name) from error

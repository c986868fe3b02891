"""Imported first, this ends a script that lacks a package with one sentence. It needs nothing but Python itself."""

import sys
from pathlib import Path
from types import TracebackType

EXTRAS = {"demo.py": "demo", "export.py": "export"}  # all other scripts need "train", which these include


def _end_in_one_sentence(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not isinstance(error, ImportError):
        return _before(kind, error, traceback)
    script = Path(sys.argv[0]).name
    text = str(error)  # of s3n_timm, which names the extra, or of a package that is there and says what it lacks
    if isinstance(error, ModuleNotFoundError) and error.name:
        text = f'{error.name} is missing: pip install "s3n_timm[{EXTRAS.get(script, "train")}]"'
    print(f"{script}: {text}", file=sys.stderr)


_before, sys.excepthook = sys.excepthook, _end_in_one_sentence

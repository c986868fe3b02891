"""Progress of long loops: a bar on a terminal, now and then a line in a log."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between two lines of a log


class LogLines(tqdm):
    """A tqdm that writes a line at most every `LOG_INTERVAL` seconds, and one when it is closed."""

    monitor_interval = 0  # no thread: there is no bar to keep alive

    def __init__(self, *args: Any, **options: Any) -> None:
        self.due = time.monotonic() + LOG_INTERVAL
        # leave=False: close() would add an empty line to our own last one
        super().__init__(*args, **options | dict(leave=False, mininterval=0.5, miniters=1, smoothing=0))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and time.monotonic() >= self.due:
            self.write_line()

    def write_line(self) -> None:
        self.due = time.monotonic() + LOG_INTERVAL
        print(self, file=self.fp, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.write_line()
        super().close()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """`tqdm(iterable, **options)` on a terminal; where stderr is a file or a pipe, lines for a log.

    Args:
        iterable: what to count; without it call the result's `update` and `close`, as with tqdm.
        options: of tqdm.

    Returns:
        A tqdm: an iterable with `update`, `set_postfix` and `close`.
    """
    return (tqdm if sys.stderr.isatty() else LogLines)(iterable, **options)

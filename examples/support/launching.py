"""A script's beginning and end: processes, threads, signals, and errors that the user can mend."""

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing import resource_tracker, util
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from accelerate.utils.environment import get_cpu_distributed_information

RANKS = ("LOCAL_RANK", "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

# processes wait for what one of them does alone, such as verifying a data set; NCCL would give up after ten minutes
PATIENT = InitProcessGroupKwargs(timeout=timedelta(hours=3))


def refuse_lone_process() -> None:
    """Exit where `accelerate launch --cpu --num_processes N` started one process: it leaves the others to MPI.

    What it sets for more than one process is MASTER_ADDR, without a rank.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "ACCELERATE_MIXED_PRECISION" in \
        os.environ and "MASTER_ADDR" in os.environ
    if asked and not any(name in os.environ for name in RANKS):
        script = sys.argv[0]
        sys.exit(
            f"{Path(script).name}: several processes were asked for, but this one was started alone. On CPUs type "
            f"torchrun --nproc_per_node 2 {script} … instead of accelerate launch; for one process unset MASTER_ADDR."
        )


def share_cpus() -> None:
    """Tell Accelerate that the processes of torchrun run on CPUs if nothing else is there: each would train alone."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not (alone or os.environ.get("ACCELERATE_USE_CPU") or torch.accelerator.is_available()):
        os.environ["ACCELERATE_USE_CPU"] = "true"


def count_cores() -> int:
    """Cores for this process: those that it may run on, shared evenly among the processes of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // get_cpu_distributed_information().local_world_size)


def count_default_workers() -> int:
    """Data loading workers: a GPU needs all cores of its process, a CPU computes on half of them."""
    return max(1, min(count_cores(), 16) if torch.cuda.is_available() else count_cores() // 2)


def use_cpu_threads(threads: int | None, accelerator: Accelerator) -> None:
    """Give a process on a CPU its share of the cores: launchers leave it one thread."""
    if accelerator.device.type == "cpu":
        torch.set_num_threads(threads or count_cores())


def accept_any_encoding() -> None:
    """Print a substitute for characters that the terminal's encoding lacks, in place of ending in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def decide_together(decide: Callable[[], Any], accelerator: Accelerator) -> Any:
    """What the main process decides, for every process: files may look different to them.

    Raises:
        ValueError, OSError: deciding failed so.
    """
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = decide()
        except (ValueError, OSError) as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


class StopSignal:
    """Within `with`, SIGTERM and Ctrl-C end the process at once, and after `wait` they set a flag in place of it.

    A second Ctrl-C always ends it.

    Attributes:
        name: what asked this process to stop; None so far.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._waits = False

    def wait(self) -> None:
        """From here on there is something to lose, and someone who looks at `name`."""
        self._waits = True

    def __enter__(self) -> "StopSignal":
        kinds = signal.SIGTERM, signal.SIGINT  # SIGTERM is how a cluster announces that it takes the machine away
        self._before = {kind: signal.signal(kind, self._receive) for kind in kinds}
        return self

    def __exit__(self, *_: Any) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _receive(self, kind: int, _: FrameType | None) -> None:
        if kind == signal.SIGINT and (self.name is not None or not self._waits):
            raise KeyboardInterrupt
        self.name = "Ctrl-C" if kind == signal.SIGINT else signal.Signals(kind).name
        if not self._waits:
            sys.exit(f"{Path(sys.argv[0]).name}: ended by {self.name} before anything was learned.")


@functools.cache
def _kill_workers_at_exit() -> None:
    def kill() -> None:
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    util.Finalize(None, kill, exitpriority=0)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Hold back the signals of `StopSignal`; processes that start within never get them.

    A terminal and a cluster send them to every process of a run, workers of loaders included, and this process decides
    what follows. Forked workers have its handlers; those that are spawned, or come from a fork server, have none, but
    inherit what is held back. They are killed when this process ends: multiprocessing sends them a SIGTERM, which they
    never get, and waits.
    """
    if sys.platform == "win32":  # what a process is told to ignore, those that it starts ignore too
        console = ctypes.windll.kernel32
        console.SetConsoleCtrlHandler(None, True)
        try:
            yield
        finally:
            console.SetConsoleCtrlHandler(None, False)
        return
    resource_tracker.ensure_running()  # or its start, within, would release them
    _kill_workers_at_exit()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class DataError(Exception):
    """A batch could not be read."""


def reading(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; what fails in reading one, in a worker or here, becomes a `DataError`."""
    iterator, starting = iter(batches), True
    while True:
        try:
            with holding_signals() if starting else nullcontext():
                batch = next(iterator)
            starting = False
        except StopIteration:
            return
        except (ValueError, OSError) as error:
            # what a worker raised comes with its traceback as text, in which the message is last
            text = str(error).strip()
            text = text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
            raise DataError(text) from error
        yield batch


@contextmanager
def exiting_on(*kinds: type[BaseException]) -> Iterator[None]:
    """End with the message alone of errors that the user can mend, and of Ctrl-C; all others keep their traceback."""
    try:
        yield
    except (KeyboardInterrupt, *kinds) as error:
        text = str(error) or ("interrupted." if isinstance(error, KeyboardInterrupt) else type(error).__name__)
        sys.exit(f"{Path(sys.argv[0]).name}: {text}")

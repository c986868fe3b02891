"""Runs of train.py and evaluate.py in processes of their own, which go on where they were interrupted.

paper_tables.py and cub50.py plan runs; this file executes them and keeps a record of each beside its weights.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from support.files import replace_text

EXAMPLES = Path(__file__).parents[1]
STOPPING = threading.Event()  # set when this process is to end: its threads then end the processes they wait for


class Run(NamedTuple):
    """One training and one evaluation of its weights."""

    name: str
    seed: int
    folder: Path  # what train.py writes to
    train: list[str]
    evaluate: list[str]
    settings: dict[str, Any]  # what its metrics depend on

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def evaluation(self) -> Path:
        """The folder that evaluate.py writes to."""
        return Path(self.evaluate[self.evaluate.index("--output") + 1])


class RunError(Exception):
    """A process did not come to its end, or a folder holds another run; the message says which, and what to do."""


# what is there


def read_record(run: Run) -> dict[str, Any]:
    path = run.folder / "command.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else dict(settings={}, seconds=0)


def is_evaluated(run: Run) -> bool:
    return all((run.evaluation / name).is_file() for name in ("results.json", "predictions.csv"))


def is_done(run: Run) -> bool:
    return is_evaluated(run) and read_record(run)["settings"] == run.settings


def refuse_difference(run: Run) -> None:
    """Raise a RunError where the run's folder holds training with other settings."""
    if not any((run.folder / name).exists() for name in ("checkpoints", "last", "evaluation")):
        return
    then, now = read_record(run)["settings"], run.settings
    differing = [f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
                 for key in (*now, *(then.keys() - now)) if then.get(key) != now.get(key)]
    if differing:
        why = "; ".join(differing) if then else "it has no command.json"
        raise RunError(f"{run.folder} holds a run with other settings ({why}): choose another --output or delete it.")


# execution


def call(command: list[str], run: Run, tick: Callable[[float], None]) -> None:
    """Run a process with its output in the run's log; `tick` is called with the seconds so far, every few seconds."""
    path, started = run.folder / "log.txt", time.monotonic()
    environment = dict(PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8", TQDM_MININTERVAL="30", COLUMNS="120")
    with path.open("ab", buffering=0) as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        begin = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            while process.poll() is None and not STOPPING.is_set():
                try:
                    process.wait(timeout=2)
                except subprocess.TimeoutExpired:
                    tick(time.monotonic() - started)
        finally:  # whatever ends this process ends that one, which saves what it has
            if process.poll() is None:
                process.terminate()
                process.wait()
            tick(time.monotonic() - started)
    if process.returncode:
        said = path.read_bytes()[begin:].decode(errors="replace").replace("\r", "\n").splitlines()
        lines = "\n".join([f"  {line}" for line in said if line.strip()][-12:])
        raise RunError(f"{run} failed with exit status {process.returncode}; the end of {path}:\n{lines}")


def train(run: Run) -> None:
    """Train what is left to train."""
    results = run.folder / "results.json"  # the last thing that train.py writes
    if results.is_file():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    before = read_record(run)["seconds"]

    def record(seconds: float) -> None:
        content = dict(seconds=before + seconds, train=run.train, evaluate=run.evaluate, settings=run.settings)
        replace_text(run.folder / "command.json", json.dumps(content, indent=1))

    record(0.0)
    call(run.train, run, record)
    if not results.is_file():  # as after a SIGTERM
        raise RunError(f"{run} was stopped before its end: run the same command again to go on.")


def execute(run: Run) -> None:
    """Train and evaluate, or what of it is left."""
    train(run)
    if not is_evaluated(run):
        call(run.evaluate, run, lambda seconds: None)


def execute_all(chains: Iterable[Sequence[Run]], each: Callable[[Run], None], jobs: int = 1) -> None:
    """Call `each` for every run, `jobs` chains at a time; what it raises ends all of them.

    Args:
        chains: runs that must follow one another, because they share weights or one learns from another's.
        each: blocks until its run has ended; the run's work is in processes, so threads do to wait for them.
        jobs: how many chains run at a time.
    """
    def follow(chain: Sequence[Run]) -> None:
        try:
            for run in chain:
                if STOPPING.is_set():
                    return
                each(run)
        except BaseException:
            STOPPING.set()  # before this thread takes the next chain
            raise

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(follow, chain) for chain in chains]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            STOPPING.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            STOPPING.clear()


def exit_on_signals() -> None:
    """SIGINT and SIGTERM end this process by way of its `finally` clauses, which end the processes that it started."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, _: sys.exit(128 + number))

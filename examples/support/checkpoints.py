"""Checkpoints that are whole or don't count, and the state of a run that they hold beside Accelerate's."""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from support.files import replace_text
from timm.utils import ModelEmaV3

MANIFEST = "manifest.json"


class Progress:
    """How far training has come; saved with every checkpoint."""

    def __init__(self, ema: ModelEmaV3 | None) -> None:
        self.ema = ema
        self.epoch = 0  # epochs that are trained and evaluated
        self.updates = 0  # steps of the optimizer, which timm's schedulers are functions of
        self.loss = 0.0  # sum over the batches of the epoch that is under way
        self.best, self.best_epoch = -1.0, 0
        self.history: list[dict[str, float]] = []  # a row an epoch

    def state_dict(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "ema"}
        return state if self.ema is None else dict(state, ema=self.ema.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if self.ema is not None:
            self.ema.load_state_dict(state.pop("ema"))
        vars(self).update(state)


@contextmanager
def replacing(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A folder to write to that takes the place of `folder` once it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield partial
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def write_summary(path: Path, history: list[dict[str, float]]) -> None:
    """A CSV row an epoch, from the run's own state, so that a resumed run repeats none."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in history for name in row))  # an epoch need not be evaluated
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    replace_text(path, text.getvalue())


def _digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def list_checkpoints(output: Path) -> list[Path]:
    """Oldest first."""
    return sorted((output / "checkpoints").glob("update-*"), key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(
        output: Path,
        progress: Progress,
        trajectory: dict[str, Any],
        keep: int,
        accelerator: Accelerator,
) -> Path:
    """Write a checkpoint with a manifest of what belongs to it, and drop all but the last `keep`."""
    folder = output / "checkpoints" / f"update-{progress.updates}"
    with replacing(folder, accelerator) as partial:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {str(path.relative_to(partial)): _digest(path) for path in partial.rglob("*") if path.is_file()}
            manifest = dict(epoch=progress.epoch, updates=progress.updates, run=trajectory, sha256=files)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    if accelerator.is_main_process:
        for old in list_checkpoints(output)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def find_fault(folder: Path, trajectory: dict[str, Any]) -> str | None:
    """Say why a run can't go on from a checkpoint; None if it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, run = manifest["sha256"], manifest["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {MANIFEST}, so this script never finished writing it"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"it is torn: {name} is missing"
        if _digest(folder / name) != digest:
            return f"it is torn: {name} is not as it was written"
    for name in trajectory.keys() | run.keys():
        if trajectory.get(name) != run.get(name):
            return f"it belongs to another run: {name} was {run.get(name)!r} and is {trajectory.get(name)!r}"
    return None


def find_checkpoint(output: Path, resume: str | None, trajectory: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what was wrong with newer ones.

    Args:
        output: folder of the run.
        resume: None for none, `"auto"` for the newest that will do, or the path of one.
        trajectory: what the checkpoint and this run must have in common.

    Raises:
        ValueError: the path names no checkpoint of this run, or every checkpoint is refused.
    """
    if resume is None:
        return None, []
    if resume != "auto":
        fault = find_fault(Path(resume), trajectory)
        if fault is not None:
            raise ValueError(f"--resume {resume} is refused: {fault}; name another checkpoint.")
        return Path(resume), []
    refused = []
    for folder in reversed(list_checkpoints(output)):
        fault = find_fault(folder, trajectory)
        if fault is None:
            return folder, refused
        refused.append(f"Checkpoint {folder} is refused: {fault}.")
    if refused:
        raise ValueError(f"{' '.join(refused)} Choose another --output to start anew.")
    return None, []

"""Checkpoints: written atomically, verified by a manifest, and loaded without running code.

A checkpoint is trusted no further than the folder that it lies in: no file of it is unpickled but by
`torch.load(weights_only=True)`.
"""

import csv
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.files import replace_folder, replace_text
from support.launching import decide_together
from timm.utils import ModelEmaV3

from s3n_timm.images import is_of_system

MANIFEST, PROGRESS, EMA = "manifest.json", "progress.json", "ema.safetensors"

# flags that a resumed run may change although they change what it learns: the remedies for a loss that is not finite
REMEDIES = ("lr", "clip_grad", "warmup_epochs")


class Progress:
    """How far training has come; saved with every checkpoint.

    Attributes:
        epoch: epochs that are trained and, where one was due, evaluated.
        updates: steps of the optimizer, which timm's schedulers are functions of.
        loss: sum over the updates of the epoch that is under way.
        best: accuracy in % of the best epoch, -1 before there is one.
        best_epoch: number of that epoch, from 1.
        history: a row of metrics for each epoch.
    """

    def __init__(self) -> None:
        self.epoch, self.updates, self.loss = 0, 0, 0.0
        self.best, self.best_epoch = -1.0, 0
        self.history: list[dict[str, float]] = []

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `vars(progress)` gave.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        kinds = dict(epoch=int, updates=int, loss=(int, float), best=(int, float), best_epoch=int, history=list)
        if not isinstance(state, dict) or state.keys() != kinds.keys():
            raise ValueError(f"{PROGRESS} must have the fields {', '.join(kinds)}.")
        for name, kind in kinds.items():
            if not isinstance(state[name], kind):
                raise ValueError(f"{PROGRESS} has {name} {state[name]!r}.")
        vars(self).update(state)


# writing


class OutputError(OSError):
    """The output folder could not be written, in one sentence."""


@contextmanager
def explaining_output(folder: Path) -> Iterator[None]:
    """Turn what writers raise on a full or failing disk into `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        of_torch = isinstance(error, RuntimeError)  # torch.save raises it
        if isinstance(error, OutputError) or (of_torch and "PytorchStreamWriter" not in str(error)):
            raise
        place = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        reason = str(error).strip().splitlines()[0]
        free = shutil.disk_usage(place).free / 2**20
        raise OutputError(f"{folder} could not be written ({reason}); {free:.0f} MiB are free on that disk.") from error


@contextmanager
def replacing(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A temporary folder for all processes to write to, which takes the place of `folder` once it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")  # one run at a time writes here: see `claimed`
    with explaining_output(folder):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        yield partial
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            replace_folder(partial, folder)
        accelerator.wait_for_everyone()


def write_summary(path: Path, history: list[dict[str, float]]) -> None:
    """Write a CSV with a row for each epoch, from the run's own state, so that a resumed run repeats none."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in history for name in row))  # an epoch need not be evaluated
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with explaining_output(path):
        replace_text(path, text.getvalue())


def describe_images(splits: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Count and digest of each split's paths and labels, in order; None for a stream.

    A path counts from the folder that all images of a split lie in, so that a data set may move. An image without a
    path, in a Parquet file or drawn, counts by its content.
    """
    described: dict[str, dict[str, Any]] = {}
    for name, split in splits.items():
        if not isinstance(split, datasets.Dataset):
            described[name] = dict(count=None, sha256=None)
            continue
        rows = split.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
        paths: list[str] = []
        labels: list[int] = []
        for batch in rows.with_format("arrow").iter(1000):
            images = batch["image"].combine_chunks()
            for index, path in enumerate(pyarrow.compute.struct_field(images, "path").to_pylist()):
                content = images[index]["bytes"].as_py() if path is None else None
                paths.append(path.replace(os.sep, "/") if content is None else hashlib.sha256(content).hexdigest())
            labels += batch["label"].to_pylist()
        sha256 = hashlib.sha256()
        root = len(_common_folder(paths))
        for path, label in zip(paths, labels):
            sha256.update(json.dumps([path[root:], label]).encode())
        described[name] = dict(count=len(paths), sha256=sha256.hexdigest())
    return described


def _common_folder(paths: list[str]) -> str:
    first, last = min(paths), max(paths)
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:first.rfind("/", 0, length) + 1]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        sha256 = hashlib.sha256()
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def _list_files(folder: Path) -> dict[str, Path]:
    """Files of a checkpoint by name: without the manifest, and without a config.json by which timm loads the folder."""
    paths = (path for path in folder.rglob("*") if (not path.is_dir() or path.is_symlink())
             and not is_of_system(path.name))
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path for name, path in names.items() if name not in (MANIFEST, "config.json")}


def list_checkpoints(output: Path) -> list[Path]:
    """Folders named exactly `update-NUMBER`, oldest first; anything else there is the user's."""
    folders = (output / "checkpoints").glob("update-*")
    mine = [path for path in folders if re.fullmatch(r"update-(0|[1-9][0-9]*)", path.name) and path.is_dir()]
    return sorted(mine, key=_count_updates)


def _count_updates(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def save_checkpoint(
        output: Path,
        progress: Progress,
        ema: ModelEmaV3 | None,
        trajectory: dict[str, Any],
        keep: int,
        accelerator: Accelerator,
) -> None:
    """Write a checkpoint with a manifest of its files, and delete all but the last `keep`.

    Raises:
        OutputError: it could not be written.
    """
    folder = output / "checkpoints" / f"update-{progress.updates}"
    with replacing(folder, accelerator) as partial:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / PROGRESS).write_text(json.dumps(vars(progress)), encoding="utf-8")
            if ema is not None:
                tensors = {name: tensor.contiguous() for name, tensor in ema.module.state_dict().items()}
                save_file(tensors, partial / EMA)
            files = {name: _digest(path) for name, path in _list_files(partial).items()}
            manifest = dict(epoch=progress.epoch, updates=progress.updates, run=trajectory, sha256=files)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    if accelerator.is_main_process:
        for old in list_checkpoints(output)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)  # one that another program reads is tried again next time
    accelerator.wait_for_everyone()


def set_aside_diverged(output: Path, update: int, accelerator: Accelerator) -> None:
    """Rename the checkpoint whose next update's loss was not finite: no lower rate could save that update."""
    accelerator.wait_for_everyone()
    _set_aside(output / "checkpoints" / f"update-{update - 1}", "diverged", accelerator)


# reading


def find_fault(folder: Path, trajectory: dict[str, Any]) -> str | None:
    """Say why a run can't go on from a checkpoint; None if it can."""
    try:
        if not (folder / MANIFEST).is_file():  # reading a pipe would hang
            raise FileNotFoundError
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no readable {MANIFEST}, so it is no complete checkpoint of this script"
    files, run = (manifest.get(name) if isinstance(manifest, dict) else None for name in ("sha256", "run"))
    if not isinstance(files, dict) or not isinstance(run, dict):
        return f"its {MANIFEST} was not written by this script"
    found = _list_files(folder)
    for name in sorted(files.keys() | found.keys() | {PROGRESS}):
        if name not in found:
            return f"it is corrupt: {name} is missing"
        if name not in files:
            return f"it is corrupt: {name} is not in {MANIFEST}"
        if found[name].is_symlink() or not found[name].is_file():
            return f"it is corrupt: {name} is not a regular file"
        if _digest(found[name]) != files[name]:
            return f"it is corrupt: hash mismatch of {name}"
    for name in [name for name in {**trajectory, **run} if name not in REMEDIES]:
        was, now = run.get(name), trajectory.get(name)
        if was == now:
            continue
        if name == "images":
            return f"its images are not those of now: {_compare_images(was, now)}"
        return f"it belongs to another run: {name} was {was!r} and is {now!r}"
    return None


def _compare_images(was: Any, now: Any) -> str:
    if not isinstance(was, dict):
        return f"{MANIFEST} does not describe them"
    for split in {**now, **was}:
        before, after = was.get(split), now.get(split)
        if before == after:
            continue
        counts = [each.get("count") if isinstance(each, dict) else None for each in (before, after)]
        if counts[0] != counts[1]:
            return f"{split} had {counts[0]} and has {counts[1]}"
        return f"{split} has {counts[1]} as before, but paths, order or labels have changed"
    return ""


def list_changes(folder: Path, trajectory: dict[str, Any]) -> list[str]:
    """What a resumed run changes of the flags that it may change, as lines to print."""
    run = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run"]
    return [f"--{name.replace('_', '-')} was {run.get(name)} and is {trajectory.get(name)} from here on."
            for name in REMEDIES if run.get(name) != trajectory.get(name)]


def find_checkpoint(output: Path, resume: str | None, trajectory: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and lines to print: what was wrong with newer ones, and what changes.

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
        if Path(resume).resolve().parent != (output / "checkpoints").resolve():
            raise ValueError(f"--resume {resume} is refused: it is not of --output {output}. To leave a run as it is "
                             "and go on in another folder, copy the whole folder and name the copy in both flags.")
        return Path(resume), list_changes(Path(resume), trajectory)
    refused: list[str] = []
    for folder in reversed(list_checkpoints(output)):
        fault = find_fault(folder, trajectory)
        if fault is None:
            return folder, refused + list_changes(folder, trajectory)
        refused.append(f"Checkpoint {folder} is refused: {fault}.")
    if refused:
        raise ValueError(f"{' '.join(refused)} Choose another --output to start anew.")
    return None, [f"--resume: {output} has no checkpoint, so training starts from the beginning."]


def load_checkpoint(folder: Path, progress: Progress, ema: ModelEmaV3 | None, accelerator: Accelerator) -> None:
    """Bring model, optimizer, random states and progress back to a checkpoint that `find_fault` accepted.

    Raises:
        ValueError: its content does not fit, or a file holds more than tensors and numbers.
    """
    try:
        progress.load(json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
        if ema is not None:
            ema.module.load_state_dict(load_file(folder / EMA))
        accelerator.load_state(str(folder))  # Accelerate's own files, by weights_only=True
        accelerator.step = 0  # of micro-steps in an update, whose number may have changed; a checkpoint is between two
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Checkpoint {folder} cannot be loaded: {reason}") from error


def set_aside_newer(output: Path, progress: Progress, accelerator: Accelerator) -> list[Path]:
    """Rename the checkpoints after the one that a run goes on from, which a plain --resume would take; their new names.

    The best epoch is forgotten with them: `best/` may hold weights of what they belong to.
    """
    def find_newer() -> list[Path]:
        return [folder for folder in list_checkpoints(output) if _count_updates(folder) > progress.updates]

    newer = decide_together(find_newer, accelerator)
    aside = [_set_aside(folder, "abandoned", accelerator) for folder in newer]
    accelerator.wait_for_everyone()
    if newer:
        progress.best, progress.best_epoch = -1.0, 0
    return aside


def _set_aside(folder: Path, why: str, accelerator: Accelerator) -> Path:
    aside = folder.with_name(f"{why}-{folder.name}")
    if accelerator.is_main_process and folder.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return aside


def refuse_pickled_shards(accelerator: Accelerator) -> None:
    """Refuse FSDP's sharded checkpoints, whose metadata torch unpickles without restriction.

    Raises:
        ValueError: FSDP is set up to write them.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    full = torch.distributed.fsdp.StateDictType.FULL_STATE_DICT if plugin is not None else None
    if plugin is not None and plugin.state_dict_type != full:
        raise ValueError("Sharded checkpoints of FSDP are read by unpickling, which could run code: set "
                         "fsdp_state_dict_type: FULL_STATE_DICT, as examples/configs/fsdp.yaml does.")

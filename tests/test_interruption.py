"""Runs of examples/train.py that are killed, stopped or resumed from damaged checkpoints."""

import contextlib
import csv
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import train as script
from accelerate import Accelerator
from helpers import ENVIRONMENT, EXAMPLES, SMALL, Forked, train, weights
from PIL import Image
from safetensors.torch import load_file
from support import checkpoints, files, results

# three epochs of ten updates, the last of which find the partition changed and the averaged weights far from the live
ARGS = ("--num-images", 96, "--epochs", 3, "--checkpoint-every", 2, "--model-ema", "--model-kwargs",
        json.dumps(dict(partition_warmup_epochs=1)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    train(*ARGS, "--output", output)
    return output


def assert_same_end(ours, theirs):
    for kind in ("last", "ema", "best"):
        a, b = weights(ours, kind), weights(theirs, kind)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), kind
    assert (ours / "summary.csv").read_text() == (theirs / "summary.csv").read_text()
    assert json.loads((ours / "results.json").read_text())["test_top1"] == json.loads(
        (theirs / "results.json").read_text())["test_top1"]


def kill_when(output, seen):
    """Start or resume training and kill it, SIGKILL, as soon as `seen()` is true; whether it was still alive."""
    run = Forked("train.py", *SMALL, *ARGS, "--output", output, "--resume")
    while run.is_alive() and not seen():
        time.sleep(0.0005)
    alive = run.is_alive()
    run.kill()
    return alive


def test_killed_at_random_moments_and_while_saving_it_ends_as_if_nothing_had_been(whole, tmp_path):
    output, draw = tmp_path / "run", random.Random(0)
    folder = output / "checkpoints"

    def newest():
        return max((int(path.name.split("-")[1]) for path in folder.glob("update-*")), default=0)

    def saving(update):
        return lambda: any(folder.glob(f".update-{update}.partial/*"))

    assert kill_when(output, saving(4))  # in the middle of an epoch
    assert newest() == 2
    assert (folder / ".update-4.partial").is_dir()  # half of a checkpoint lies there and is not one
    assert kill_when(output, saving(10))  # after the first epoch
    for _ in range(2):
        since, wait = newest(), draw.uniform(0, 0.3)
        moment: list[float] = []

        def later(since=since, wait=wait, moment=moment):
            if newest() > since and not moment:
                moment.append(time.monotonic() + wait)
            return bool(moment) and time.monotonic() > moment[0]

        assert kill_when(output, later)
    assert not (output / "results.json").exists()
    text = train(*ARGS, "--output", output, "--resume", "--workers", 1)
    assert f"Resumed from {folder / 'update-'}" in text
    assert_same_end(output, whole)
    assert [path.name for path in sorted(folder.iterdir())] == ["update-28", "update-30"]


@pytest.mark.parametrize(("processes", "kind"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_ends_cleanly(tmp_path, processes, kind):
    args = ("--num-images", 96, "--epochs", 1, "--batch-size", 8 // processes, "--checkpoint-every", 1)
    train(*args, "--output", tmp_path / "whole", processes=processes)
    output = tmp_path / "run"
    run = Forked("train.py", *SMALL, *args, "--workers", 1, "--output", output, processes=processes)
    while run.is_alive() and not (output / "checkpoints" / "update-1").is_dir():
        time.sleep(0.01)
    for process in run.processes:
        started = psutil.Process(process.pid)
        children = started.children() if kind == signal.SIGINT else []  # to which a terminal sends it as well
        for each in (started, *children):
            each.send_signal(kind)
    text = run.end()
    assert "Traceback" not in text
    assert f"Stopped by {'Ctrl-C' if kind == signal.SIGINT else 'SIGTERM'}" in text
    assert not (output / "results.json").exists()
    newest = max(int(path.name.partition("-")[2]) for path in (output / "checkpoints").iterdir())
    assert 1 <= newest < 10
    train(*args, "--output", output, "--resume", processes=processes)
    ours, theirs = weights(output), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ctrl_c_leaves_spawned_workers_to_the_run(tmp_path):
    """A terminal sends it to all processes; workers start by spawn on macOS, from a fork server since Python 3.14."""
    code = "import multiprocessing, train; multiprocessing.set_start_method('spawn'); train.main()"
    args = ("--num-images", 96, "--epochs", 9, "--checkpoint-every", 2, "--workers", 1, "--output", tmp_path / "run")
    words = [sys.executable, "-c", code, *SMALL, *map(str, args)]
    environment = ENVIRONMENT | dict(PYTHONPATH=os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                          start_new_session=True) as run:
        while run.poll() is None and not (tmp_path / "run" / "checkpoints" / "update-2").is_dir():
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGINT)
        text, _ = run.communicate()
    assert run.returncode == 0, text
    assert "Traceback" not in text
    assert "Stopped by Ctrl-C" in text


def test_a_signal_before_training_ends_the_process_at_once(tmp_path, monkeypatch):
    def be_told(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(script, "load_splits", be_told)
    text = train("--output", tmp_path / "run", ok=False)
    assert "ended by SIGTERM before anything was learned" in text
    assert not list((tmp_path / "run").iterdir())


def test_a_signal_during_evaluation_ends_it_and_the_epoch_is_kept(tmp_path, monkeypatch):
    args = ("--num-images", 96, "--val-fraction", 0.5, "--epochs", 2, "--output")
    train(*args, tmp_path / "whole")
    batches = []

    def signalling(loader, **_):
        for batch in loader:
            if not batches:
                os.kill(os.getpid(), signal.SIGTERM)
            batches.append(batch)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(results, "show_progress", signalling)
        text = train(*args, tmp_path / "run")
    assert "Stopped by" in text
    assert len(batches) < 6  # of the validation images
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["update-6"]
    text = train(*args, tmp_path / "run", "--resume")
    assert "Resumed from" in text
    assert "after 0 epochs and 6 updates" in text
    a, b = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "run" / "summary.csv").read_text() == (tmp_path / "whole" / "summary.csv").read_text()


def test_a_signal_while_the_exported_backbone_is_tested_ends_the_run_without_results(tmp_path, monkeypatch):
    def signalling(loader, desc="", **_):
        for batch in loader:
            if desc == "test, backbone":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(results, "show_progress", signalling)
    assert "Stopped by SIGTERM" in train("--epochs", 1, "--output", tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def damage(kind, folder):
    if kind == "cut":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "changed":
        path = folder / "optimizer.bin"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif kind == "missing":
        (folder / "progress.json").unlink()
    elif kind == "added":
        (folder / "custom_checkpoint_0.pkl").write_bytes(b"")
    elif kind == "pipe":
        (folder / "optimizer.bin").unlink()
        os.mkfifo(folder / "optimizer.bin")
    elif kind == "foreign":
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["run"]["seed"] = 7
        path.write_text(json.dumps(manifest))
    else:
        (folder / "manifest.json").write_text(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "is corrupt: hash mismatch of model.safetensors"),
        ("changed", "is corrupt: hash mismatch of optimizer.bin"),
        ("missing", "is corrupt: progress.json is missing"),
        ("added", "is corrupt: custom_checkpoint_0.pkl is not in manifest.json"),
        ("pipe", "is corrupt: optimizer.bin is not a regular file"),
        ("foreign", "belongs to another run: seed was 7 and is 42"),
        ("{", "has no readable manifest.json"),
        ("[]", "its manifest.json was not written by this script"),
        ('{"sha256": [], "run": {}}', "its manifest.json was not written by this script"),
        ('{"sha256": {}, "run": null}', "its manifest.json was not written by this script"),
        ('{"sha256": {}, "run": {}}', "is corrupt: ema.safetensors is not in manifest.json"),
    ],
)
def test_damaged_checkpoint_is_refused_by_name(whole, tmp_path, kind, message):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    damage(kind, tmp_path / "checkpoints" / "update-30")
    held = json.loads((whole / "checkpoints" / "update-30" / "manifest.json").read_text())["run"]
    found, (line,) = checkpoints.find_checkpoint(tmp_path, "auto", held)
    assert found == tmp_path / "checkpoints" / "update-28"
    assert f"{tmp_path / 'checkpoints' / 'update-30'} is refused: it" in line
    assert message.removeprefix("it") in line


@pytest.mark.parametrize("name", [".DS_Store", "._progress.json", "desktop.ini", "Thumbs.db"])
def test_a_checkpoint_that_a_file_manager_opened_is_sound(whole, tmp_path, name):
    shutil.copytree(whole / "checkpoints" / "update-30", tmp_path / "checkpoints" / "update-30")
    (tmp_path / "checkpoints" / "update-30" / name).write_text("")
    held = json.loads((whole / "checkpoints" / "update-30" / "manifest.json").read_text())["run"]
    assert checkpoints.find_checkpoint(tmp_path, "auto", held) == (tmp_path / "checkpoints" / "update-30", [])


def test_the_checkpoint_before_a_damaged_one_is_used(whole, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "results.json").unlink()
    damage("cut", output / "checkpoints" / "update-30")
    text = train(*ARGS, "--output", output, "--resume")
    assert "update-30 is refused" in text
    assert f"Resumed from {output / 'checkpoints' / 'update-28'} after 2 epochs and 28 updates" in text
    assert_same_end(output, whole)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin",
                                  "pytorch_model.bin"])
def test_a_planted_checkpoint_runs_no_code(whole, tmp_path, name):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    planted, proof = output / "checkpoints" / "update-999", tmp_path / "proof"
    shutil.copytree(output / "checkpoints" / "update-28", planted)
    if name == "pytorch_model.bin":
        (planted / "model.safetensors").unlink()
    torch.save(Attack(proof), planted / name)
    manifest = json.loads((planted / "manifest.json").read_text())
    manifest["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                          for path in planted.iterdir() if path.name != "manifest.json"}
    (planted / "manifest.json").write_text(json.dumps(manifest))
    ends = name in ("scheduler.bin", "random_states_0.pkl")  # not read, or left as they are where they cannot be read
    text = train(*ARGS, "--output", output, "--resume", planted, ok=ends)
    assert not proof.exists()
    assert "Traceback" not in text
    assert ends or f"Checkpoint {planted} cannot be loaded" in text


def test_a_named_checkpoint_begins_another_course(whole, tmp_path):
    """Newer checkpoints are set aside, so that --resume goes on with the new one; the best weights are its own."""
    output = tmp_path / "run"
    args = ("--num-images", 96, "--epochs", 2, "--checkpoint-every", 5, "--checkpoint-hist", 3, "--output", output)
    train(*args)
    folder = output / "checkpoints"
    shutil.copy(output / "last" / "config.json", folder / "update-15")  # by which timm loads it (visualize.py)
    (output / "results.json").unlink()
    shutil.rmtree(output / "best")
    text = train(*args, "--lr", 1e-4, "--resume", folder / "update-15")
    assert "abandoned-update-20" in text
    assert sorted(path.name for path in folder.iterdir()) == [
        "abandoned-update-20", "update-10", "update-15", "update-20"]
    assert weights(output, "best").keys() == weights(output).keys()
    text = train(*args, "--output", tmp_path / "other", "--resume", folder / "update-15", ok=False)
    assert "is not of --output" in text


def test_an_update_divides_otherwise_in_mid_epoch(tmp_path):
    """Other batches and accumulation steps from a checkpoint with an odd number of updates on."""
    output = tmp_path / "run"
    args = ("--epochs", 1, "--freeze-bn", "--checkpoint-every", 3, "--checkpoint-hist", 9)
    train(*args, "--output", output)
    text = train(*args, "--output", output, "--resume", output / "checkpoints" / "update-3", "-b", 4,
                 "--grad-accum-steps", 2)
    assert "after 0 epochs and 3 updates" in text
    train(*args, "--output", tmp_path / "whole")
    ours, theirs = weights(output), weights(tmp_path / "whole")
    assert max((ours[name] - theirs[name]).abs().max() for name in ours if ours[name].is_floating_point()) < 1e-4


def test_checkpoints_of_another_run_are_refused(whole, tmp_path):
    text = train(*ARGS, "--momentum", 0.5, "--output", whole, "--resume", ok=False)
    assert "belongs to another run: momentum was 0.9 and is 0.5" in text
    assert "Traceback" not in text
    text = train(*ARGS, "--output", tmp_path / "run", "--resume", whole / "last", ok=False)
    assert f"--resume {whole / 'last'} is refused: it has no readable manifest.json" in text
    assert "Traceback" not in text


def test_a_finished_run_is_not_trained_again(whole):
    before = (whole / "last" / "model.safetensors").stat().st_mtime_ns
    assert "after 3 epochs and 30 updates" in train(*ARGS, "--output", whole, "--resume")
    assert (whole / "last" / "model.safetensors").stat().st_mtime_ns == before


def test_the_partition_phase_is_part_of_the_weights(whole):
    # the warm-up of one epoch lies behind them
    assert bool(load_file(whole / "last" / "model.safetensors")["partition_warm"])
    assert bool(load_file(whole / "ema" / "model.safetensors")["partition_warm"])


def test_a_loss_that_is_not_finite_is_never_saved_and_its_remedies_may_change(tmp_path):
    args = ("--epochs", 2, "--sched", "constant", "--checkpoint-every", 1, "--checkpoint-hist", 9, "--output",
            tmp_path / "run")
    text = train(*args, "--lr", 1e30, ok=False)
    update = int(text.partition("at update ")[2].partition(":")[0])
    assert "The loss became" in text
    assert "Traceback" not in text
    folders = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert f"update-{update}" not in folders
    assert f"update-{update - 1}" not in folders  # another rate could not save its next update
    assert f"diverged-update-{update - 1}" in folders
    for path in (tmp_path / "run" / "checkpoints").glob("update-*"):
        shutil.rmtree(path)
    train(*args, "--lr", 1e-3, "--resume", "--epochs", 1)
    text = train(*args, "--lr", 1e-4, "--clip-grad", 1, "--warmup-epochs", 1, "--resume")
    assert "--lr was 0.001 and is 0.0001 from here on" in text
    assert "--clip-grad was None and is 1.0" in text
    assert "--warmup-epochs was 1 and is" not in text
    with (tmp_path / "run" / "summary.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["lr"]) == pytest.approx(1e-4)


def write_images(root):
    for split, count in (("train", 8), ("test", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                color = (i * 30, 100 if split == "train" else 50, 200 if name == "a" else 0)
                Image.new("RGB", (70, 70), color).save(root / split / name / f"{i}.png")
    return root


def test_images_that_changed_are_refused_and_a_moved_folder_is_not(tmp_path):
    args = ("--dataset", "folder", "--recipe", "birds", "-b", 4, "--val-fraction", 0.25, "--output", tmp_path / "run")
    data = write_images(tmp_path / "data")
    train(*args, "--epochs", 1, "--data-dir", data)
    moved = data.rename(tmp_path / "moved")
    args = (*args, "--epochs", 2, "--data-dir", moved, "--resume")
    image = moved / "train" / "a" / "3.png"
    content = image.read_bytes()

    image.unlink()
    assert "its images are not those of now: train had 12 and has" in train(*args, ok=False)
    image.with_name("name.png").write_bytes(content)
    assert "but paths, order or labels have changed" in train(*args, ok=False)
    image.with_name("name.png").rename(image)
    Image.new("RGB", (70, 70), (1, 2, 3)).save(image.with_name("added.png"))
    assert "its images are not those of now: train" in train(*args, ok=False)
    image.with_name("added.png").unlink()
    assert "after 1 epochs" in train(*args)


def test_only_folders_named_as_ours_are_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("update-6-keep", "update-24 copy", "update-06", "update-x", "update-4", "update-24", "update-3"):
        (folder / name).mkdir(parents=True)
    (folder / "update-5").write_text("")
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["update-3", "update-4", "update-24"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Accelerator.save_state

    def save_on_a_full_disk(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return save(*args, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", save_on_a_full_disk)
    try:
        text = train("--epochs", 1, "--output", tmp_path / "run", ok=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "update-5 could not be written" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("failures", [2, 1000])
def test_a_name_that_another_program_holds_is_tried_again(tmp_path, monkeypatch, failures):
    """As on Windows, where a file that is being read can't be replaced."""
    replace, failed = Path.replace, []

    def replace_later(path, target):
        if path.name == "new" and len(failed) < failures:
            failed.append(path)
            raise PermissionError(13, "used by another process")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_later)
    monkeypatch.setattr("s3n_timm.files.PATIENCE", 0.3)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    if failures == 2:
        files.replace_folder(tmp_path / "new", tmp_path / "old")
    else:
        with pytest.raises(PermissionError):
            files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "content").read_text() == ("new" if failures == 2 else "old")


def lock(folder, **owner):
    folder.mkdir()
    (folder / files.LOCK).write_text(json.dumps(files._describe_process() | owner))


@pytest.mark.parametrize("owner", [{}, dict(host="elsewhere")], ids=["alive", "another host"])
def test_a_folder_that_another_run_writes_is_refused(tmp_path, owner):
    lock(tmp_path / "run", **owner)
    text = train("--epochs", 1, "--output", tmp_path / "run", ok=False)
    assert "is being written by process" in text
    assert [path.name for path in (tmp_path / "run").iterdir()] == [files.LOCK]


@pytest.mark.parametrize("owner", [dict(pid=2**22 + 1), dict(started=1.0)], ids=["dead", "number used again"])
def test_a_lock_whose_process_ended_is_taken_over(tmp_path, owner):
    lock(tmp_path / "run", **owner)
    (tmp_path / "run" / ".partial-1-abc.summary.csv").write_text("half")
    with files.claimed(tmp_path / "run"):
        with pytest.raises(ValueError, match="is being written by process"), files.claimed(tmp_path / "run"):
            pass
        assert [path.name for path in (tmp_path / "run").iterdir()] == [files.LOCK]
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_of_another_host_without_a_sign_of_life_is_taken_over(tmp_path, monkeypatch):
    lock(tmp_path / "run", host="elsewhere")
    old = time.time() - 11 * files.HEARTBEAT
    os.utime(tmp_path / "run" / files.LOCK, (old, old))
    monkeypatch.setattr(files, "HEARTBEAT", 0.05)
    with files.claimed(tmp_path / "run"):
        held = (tmp_path / "run" / files.LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / "run" / files.LOCK).stat().st_mtime_ns == held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "run" / files.LOCK).stat().st_mtime_ns > held
    assert not list((tmp_path / "run").iterdir())


def test_writers_of_one_file_have_partial_files_of_their_own(tmp_path):
    path = tmp_path / "a.txt"
    with files.replacing_file(path) as first, files.replacing_file(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert path.read_text() == "first"
    with contextlib.suppress(ZeroDivisionError), files.replacing_file(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "first"

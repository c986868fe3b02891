"""Runs of examples/train.py that are killed, stopped or resumed from damaged checkpoints."""

import json
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file
from scripts import ENVIRONMENT, SMALL, command, train, weights

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
    words = command("train.py", *SMALL, *ARGS, "--output", output, "--resume")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as run:
        while run.poll() is None and not seen():
            time.sleep(0.0005)
        alive = run.poll() is None
        run.kill()
    return alive


def test_killed_at_random_moments_and_while_saving_it_ends_as_if_nothing_had_been(whole, tmp_path):
    output, draw = tmp_path / "run", random.Random(0)
    checkpoints = output / "checkpoints"

    def newest():
        return max((int(path.name.split("-")[1]) for path in checkpoints.glob("update-*")), default=0)

    def saving(update):
        return lambda: any(checkpoints.glob(f".update-{update}.partial/*"))

    assert kill_when(output, saving(4))  # in the middle of an epoch
    assert newest() == 2
    assert (checkpoints / ".update-4.partial").is_dir()  # half of a checkpoint lies there and is not one
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
    assert f"Resumed from {checkpoints / 'update-'}" in text
    assert_same_end(output, whole)
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["update-28", "update-30"]


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits_cleanly(tmp_path, processes):
    args = ("--num-images", 96, "--epochs", 3, "--batch-size", 8 // processes)
    train(*args, "--output", tmp_path / "whole", processes=processes)
    output = tmp_path / "run"
    words = command("train.py", *SMALL, *args, "--output", output, processes=processes)
    with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
            start_new_session=True,
    ) as run:
        assert run.stdout is not None
        text = ""
        while "2/10" not in text:
            character = run.stdout.read(1)
            assert character, text
            text += character
        for worker in find_workers(run.pid, processes):
            worker.send_signal(signal.SIGTERM)
        text += run.stdout.read()
    assert run.returncode == 0, text
    assert "Stopped by SIGTERM" in text
    assert not (output / "results.json").exists()
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert 2 <= int(checkpoint.name.split("-")[1]) < 10
    train(*args, "--output", output, "--resume", processes=processes)
    ours, theirs = weights(output), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def find_workers(pid, processes):
    psutil = pytest.importorskip("psutil")
    launcher = psutil.Process(pid)
    if processes == 1:
        return [launcher]
    found = [each for each in launcher.children(recursive=True) if "torch.distributed.run" not in each.cmdline()]
    found = [each for each in found if any(word.endswith("train.py") for word in each.cmdline())]
    assert len(found) == processes
    return found


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
        (folder / "custom_checkpoint_0.pkl").unlink()
    elif kind == "foreign":
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["run"]["lr"] = 7
        path.write_text(json.dumps(manifest))
    else:
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "is torn: model.safetensors is not as it was written"),
        ("changed", "is torn: optimizer.bin is not as it was written"),
        ("missing", "is torn: custom_checkpoint_0.pkl is missing"),
        ("foreign", "belongs to another run: lr was 7 and is 0.02"),
        ("manifest", "has no readable manifest.json"),
    ],
)
def test_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(whole, tmp_path, kind, message):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (output / "results.json").unlink()
    damage(kind, output / "checkpoints" / "update-30")
    text = train(*ARGS, "--output", output, "--resume")
    assert f"{output / 'checkpoints' / 'update-30'} is refused: it {message}" in " ".join(text.split())
    assert f"Resumed from {output / 'checkpoints' / 'update-28'} after 2 epochs and 28 updates" in text
    assert_same_end(output, whole)


def test_checkpoints_of_another_run_are_refused(whole, tmp_path):
    text = train(*ARGS, "--lr", 0.5, "--output", whole, "--resume", ok=False)
    assert "belongs to another run: lr was 0.02 and is 0.5" in text
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

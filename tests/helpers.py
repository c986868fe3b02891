"""What tests of several scripts share: running them as their users do, and reading the weights that they leave."""

import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = (
    "--backbone", "test_resnet", "--num-images", "48", "--num-classes", "4", "--img-size", "64", "--batch-size", "8",
    "--workers", "0", "--lr", "0.02", "--cpu-threads", "1", "--no-pretrained",
)
ENVIRONMENT = os.environ | {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONUNBUFFERED": "1",
}


def command(script: str, *args: object, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launch, str(EXAMPLES / script), *map(str, args)]


def run(words: list[str], ok: bool = True, **environment: str) -> str:
    """What a command printed; its exit status must be as expected."""
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=ENVIRONMENT | environment,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def call(script: str, *args: object, ok: bool = True, **environment: str) -> str:
    """What a script's `main` printed in this process, which saves the start of an interpreter and its imports."""
    text, argv, failed = io.StringIO(), list(map(str, args)), False
    with (
        mock.patch.dict(os.environ, dict(ACCELERATE_USE_CPU="true") | environment),
        mock.patch.object(sys, "argv", [str(EXAMPLES / script), *argv]),
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            failed = bool(importlib.import_module(script.removesuffix(".py")).main(argv))
        except SystemExit as end:
            failed = end.code not in (None, 0)
            if isinstance(end.code, str):
                print(end.code)
        finally:
            GradientState._reset_state()
            AcceleratorState._reset_state(reset_partial_state=True)
            torch._dynamo.reset()
    assert failed != ok, text.getvalue()
    return text.getvalue()


def assert_near(ours: Any, theirs: Any, rel: float = 1e-5) -> None:
    """Nested results are the same but for rounding: how a batch is made up decides in which order sums are taken."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs):
            assert_near(our, their, rel)
    else:
        assert ours == (pytest.approx(theirs, rel=rel) if isinstance(theirs, float) else theirs)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# forks processes after the imports that take each of them seconds
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["accelerate", "datasets", "s3n_timm", "scipy.stats", "timm", "torch", "torchmetrics"])


def _become(script: str, argv: list[str], environment: dict[str, str], log: str) -> None:
    """Be a script, in a new process."""
    # workers of its loaders would come from a server of their own, which imports everything once more
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv[:] = [script, *argv]
    ours = {str(EXAMPLES), str(Path(__file__).parent)}  # of pytest's path
    sys.path[:] = [str(Path(script).parent), *(path for path in sys.path if path not in ours)]
    runpy.run_path(script, run_name="__main__")


class Forked:
    """A script in processes of its own, which begin after the imports; several have the environment of torchrun."""

    def __init__(self, script: str, *args: object, processes: int = 1, **environment: str) -> None:
        shared, self._folder = ENVIRONMENT | environment, tempfile.TemporaryDirectory()
        self._log, self.processes = Path(self._folder.name, "log"), []
        if processes > 1:
            shared |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(processes))
        for rank in map(str, range(processes)):
            own = shared | (dict(RANK=rank, LOCAL_RANK=rank) if processes > 1 else {})
            words = (str(EXAMPLES / script), list(map(str, args)), own, str(self._log))
            self.processes.append(FORKS.Process(target=_become, args=words))
            self.processes[-1].start()

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def end(self, ok: bool = True) -> str:
        """What it printed, when it has ended as expected."""
        alive = list(self.processes)
        while alive and not any(process.exitcode for process in self.processes):
            ended = wait([process.sentinel for process in alive], timeout=300)
            assert ended, self._log.read_text(encoding="utf-8")
            alive = [process for process in alive if process.sentinel not in ended]
        for process in alive:  # one has failed, for which the others would wait
            process.terminate()
        for process in self.processes:
            process.join()
        text = self._log.read_text(encoding="utf-8")
        assert all(process.exitcode == 0 for process in self.processes) == ok, text
        return text


class ForkedPopen:
    """As much of subprocess.Popen as experiments/runner.py asks of it, for a script: forked, as `Forked` is."""

    def __init__(self, command: list[str], stdout: Any, stderr: int, env: dict[str, str]) -> None:
        words = (command[1], command[2:], env, stdout.name)
        self._process = FORKS.Process(target=_become, args=words)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("", timeout or 0)
        return self.returncode

    def terminate(self) -> None:
        self._process.terminate()


@contextlib.contextmanager
def runs_forked() -> Iterator[None]:
    """Within it the scripts of experiments/runner.py begin after the imports."""
    from experiments import runner

    given = SimpleNamespace(Popen=ForkedPopen, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired)
    with mock.patch.object(runner, "subprocess", given):
        yield


def train(*args: object, processes: int = 1, ok: bool = True, picture: bool = False, **environment: str) -> str:
    """train.py on few drawn birds: in this process, by default without the picture at its end, or in several."""
    if processes == 1:
        with contextlib.nullcontext() if picture else mock.patch("support.results.draw_picture"):
            return call("train.py", *SMALL, *args, ok=ok, **environment)
    return Forked("train.py", *SMALL, *args, processes=processes, **environment).end(ok)


def weights(output: Path, kind: str = "last") -> dict[str, torch.Tensor]:
    return load_file(output / kind / "model.safetensors")


def largest_difference(ours: Path, theirs: Path, buffers: bool = True, kind: str = "last") -> float:
    a, b = weights(ours, kind), weights(theirs, kind)
    assert a.keys() == b.keys()
    names = [name for name in a if buffers or "running" not in name]
    return max((a[name].double() - b[name].double()).abs().max().item() for name in names)


CHANNELS = dict(blue=2, green=1, red=0)  # of the labels of write_labels


def write_labels(root: Path, counts: dict[str, int]) -> Path:
    """Images of noise in which every label brightens a channel, beside their metadata.csv."""
    random = np.random.default_rng(0)
    for split, count in counts.items():
        (root / split / "images").mkdir(parents=True)
        lines = ["file_name,labels,photographer"]
        for i in range(count):
            pixels = random.integers(0, 120, (64, 64, 3))
            labels = [name for bit, name in enumerate(CHANNELS) if i >> bit & 1]
            for name in labels:
                pixels[..., CHANNELS[name]] += 130
            Image.fromarray(pixels.astype("uint8")).save(root / split / "images" / f"{i}.png")
            lines.append(f"images/{i}.png,{' | '.join(labels)},somebody")
        (root / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root

"""What tests of several scripts share: running them as their users do, and reading the weights that they leave."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = (
    "--backbone", "test_resnet", "--num-images", "48", "--num-classes", "4", "--img-size", "64", "--batch-size", "8",
    "--workers", "0", "--lr", "0.02", "--cpu-threads", "1",
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


def train(*args: object, processes: int = 1, ok: bool = True) -> str:
    return run(command("train.py", *SMALL, *args, processes=processes), ok)


def weights(output: Path, kind: str = "last") -> dict[str, torch.Tensor]:
    return load_file(output / kind / "model.safetensors")


def largest_difference(ours: Path, theirs: Path, buffers: bool = True, kind: str = "last") -> float:
    a, b = weights(ours, kind), weights(theirs, kind)
    assert a.keys() == b.keys()
    names = [name for name in a if buffers or "running" not in name]
    return max((a[name].double() - b[name].double()).abs().max().item() for name in names)

"""Speed and multiply-accumulates of the rows of cub50.py, for its tables: `python examples/experiments/speed.py`.

Rows take turns in one process, forward and in a training step, each at its own image size, on whatever device is there.
A row that has the network and the input size of another one (`cost`, `trained`) is not measured beside it.
"""

import argparse
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of support/

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import torch
from accelerate import Accelerator
from benchmark import describe, draw_images, forward, show, step
from experiments.cub50 import RESULTS, ROWS
from support.arguments import parse_args as parse_train_args
from support.files import replace_text
from support.timing import time_by_turns
from train import create_model

import s3n_timm
from s3n_timm.hub import count_macs


def measure_rows(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Multiply-accumulates of an image, and images a second in answering and in training."""
    models, gmacs = {}, {}
    for name in args.rows:
        # --resume: a folder of a run that is there is no fault here
        given = ["--dataset", "cub", "--recipe", "cub50", "--no-pretrained", "--resume", *ROWS[name].train]
        train_args = parse_train_args([*given, "--channels-last" if args.channels_last else "--no-channels-last"])
        x = draw_images(args.batch_size, train_args.img_size, args, device)
        models[name] = create_model(train_args, 50, Accelerator()).to(device).eval(), x
        gmacs[name] = count_macs(models[name][0], x.shape[1:]) / 1e9
    limits = dict(seconds=args.seconds, min_rounds=args.min_rounds, max_rounds=args.max_rounds)
    with torch.inference_mode():
        answering = time_by_turns({name: forward(m, (1,), x) for name, (m, x) in models.items()}, device, **limits)
    target = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    steps = {name: step(m.train(), (1,), x, target, s3n_timm.S3NLoss()) for name, (m, x) in models.items()}
    training = time_by_turns(steps, device, **limits)
    return [dict(
        row=name, gmacs=gmacs[name],
        images_per_second=args.batch_size / answering[name],
        training_images_per_second=args.batch_size / training[name],
        times_plain=answering[name] / answering["plain"], training_times_plain=training[name] / training["plain"],
    ) for name in models]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help="names or patterns; all if left out")
    parser.add_argument("--device", type=torch.device, help="cuda, cuda:1, cpu, …; default: the GPU, if there is one")
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=1, help="for answering, and for training")
    parser.add_argument("--min-rounds", type=int, default=5)
    parser.add_argument("--max-rounds", type=int, default=200)
    parser.add_argument("--cpu-threads", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json")
    args = parser.parse_args(argv)
    args.rows = [name for name, row in ROWS.items() if row.cost is None and row.trained is None
                 and (name == "plain" or any(fnmatchcase(name, pattern) for pattern in args.rows))]
    device = args.device or Accelerator().device
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    results = describe(args, device) | dict(rows=measure_rows(args, device))
    show("rows", results["rows"])
    replace_text(args.output, json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""What S3N gains over its backbone, and what it costs, on real birds:

    python examples/experiments.py --data-dir CUB50 --pretrained-path tf_efficientnet_lite0.safetensors --seeds 0 1 2

Each row is trained by train.py on all training images and tested once a seed by evaluate.py. What a run measured, with
its commands, commit and answers, becomes a file in examples/results/; experiments_table.py makes the table and the plot
of them. A run that was interrupted goes on, a finished one is not repeated. Read it top to bottom: rows, one run, main.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from ablation import Run, RunError, execute, is_done, refuse_difference
from files import replace_text
from safetensors.torch import load_file

import s3n_timm

RESULTS = Path(__file__).parent / "results" / "cub50"
OUTPUTS = ("joint", "original", "discriminative", "complementary")

# rows


class Row(NamedTuple):
    """What is trained, in flags of train.py beyond the recipe's, and how it is read otherwise than trained."""

    about: str
    train: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    trained: str | None = None  # the row whose weights this one reads


def given(**kwargs: Any) -> tuple[str, str]:
    return "--model-kwargs", json.dumps(kwargs)


# a plain backbone had its best validation accuracy at three times S3N's rate
PLAIN = ("--plain", "--lr", "0.03")
ROWS = {
    "plain": Row("the backbone alone, equal epochs", PLAIN),
    "plain-18": Row("the backbone alone, three times the epochs", (*PLAIN, "--epochs", "18")),
    "plain-288": Row("the backbone alone, 288 px, the cost of three passes", (*PLAIN, "--img-size", "288")),
    "s3n": Row("S3N, the paper's preset"),
    "s3n-original": Row("S3N, the original's preset", ("--preset", "original")),
    "O": Row("table 2", ("--branches", "O")),
    "O+D": Row("table 2", ("--branches", "O+D")),
    "O+C": Row("table 2", ("--branches", "O+C")),
    "D+C": Row("table 2", ("--branches", "D+C")),
    "saliency": Row("table 3", ("--attention", "saliency")),
    "response": Row("table 3", ("--attention", "response")),
    "all": Row("table 4", given(partition_train="all", partition_eval="all")),
    "random": Row("table 4", given(partition_train="random", partition_eval="random")),
    "probability": Row("s3n, peaks drawn at inference", (), ("--partition-eval", "probability"), "s3n"),
    "extreme": Row("s3n, one peak a branch at inference", (), ("--partition-eval", "extreme"), "s3n"),
    "s3n-256": Row("S3N, 256 px", ("--img-size", "256")),
    "zoom-256": Row("256 px in, 160 scanned and zoomed", ("--img-size", "256", *given(scan_size=160, zoom_size=160))),
    "branch-norm": Row("batch norm per branch", given(branch_norm=True)),
    "plain-288-18": Row("the backbone alone, 288 px, until it stops rising",
                        (*PLAIN, "--img-size", "288", "--epochs", "18")),
    "s3n-18": Row("S3N until it stops rising", ("--epochs", "18")),
}


# one run


def plan_run(name: str, seed: int, args: argparse.Namespace) -> Run:
    row = ROWS[name]
    examples, trained = Path(__file__).parent, row.trained or name
    folder = args.output / trained / f"seed-{seed}"
    shared = ["--workers", "0", "--cpu-threads", str(args.cpu_threads), "--no-verify"]
    data = ["--dataset", "cub", "--data-dir", str(args.data_dir)]
    train = [sys.executable, str(examples / "train.py"), *data, "--recipe", "cub50", "--pretrained-path",
             str(args.pretrained_path), *ROWS[trained].train, "--val-interval", "1000", "--seed", str(seed),
             "--output", str(folder), "--resume", *shared]
    evaluation = folder / ("evaluation" if row.trained is None else f"evaluation-{name}")
    evaluate = [sys.executable, str(examples / "evaluate.py"), str(folder / "last"), *data, *row.evaluate,
                "--seed", str(seed), "--output", str(evaluation), *shared]
    settings = dict(row=trained, flags=list(ROWS[trained].train), s3n_timm=s3n_timm.__version__)
    return Run(name, seed, folder, train, evaluate, settings)


def measure(run: Run) -> dict[str, Any]:
    """What a finished run measured, its answers image by image, and all that is needed to repeat it."""
    folder = Path(run.evaluate[run.evaluate.index("--output") + 1])
    measures = json.loads((folder / "results.json").read_text(encoding="utf-8"))["measures"]
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    betas = {name: value.item() for name, value in load_file(run.folder / "last" / "model.safetensors").items()
             if name.startswith("beta_")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, text=True,
                            capture_output=True).stdout.strip()
    correct = {name: "".join(row[f"correct_{name}"] for row in answers)
               for name in OUTPUTS if f"correct_{name}" in answers[0]}
    return dict(
        row=run.name,
        about=ROWS[run.name].about,
        seed=run.seed,
        train=[Path(word).name if "/" in word else word for word in run.train[1:]],
        evaluate=[Path(word).name if "/" in word else word for word in run.evaluate[1:]],
        commit=commit,
        versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__),
        train_seconds=json.loads((run.folder / "command.json").read_text(encoding="utf-8"))["seconds"],
        betas=betas,
        measures=measures,
        correct=correct,
    )


# main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of CUB-200-2011, or of a part of it")
    parser.add_argument("--pretrained-path", type=Path, required=True, help="the backbone's ImageNet weights")
    parser.add_argument("--output", type=Path, default=Path("output/experiments"), help="weights and logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a JSON file for each run")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW", help=str([*ROWS]))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cpu-threads", type=int, default=1)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.rows:
            run, path = plan_run(name, seed, args), args.results / f"{name}-{seed}.json"
            if path.is_file():
                continue
            refuse_difference(run)
            try:
                execute(run)
            except RunError as error:
                sys.exit(f"experiments.py: {error}")
            assert ROWS[name].trained or is_done(run)
            content = measure(run)
            replace_text(path, json.dumps(content, indent=1))
            print(f"{run}: {content['measures']['accuracy']['joint']['top1']:.1f} %, "
                  f"{content['train_seconds']:.0f} s of training", flush=True)


if __name__ == "__main__":
    main()

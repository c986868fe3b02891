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

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of support/

from experiments.paper_tables import Run, RunError, execute, refuse_difference
from safetensors.torch import load_file
from support.files import replace_text

import s3n_timm
from s3n_timm.evaluation import OUTPUTS

RESULTS = Path(__file__).parents[1] / "results" / "cub50"

# rows


class Row(NamedTuple):
    """What is trained, in flags of train.py beyond the recipe's, and how it is read otherwise than trained."""

    about: str
    train: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    trained: str | None = None  # the row whose weights this one reads
    answer: str = "joint"  # of what evaluate.py measured, the output that counts
    exit_entropy: float | None = None  # below it the original branch answers, see s3n_timm.early_exit


def given(**kwargs: Any) -> tuple[str, str]:
    return "--model-kwargs", json.dumps(kwargs)


# a plain backbone had its best validation accuracy without a smaller rate for what is pretrained
PLAIN = ("--plain", "--backbone-lr-scale", "1")
# s3n_timm.evaluation.choose_exit_entropy at a loss of 0.3 points, on validation runs (results/README.md says which)
EXIT_ENTROPY = 1.68
CASCADE_EXIT_ENTROPY = 1.29
FOCUS_EXIT_ENTROPY = 0.71
# at 18 epochs a validation run allowed every image to leave; this threshold halves the cost of its images
LONG_EXIT_ENTROPY = 2.46
CASCADE = ("--branches", "O+D", "--img-size", "320", *given(scan_size=160, zoom_size=224))


def focus(scan_size: int) -> tuple[str, ...]:
    """The response covers the bird, a peak one place on it, and a lower floor magnifies more."""
    kwargs = given(scan_size=scan_size, zoom_size=224, floor=0.03)
    return "--branches", "O+D", "--img-size", "320", "--attention", "response", *kwargs


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
    "mean": Row("s3n, the mean of all outputs answers", trained="s3n", answer="mean"),
    "exit": Row("mean, but sure images leave after O", trained="s3n", answer="mean", exit_entropy=EXIT_ENTROPY),
    "zoom-256": Row("256 px in, 160 scanned and zoomed", ("--img-size", "256", *given(scan_size=160, zoom_size=160))),
    "s3n-288": Row("S3N, 288 px", ("--img-size", "288")),
    "plain-496": Row("the backbone alone, 496 px, the cost of three passes at 288", (*PLAIN, "--img-size", "496")),
    "plain-224": Row("the backbone alone, 224 px", (*PLAIN, "--img-size", "224")),
    "plain-320": Row("the backbone alone, 320 px, the cost of focus-224", (*PLAIN, "--img-size", "320")),
    "cascade": Row("O+D, 320 px in, 160 scanned, 224 zoomed; the mean answers", CASCADE, answer="mean"),
    "cascade-exit": Row("cascade, but sure images leave after O", trained="cascade", answer="mean",
                        exit_entropy=CASCADE_EXIT_ENTROPY),
    "focus": Row("cascade, dense attention by the response over a floor of 0.03; D answers", focus(160),
                 answer="discriminative"),
    "focus-exit": Row("focus, but sure images leave after O", trained="focus", answer="discriminative",
                      exit_entropy=FOCUS_EXIT_ENTROPY),
    "focus-224": Row("focus, 224 scanned and 224 zoomed; the mean answers", focus(224), answer="mean"),
    "focus-224-exit": Row("focus-224, but sure images leave after O", trained="focus-224", answer="mean",
                          exit_entropy=EXIT_ENTROPY),
    "plain-288-18": Row("the backbone alone, 288 px, three times the epochs",
                        (*PLAIN, "--img-size", "288", "--epochs", "18")),
    "s3n-18": Row("S3N, three times the epochs", ("--epochs", "18")),
    "mean-18": Row("s3n-18, the mean of all outputs answers", trained="s3n-18", answer="mean"),
    "exit-18": Row("mean-18, but sure images leave after O", trained="s3n-18", answer="mean",
                   exit_entropy=LONG_EXIT_ENTROPY),
    "focus-224-18": Row("focus-224, three times the epochs", (*focus(224), "--epochs", "18"), answer="mean"),
    "focus-224-18-exit": Row("focus-224-18, but sure images leave after O", trained="focus-224-18", answer="mean",
                             exit_entropy=EXIT_ENTROPY),
}


# one run


def plan_run(name: str, seed: int, args: argparse.Namespace) -> Run:
    row = ROWS[name]
    examples, trained = Path(__file__).parents[1], row.trained or name
    folder = args.output / trained / f"seed-{seed}"
    shared = ["--workers", "0", "--cpu-threads", str(args.cpu_threads), "--no-verify"]
    data = ["--dataset", "cub", "--data-dir", str(args.data_dir)]
    train = [sys.executable, str(examples / "train.py"), *data, "--recipe", "cub50", "--pretrained-path",
             str(args.pretrained_path), *ROWS[trained].train, "--val-interval", "1000", "--seed", str(seed),
             "--output", str(folder), "--resume", *shared]
    evaluation = folder / (f"evaluation-{name}" if row.evaluate else "evaluation")
    evaluate = [sys.executable, str(examples / "evaluate.py"), str(folder / "last"), *data, *row.evaluate,
                "--seed", str(seed), "--output", str(evaluation), *shared]
    settings = dict(row=trained, flags=list(ROWS[trained].train), s3n_timm=s3n_timm.__version__)
    return Run(name, seed, folder, train, evaluate, settings)


def evaluation_folder(run: Run) -> Path:
    return Path(run.evaluate[run.evaluate.index("--output") + 1])


def measure(run: Run) -> dict[str, Any]:
    """What a finished run measured, its answers image by image, and all that is needed to repeat it."""
    folder = evaluation_folder(run)
    measures = json.loads((folder / "results.json").read_text(encoding="utf-8"))["measures"]
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    betas = {name: value.item() for name, value in load_file(run.folder / "last" / "model.safetensors").items()
             if name.startswith("beta_")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, text=True,
                            capture_output=True).stdout.strip()
    row = ROWS[run.name]
    correct = {name: "".join(answer[f"correct_{name}"] for answer in answers)
               for name in OUTPUTS if f"correct_{name}" in answers[0]}
    exits = [row.exit_entropy is not None and float(answer["entropy"]) < row.exit_entropy for answer in answers]
    answered = [early if out else full
                for out, early, full in zip(exits, correct.get("original", exits), correct[row.answer])]
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
        answered="".join(map(str, answered)),  # which test images the row's own answer had right
        exited=sum(exits) / len(exits),
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
            # a row that reads the answers of another in its own way needs no evaluation of its own
            measured = ROWS[name].trained and not ROWS[name].evaluate and (evaluation_folder(run) / "results.json")
            if not (measured and measured.is_file()):
                try:
                    execute(run)
                except RunError as error:
                    sys.exit(f"experiments.py: {error}")
            content = measure(run)
            replace_text(path, json.dumps(content, indent=1))
            answered = content["answered"]
            print(f"{run}: {100 * answered.count('1') / len(answered):.1f} %, "
                  f"{content['train_seconds']:.0f} s of training", flush=True)


if __name__ == "__main__":
    main()

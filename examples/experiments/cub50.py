"""What S3N gains over its backbone, and what it costs, on real birds:

    python examples/experiments/cub50.py --data-dir CUB50 --pretrained-path tf_efficientnet_lite0.safetensors --rows s3n

Each row is trained by train.py on all training images and tested once a seed by evaluate.py. The metrics, commands,
commit and answers of each run become a file of examples/results/cub50/; tables.py makes the tables and plots of them. A
run that was interrupted goes on, a finished one is not repeated. Options and thresholds are chosen with --validation,
which trains on four fifths of the training images and evaluates on the others.

Read it top to bottom: rows, one run, main.
"""

import argparse
import csv
import json
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of support/

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import timm
import torch
from experiments.runner import EXAMPLES, Run, RunError, execute, execute_all, exit_on_signals, refuse_difference
from safetensors.torch import load_file
from support.files import replace_text

import s3n_timm
from s3n_timm.evaluation import OUTPUTS

RESULTS = EXAMPLES / "results" / "cub50"
VALIDATION = ("--val-fraction", "0.2")

# rows


class Row(NamedTuple):
    """What is trained, in flags of train.py beyond those of the recipe, and how it is evaluated."""

    about: str
    train: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()  # flags of evaluate.py
    trained: str | None = None  # the row whose weights this one evaluates
    evaluated: str = "last"  # which folder of train.py: last, or backbone, the plain timm model of the O branch
    answer: str = "joint"  # the output of evaluate.py that counts
    exit_entropy: float | None = None  # below it the original branch answers, see s3n_timm.early_exit
    cost: str | None = None  # the row whose speed stands for this one's: the same network at the same input size

    @property
    def is_plain(self) -> bool:
        return "--plain" in self.train

    @property
    def is_single_pass(self) -> bool:
        """Answered by one pass of a plain timm model."""
        return self.is_plain or self.evaluated == "backbone"


def flag(words: Sequence[str], name: str, default: str) -> str:
    """The value that a command gives to a flag, or else the recipe's."""
    return words[words.index(name) + 1] if name in words else default


def input_side(words: Sequence[str]) -> int:
    """Pixels of the side of the image that the O branch reads."""
    return int(json.loads(flag(words, "--model-kwargs", "{}")).get("scan_size", flag(words, "--img-size", "160")))


def kwargs(**options: Any) -> tuple[str, str]:
    return "--model-kwargs", json.dumps(options)


# a plain backbone had its best validation accuracy without a smaller rate for pretrained layers
PLAIN = ("--plain", "--backbone-lr-scale", "1")
# s3n_timm.evaluation.choose_exit_entropy at a loss of 0.3 points, on validation runs (results/README.md says which)
EXIT_ENTROPY = 1.68
CASCADE_EXIT_ENTROPY = 1.29
FOCUS_EXIT_ENTROPY = 0.71
# at 18 epochs a validation run allowed every image to leave; this threshold halves the cost of its images
LONG_EXIT_ENTROPY = 2.46
CASCADE = ("--branches", "O+D", "--img-size", "320", *kwargs(scan_size=160, zoom_size=224))


def focus(scan_size: int) -> tuple[str, ...]:
    """The response covers the bird, a peak one place on it, and a lower floor magnifies more."""
    return ("--branches", "O+D", "--img-size", "320", "--attention", "response",
            *kwargs(scan_size=scan_size, zoom_size=224, floor=0.03))


SIZES = {160: "", 224: "-224", 288: "-288"}  # in names of rows; 160 px are the recipe's
AUGMENTATIONS = {
    "cutmix": ("--cutmix", "1"),
    "erasing": ("--reprob", "0.25"),
    "randaugment": ("--aa", "rand-m9-mstd0.5-inc1"),
}
IDEAS = {
    "erasing": AUGMENTATIONS["erasing"],
    "reflect": kwargs(border="reflect"),
    "small": ("-b", "6"),  # an update reads 18 images, and there are about as many updates as of the plain 54 epochs
}


def compare_at(side: int) -> dict[str, Row]:
    """Single passes at one input size: S3N's backbone, and the plain baselines of as much training.

    An epoch of S3N takes three passes an image. So 54 epochs of the plain backbone are as much training as 18 of S3N,
    and 162 as much as 54.
    """
    size = SIZES[side]
    px = ("--img-size", str(side)) if size else ()
    plain, cost, s3n = (*PLAIN, *px), f"plain{size}", f"s3n{size}-18"
    s3n_cost = {160: "s3n", 288: "s3n-288"}.get(side)
    rows = {
        f"plain{size}-{epochs}": Row(f"the backbone alone, {side} px, {epochs} epochs", (*plain, "--epochs", epochs),
                                     cost=cost)
        for epochs in ("18", "54", "162")}
    rows |= {
        f"plain{size}-{epochs}-{name}": Row(f"the backbone alone, {side} px, {epochs} epochs, {' '.join(flags)}",
                                            (*plain, "--epochs", epochs, *flags), cost=cost)
        for epochs in ("18", "54") for name, flags in AUGMENTATIONS.items()}
    rows |= {f"s3n{size}-{epochs}": Row(f"S3N, {side} px, {epochs} epochs", (*px, "--epochs", epochs), cost=s3n_cost)
             for epochs in ("18", "54")}
    rows |= {f"{s3n}-{name}": Row(f"S3N, {side} px, 18 epochs, {' '.join(flags)}", (*px, "--epochs", "18", *flags),
                                  cost=s3n_cost or s3n)
             for name, flags in IDEAS.items()}
    return rows


ROWS = {
    "plain": Row("the backbone alone, equal epochs", PLAIN),
    "plain-288": Row("the backbone alone, 288 px, the cost of three passes", (*PLAIN, "--img-size", "288")),
    "s3n": Row("S3N, the paper's preset"),
    "s3n-original": Row("S3N, the original's preset", ("--preset", "original")),
    "O": Row("table 2", ("--branches", "O")),
    "O+D": Row("table 2", ("--branches", "O+D")),
    "O+C": Row("table 2", ("--branches", "O+C")),
    "D+C": Row("table 2", ("--branches", "D+C")),
    "saliency": Row("table 3", ("--attention", "saliency")),
    "response": Row("table 3", ("--attention", "response")),
    "all": Row("table 4", kwargs(partition_train="all", partition_eval="all")),
    "random": Row("table 4", kwargs(partition_train="random", partition_eval="random")),
    "probability": Row("s3n, peaks drawn at inference", (), ("--partition-eval", "probability"), "s3n"),
    "extreme": Row("s3n, one peak a branch at inference", (), ("--partition-eval", "extreme"), "s3n"),
    "mean": Row("s3n, the mean of all outputs answers", trained="s3n", answer="mean"),
    "exit": Row("mean, with early exit", trained="s3n", answer="mean", exit_entropy=EXIT_ENTROPY),
    "zoom-256": Row("256 px in, 160 scanned and zoomed",
                    ("--img-size", "256", *kwargs(scan_size=160, zoom_size=160))),
    "s3n-288": Row("S3N, 288 px", ("--img-size", "288")),
    "plain-496": Row("the backbone alone, 496 px, the cost of three passes at 288", (*PLAIN, "--img-size", "496")),
    "plain-224": Row("the backbone alone, 224 px", (*PLAIN, "--img-size", "224")),
    "plain-320": Row("the backbone alone, 320 px, the cost of focus-224", (*PLAIN, "--img-size", "320")),
    "cascade": Row("O+D, 320 px in, 160 scanned, 224 zoomed; the mean answers", CASCADE, answer="mean"),
    "cascade-exit": Row("cascade, with early exit", trained="cascade", answer="mean",
                        exit_entropy=CASCADE_EXIT_ENTROPY),
    "focus": Row("cascade, dense attention by the response over a floor of 0.03; D answers", focus(160),
                 answer="discriminative"),
    "focus-exit": Row("focus, with early exit", trained="focus", answer="discriminative",
                      exit_entropy=FOCUS_EXIT_ENTROPY),
    "focus-224": Row("focus, 224 scanned and 224 zoomed; the mean answers", focus(224), answer="mean"),
    "focus-224-exit": Row("focus-224, with early exit", trained="focus-224", answer="mean", exit_entropy=EXIT_ENTROPY),
    "focus-224-18": Row("focus-224, 18 epochs", (*focus(224), "--epochs", "18"), answer="mean", cost="focus-224"),
    "focus-224-18-exit": Row("focus-224-18, with early exit", trained="focus-224-18", answer="mean",
                             exit_entropy=EXIT_ENTROPY),
    **compare_at(160),
    "mean-18": Row("s3n-18, the mean of all outputs answers", trained="s3n-18", answer="mean"),
    "exit-18": Row("mean-18, with early exit", trained="s3n-18", answer="mean", exit_entropy=LONG_EXIT_ENTROPY),
    **compare_at(224),
    **compare_at(288),
}
ROWS |= {f"{name}-backbone": Row(f"the backbone of {name}, a plain timm model", trained=name, evaluated="backbone",
                                 cost=f"plain{SIZES[input_side(row.train)]}")
         for name, row in ROWS.items() if flag(row.train, "--epochs", "6") in ("18", "54") and not row.is_plain}


# one run


def plan_run(name: str, seed: int, args: argparse.Namespace) -> Run:
    row = ROWS[name]
    trained = row.trained or name
    flags = ROWS[trained].train
    folder = args.output / trained / f"seed-{seed}"
    shared = ["--workers", str(args.workers), "--cpu-threads", str(args.cpu_threads), "--no-verify"]
    data = ["--dataset", "cub", "--data-dir", str(args.data_dir)]
    words = [sys.executable, str(EXAMPLES / "train.py"), *data, "--recipe", "cub50", "--pretrained-path",
             str(args.pretrained_path), *flags, "--val-interval", "1000", "--seed", str(seed),
             "--output", str(folder), "--resume", *shared]
    words += VALIDATION if args.validation else []
    ending = "" if row.evaluated == "last" else f"-{row.evaluated}"
    evaluation = folder / (f"evaluation-{name}" if row.evaluate else f"evaluation{ending}")
    evaluate = [sys.executable, str(EXAMPLES / "evaluate.py"), str(folder / row.evaluated), *data, *row.evaluate,
                *(("--split", "train", *VALIDATION) if args.validation else ()),
                "--seed", str(seed), "--output", str(evaluation), *shared]
    settings = dict(row=trained, flags=list(flags), s3n_timm=s3n_timm.__version__, validation=args.validation)
    return Run(name, seed, folder, words, evaluate, settings)


def measure(run: Run) -> dict[str, Any]:
    """The metrics of a finished run, its answers image by image, and all that is needed to repeat it."""
    row = ROWS[run.name]
    measures = json.loads((run.evaluation / "results.json").read_text(encoding="utf-8"))["measures"]
    with (run.evaluation / "predictions.csv").open(newline="", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    weights = load_file(run.folder / "last" / "model.safetensors")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, text=True,
                            capture_output=True).stdout.strip()
    correct = {name: "".join(answer[f"correct_{name}"] for answer in answers)
               for name in OUTPUTS if f"correct_{name}" in answers[0]}
    exits = [row.exit_entropy is not None and float(answer["entropy"]) < row.exit_entropy for answer in answers]
    answered = [early if out else full
                for out, early, full in zip(exits, correct.get("original", exits), correct[row.answer])]
    return dict(
        row=run.name,
        about=row.about,
        seed=run.seed,
        train=[Path(word).name if "/" in word else word for word in run.train[1:]],
        evaluate=[Path(word).name if "/" in word else word for word in run.evaluate[1:]],
        commit=commit,
        versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__),
        train_seconds=json.loads((run.folder / "command.json").read_text(encoding="utf-8"))["seconds"],
        betas={name: value.item() for name, value in weights.items() if name.startswith("beta")},
        measures=measures,
        correct=correct,
        answered="".join(map(str, answered)),  # which images the row's own answer had right
        exited=sum(exits) / len(exits),
    )


# main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of CUB-200-2011, or of a part of it")
    parser.add_argument("--pretrained-path", type=Path, required=True, help="the backbone's ImageNet weights")
    parser.add_argument("--rows", nargs="+", required=True, metavar="ROW",
                        help=f"names or patterns, such as 'plain-224-*': {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation", action="store_true",
                        help="train on four fifths of the training images and evaluate on the others")
    parser.add_argument("--output", type=Path, help="weights and logs; output/cub50 or output/cub50_validation")
    parser.add_argument("--results", type=Path, help="a JSON file for each run; results/cub50, or its validation/")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, as on one GPU")
    parser.add_argument("-j", "--workers", type=int, default=0, help="of each training and evaluation")
    parser.add_argument("--cpu-threads", type=int, default=1, help="of each training and evaluation, on a CPU")
    args = parser.parse_args(argv)
    unknown = [pattern for pattern in args.rows if not any(fnmatchcase(name, pattern) for name in ROWS)]
    if unknown:
        parser.error(f"--rows {unknown[0]} names no row: see --help.")
    if args.jobs < 1:
        parser.error(f"--jobs must be positive, got {args.jobs}.")
    args.rows = [name for name in ROWS if any(fnmatchcase(name, pattern) for pattern in args.rows)]
    args.output = args.output or Path("output/cub50_validation" if args.validation else "output/cub50")
    args.results = args.results or (RESULTS / "validation" if args.validation else RESULTS)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    exit_on_signals()
    args.results.mkdir(parents=True, exist_ok=True)
    chains: dict[tuple[int, str], list[Run]] = {}  # rows that share weights follow one another
    for seed in args.seeds:
        for name in args.rows:
            if not (args.results / f"{name}-{seed}.json").is_file():
                chains.setdefault((seed, ROWS[name].trained or name), []).append(plan_run(name, seed, args))
    printing = threading.Lock()

    def finish(run: Run) -> None:
        execute(run)
        content = measure(run)
        replace_text(args.results / f"{run.name}-{run.seed}.json", json.dumps(content, indent=1))
        answered = content["answered"]
        with printing:
            print(f"{run}: {100 * answered.count('1') / len(answered):.1f} %, "
                  f"{content['train_seconds']:.0f} s of training", flush=True)

    try:
        for chain in chains.values():
            for run in chain:
                refuse_difference(run)
        execute_all(chains.values(), finish, args.jobs)
    except RunError as error:
        sys.exit(f"cub50.py: {error}")


if __name__ == "__main__":
    main()

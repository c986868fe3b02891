"""Tables 2, 3 and 4 of the paper and the plain backbone, in one command that goes on where it was interrupted:

    python examples/ablation.py --output output/ablation --seeds 0 1 2 -- --dataset cub --data-dir CUB_200_2011

What follows `--` are flags of train.py, the same for every row. Read it top to bottom: rows, arguments, one run, main.
The table that it writes is made by ablation_table.py.

Rows are tuned for the same number of backbone passes: a step of the full model passes O, D and C, one of the plain
backbone passes O alone, which so trains three times the epochs; schedules stretch with the epochs. Each row is tested
by the partition it trains with: `probability` by what the preset has for it (`expected`, its mean, or `extreme`), `all`
by itself, `random` by draws that the run's seed repeats. Weights are those of the best validation epoch, or of the last
one where no images are held out; the test split chooses nothing.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of support/

from experiments.runner import print_table, read_figures, summarise_runs, write_table
from support.arguments import FREE_TO_CHANGE
from support.arguments import parse_args as parse_train_args
from support.files import replace_text
from support.loaders import count_test_birds
from tqdm import tqdm

import s3n_timm
from s3n_timm.config import PRESETS

# rows


class Row(NamedTuple):
    """A table of the paper, what it prints (CUB-200-2011, ResNet-50, 448 px), and how the row is trained."""

    table: str
    paper_top1: float
    paper_localisation: float | None
    options: dict[str, Any]


ROWS = {
    "plain": Row("–", 86.0, None, dict(plain=True)),
    "O": Row("2", 86.0, 57.7, dict(branches="O")),
    "O+D": Row("2", 87.6, 59.2, dict(branches="O+D")),
    "O+C": Row("2", 87.3, 56.6, dict(branches="O+C")),
    "D+C": Row("2", 87.5, 62.6, dict(branches="D+C")),
    "O+D+C": Row("2", 88.5, 65.2, {}),
    "saliency": Row("3", 85.9, None, dict(attention="saliency")),
    "response": Row("3", 87.8, None, dict(attention="response")),
    "sparse": Row("3", 88.5, None, {}),
    "all": Row("4", 87.7, None, dict(partition="all")),
    "random": Row("4", 87.9, None, dict(partition="random")),
    "probability": Row("4", 88.5, None, {}),
}
FULL = "O+D+C"
FULL_PASSES = 3


def trained_as(name: str) -> str:
    """The first of the rows with one configuration: it alone is trained."""
    return next(first for first, row in ROWS.items() if row.options == ROWS[name].options)


def count_passes(options: dict[str, Any]) -> int:
    """Backbone passes of an image in a training step; D+C reads the original too, to find the peaks."""
    branches = "O" if options.get("plain") else options.get("branches", FULL)
    return 1 + sum(branch in branches for branch in "DC")


def scale_epochs(epochs: int, passes: int) -> int:
    """Epochs that cost as many passes as those of the full model, halves rounded up."""
    return (2 * FULL_PASSES * epochs + passes) // (2 * passes)


# arguments

# a run that goes on may differ in these from the one that was interrupted; the rest decides what a figure means
FREE = FREE_TO_CHANGE - {"epochs", "patience", "batch_size", "grad_accum_steps", "data_dir", "pretrained_path"}
OF_ROWS = ("--output", "--resume", "--seed", "--plain", "--branches", "--attention", "--answer")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    usage, layout = "%(prog)s [options] -- [flags of train.py, for every row]", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage=usage, formatter_class=layout)
    parser.add_argument("--output", type=Path, default=Path("output/ablation"), help="folder of all runs and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), metavar="ROW", help=str([*ROWS]))
    parser.add_argument("--launch", type=shlex.split, metavar="WORDS", help='"accelerate launch", in place of python')
    parser.add_argument("--keep-going", action="store_true", help="run the others after a run that fails")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.flags = list(argv[end + 1:])
    for flag in args.flags:
        if flag.startswith("--") and any(own.startswith(flag.partition("=")[0]) for own in OF_ROWS):
            parser.error(f"{flag} is not for all rows: this script sets {', '.join(OF_ROWS)} itself.")
    args.shared = parse_train_args([*args.flags, "--output", str(args.output / "any"), "--resume"])
    if args.shared.patience:
        parser.error("--patience would end rows after different numbers of passes: leave it out.")
    if {"partition_train", "partition_eval"} & args.shared.model_kwargs.keys():
        parser.error("--model-kwargs sets the partition, which the rows of table 4 compare: leave it out.")
    return args


def create_train_flags(options: dict[str, Any], shared: argparse.Namespace) -> list[str]:
    """What a row adds to the flags of all rows: its configuration, and its share of passes."""
    passes, kwargs = count_passes(options), dict(shared.model_kwargs)
    if options.get("plain"):
        flags = ["--plain"]
    else:
        flags = ["--branches", options.get("branches", FULL), "--attention", options.get("attention", "sparse")]
        flags += ["--answer", "joint"]  # what the paper's tables compare; it chooses the epoch, too
        if "partition" in options:
            kwargs |= dict(partition_train=options["partition"], partition_eval=options["partition"])
        warmup = kwargs.get("partition_warmup_epochs", PRESETS[shared.preset]["partition_warmup_epochs"])
        if warmup:
            kwargs["partition_warmup_epochs"] = scale_epochs(warmup, passes)
    if kwargs:  # in place of the recipe's, which shared.model_kwargs holds
        flags += ["--model-kwargs", json.dumps(kwargs)]
    for name in ("epochs", "warmup_epochs", "freeze_epochs", "decay_milestones"):
        value = getattr(shared, name)
        scaled = [scale_epochs(each, passes) for each in (value if isinstance(value, list) else [value]) if each]
        if scaled:
            flags += [f"--{name.replace('_', '-')}", *map(str, scaled)]
    return flags


def create_evaluate_flags(args: argparse.Namespace) -> list[str]:
    """The test split that train.py tests on, by its own namespace; crops are in the weights' config."""
    kind = args.dataset.partition(":")[0]
    flags = ["--dataset", args.dataset, "--split", args.test_split if kind == "hub" else "test"]
    flags += ["--seed", str(args.seed), "--batch-size", str(args.batch_size), "--workers", str(args.workers)]
    if kind == "birds":  # load_splits of data.py draws a quarter as many to test on
        flags += ["--num-images", str(count_test_birds(args.num_images, args.num_classes))]
    if kind in ("hub", "parquet"):
        flags += ["--image-column", args.image_column, "--label-column", args.label_column]
    flags += ["--data-dir", str(args.data_dir)] if args.data_dir else []
    flags += ["--cpu-threads", str(args.cpu_threads)] if args.cpu_threads else []
    return flags if args.verify else [*flags, "--no-verify"]


# one run


class Run(NamedTuple):
    name: str
    seed: int
    folder: Path
    train: list[str]
    evaluate: list[str]
    settings: dict[str, Any]  # what its figures depend on

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


class RunError(Exception):
    """A process did not come to its end; the message says where it wrote why."""


def plan_run(name: str, seed: int, args: argparse.Namespace) -> Run:
    folder = args.output / name / f"seed-{seed}"
    flags = [*args.flags, *create_train_flags(ROWS[name].options, args.shared)]
    flags += ["--seed", str(seed), "--output", str(folder), "--resume"]
    settled = parse_train_args(flags)
    kind = "best" if settled.val_fraction or settled.val_split else "last"
    settings = {key: value for key, value in vars(settled).items() if key not in FREE}
    settings |= dict(launch=args.launch, weights=kind, s3n_timm=s3n_timm.__version__)
    launch, examples = args.launch or [sys.executable], Path(__file__).parents[1]
    train = [*launch, str(examples / "train.py"), *flags]
    evaluate = [*launch, str(examples / "evaluate.py"), str(folder / kind), *create_evaluate_flags(settled)]
    evaluate += ["--output", str(folder / "evaluation")]
    return Run(name, seed, folder, train, evaluate, json.loads(json.dumps(settings, default=str)))


def read_record(run: Run) -> dict[str, Any]:
    path = run.folder / "command.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else dict(settings={}, seconds=0)


def is_done(run: Run) -> bool:
    files = [run.folder / "evaluation" / name for name in ("results.json", "predictions.csv")]
    return all(path.is_file() for path in files) and read_record(run)["settings"] == run.settings


def refuse_difference(run: Run) -> None:
    """End with a sentence where a folder holds training that this command does not ask for."""
    if not any((run.folder / name).exists() for name in ("checkpoints", "last", "evaluation")):
        return
    then, now = read_record(run)["settings"], run.settings
    differing = [f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
                 for key in (*now, *(then.keys() - now)) if then.get(key) != now.get(key)]
    if differing:
        why = "; ".join(differing) if then else "by no command of this script"
        sys.exit(f"ablation.py: {run.folder} was begun otherwise ({why}): choose another --output or delete it.")


def call(command: list[str], run: Run, tick: Callable[[float], None]) -> None:
    """Run a process with its output in the run's log; `tick` hears now and then how many seconds it took so far."""
    path, started = run.folder / "log.txt", time.monotonic()
    environment = dict(PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8", TQDM_MININTERVAL="30", COLUMNS="120")
    with path.open("ab", buffering=0) as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        begin = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    tick(time.monotonic() - started)
        finally:  # whoever ends this process ends that one, which saves what it has
            if process.poll() is None:
                process.terminate()
                process.wait()
            tick(time.monotonic() - started)
    if process.returncode:
        said = path.read_bytes()[begin:].decode(errors="replace").replace("\r", "\n").splitlines()
        lines = "\n".join([f"  {line}" for line in said if line.strip()][-12:])
        raise RunError(f"{run} failed with exit status {process.returncode}; the end of {path}:\n{lines}")


def execute(run: Run) -> None:
    """Train and evaluate, or what of it is left."""
    run.folder.mkdir(parents=True, exist_ok=True)
    before = read_record(run)["seconds"]

    def record(seconds: float) -> None:
        content = dict(seconds=before + seconds, train=run.train, evaluate=run.evaluate, settings=run.settings)
        replace_text(run.folder / "command.json", json.dumps(content, indent=1))

    record(0.0)
    results = run.folder / "results.json"  # the last thing that train.py writes
    if not results.is_file():
        call(run.train, run, record)
        if not results.is_file():  # as after a SIGTERM
            raise RunError(f"{run} was stopped before its end: run the same command again to go on.")
    call(run.evaluate, run, lambda seconds: None)


# main


def tabulate(plan: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """A dict for each row that has a finished run."""
    done = {name: {run.seed: run.folder for run in runs if is_done(run)} for name, runs in plan.items()}
    table = []
    for name, row in ROWS.items():
        trained, passes = trained_as(name), count_passes(row.options)
        if done[trained]:
            epochs = plan[trained][0].settings["epochs"]
            budget = dict(run=trained, passes_a_step=passes, epochs=epochs, passes=passes * epochs)
            figures = summarise_runs(done[trained], {} if trained == "plain" else done["plain"])
            table.append(dict(row=name, **row._asdict(), **budget, **figures))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, _: sys.exit(128 + number))
    # every row is in the table once it is there; those that are asked for are run
    plan = {name: [plan_run(name, seed, args) for seed in args.seeds]
            for name in dict.fromkeys(map(trained_as, ROWS))}
    asked = [name for name in plan if name in map(trained_as, args.rows)]
    runs = [run for of_seed in zip(*(plan[name] for name in asked)) for run in of_seed]
    for run in runs:  # before the first of them takes hours
        refuse_difference(run)

    failures = []
    with tqdm(runs, desc="runs") as bar:
        for run in bar:
            bar.set_postfix_str(str(run))
            try:
                state = "done before" if is_done(run) else "done"
                if state == "done":
                    execute(run)
            except RunError as error:
                failures.append(run)
                tqdm.write(f"ablation.py: {error}")
                if not args.keep_going:
                    break
                continue
            write_table(tabulate(plan), args.output)
            figures = read_figures(run.folder)
            tqdm.write(f"{run}: {state}, top-1 {figures['joint']:.1f} %, {figures['seconds']:.0f} s of training")
    if rows := tabulate(plan):
        write_table(rows, args.output)
        print_table(rows)
    if failures:
        sys.exit(f"ablation.py: failed: {'; '.join(map(str, failures))}. The same command goes on from what is done.")


if __name__ == "__main__":
    main()

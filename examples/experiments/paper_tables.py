"""Tables 2, 3 and 4 of the paper and the plain backbone, in one command that goes on where it was interrupted:

    python examples/experiments/paper_tables.py --output output/paper_tables -- --dataset cub --data-dir CUB_200_2011

What follows `--` are flags of train.py, the same for every row. Read it top to bottom: rows, arguments, one run, main.

Every row trains for the same number of backbone passes: a training step of the full model takes three for each image
(O, D and C), one of the plain backbone takes one, so the plain backbone trains for three times as many epochs; its
schedule is stretched likewise. Each row is tested with the partition that it was trained with: `probability` with the
preset's `partition_eval` (`expected` or `extreme`), `all` with `all`, `random` with draws that the run's seed repeats.
The weights are those of the best validation epoch, or of the last epoch if no images are held out; nothing is chosen on
the test split.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of support/

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
from experiments.runner import EXAMPLES, Run, RunError, execute, exit_on_signals, is_done, refuse_difference
from experiments.tables import print_table, read_metrics, summarize_runs, write_table
from support.arguments import FREE_TO_CHANGE
from support.arguments import parse_args as parse_train_args
from support.loaders import count_test_birds
from tqdm import tqdm

import s3n_timm
from s3n_timm.config import PRESETS

# rows


class Row(NamedTuple):
    """A table of the paper, what it prints (CUB-200-2011, ResNet-50, 448 px), and how the row is trained."""

    table: str
    paper_top1: float
    paper_localization: float | None
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

# flags that may change when a run is resumed; all others decide what its metrics mean
FREE = FREE_TO_CHANGE - {"epochs", "patience", "batch_size", "grad_accum_steps", "data_dir", "pretrained_path"}
OF_ROWS = ("--output", "--resume", "--seed", "--plain", "--branches", "--attention", "--answer")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    usage, layout = "%(prog)s [options] -- [flags of train.py, for every row]", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage=usage, formatter_class=layout)
    parser.add_argument("--output", type=Path, default=Path("output/paper_tables"), help="runs and tables")
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


def plan_run(name: str, seed: int, args: argparse.Namespace) -> Run:
    folder = args.output / name / f"seed-{seed}"
    flags = [*args.flags, *create_train_flags(ROWS[name].options, args.shared)]
    flags += ["--seed", str(seed), "--output", str(folder), "--resume"]
    settled = parse_train_args(flags)
    kind = "best" if settled.val_fraction or settled.val_split else "last"
    settings = {key: value for key, value in vars(settled).items() if key not in FREE}
    settings |= dict(launch=args.launch, weights=kind, s3n_timm=s3n_timm.__version__)
    launch = args.launch or [sys.executable]
    train = [*launch, str(EXAMPLES / "train.py"), *flags]
    evaluate = [*launch, str(EXAMPLES / "evaluate.py"), str(folder / kind), *create_evaluate_flags(settled)]
    evaluate += ["--output", str(folder / "evaluation")]
    return Run(name, seed, folder, train, evaluate, json.loads(json.dumps(settings, default=str)))


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
            summary = summarize_runs(done[trained], {} if trained == "plain" else done["plain"])
            table.append(dict(row=name, **row._asdict(), **budget, **summary))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    exit_on_signals()
    # the table shows every finished row, also of earlier commands; those that are asked for are run
    plan = {name: [plan_run(name, seed, args) for seed in args.seeds]
            for name in dict.fromkeys(map(trained_as, ROWS))}
    asked = [name for name in plan if name in map(trained_as, args.rows)]
    runs = [run for of_seed in zip(*(plan[name] for name in asked)) for run in of_seed]
    try:
        for run in runs:  # before the first of them takes hours
            refuse_difference(run)
    except RunError as error:
        sys.exit(f"paper_tables.py: {error}")

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
                tqdm.write(f"paper_tables.py: {error}")
                if not args.keep_going:
                    break
                continue
            write_table(tabulate(plan), args.output)
            metrics = read_metrics(run.folder)
            tqdm.write(f"{run}: {state}, top-1 {metrics['joint']:.1f} %, {metrics['seconds']:.0f} s of training")
    if rows := tabulate(plan):
        write_table(rows, args.output)
        print_table(rows)
    if failures:
        sys.exit(f"paper_tables.py: failed: {'; '.join(map(str, failures))}. The same command goes on from there.")


if __name__ == "__main__":
    main()

"""The tables and plots of experiments. Those of cub50.py are made by `python examples/experiments/tables.py`.

It reads the JSON files of examples/results/cub50 and writes beside them table.md and accuracy.png, and frontier.md and
frontier.png with the rows that a plain timm model answers in a single pass. Speed comes from speed.json, which
`speed.py` measures in one process where all rows take turns: the runs themselves shared their machine with others.

Read it top to bottom: statistics, the paper's tables, the rows of cub50.py, their frontier, main.
"""

import argparse
import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of support/

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import torch
from experiments.cub50 import RESULTS, ROWS, flag, input_side
from experiments.runner import RunError
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table
from support.files import replace_text, replacing_file
from torch import Tensor

from s3n_timm.evaluation import bootstrap_difference

Runs = dict[str, dict[int, dict[str, Any]]]  # of cub50.py: by row, then by seed
Speed = dict[str, dict[str, float]]

# statistics


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation; None if a value is missing, and for the deviation of one seed."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values)
    return dict(
        mean=statistics.fmean(known) if complete else None,
        sd=statistics.stdev(known) if complete and len(known) > 1 else None,
        values=list(values),
    )


def show(value: dict[str, Any] | None, form: str = ".1f") -> str:
    """Mean ± deviation of `spread`; empty where there is none."""
    if value is None or value["mean"] is None:
        return ""
    return format(value["mean"], form) + ("" if value["sd"] is None else f" ± {value['sd']:{form.lstrip('+')}}")


def compare(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> dict[str, Any] | None:
    """Differences of top-1 in percentage points seed by seed, and their paired 95 % bootstrap interval.

    Args:
        ours: which of N images a row had right, N booleans, by seed.
        theirs: the same of the row that it is compared with; seeds that one side lacks are left out.

    Returns:
        `spread` of the differences, their `seeds` and the `interval`; None without a common seed.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    a, b = (torch.stack([of_row[seed] for seed in seeds]) for of_row in (ours, theirs))
    differences = 100 * (a.double().mean(1) - b.double().mean(1))
    interval = [100 * end for end in bootstrap_difference(a, b)]
    return dict(spread(differences.tolist()), seeds=seeds, interval=interval)


def show_difference(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(difference["mean"], *difference["interval"])


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 2) -> str:
    """A table whose first columns are texts, aligned left."""
    aligned = [*["---"] * texts, *["---:"] * (len(header) - texts)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, aligned, *rows))


# the paper's tables

METRICS = dict(
    joint=("accuracy", "joint", "top1"),
    O=("accuracy", "original", "top1"),
    D=("accuracy", "discriminative", "top1"),
    C=("accuracy", "complementary", "top1"),
    localization=("localization", "joint", "accuracy"),
    hit_rate=("hits", "rate"),
)
PAPER_HEADER = ("table", "row", "paper", "passes × epochs", "seeds", "joint", "O", "D", "C", "paper loc. %", "loc. %",
                "hits %", "s", "− plain", "95 %")
NOTE = (
    "Top-1 in % on the test split, mean ± sample standard deviation over seeds. − plain: joint top-1 less that of the "
    "plain backbone of the same seed, in percentage points. 95 %: paired bootstrap interval of that difference; the "
    "answers of all seeds count as if each had its own images, so it is a little narrow. paper: as published for "
    "CUB-200-2011, ResNet-50, 448 px. s: wall-clock seconds of train.py, its start and its own tests included."
)


def read_metrics(folder: Path) -> dict[str, float | None]:
    """Metrics of a run; None for those of branches, peaks or maps that it does not have."""
    measures = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))["measures"]
    metrics: dict[str, float | None] = {}
    for name, path in METRICS.items():
        value = measures
        for key in path:
            value = value.get(key) if value else None
        metrics[name] = value
    return dict(metrics, seconds=json.loads((folder / "command.json").read_text(encoding="utf-8"))["seconds"])


def read_correct(folder: Path) -> tuple[list[tuple[str, str]], Tensor]:
    """Index and label of every test image, and whether the joint prediction is right."""
    with (folder / "evaluation" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [(row["index"], row["label"]) for row in rows], torch.tensor([row["correct_joint"] == "1" for row in rows])


def compare_folders(folders: Mapping[int, Path], baselines: Mapping[int, Path]) -> dict[str, Any] | None:
    """`compare` of a row's runs with those of another, by seed.

    Raises:
        RunError: two runs of a seed were not tested on the same images in the same order.
    """
    ours, theirs = ({seed: read_correct(folder) for seed, folder in each.items()} for each in (folders, baselines))
    for seed in ours.keys() & theirs.keys():
        if ours[seed][0] != theirs[seed][0]:
            raise RunError(f"{folders[seed]} and {baselines[seed]} were tested on other images: delete one.")
    return compare(*({seed: right for seed, (_, right) in each.items()} for each in (ours, theirs)))


def summarize_runs(folders: Mapping[int, Path], baselines: Mapping[int, Path]) -> dict[str, Any]:
    """Metrics of a row's runs, by seed, and its difference from the baseline."""
    each = [read_metrics(folder) for folder in folders.values()]
    metrics = {name: spread([of_run[name] for of_run in each]) for name in each[0]}
    return dict(seeds=list(folders), metrics=metrics, difference=compare_folders(folders, baselines))


def format_row(row: dict[str, Any]) -> list[str]:
    metrics, difference = row["metrics"], row["difference"]
    interval = "" if difference is None else "{:+.1f} to {:+.1f}".format(*difference["interval"])
    top1 = [show(metrics[name]) for name in ("joint", "O", "D", "C")]
    located = "" if row["paper_localization"] is None else str(row["paper_localization"])
    return [row["table"], row["row"], str(row["paper_top1"]), f"{row['passes_a_step']} × {row['epochs']}",
            str(len(row["seeds"])), *top1, located, show(metrics["localization"]), show(metrics["hit_rate"]),
            show(metrics["seconds"], ".0f"), show(difference, "+.1f"), interval]


def write_table(rows: list[dict[str, Any]], output: Path) -> None:
    """table.json with everything, table.csv with a column for each number, table.md to read."""
    replace_text(output / "table.json", json.dumps(dict(note=NOTE, rows=rows), indent=1, ensure_ascii=False))

    lines = []
    for row in rows:
        kept = ("table", "row", "paper_top1", "paper_localization", "passes_a_step", "epochs", "passes")
        line = {key: row[key] for key in kept} | dict(seeds=len(row["seeds"]))
        for name, value in dict(row["metrics"], difference=row["difference"] or dict(mean=None, sd=None)).items():
            line |= {f"{name}_{key}": value[key] for key in ("mean", "sd")}
        low, high = row["difference"]["interval"] if row["difference"] else (None, None)
        lines.append(dict(line, difference_low=low, difference_high=high))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_text(output / "table.csv", text.getvalue())
    replace_text(output / "table.md", f"{as_markdown(PAPER_HEADER, [format_row(row) for row in rows])}\n{NOTE}\n")


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(caption=NOTE, caption_justify="left")
    for i, name in enumerate(PAPER_HEADER):
        table.add_column(name, justify="right" if i > 1 else "left")
    for row in rows:
        table.add_row(*format_row(row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


# the rows of cub50.py

IMAGES = 1500  # that every row trains on
BASELINES = ("plain", "plain-18", "plain-288")  # equal epochs, equal training compute, equal cost of an image
# names of points that have a neighbor on their right: on which side of the point they stand instead, (x, y)
SIDES = {"plain-224": (0, 1), "plain-288": (0, 1), "plain-288-18": (0, 1), "focus-exit": (0, -1),
         "focus-224-exit": (0, -1), "cascade-exit": (0, 1), "exit-18": (-1, 0), "focus-224-18-exit": (-1, 0)}
HEADER = ("row", "what", "epochs", "px", "passes an image", "images/s", "training min", "seeds", "top-1 %", "joint",
          "mean", "O", "D", "C", "hits %", "loc. %", *(f"− {name}" for name in BASELINES))
OUTPUTS = ("joint", "mean", "original", "discriminative", "complementary")


def read_runs(folder: Path) -> Runs:
    """The runs of each row by seed, rows in the order of cub50.py."""
    runs: Runs = {name: {} for name in ROWS}
    for path in sorted(folder.glob("*-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["row"] not in runs:
            raise RunError(f"{path} is a run of {run['row']}, which is no row of cub50.py: move it or delete it.")
        runs[run["row"]][run["seed"]] = run
    return {name: of_row for name, of_row in runs.items() if of_row}


def read_speed(path: Path) -> Speed:
    """What speed.py measured, by row, also of the rows whose network another row has."""
    measured = {row["row"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}

    def source(name: str) -> str | None:
        while name not in measured:
            following = ROWS[name].cost or ROWS[name].trained
            if following is None:
                return None
            name = following
        return name

    return {name: measured[found] for name in ROWS if (found := source(name))}


def count_passes(run: dict[str, Any], speed: Speed) -> float:
    """Backbone passes that answering one image takes on average, in passes at 160 px, by multiply-accumulates."""
    passes = speed[run["row"]]["gmacs"] / speed["plain"]["gmacs"]
    return passes - run.get("exited", 0) * (passes - (input_side(run["train"]) / 160) ** 2)


def read_answers(run: dict[str, Any]) -> Tensor:
    return torch.tensor([answer == "1" for answer in run["answered"]])


def read_top1(of_row: Mapping[int, dict[str, Any]]) -> list[float]:
    return [100 * read_answers(run).double().mean().item() for run in of_row.values()]


def compare_rows(runs: Mapping[int, dict[str, Any]], baselines: Mapping[int, dict[str, Any]]) -> str:
    """Mean difference in percentage points on the seeds that both have, and its interval; empty against itself."""
    if runs is baselines:
        return ""
    return show_difference(compare(*({seed: read_answers(run) for seed, run in each.items()}
                                     for each in (runs, baselines))))


def show_speed(run: dict[str, Any], speed: Speed) -> tuple[str, str]:
    """Images answered a second, and minutes that training takes."""
    trained = speed[ROWS[run["row"]].trained or run["row"]]
    minutes = int(flag(run["train"], "--epochs", "6")) * IMAGES / trained["training_images_per_second"] / 60
    # how fast an early exit is depends on the images
    return f"{speed[run['row']]['images_per_second']:.0f}" if not run.get("exited") else "", f"{minutes:.0f}"


def describe(name: str, of_row: Mapping[int, dict[str, Any]], speed: Speed) -> list[str]:
    """The first columns of both tables, from `row` to `top-1 %`."""
    each = list(of_row.values())
    words, passes = each[0]["train"], statistics.fmean(count_passes(run, speed) for run in each)
    side = str(input_side(words)) if ROWS[name].evaluated == "backbone" else flag(words, "--img-size", "160")
    return [name, ROWS[name].about, flag(words, "--epochs", "6"), side, f"{passes:.2f}", *show_speed(each[0], speed),
            str(len(each)), show(spread(read_top1(of_row)))]


def format_rows(runs: Runs, speed: Speed) -> list[list[str]]:
    lines = []
    for name, of_row in runs.items():
        measures = [run["measures"] for run in of_row.values()]
        outputs = [show(spread([(of_run["accuracy"].get(output) or {}).get("top1") for of_run in measures]))
                   for output in OUTPUTS]
        hits = show(spread([(of_run.get("hits") or {}).get("rate") for of_run in measures]))
        located = [(of_run.get("localization") or {}).get("joint", {}).get("accuracy") for of_run in measures]
        lines.append([*describe(name, of_row, speed), *outputs, hits, show(spread(located)),
                      *(compare_rows(of_row, runs.get(baseline, {})) for baseline in BASELINES)])
    return lines


def set_axes(ax: Axes, lowest: float, most: float, title: str) -> None:
    ax.set_ylim(lowest, lowest + 18)
    ax.set_xlim(0.8, most)
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 3, 4, 6, 10], ["1", "2", "3", "4", "6", "10"], minor=False)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("backbone passes an image, at 160 px")
    ax.set_ylabel("top-1 %")


def draw(runs: Runs, speed: Speed, title: str) -> Figure:
    """Accuracy against what answering an image costs, in passes of the backbone at 160 px."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    ax = figure.subplots()
    places: list[tuple[float, float, float, str]] = []
    for name, of_row in runs.items():
        values, costs = read_top1(of_row), [count_passes(run, speed) for run in of_row.values()]
        cost, mean = statistics.fmean(costs), statistics.fmean(values)
        color = "tab:gray" if ROWS[name].is_plain else "tab:blue"
        long = int(flag(next(iter(of_row.values()))["train"], "--epochs", "6")) > 6
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        ax.errorbar(cost, mean, deviation or None, fmt="s" if long else "o", markersize=5, color=color)
        places.append((cost, mean, deviation, name))
    # a row that failed would press all others together: it is named, not drawn
    lowest = max(mean for _, mean, _, _ in places) - 15
    failed = [f"{name} {mean:.1f} %" for _, mean, _, name in places if mean < lowest]
    set_axes(ax, lowest, max(14.0, 1.4 * max(cost for cost, *_ in places)), title)
    if failed:
        ax.text(0.99, 0.01, f"below: {', '.join(failed)}", transform=ax.transAxes, ha="right", fontsize=8)
    heights: dict[int, float] = {}  # of the topmost name beside points of about one cost
    for cost, mean, deviation, name in sorted(places, key=lambda place: place[1]):
        if mean < lowest:
            continue
        if name in SIDES:
            x, y = SIDES[name]
            ax.text(cost * 1.04**x, mean + y * (deviation + 0.2), name, fontsize=8, ha="right" if x else "center",
                    va=("center", "bottom", "top")[y])
        else:
            column = round(4 * math.log2(cost))
            heights[column] = max(mean - 0.2, heights.get(column, 0) + 0.45)
            ax.annotate(name, (cost, mean), (cost * 1.08, heights[column]), va="center", fontsize=8,
                        arrowprops=dict(arrowstyle="-", color="lightgray", shrinkA=0, shrinkB=3, relpos=(0, 0.5)))
    return figure


# their frontier: what one pass of a plain timm model answers

FRONTIER_HEADER = (*HEADER[:9], "best baseline", "− best baseline")


def find_best_baselines(runs: Runs) -> dict[int, str]:
    """The plain row of the highest mean top-1 on the images of the runs, for each input size in pixels.

    Choosing it there favors the baseline. It is one with as many seeds as any: with fewer a row can be above others by
    chance, and less could be compared with it.
    """
    best: dict[int, str] = {}
    for name in filter(lambda name: ROWS[name].is_plain, runs):
        side = input_side(next(iter(runs[name].values()))["train"])
        best[side] = max(best.get(side, name), name,
                         key=lambda each: (len(runs[each]), statistics.fmean(read_top1(runs[each]))))
    return best


def format_frontier(runs: Runs, speed: Speed) -> list[list[str]]:
    """Single-pass rows by input size, the best first, each against the best plain baseline of its size."""
    best, lines = find_best_baselines(runs), []
    for name, of_row in runs.items():
        side = input_side(next(iter(of_row.values()))["train"])
        baseline = best.get(side, "")
        key = (side, -statistics.fmean(read_top1(of_row)))
        lines.append((key, [*describe(name, of_row, speed), baseline, compare_rows(of_row, runs.get(baseline, {}))]))
    return [line for _, line in sorted(lines, key=lambda line: line[0])]


def draw_frontier(runs: Runs, speed: Speed) -> Figure:
    """`draw` with a line through the best plain baseline of each size, and one through S3N's best backbone."""
    taught = "" if all(ROWS[name].is_plain for name in runs) else ": trained alone grey, by S3N blue"
    figure = draw(runs, speed, f"one pass of a plain timm model{taught}; the best of each cost are joined")
    for plain, color in ((True, "tab:gray"), (False, "tab:blue")):
        best: dict[float, float] = {}
        for name, of_row in runs.items():
            if ROWS[name].is_plain == plain:
                cost = count_passes(next(iter(of_row.values())), speed)
                best[cost] = max(best.get(cost, 0.0), statistics.fmean(read_top1(of_row)))
        figure.axes[0].plot(sorted(best), [best[cost] for cost in sorted(best)], color=color, linewidth=1)
    return figure


# main


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.results)
    except RunError as error:
        parser.error(str(error))
    if not runs:
        parser.error(f"--results {args.results} holds no run: examples/experiments/cub50.py makes them.")
    # validation runs lie in a folder beside speed.json
    path = next((each / "speed.json" for each in (args.results, args.results.parent)
                 if (each / "speed.json").is_file()), None)
    if path is None:
        parser.error(f"--results {args.results} has no speed.json: examples/experiments/speed.py makes it.")
    speed = read_speed(path)
    needed = [name for row in runs for name in (row, ROWS[row].trained) if name]
    unmeasured = [name for name in dict.fromkeys(needed) if name not in speed]
    if unmeasured:
        parser.error(f"{path} lacks {', '.join(unmeasured)}: examples/experiments/speed.py measures all rows.")
    single = {name: of_row for name, of_row in runs.items() if ROWS[name].is_single_pass}
    title = "plain backbone grey, S3N blue; circles 6 epochs, squares 18 or more; bars: deviation of seeds"
    text = as_markdown(HEADER, format_rows(runs, speed))
    replace_text(args.results / "table.md", text)
    pictures = {"accuracy.png": draw(runs, speed, title)}
    print(text)
    if single:
        text = as_markdown(FRONTIER_HEADER, format_frontier(single, speed))
        replace_text(args.results / "frontier.md", text)
        pictures["frontier.png"] = draw_frontier(single, speed)
        print(text)
    for name, figure in pictures.items():
        with replacing_file(args.results / name) as partial:
            figure.savefig(partial, dpi=120)


if __name__ == "__main__":
    main()

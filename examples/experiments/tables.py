"""The table and the plot of experiments.py: `python examples/experiments_table.py`.

Reads the JSON files of examples/results/cub50 and writes table.md and accuracy.png beside them. Differences are those
from a row of the same seed and the same test images. Images per second and minutes of training are not those of the
runs, which shared their machine with others: speed.json has them from one process in which all rows took turns, see
benchmark.py.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of support/

from experiments.cub50 import RESULTS, ROWS
from experiments.runner import show, spread
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from support.files import replace_text, replacing_file

from s3n_timm.evaluation import bootstrap_difference

IMAGES = 1500  # that every row trains on
BASELINES = ("plain", "plain-18", "plain-288")  # equal epochs, equal training compute, equal cost of an image
# points with a neighbour on the right, where all others have their names in the plot: the side of these names, (x, y)
SIDES = {"plain-224": (0, 1), "plain-288": (0, 1), "plain-288-18": (0, 1), "focus-exit": (0, -1),
         "focus-224-exit": (0, -1), "cascade-exit": (0, 1), "exit-18": (-1, 0), "focus-224-18-exit": (-1, 0)}
HEADER = ("row", "what", "epochs", "px", "passes an image", "images/s", "training min", "seeds", "top-1 %", "joint",
          "mean", "O", "D", "C", "hits %", "loc. %", *(f"− {name}" for name in BASELINES))


def read_runs(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The runs of each row by seed, rows in the order of experiments.py."""
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in ROWS}
    for path in sorted(folder.glob("*-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs[run["row"]][run["seed"]] = run
    return {name: of_row for name, of_row in runs.items() if of_row}


def flag(run: dict[str, Any], name: str, default: str) -> str:
    words = run["train"]
    return words[words.index(name) + 1] if name in words else default


def read_speed(folder: Path) -> dict[str, dict[str, float]]:
    """What `benchmark.py rows --output speed.json` measured, by row, also of those that read another row's weights."""
    measured = {row["row"]: row for row in json.loads((folder / "speed.json").read_text(encoding="utf-8"))["rows"]}
    return {name: measured[row.trained or name] for name, row in ROWS.items() if (row.trained or name) in measured}


def count_passes(run: dict[str, Any], speed: dict[str, dict[str, float]]) -> float:
    """Backbone passes that answering one image takes on average, in passes at 160 px, by multiply-accumulates."""
    passes = speed[run["row"]]["gmacs"] / speed["plain"]["gmacs"]
    side = json.loads(flag(run, "--model-kwargs", "{}")).get("scan_size", flag(run, "--img-size", "160"))
    return passes - run.get("exited", 0) * (passes - (int(side) / 160) ** 2)


def read_answers(run: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([answer == "1" for answer in run["answered"]])


def show_speed(run: dict[str, Any], speed: dict[str, dict[str, float]]) -> tuple[str, str]:
    """Images that a second answers, and minutes that training takes."""
    measured = speed[run["row"]]
    minutes = int(flag(run, "--epochs", "6")) * IMAGES / measured["training_images_per_second"] / 60
    # how fast an early exit is depends on the images
    return f"{measured['images_per_second']:.0f}" if not run.get("exited") else "", f"{minutes:.0f}"


def compare(runs: dict[int, dict[str, Any]], baselines: dict[int, dict[str, Any]]) -> str:
    """Mean difference in percentage points on the seeds that both have, and its paired 95 % bootstrap interval."""
    seeds = [seed for seed in runs if seed in baselines]
    if not seeds or runs is baselines:
        return ""
    ours, theirs = (torch.stack([read_answers(of_row[seed]) for seed in seeds]) for of_row in (runs, baselines))
    low, high = bootstrap_difference(ours, theirs)
    difference = 100 * (ours.double().mean() - theirs.double().mean()).item()
    return f"{difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def format_rows(
        runs: dict[str, dict[int, dict[str, Any]]],
        speed: dict[str, dict[str, float]],
) -> list[list[str]]:
    lines = []
    for name, of_row in runs.items():
        each = list(of_row.values())
        measures = [run["measures"] for run in each]
        top1 = show(spread([100 * read_answers(run).double().mean().item() for run in each]))
        outputs = [show(spread([(of_run["accuracy"].get(output) or {}).get("top1") for of_run in measures]))
                   for output in ("joint", "mean", "original", "discriminative", "complementary")]
        hits = show(spread([(of_run.get("hits") or {}).get("rate") for of_run in measures]))
        located = [(of_run.get("localisation") or {}).get("joint", {}).get("accuracy") for of_run in measures]
        passes = f"{statistics.fmean(count_passes(run, speed) for run in each):.2f}"
        epochs, side = flag(each[0], "--epochs", "6"), flag(each[0], "--img-size", "160")
        lines.append([name, ROWS[name].about, epochs, side, passes, *show_speed(each[0], speed), str(len(each)), top1,
                      *outputs, hits, show(spread(located)),
                      *(compare(of_row, runs.get(baseline, {})) for baseline in BASELINES)])
    return lines


def draw(runs: dict[str, dict[int, dict[str, Any]]], speed: dict[str, dict[str, float]]) -> Figure:
    """Accuracy against what answering an image costs, in passes of the backbone at 160 px."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    ax = figure.subplots()
    places: list[tuple[float, float, float, str]] = []
    for name, of_row in runs.items():
        each = list(of_row.values())
        values = [100 * read_answers(run).double().mean().item() for run in each]
        cost, mean = statistics.fmean(count_passes(run, speed) for run in each), statistics.fmean(values)
        color = "tab:gray" if name.startswith("plain") else "tab:blue"
        long = int(flag(each[0], "--epochs", "6")) > 6
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        ax.errorbar(cost, mean, deviation or None, fmt="s" if long else "o", markersize=5, color=color)
        places.append((cost, mean, deviation, name))
    # a row that failed would press all others together: it is named, not drawn
    lowest = max(mean for _, mean, _, _ in places) - 15
    failed = [f"{name} {mean:.1f} %" for _, mean, _, name in places if mean < lowest]
    ax.set_ylim(lowest, lowest + 18)
    ax.set_xlim(0.8, 14)
    ax.set_xscale("log")
    ax.set_xticks([1, 2, 3, 4, 6, 10], ["1", "2", "3", "4", "6", "10"], minor=False)
    ax.xaxis.set_minor_locator(NullLocator())
    if failed:
        ax.text(0.99, 0.01, f"below: {', '.join(failed)}", transform=ax.transAxes, ha="right", fontsize=8)
    heights: dict[int, float] = {}  # where the last name stands that belongs to points of about one cost
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
    ax.set_title("plain backbone grey, S3N blue; circles 6 epochs, squares 18; bars: deviation of seeds", fontsize=9)
    ax.set_xlabel("backbone passes an image, at 160 px")
    ax.set_ylabel("top-1 % on the test split")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = read_runs(args.results)
    if not runs:
        parser.error(f"--results {args.results} holds no run: examples/experiments.py makes them.")
    if not (args.results / "speed.json").is_file():
        parser.error(f"--results {args.results} has no speed.json: benchmark.py rows --output makes it.")
    speed = read_speed(args.results)
    unmeasured = [name for name in runs if name not in speed]
    if unmeasured:
        parser.error(f"speed.json lacks {', '.join(unmeasured)}: benchmark.py rows --output measures all rows.")
    aligned = ["---", "---", *["---:"] * (len(HEADER) - 2)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [list(HEADER), aligned, *format_rows(runs, speed)])
    replace_text(args.results / "table.md", f"{text}\n")
    with replacing_file(args.results / "accuracy.png") as path:
        draw(runs, speed).savefig(path, dpi=120)
    print(text)


if __name__ == "__main__":
    main()

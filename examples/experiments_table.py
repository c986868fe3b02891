"""The table and the plot of experiments.py: `python examples/experiments_table.py`.

Reads the JSON files of examples/results/cub50 and writes table.md and accuracy.png beside them. Differences are those
from a row of the same seed and the same test images.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from ablation_table import spread
from experiments import RESULTS, ROWS
from files import replace_text, replacing_file
from matplotlib.figure import Figure

from s3n_timm.evaluation import bootstrap_difference

HEADER = ("row", "what", "passes a step", "epochs", "px", "seeds", "joint", "O", "D", "C", "hits %", "loc. %",
          "training s", "− plain", "95 %")


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


def count_cost(run: dict[str, Any]) -> tuple[int, int, int]:
    """Backbone passes a step, epochs, and pixels a side of what they read."""
    branches = "O" if "--plain" in run["train"] else flag(run, "--branches", "O+D+C")
    kwargs = json.loads(flag(run, "--model-kwargs", "{}"))
    side = kwargs.get("scan_size", int(flag(run, "--img-size", "160")))
    return 1 + sum(branch in branches for branch in "DC"), int(flag(run, "--epochs", "6")), side


def correct(run: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([answer == "1" for answer in run["correct"]["joint"]])


def compare(runs: dict[int, dict[str, Any]], baselines: dict[int, dict[str, Any]]) -> tuple[str, str]:
    """Mean difference of joint top-1 in percentage points, and its paired bootstrap interval over all answers."""
    seeds = [seed for seed in runs if seed in baselines]
    if not seeds or runs is baselines:
        return "", ""
    ours = torch.cat([correct(runs[seed]) for seed in seeds])
    theirs = torch.cat([correct(baselines[seed]) for seed in seeds])
    low, high = bootstrap_difference(ours, theirs)
    difference = 100 * (ours.double().mean() - theirs.double().mean()).item()
    return f"{difference:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"


def format_rows(runs: dict[str, dict[int, dict[str, Any]]]) -> list[list[str]]:
    def show(values: list[float | None], form: str = ".1f") -> str:
        figure = spread(values)
        if figure["mean"] is None:
            return ""
        return format(figure["mean"], form) + ("" if figure["sd"] is None else f" ± {figure['sd']:{form}}")

    lines = []
    for name, of_row in runs.items():
        each = list(of_row.values())
        passes, epochs, side = count_cost(each[0])
        top1 = [show([(run["measures"]["accuracy"].get(output) or {}).get("top1") for run in each])
                for output in ("joint", "original", "discriminative", "complementary")]
        hits = show([(run["measures"].get("hits") or {}).get("rate") for run in each])
        located = show([(run["measures"].get("localisation") or {}).get("joint", {}).get("accuracy") for run in each])
        seconds = show([run["train_seconds"] for run in each], ".0f")
        lines.append([name, ROWS[name].about, str(passes), str(epochs), str(side), str(len(each)), *top1, hits, located,
                      seconds, *compare(of_row, runs.get("plain", {}))])
    return lines


def draw(runs: dict[str, dict[int, dict[str, Any]]]) -> Figure:
    """Accuracy against the cost of training, in passes of the backbone at 160 px over all training images."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, of_row in runs.items():
        passes, epochs, side = count_cost(next(iter(of_row.values())))
        values = [run["measures"]["accuracy"]["joint"]["top1"] for run in of_row.values()]
        cost, mean = passes * epochs * (side / 160) ** 2, statistics.fmean(values)
        color = "tab:gray" if name.startswith("plain") else "tab:blue"
        ax.errorbar(cost, mean, statistics.stdev(values) if len(values) > 1 else None, fmt="o", color=color)
        ax.annotate(name, (cost, mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
    ax.set_xlabel("backbone passes over the training images, at 160 px")
    ax.set_ylabel("joint top-1 % on the test split")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = read_runs(args.results)
    if not runs:
        parser.error(f"--results {args.results} holds no run: examples/experiments.py makes them.")
    aligned = ["---", "---", *["---:"] * (len(HEADER) - 2)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [list(HEADER), aligned, *format_rows(runs)])
    replace_text(args.results / "table.md", f"{text}\n")
    with replacing_file(args.results / "accuracy.png") as path:
        draw(runs).savefig(path, dpi=120)
    print(text)


if __name__ == "__main__":
    main()

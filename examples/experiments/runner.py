"""The table of ablation.py: figures of finished runs, over seeds and against the plain backbone, and their files."""

import csv
import io
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support.files import replace_text
from torch import Tensor

from s3n_timm.evaluation import bootstrap_difference

FIGURES = dict(
    joint=("accuracy", "joint", "top1"),
    O=("accuracy", "original", "top1"),
    D=("accuracy", "discriminative", "top1"),
    C=("accuracy", "complementary", "top1"),
    localisation=("localisation", "joint", "accuracy"),
    hit_rate=("hits", "rate"),
)
HEADER = ("table", "row", "paper", "passes × epochs", "seeds", "joint", "O", "D", "C", "paper loc. %", "loc. %",
          "hits %", "s", "− plain", "95 %")
NOTE = (
    "Top-1 in % on the test split, mean ± sample standard deviation over seeds. − plain: joint top-1 less that of the "
    "plain backbone of the same seed, in percentage points. 95 %: paired bootstrap interval of that difference, the "
    "answers of all seeds taken as if each had images of its own, so a little narrow. paper: its own figures, for "
    "CUB-200-2011, ResNet-50, 448 px. s: wall-clock seconds of train.py, with its start and its own tests."
)

# figures of runs


def read_figures(folder: Path) -> dict[str, float | None]:
    """Figures of a run; None for those of branches, peaks or maps that it does not have."""
    measures = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))["measures"]
    figures: dict[str, float | None] = {}
    for name, path in FIGURES.items():
        value = measures
        for key in path:
            value = value.get(key) if value else None
        figures[name] = value
    return dict(figures, seconds=json.loads((folder / "command.json").read_text(encoding="utf-8"))["seconds"])


def read_correct(folder: Path) -> tuple[list[tuple[str, str]], Tensor]:
    """Index and label of every test image, and whether the joint prediction is right."""
    with (folder / "evaluation" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [(row["index"], row["label"]) for row in rows], torch.tensor([row["correct_joint"] == "1" for row in rows])


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation; None for what a run lacks, and for the deviation of one seed."""
    known = [value for value in values if value is not None]
    whole = len(known) == len(values)
    return dict(
        mean=statistics.fmean(known) if whole else None,
        sd=statistics.stdev(known) if whole and len(known) > 1 else None,
        values=list(values),
    )


def compare(folders: Mapping[int, Path], baselines: Mapping[int, Path]) -> dict[str, Any] | None:
    """Differences of joint top-1 in percentage points seed by seed, and an interval from the answers of all of them.

    Args:
        folders: of a row's runs, by seed.
        baselines: of the runs that they are compared with, by seed; seeds that one side lacks are left out.

    Returns:
        What `spread` says of the differences, with their `seeds` and the `interval`; None without a common seed.

    Raises:
        SystemExit: two runs of a seed were not tested on the same images in one order.
    """
    seeds = [seed for seed in folders if seed in baselines]
    if not seeds:
        return None
    differences, ours, theirs = [], [], []
    for seed in seeds:
        (images, right), (same, baseline) = read_correct(folders[seed]), read_correct(baselines[seed])
        if images != same:
            sys.exit(f"ablation.py: {folders[seed]} and {baselines[seed]} were tested on other images: delete one.")
        differences.append(100 * (right.double().mean() - baseline.double().mean()).item())
        ours.append(right)
        theirs.append(baseline)
    interval = bootstrap_difference(torch.stack(ours), torch.stack(theirs))
    return dict(spread(differences), seeds=seeds, interval=[100 * end for end in interval])


def summarise_runs(folders: Mapping[int, Path], baselines: Mapping[int, Path]) -> dict[str, Any]:
    """The figures of a row's runs, by seed, and how it compares."""
    each = [read_figures(folder) for folder in folders.values()]
    figures = {name: spread([of_run[name] for of_run in each]) for name in each[0]}
    return dict(seeds=list(folders), figures=figures, difference=compare(folders, baselines))


# files and print


def show(figure: dict[str, Any] | None, form: str = ".1f") -> str:
    """Mean ± deviation of `spread`; nothing where there is none."""
    if figure is None or figure["mean"] is None:
        return ""
    return format(figure["mean"], form) + ("" if figure["sd"] is None else f" ± {figure['sd']:{form.lstrip('+')}}")


def format_row(row: dict[str, Any]) -> list[str]:
    figures, difference = row["figures"], row["difference"]
    interval = "" if difference is None else "{:+.1f} to {:+.1f}".format(*difference["interval"])
    top1 = [show(figures[name]) for name in ("joint", "O", "D", "C")]
    located = "" if row["paper_localisation"] is None else str(row["paper_localisation"])
    return [row["table"], row["row"], str(row["paper_top1"]), f"{row['passes_a_step']} × {row['epochs']}",
            str(len(row["seeds"])), *top1, located, show(figures["localisation"]), show(figures["hit_rate"]),
            show(figures["seconds"], ".0f"), show(difference, "+.1f"), interval]


def write_table(rows: list[dict[str, Any]], output: Path) -> None:
    """table.json with all figures, table.csv with one column a figure, table.md to read."""
    replace_text(output / "table.json", json.dumps(dict(note=NOTE, rows=rows), indent=1, ensure_ascii=False))

    lines = []
    for row in rows:
        kept = ("table", "row", "paper_top1", "paper_localisation", "passes_a_step", "epochs", "passes")
        line = {key: row[key] for key in kept} | dict(seeds=len(row["seeds"]))
        for name, figure in dict(row["figures"], difference=row["difference"] or dict(mean=None, sd=None)).items():
            line |= {f"{name}_{key}": figure[key] for key in ("mean", "sd")}
        low, high = row["difference"]["interval"] if row["difference"] else (None, None)
        lines.append(dict(line, difference_low=low, difference_high=high))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_text(output / "table.csv", text.getvalue())

    aligned = ["---", "---", *["---:"] * (len(HEADER) - 2)]
    cells = [HEADER, aligned, *map(format_row, rows)]
    replace_text(output / "table.md", "\n".join(f"| {' | '.join(line)} |" for line in cells) + f"\n\n{NOTE}\n")


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(caption=NOTE, caption_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i > 1 else "left")
    for row in rows:
        table.add_row(*format_row(row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)

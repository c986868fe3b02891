"""What evaluate.py leaves: files in its folder, tables on the terminal."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from support.files import replace_text, replacing_file
from torch import Tensor

from s3n_timm.evaluation import OUTPUTS, ResultTable, confidence, confused_pairs, draw_confusions, result_tables

# files


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    replace_text(path, text.getvalue())


def write_files(output: Path, results: dict[str, Any], records: dict[str, Tensor], names: list[str]) -> None:
    labels, predictions = records["label"], records["prediction_answer"]
    images = torch.bincount(labels, minlength=len(names)).tolist()
    correct = torch.bincount(labels[labels == predictions], minlength=len(names)).tolist()
    accuracy = [100 * right / count if count else None for right, count in zip(correct, images)]
    write_csv(
        output / "per_class.csv",
        ("label", "name", "images", "correct", "accuracy"),
        zip(range(len(names)), names, images, correct, accuracy),
    )
    pairs = confused_pairs(labels, predictions, len(names), k=len(names) ** 2).tolist()
    write_csv(
        output / "confused.csv",
        ("label", "name", "prediction", "predicted_name", "count"),
        ((label, names[label], taken, names[taken], count) for label, taken, count in pairs),
    )
    columns = dict(index=records["index"], label=labels, prediction=predictions)
    columns["probability"], _ = confidence(records["logits"])
    columns |= {
        f"correct_{name}": (records[f"prediction_{name}"] == labels).int()
        for name in OUTPUTS if f"prediction_{name}" in records
    }
    columns |= {name: records[name] for name in ("entropy", "peaks", "hits") if name in records}
    rows = {name: values.tolist() for name, values in columns.items()}
    if "hits" in rows:  # an image whose box was cropped away has none
        rows["hits"] = [hits if boxed else None for hits, boxed in zip(rows["hits"], records["boxed"].tolist())]
    write_csv(output / "predictions.csv", list(rows), zip(*rows.values()))

    # the last one: where it is, the others are complete
    replace_text(output / "results.json", json.dumps(results, indent=1, allow_nan=False))


def draw_picture(output: Path, records: dict[str, Tensor], names: list[str]) -> None:
    with replacing_file(output / "confusion.png") as file:
        figure = draw_confusions(records["label"], records["prediction_answer"], names)
        figure.savefig(file, format="png", dpi=110)


# tables


def print_table(table: ResultTable, console: Console) -> None:
    printed = Table(title=table.title, title_justify="left", title_style="bold")
    for i, column in enumerate(table.header):
        printed.add_column(column, justify="right" if i else "left")
    for row in table.rows:
        printed.add_row(*("–" if cell is None else escape(cell) for cell in row))
    console.print(printed)


def report(results: dict[str, Any], records: dict[str, Tensor], names: list[str], console: Console) -> None:
    title = f"{results['weights']} on {results['dataset']}, {results['split']}: {results['images']} images"
    console.print(title, style="bold", highlight=False, markup=False)
    for table in result_tables(results["measures"]).values():
        print_table(table, console)
    pairs = confused_pairs(records["label"], records["prediction_answer"], len(names), k=5).tolist()
    if pairs:
        rows = [(names[label], names[taken], str(count)) for label, taken, count in pairs]
        print_table(ResultTable("Most confused", ("label", "prediction", "images"), list(rows)), console)


def report_labels(results: dict[str, Any], output: Path, console: Console) -> None:
    for table in result_tables(results["measures"]).values():
        print_table(table, console)
    classes = results["measures"]["classes"]
    write_csv(output / "per_class.csv", list(classes[0]), map(dict.values, classes))
    replace_text(output / "results.json", json.dumps(results, indent=1, allow_nan=False))

"""Measure trained weights as the paper does: `accelerate launch examples/evaluate.py output/s3n/best`.

Accuracy of every branch, calibration, hits of peaks, localisation, parts, magnification and confusions, as a table and
as files. Read it top to bottom: arguments, model, data, measuring, files, tables, main.
"""

import argparse
import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from support.files import replace_text, replacing_file
from support.launching import exiting_on, refuse_lone_process, use_cpu_threads
from support.loaders import hold_out
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import s3n_timm
from s3n_timm.data import load, part_names
from s3n_timm.draw import draw_confusions
from s3n_timm.evaluation import (
    CALIBRATION,
    CROP_MODES,
    OUTPUTS,
    UNITS,
    as_plain,
    carry_annotations,
    choose_exit_entropy,
    confused_pairs,
    measure_batch,
    summarise,
)
from s3n_timm.hub import count_parameters
from s3n_timm.model import ANSWERS
from s3n_timm.peaks import PARTITION_MODES

SHORT = dict(discriminative="D", complementary="C")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Calibration: {CALIBRATION}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="folder of s3n_timm.save, or hf-hub:USER/NAME")

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="birds", help="birds, cub, aircraft, cars, folder, parquet or hub:NAME")
    data.add_argument("--data-dir", help="folder of the data set; drawn birds and the Hub need none")
    data.add_argument("--split", default="test")
    data.add_argument("--val-fraction", type=float, default=0.0, metavar="PART",
                      help="with --split train: the part that train.py held out of it, see --seed")
    data.add_argument("--image-column", metavar="NAME", help="parquet and hub: the column of images, if not image")
    data.add_argument("--label-column", metavar="NAME", help="parquet and hub: the column of labels, if not label")
    data.add_argument("--num-images", type=int, default=750, help="drawn birds: images")
    data.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="decode every image first")
    data.add_argument("-b", "--batch-size", type=int, default=32, help="per process")
    data.add_argument("-j", "--workers", type=int, default=max(1, min(4, (os.cpu_count() or 2) // 2)))

    model = parser.add_argument_group("model", "its own settings where these are left out")
    model.add_argument("--img-size", type=int, metavar="PX")
    model.add_argument("--crop-pct", type=float, help="centre crop")
    model.add_argument("--crop-mode", choices=CROP_MODES, help="how images are resized")
    model.add_argument("--partition-eval", choices=PARTITION_MODES, help="how peaks are divided; some draw, see --seed")
    model.add_argument("--answer", choices=ANSWERS, help="which output answers")

    sure = model.add_mutually_exclusive_group()
    sure.add_argument("--exit-entropy", type=float, metavar="NATS",
                      help="report what early exit does: images of less entropy are answered by the original branch")
    sure.add_argument("--exit-loss", type=float, metavar="POINTS",
                      help="find the threshold of early exit that loses at most so many points of accuracy here")

    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, help="folder for the files; beside the weights if left out")
    run.add_argument("--bootstrap-samples", type=int, default=10_000)
    run.add_argument("--cpu-threads", type=int, help="per process, on a CPU; default: all cores, shared evenly")
    run.add_argument("--seed", type=int, default=42)

    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "img_size", "crop_pct", "bootstrap_samples", "cpu_threads"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}.")
    for name in ("image_column", "label_column"):
        if getattr(args, name) and not args.dataset.startswith(("parquet", "hub:")):
            parser.error(f"--{name.replace('_', '-')} is for parquet and hub:NAME alone, not for {args.dataset}.")
    if args.val_fraction and args.split != "train":
        parser.error(f"--val-fraction is a part of --split train, not of {args.split}.")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must lie in [0, 1), got {args.val_fraction}.")
    if args.output is None:
        kind = "-".join(["evaluation", *args.dataset.replace(":", "/").split("/"), args.split])
        args.output = Path("output/evaluation") if is_on_hub(args.weights) else Path(args.weights) / kind
    return args


# model


def is_on_hub(weights: str) -> bool:
    return weights.startswith("hf-hub:")


def load_model(args: argparse.Namespace) -> nn.Module:
    """The model in eval mode, with the partition that the arguments ask for."""
    name = args.weights
    if not is_on_hub(name):
        if not (Path(name) / "config.json").is_file():
            lack = "has no config.json" if Path(name).is_dir() else "is not a folder"
            raise ValueError(f"WEIGHTS {name} {lack}: name a folder that s3n_timm.save wrote, or hf-hub:USER/NAME.")
        name = f"local-dir:{name}"
    try:
        model = timm.create_model(name, pretrained=True).eval()
        if args.img_size and model.pretrained_cfg.get("fixed_input_size"):  # its position embedding is resampled
            model = timm.create_model(name, pretrained=True, img_size=args.img_size).eval()
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"WEIGHTS {args.weights} cannot be loaded as a timm model ({error}).") from error
    if not model.num_classes:
        raise ValueError(f"WEIGHTS {args.weights} has no classifier, so there is nothing to measure.")
    exits = args.exit_entropy is not None or args.exit_loss is not None
    if exits and not (isinstance(model, s3n_timm.S3N) and "O" in model.branches):
        raise ValueError("--exit-entropy and --exit-loss need an S3N with the O branch: leave them out.")
    if args.partition_eval:
        if not has_peaks(model):
            raise ValueError(f"--partition-eval {args.partition_eval} needs a model with peaks: leave it out.")
        model.partition_eval = args.partition_eval
        model.set_epoch(model.partition_warmup_epochs)  # weights from its warm-up would go on with another one
    if args.answer:
        if not isinstance(model, s3n_timm.S3N):
            raise ValueError(f"--answer {args.answer} needs an S3N, and this model has one output: leave it out.")
        model.set_answer(args.answer)
    return model


def has_peaks(model: nn.Module) -> bool:
    return isinstance(model, s3n_timm.S3N) and model.attention == "sparse" and bool(model.warped)


def describe_model(model: nn.Module, data_config: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = dict(
        architecture=model.pretrained_cfg.get("architecture"),
        num_classes=model.num_classes,
        parameters=count_parameters(model),
    )
    if isinstance(model, s3n_timm.S3N):
        betas = {name: value.item() for name, value in model.named_parameters() if name.startswith("beta_")}
        # the config holds the values that training began with
        now = dict(answer=model.answer, partition=model.partition if has_peaks(model) else None)
        summary["s3n"] = {**model.config, **betas, **now}
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return dict(summary, preprocessing={name: data_config[name] for name in names})


# data


def load_data(args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any]) -> datasets.Dataset:
    if args.dataset == "birds":
        size = max(data_config["input_size"][1:])
        options = dict(num_images=args.num_images, num_classes=model.num_classes, size=size)
    else:
        columns = dict(image_column=args.image_column, label_column=args.label_column)
        options = dict(verify=args.verify, **{key: name for key, name in columns.items() if name})
    dataset = load(args.dataset, args.data_dir, args.split, **options)
    if args.val_fraction:
        _, dataset = hold_out(dataset, args.val_fraction, args.seed)
    if not len(dataset):
        raise ValueError(f"--split {args.split} of {args.dataset} has no image.")
    return dataset


def check_classes(dataset: datasets.Dataset, model: nn.Module, args: argparse.Namespace) -> str | None:
    """A warning where the data set has the model's number of classes under other names."""
    names = dataset.features["label"].names
    if len(names) != model.num_classes:
        raise ValueError(
            f"--dataset {args.dataset} has {len(names)} classes and WEIGHTS {args.weights} has {model.num_classes}: "
            "evaluate it on the data set that it was trained for."
        )
    known = model.pretrained_cfg.get("label_names")
    differing = [pair for pair in zip(known or names, names) if pair[0] != pair[1]]
    if not differing:
        return None
    return (
        f"Warning: {len(differing)} of {len(names)} classes have other names than in training, the first "
        f"{differing[0][1]!r} instead of {differing[0][0]!r}."
    )


def create_loader(dataset: datasets.Dataset, transform: Callable, args: argparse.Namespace) -> DataLoader:
    """Transformed images in order, with the annotations as they are stored and what it takes to carry them along."""
    annotated = [name for name in ("box", "parts") if name in dataset.features]

    def transform_batch(batch: dict[str, list]) -> dict[str, list]:
        images = [image.convert("RGB") for image in batch["image"]]
        rows: dict[str, list] = dict(index=batch["index"], label=batch["label"])
        rows["sizes"] = [torch.tensor([image.height, image.width]) for image in images]
        rows["image"] = [transform(image) for image in images]
        if "box" in batch:
            rows["box"] = [torch.tensor(box) for box in batch["box"]]
        if "parts" in batch:
            rows["parts"] = [torch.tensor(list(parts.values())) for parts in batch["parts"]]
        return rows

    dataset = dataset.select_columns(["image", "label", *annotated]).add_column("index", list(range(len(dataset))))
    return DataLoader(dataset.with_transform(transform_batch), batch_size=args.batch_size, num_workers=args.workers)


# measuring


def pad_batch(batch: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Repeat the last row of a batch that is not full: images are rounded alike only in batches of one size."""
    missing = size - len(batch["label"])
    return {name: torch.cat([rows, rows[-1:].repeat_interleave(missing, 0)]) for name, rows in batch.items()}


@torch.inference_mode()
def measure(
        model: nn.Module,
        loader: DataLoader,
        data_config: dict[str, Any],
        args: argparse.Namespace,
        accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Rows of all images, each once and in the data set's order, on the main process; empty on the others."""
    geometry = (data_config["input_size"][1:], data_config["crop_pct"], data_config["crop_mode"])
    batches = []
    for batch in tqdm(loader, desc=args.split, disable=not accelerator.is_main_process, leave=False):
        full = carry_annotations(pad_batch(batch, args.batch_size), *geometry)
        with accelerator.autocast():
            rows = measure_batch(model, full)
        rows = {name: values[:len(batch["label"])].contiguous() for name, values in rows.items()}
        rows = accelerator.gather_for_metrics(rows)
        if accelerator.is_main_process:
            batches.append({name: values.cpu() for name, values in rows.items()})
    return {name: torch.cat([rows[name] for rows in batches]) for name in (batches[0] if batches else ())}


def choose_exit(records: dict[str, Tensor], args: argparse.Namespace) -> float | None:
    """The threshold of early exit that was given or is to be found."""
    if args.exit_loss is None:
        return args.exit_entropy
    original, answer = (records[f"prediction_{name}"] == records["label"] for name in ("original", "answer"))
    return choose_exit_entropy(records["entropy"], original, answer, args.exit_loss / 100)[0]


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
    columns["probability"] = records["logits"].double().softmax(1).amax(1)
    columns |= {
        f"correct_{name}": (records[f"prediction_{name}"] == labels).int()
        for name in OUTPUTS if f"prediction_{name}" in records
    }
    columns |= {name: records[name] for name in ("entropy", "peaks", "hits") if name in records}
    rows = {name: values.tolist() for name, values in columns.items()}
    if "hits" in rows:  # an image whose box was cropped away has none
        rows["hits"] = [hits if boxed else None for hits, boxed in zip(rows["hits"], records["boxed"].tolist())]
    write_csv(output / "predictions.csv", list(rows), zip(*rows.values()))

    with replacing_file(output / "confusion.png") as file:
        draw_confusions(labels, predictions, names).savefig(file, format="png", dpi=110)
    # the last, so that it tells that all is there
    replace_text(output / "results.json", json.dumps(results, indent=1, allow_nan=False))


# tables


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def create_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def tabulate_accuracy(measures: dict[str, Any]) -> Table:
    table = create_table("accuracy, % with 95 % interval", "output", "top-1", "top-5")
    for name, figures in measures["accuracy"].items():
        cells = []
        for kind in ("top1", "top5"):
            low, high = figures[f"{kind}_interval"]
            cells.append(f"{figures[kind]:.1f} ({low:.1f}–{high:.1f})")
        table.add_row(name, *cells)
    return table


def tabulate_localisation(measures: dict[str, Any]) -> Table:
    columns = ("accuracy %", "mean IoU", "normalised %", "normalised IoU")
    table = create_table("localisation by the maps of the joint class (table 2)", "maps of", *columns)
    for name, figures in measures["localisation"].items():
        if name != "images":
            cells = [number(figures[kind + each], digits)
                     for kind in ("", "normalized_") for each, digits in (("accuracy", 1), ("iou", 3))]
            table.add_row("all, added up" if name == "joint" else name, *cells)
    return table


def tabulate_rest(measures: dict[str, Any]) -> Table:
    table = create_table("calibration, peaks", "figure", "value")
    errors = measures["calibration"]
    for name, key, digits in (("negative log likelihood, nats", "nll", 3), ("expected calibration error, %", "ece", 1)):
        table.add_row(name, number(errors[key], digits))
        table.add_row("  calibrated by cross-fitting", number(errors[f"{key}_calibrated"], digits))
    if "peaks" in measures:
        peaks = measures["peaks"]
        table.add_row("peaks per image", f"{number(peaks['mean'])} ({peaks['min']}–{peaks['max']})")
        table.add_row("images without a peak", str(peaks["images_without"]))
    if "hits" in measures:
        hits = measures["hits"]
        table.add_row("hit rate, % (table 1)", number(hits["rate"]))
        table.add_row("hits per image", number(hits["mean"]))
        table.add_row("images with 0, 1, 2, … hits (figure 5)", " ".join(map(str, hits["histogram"])))
    return table


def tabulate_exit(measures: dict[str, Any]) -> Table:
    figures = measures["early_exit"]
    table = create_table("early exit: sure images answered by the original branch alone", "figure", "value")
    table.add_row("exit entropy, nats", number(figures["exit_entropy"], 4))
    table.add_row("images that exit, %", number(figures["exited"]))
    table.add_row("backbone passes per image", number(figures["passes"], 2))
    table.add_row("top-1 %", number(figures["top1"]))
    table.add_row("top-1 % of all branches for all images", number(figures["top1_without"]))
    return table


def tabulate_magnification(measures: dict[str, Any]) -> Table:
    branches = measures["magnification"]
    columns = (f"{SHORT[branch]} {kind}" for branch in branches for kind in ("mean", "median"))
    table = create_table("magnification, × by area", "of", *columns)
    for kind in ("object", "background", "parts"):
        if all(kind in figures for figures in branches.values()):
            cells = (number(figures[kind][each], 2) for figures in branches.values() for each in ("mean", "median"))
            table.add_row(kind, *cells)
    return table


def tabulate_parts(measures: dict[str, Any]) -> Table:
    parts = measures["parts"]
    branches = list(parts["not_shown"])
    columns = [f"{kind} {SHORT[branch]}" for kind in ("×", "not shown %") for branch in branches]
    extremes = ["strongest", "weakest"] if parts["images"] is not None else []
    table = create_table("parts next to the strongest and the weakest peak (figure 6)", "part", *extremes, *columns)
    for name, figures in parts["names"].items():
        cells = [str(figures[kind]) for kind in extremes]
        cells += [number(figures[branch]["magnification"]["median"], 2) for branch in branches]
        table.add_row(name, *cells, *(number(figures[branch]["not_shown"]) for branch in branches))
    blank = [""] * (len(extremes) + len(branches))
    table.add_row("all", *blank, *(number(parts["not_shown"][branch]) for branch in branches))
    table.caption = "×: median magnification by area" if branches else None
    return table


def report(results: dict[str, Any], records: dict[str, Tensor], names: list[str], console: Console) -> None:
    measures = results["measures"]
    title = f"{results['weights']} on {results['dataset']}, {results['split']}: {results['images']} images"
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(tabulate_accuracy(measures))
    if "localisation" in measures:
        console.print(tabulate_localisation(measures))
    console.print(tabulate_rest(measures))
    if "early_exit" in measures:
        console.print(tabulate_exit(measures))
    if "magnification" in measures:
        console.print(tabulate_magnification(measures))
    if "strongest" in records or measures.get("parts", {}).get("not_shown"):
        console.print(tabulate_parts(measures))
    pairs = confused_pairs(records["label"], records["prediction_answer"], len(names), k=5).tolist()
    if pairs:
        table = create_table("most confused", "label", "taken for", "images")
        for label, taken, count in pairs:
            table.add_row(names[label], names[taken], str(count))
        console.print(table)


# main


def main() -> None:
    args = parse_args()
    refuse_lone_process()
    accelerator = Accelerator()
    set_seed(args.seed, device_specific=True)  # processes that draw a partition draw different ones
    use_cpu_threads(args.cpu_threads, accelerator)
    with exiting_on(ValueError, OSError, ImportError):
        with accelerator.main_process_first():
            model = load_model(args).to(accelerator.device)
            overrides = dict(img_size=args.img_size, crop_pct=args.crop_pct, crop_mode=args.crop_mode)
            data_config = resolve_data_config(overrides, model=model)
            dataset = load_data(args, model, data_config)
        warning = check_classes(dataset, model, args)
        args.output.mkdir(parents=True, exist_ok=True)
    if warning:
        accelerator.print(warning)
    names = dataset.features["label"].names
    config = {key: data_config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    loader = accelerator.prepare(create_loader(dataset, create_transform(**config), args))

    started = time.monotonic()
    records = measure(model, loader, data_config, args, accelerator)
    seconds = time.monotonic() - started
    accelerator.end_training()  # a process that ends while gloo's threads run is aborted
    if not accelerator.is_main_process:
        return
    if records["index"].tolist() != list(range(len(dataset))):
        raise RuntimeError("Accelerate gave images twice, not at all or out of order: this is a bug.")
    with exiting_on(ValueError, OSError):
        exit_entropy = choose_exit(records, args)
        measures = summarise(records, part_names(dataset), args.seed, args.bootstrap_samples, exit_entropy)
        run = dict(
            seconds=seconds,
            images_per_second=len(dataset) / seconds,
            processes=accelerator.num_processes,
            device=str(accelerator.device),
            versions=dict(s3n_timm=s3n_timm.__version__, timm=timm.__version__, torch=torch.__version__),
            args={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        )
        results = dict(
            weights=args.weights,
            dataset=args.dataset,
            split=args.split,
            images=len(dataset),
            units=UNITS,
            model=as_plain(describe_model(model, data_config)),
            measures=measures,
            run=run,
        )
        write_files(args.output, results, records, names)
    report(results, records, names, Console())
    print(f"{seconds:.0f} s, {len(dataset) / seconds:.1f} images a second. Files: {args.output}")


if __name__ == "__main__":
    main()

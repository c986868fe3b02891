"""Measure trained weights as the paper does: `accelerate launch examples/evaluate.py output/s3n/best`.

Accuracy of every branch, calibration, hits of peaks, localization, faithfulness, parts, magnification and confusions,
as tables and as files. Read it top to bottom: arguments, model, data, measuring, main. Files and tables are written by
support/reports.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from support.columns import add_columns, check_columns, list_columns
from support.files import replace_text
from support.launching import (
    PATIENT,
    DataError,
    accept_any_encoding,
    count_default_workers,
    exiting_on,
    reading,
    refuse_lone_process,
    share_cpus,
    use_cpu_threads,
)
from support.loaders import hold_out, spread_over
from support.measuring import describe_results, match_classes
from support.progress import progress
from support.reports import draw_picture, report, report_labels, write_files
from timm.data import MultiLabelTarget, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

import s3n_timm
from s3n_timm.checkpoints import has_peaks
from s3n_timm.config import ANSWERS, MAX_SCALE
from s3n_timm.data import is_multi_label, load, part_names, read_stored, store_images
from s3n_timm.early_exit import choose_exit_entropy
from s3n_timm.evaluation import (
    CALIBRATION,
    CROP_MODES,
    Crop,
    as_plain,
    carry_annotations,
    measure_batch,
    measure_faithfulness,
    measure_labels,
    summarize,
    summarize_faithfulness,
    summarize_labels,
)
from s3n_timm.heads import NoResponseMap, inspect_head
from s3n_timm.images import image_mode, input_config
from s3n_timm.peaks import PARTITION_MODES


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Calibration: {CALIBRATION}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="folder of s3n_timm.save, or hf-hub:USER/NAME")

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="birds", help="birds, or as train.py has them: folder, multi-label, …")
    data.add_argument("--data-dir", help="folder of the data set; drawn birds and the Hub need none")
    data.add_argument("--split", default="test")
    data.add_argument("--val-fraction", type=float, default=0.0, metavar="PART",
                      help="with --split train: evaluate the part that train.py held out, see --seed")
    add_columns(data)
    data.add_argument("--ignore-names", action="store_true",
                      help="take classes by their order where the data set names them otherwise than the model")
    data.add_argument("--num-images", type=int, help="drawn birds: images (default: 750)")
    data.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="decode every image first")
    data.add_argument("-b", "--batch-size", type=int, default=32, help="per process")
    data.add_argument("-j", "--workers", type=int, default=count_default_workers())

    model = parser.add_argument_group("model", "its own settings where these are left out")
    model.add_argument("--img-size", type=int, metavar="PX")
    model.add_argument("--crop-pct", type=float, help="side of the crop over that of the resized image")
    model.add_argument("--crop-mode", choices=CROP_MODES, help="how images are resized")
    model.add_argument("--partition-eval", choices=PARTITION_MODES,
                       help="how peaks are divided, at random by some: see --seed")
    model.add_argument("--answer", choices=ANSWERS, help="which output is the prediction")

    early_exit = model.add_mutually_exclusive_group()
    early_exit.add_argument("--exit-entropy", type=float, metavar="NATS",
                            help="report early exit: images of less entropy are classified by the original branch")
    early_exit.add_argument("--exit-loss", type=float, metavar="POINTS",
                            help="find the threshold of early exit that loses at most so many points of accuracy here")
    model.add_argument("--keep-exit", action="store_true",
                       help="write that threshold to WEIGHTS/config.json, for Classifier and predict.py")

    run = parser.add_argument_group("run")
    run.add_argument("--faithfulness", action="store_true",
                     help="deletion and insertion curves: does the model decide by what its response maps show?")
    run.add_argument("--faithfulness-images", type=int, default=500, metavar="IMAGES",
                     help="at most so many, evenly over the split: each takes 70 to 400 passes of the backbone")
    run.add_argument("--output", type=Path, help="folder for the files; beside the weights if left out")
    run.add_argument("--cpu-threads", type=int, help="per process, on a CPU; default: all cores, shared evenly")
    run.add_argument("--seed", type=int, default=42)

    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "img_size", "crop_pct", "cpu_threads", "faithfulness_images"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}.")
    check_columns(args, parser)
    if args.val_fraction and args.split != "train":
        parser.error(f"--val-fraction is a part of --split train, not of {args.split}.")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must lie in [0, 1), got {args.val_fraction}.")
    if args.dataset == "birds" and args.val_fraction and args.num_images is None:
        parser.error("What train.py held out depends on how many birds were drawn: give its --num-images, which its "
                     "results.json states.")
    for name, most in (("exit_entropy", MAX_SCALE), ("exit_loss", 100)):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must be a number from 0 to {most:g}, got {getattr(args, name)}.")
    if args.keep_exit and (args.exit_entropy is None and args.exit_loss is None):
        parser.error("--keep-exit needs a threshold: give --exit-loss or --exit-entropy.")
    for name in ("img_size", "crop_pct", "crop_mode", "partition_eval", "answer"):
        if args.keep_exit and getattr(args, name) is not None:
            parser.error(f"--keep-exit keeps a threshold for the model's own settings: leave out "
                         f"--{name.replace('_', '-')}.")
    if args.keep_exit and not Path(args.weights).is_dir():
        parser.error(f"--keep-exit writes to a folder, and WEIGHTS {args.weights} is none.")
    if args.output is None:
        kind = "-".join(["evaluation", *args.dataset.replace(":", "/").split("/"), args.split])
        args.output = Path(args.weights) / kind if Path(args.weights).is_dir() else Path("output/evaluation")
    return args


# model


def load_model(args: argparse.Namespace) -> nn.Module:
    """The model in eval mode."""
    try:
        model = s3n_timm.load_model(args.weights).eval()
        if args.img_size and model.pretrained_cfg.get("fixed_input_size"):  # its position embedding is resampled
            model = s3n_timm.load_model(args.weights, img_size=args.img_size).eval()
    except ValueError as error:
        raise ValueError(f"WEIGHTS {error}") from error
    return model


def set_options(model: nn.Module, args: argparse.Namespace) -> None:
    """Apply --partition-eval and --answer, and refuse what the model can't do."""
    is_s3n = isinstance(model, s3n_timm.S3N)
    if not model.num_classes:
        raise ValueError(f"WEIGHTS {args.weights} has no classifier, so there is nothing to measure.")
    exits = args.exit_entropy is not None or args.exit_loss is not None
    if exits and not (is_s3n and "O" in model.config.branches and not model.config.multi_label):
        raise ValueError("--exit-entropy and --exit-loss need an S3N with the O branch and one label an image.")
    if args.partition_eval:
        if not has_peaks(model):
            raise ValueError(f"--partition-eval {args.partition_eval} needs a model with peaks: leave it out.")
        model.configure(partition_eval=args.partition_eval)
    if args.answer:
        if not is_s3n:
            raise ValueError(f"--answer {args.answer} needs an S3N, and this model has one output: leave it out.")
        model.configure(answer=args.answer)
    if args.faithfulness and not is_s3n:
        try:
            inspect_head(model)
        except NoResponseMap as error:
            raise ValueError(f"--faithfulness needs class response maps: leave it out. {error}") from error


# data


def load_data(
        args: argparse.Namespace, model: nn.Module, data_config: dict[str, Any], verify: bool | None,
) -> datasets.Dataset:
    if args.dataset == "birds":
        size = max(data_config["input_size"][1:])
        options = dict(num_images=args.num_images or 750, num_classes=model.num_classes, size=size)
    else:
        options = dict(verify=verify, **list_columns(args))
    dataset = load(args.dataset, args.data_dir, args.split, **options)
    if args.val_fraction:
        _, dataset = hold_out(dataset, args.val_fraction, args.seed)
    if not len(dataset):
        raise ValueError(f"--split {args.split} of {args.dataset} has no image.")
    return dataset


class TransformRows:
    """Rows of `store_images` as the model reads them, with their annotations as stored and what carries them along.

    A class and no closure, so that workers started by spawn or forkserver can receive it.
    """

    def __init__(self, transform: Callable[[Any], Tensor], mode: str, classes: Sequence[int]) -> None:
        self.transform, self.mode, self.classes = transform, mode, classes
        self.several = MultiLabelTarget(len(classes))

    def read_label(self, label: int | list[int]) -> int | Tensor:
        """The model's class of a label; of several labels C numbers, 1 for each of them and 0 elsewhere."""
        return self.several([self.classes[each] for each in label]) if isinstance(label, list) else self.classes[label]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        images = [read_stored(image, self.mode) for image in batch["image"]]
        rows: dict[str, list] = dict(index=batch["index"], label=list(map(self.read_label, batch["label"])))
        rows["sizes"] = [torch.tensor([image.height, image.width]) for image in images]
        rows["image"] = [self.transform(image) for image in images]
        if "box" in batch:
            rows["box"] = [torch.tensor(box) for box in batch["box"]]
        if "parts" in batch:
            rows["parts"] = [torch.tensor(list(parts.values())) for parts in batch["parts"]]
        return rows


def create_loader(
        dataset: datasets.Dataset, transform: TransformRows, args: argparse.Namespace, pin_memory: bool = False,
) -> DataLoader:
    """Transformed images in order, with their annotations."""
    annotated = [name for name in ("box", "parts") if name in dataset.features]
    dataset = store_images(dataset.select_columns(["image", "label", *annotated]))
    rows = dataset.add_column("index", list(range(len(dataset)))).with_transform(transform)
    return DataLoader(rows, batch_size=args.batch_size, num_workers=args.workers, pin_memory=pin_memory)


# measuring


def pad_batch(batch: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Repeat the last row of a batch that is not full: only batches of one size are rounded alike."""
    missing = size - len(batch["label"])
    return {name: torch.cat([rows, rows[-1:].repeat_interleave(missing, 0)]) for name, rows in batch.items()}


@torch.inference_mode()
def measure(
        read: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        loader: DataLoader,
        args: argparse.Namespace,
        accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Rows of all images, each once and in the data set's order, on the main process; empty on the others.

    `read` makes the rows of a batch.
    """
    batches = []
    for batch in reading(progress(loader, desc=args.split, disable=not accelerator.is_main_process, leave=False)):
        with accelerator.autocast():
            rows = read(pad_batch(batch, args.batch_size))
        rows = {name: values[:len(batch["label"])].contiguous() for name, values in rows.items()}
        rows = accelerator.gather_for_metrics(rows)
        if accelerator.is_main_process:
            batches.append({name: values.cpu() for name, values in rows.items()})
    return {name: torch.cat([rows[name] for rows in batches]) for name in (batches[0] if batches else ())}


def choose_exit(records: dict[str, Tensor], args: argparse.Namespace) -> float | None:
    """The threshold of early exit: the given one, or the one that --exit-loss allows."""
    if args.exit_loss is None:
        return args.exit_entropy
    original, answer = (records[f"prediction_{name}"] == records["label"] for name in ("original", "answer"))
    return choose_exit_entropy(records["entropy"], original, answer, args.exit_loss / 100)[0]


def keep_exit(folder: Path, exit_entropy: float | None) -> None:
    """Write the threshold of early exit to a folder's config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_args"]["exit_entropy"] = exit_entropy
    replace_text(folder / "config.json", json.dumps(config, indent=2))


# main


def main(argv: Sequence[str] | None = None) -> None:
    accept_any_encoding()
    args = parse_args(argv)
    refuse_lone_process()
    share_cpus()
    accelerator = Accelerator(kwargs_handlers=[PATIENT])
    set_seed(args.seed, device_specific=True)  # processes that draw a partition draw different ones
    use_cpu_threads(args.cpu_threads, accelerator)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they fill a log
    with exiting_on(ValueError, OSError, ImportError):
        with accelerator.local_main_process_first():
            model = load_model(args)
            set_options(model, args)
            overrides = dict(img_size=args.img_size, crop_pct=args.crop_pct, crop_mode=args.crop_mode)
            data_config = input_config(model, overrides)
            verify = args.verify if accelerator.is_local_main_process else None
            dataset = load_data(args, model, data_config, verify)
        if is_multi_label(dataset) and args.faithfulness:
            raise ValueError("--faithfulness follows one class an image: leave it out, as images have several labels.")
        names, classes = match_classes(dataset, model, args.dataset, args.weights, args.ignore_names)
        args.output.mkdir(parents=True, exist_ok=True)
    if classes != list(range(len(classes))):
        accelerator.print("The data set has the model's classes in another order: they are matched by name.")
    rows = TransformRows(create_transform(**data_config), image_mode(data_config["input_size"][0]), classes)
    loader = accelerator.prepare(create_loader(dataset, rows, args, accelerator.device.type == "cuda"))

    model.to(accelerator.device)
    crop, several = Crop.from_config(data_config), is_multi_label(dataset)
    started = time.monotonic()
    measure_rows = measure_labels if several else measure_batch
    curves: dict[str, Tensor] = {}
    with exiting_on(DataError):
        records = measure(lambda batch: measure_rows(model, carry_annotations(batch, crop)), loader, args, accelerator)
        seconds = time.monotonic() - started
        if args.faithfulness:
            some = create_loader(spread_over(dataset, args.faithfulness_images), rows, args)
            curves = measure(lambda batch: measure_faithfulness(model, batch["image"], batch["index"], seed=args.seed),
                             accelerator.prepare(some), args, accelerator)
    accelerator.end_training()  # a process that ends while gloo's threads run is aborted
    if not accelerator.is_main_process:
        return
    if records["index"].tolist() != list(range(len(dataset))):
        raise RuntimeError("Accelerate gave images twice, not at all or out of order: this is a bug.")
    with exiting_on(ValueError, OSError):
        exit_entropy = choose_exit(records, args)
        if several:
            measures = summarize_labels(records, names)
        else:
            measures = summarize(records, part_names(dataset), args.seed, exit_entropy)
        if curves:
            measures["faithfulness"] = as_plain(summarize_faithfulness(curves))
        results = describe_results(
            model,
            data_config,
            measures,
            accelerator,
            weights=args.weights,
            dataset=args.dataset,
            split=args.split,
            images=len(dataset),
            seconds=seconds,
            images_per_second=len(dataset) / seconds,
            args={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        )
        if args.keep_exit:
            keep_exit(Path(args.weights), exit_entropy)
        if several:
            report_labels(results, args.output, Console())
        else:
            write_files(args.output, results, records, names)
            report(results, records, names, Console())
            draw_picture(args.output, records, names)
    print(f"{seconds:.0f} s, {len(dataset) / seconds:.1f} images a second. Files: {args.output}")


if __name__ == "__main__":
    main()

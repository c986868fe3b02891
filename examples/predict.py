"""Predict the class of every image of a folder, of Parquet files or of a repository of the Hub:

    accelerate launch examples/predict.py output/s3n/best photographs --output predictions

A row an image: its label, probability, the five most probable labels, the entropy of the probabilities in nats, the
number of peaks, and the box of the stored image that each warp magnifies (s3n_timm.evaluation.magnified_boxes). An
image that cannot be read has a row with the error, and the exit status is 1. Rows go to numbered shards, each whole or
not there: a run that was killed goes on with the same command after its last whole shard. Read it top to bottom: the
images, one batch, the shards, main.
"""

import argparse
import glob
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from support.files import replace_text, replacing_file
from support.launching import exiting_on, start_all_processes, use_cpu_threads
from torch import Tensor
from tqdm import tqdm

import s3n_timm
from s3n_timm.data import load_repository, read_stored
from s3n_timm.evaluation import Crop, magnified_boxes
from s3n_timm.images import expand_path, find_images, printable

WRITERS = dict(parquet="to_parquet", csv="to_csv", jsonl="to_json")
BRANCHES = ("discriminative", "complementary")
BOX = datasets.Sequence(datasets.Value("float64"))
FEATURES = datasets.Features(
    image=datasets.Value("string"),
    label=datasets.Value("string"),
    probability=datasets.Value("float64"),
    top5=datasets.Sequence(datasets.Value("string")),
    top5_probability=datasets.Sequence(datasets.Value("float64")),
    entropy=datasets.Value("float64"),
    peaks=datasets.Value("int64"),
    **{f"box_{branch}": BOX for branch in BRANCHES},
    error=datasets.Value("string"),
)
Item = tuple[str, Any]  # what an image is called, and what it is read from


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", metavar="WEIGHTS", help="folder of s3n_timm.save, or hf-hub:USER/NAME")
    parser.add_argument("source", metavar="SOURCE", help="folder of images, Parquet file, or hub:NAME of a data set")
    parser.add_argument("--split", default="test", help="hub:NAME: which part (%(default)s)")
    parser.add_argument("--image-column", default="image", metavar="NAME", help="Parquet and hub:NAME (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), help="folder (%(default)s)")
    parser.add_argument("--format", choices=tuple(WRITERS), default="parquet")
    parser.add_argument("--shard-size", type=int, default=10_000, metavar="ROWS")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="per process")
    parser.add_argument("-j", "--workers", type=int, default=2, help="threads that read images, per process")
    parser.add_argument("--cpu-threads", type=int, help="per process, on a CPU; default: all cores, shared evenly")
    args = parser.parse_args()
    for name in ("shard_size", "batch_size", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}.")
    return args


# images


def list_images(args: argparse.Namespace) -> Iterable[Item]:
    """All images in an order that does not change, to be gone through once."""
    kind, _, name = args.source.partition(":")
    path = expand_path(args.source)
    if kind == "hub" and name:
        splits = load_repository(name, streaming=True)
        if args.split not in splits:
            raise ValueError(f"--split {args.split} is not there: {args.source} has {', '.join(map(str, splits))}.")
        return read_rows(splits[args.split], args)
    if path.suffix.lower() == ".parquet" and path.is_file():
        files = dict(data=glob.escape(str(path)))
        return read_rows(datasets.load_dataset("parquet", data_files=files, split="data", streaming=True), args)
    if not path.is_dir():
        raise ValueError(f"SOURCE {path} is neither a folder nor a .parquet file, nor does it begin with hub:.")
    paths = find_images(path)
    first = next(paths, None)
    if first is None:
        raise ValueError(f"SOURCE {path} has no image: their names end in .jpg, .png or another suffix of images.")
    return ((printable(found), found) for found in itertools.chain([first], paths))


def read_rows(rows: Any, args: argparse.Namespace) -> Iterator[Item]:
    """Rows as they are stored: one that cannot be decoded must not end the stream."""
    column = args.image_column
    if rows.column_names and column not in rows.column_names:
        raise ValueError(f"--image-column {column} is not there: the columns are {', '.join(rows.column_names)}.")
    rows = rows.select_columns([column])
    if isinstance((rows.features or {}).get(column), datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))

    def read() -> Iterator[Item]:
        for number, row in enumerate(rows):
            yield str(number), row[column]

    return read()


# one batch


def open_image(item: Item) -> tuple[Any, str | None]:
    try:
        return read_stored(item[1]), None
    except (TypeError, ValueError) as error:
        return None, str(error)


@torch.inference_mode()
def predict_batch(classifier: s3n_timm.Classifier, images: list[Any], device: torch.device) -> list[dict[str, Any]]:
    """Rows of images that could be read."""
    model, config, names = classifier.model, classifier.data_config, classifier.label_names
    x = torch.stack([classifier.transform(image) for image in images]).to(device)
    boxes: dict[str, Tensor] = {}
    peaks = None
    if isinstance(model, s3n_timm.S3N):
        logits, sample, _ = model.forward_branches(x)
        answer = model.decide(logits)
        if sample is not None:
            sizes = torch.tensor([[image.height, image.width] for image in images], device=device)
            crop = Crop.from_config(config)
            boxes = {branch: magnified_boxes(getattr(sample, branch).grid, sizes, crop) for branch in model.warped}
            peaks = sample.peaks.sum((1, 2)).tolist() if model.attention == "sparse" else None
    else:
        answer = model(x)
    probabilities = answer.float().softmax(1)
    entropy = torch.special.entr(probabilities).sum(1).tolist()
    top = probabilities.topk(min(5, len(names)))
    rows = []
    for i, (values, indices) in enumerate(zip(top.values.tolist(), top.indices.tolist())):
        labels = [names[index] for index in indices]
        row = dict(label=labels[0], probability=values[0], top5=labels, top5_probability=values, entropy=entropy[i],
                   peaks=None if peaks is None else peaks[i])
        found = {branch: box[i].tolist() for branch, box in boxes.items()}
        row |= {f"box_{branch}": None if math.isnan(box[0]) else box for branch, box in found.items()}
        rows.append(row)
    return rows


def predict(
        items: Iterator[Item],
        classifier: s3n_timm.Classifier,
        pool: ThreadPoolExecutor,
        args: argparse.Namespace,
        device: torch.device,
) -> Iterator[dict[str, Any]]:
    """A row for every item, in order."""
    while batch := list(itertools.islice(items, args.batch_size)):
        opened = list(pool.map(open_image, batch))
        good = [image for image, error in opened if error is None]
        rows = iter(predict_batch(classifier, good, device) if good else ())
        for (name, _), (_, error) in zip(batch, opened):
            yield dict.fromkeys(FEATURES) | dict(image=name) | (next(rows) if error is None else dict(error=error))


# shards


def claim(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Refuse a folder that holds rows of another command; say in it whose it is."""
    path = args.output / "predictions.json"
    free = ("output", "batch_size", "workers", "cpu_threads")
    command = {name: str(value) for name, value in vars(args).items() if name not in free}
    if path.is_file():
        other = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in command if other.get(name) != command[name]]
        if differing:
            name = differing[0]
            raise ValueError(f"--output {args.output} holds predictions of {name} {other.get(name)}, not of "
                             f"{command[name]}: choose another folder.")
    elif args.output.is_dir() and any(args.output.iterdir()):
        raise ValueError(f"--output {args.output} is not empty: choose another folder.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        args.output.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(command, indent=1))
    accelerator.wait_for_everyone()


def write_shard(path: Path, rows: list[dict[str, Any]], format: str) -> None:
    """Errors are counted in the name of the file, so that no later run has to read it."""
    table = datasets.Dataset.from_list(rows, features=FEATURES)
    if format == "csv":  # which has no lists
        lists = [name for name, feature in FEATURES.items() if not isinstance(feature, datasets.Value)]
        table = table.map(lambda row: {name: row[name] and json.dumps(row[name]) for name in lists},
                          features=datasets.Features(FEATURES | dict.fromkeys(lists, datasets.Value("string"))))
    with replacing_file(path) as partial:
        getattr(table, WRITERS[format])(str(partial))


def find_shard(number: int, args: argparse.Namespace) -> Path | None:
    return next(args.output.glob(f"shard-{number:06d}-*.{args.format}"), None)


# main


def main() -> int:
    args = parse_args()
    start_all_processes()
    accelerator = Accelerator()
    use_cpu_threads(args.cpu_threads, accelerator)
    datasets.disable_progress_bars()
    with exiting_on(ValueError, OSError):
        items = iter(list_images(args))
        classifier = s3n_timm.Classifier.from_pretrained(args.weights, device=accelerator.device)
        claim(args, accelerator)
    bar = tqdm(unit=" images", disable=not accelerator.is_main_process)
    with ThreadPoolExecutor(args.workers) as pool:
        for number in itertools.count():
            mine = number % accelerator.num_processes == accelerator.process_index
            if not mine or find_shard(number, args):
                if not sum(1 for _ in itertools.islice(items, args.shard_size)):
                    break
                continue
            rows = []
            for row in predict(itertools.islice(items, args.shard_size), classifier, pool, args, accelerator.device):
                rows.append(row)
                bar.update()
            if not rows:
                break
            errors = sum(row["error"] is not None for row in rows)
            write_shard(args.output / f"shard-{number:06d}-{errors}.{args.format}", rows, args.format)
    bar.close()
    accelerator.wait_for_everyone()
    shards = sorted(args.output.glob(f"shard-*.{args.format}"))
    errors = sum(int(shard.stem.rpartition("-")[2]) for shard in shards)
    accelerator.end_training()
    if accelerator.is_main_process:
        print(f"{len(shards)} shards in {args.output}.")
        if errors:
            print(f"predict.py: {errors} images could not be read: their rows hold the error.", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

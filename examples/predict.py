"""Predict the class of every image of a folder, of a Parquet file or of a repository of the Hub:

    accelerate launch examples/predict.py output/s3n/best photographs --output predictions

One row per image: its label, probability, the five most probable labels (each with a probability of its own, where the
model gives several labels an image), the entropy of the probabilities in nats, whether the original branch answered
alone (early exit), the number of peaks, and the box that each warp magnifies (s3n_timm.evaluation.magnified_boxes), in
pixels of the image turned as its EXIF block says (PIL.ImageOps.exif_transpose). An image that cannot be read has a row
with the error, and the exit status is 1; --retry-errors reads its shard again. Rows are written in shards of
--shard-size: after an interruption the same command goes on after the last complete shard. predictions.json records
digests of the model and of the list of images; a later run that finds another model is refused, one that finds other
images too, unless --append adds rows for the new ones. Of images in a folder only the paths are compared: one that was
replaced under its name keeps its row.

With early exit (--exit-entropy, or a threshold in the model's config.json) peaks and boxes are left empty:
--exit-entropy 0 gives them. In CSV files text that begins with = + - @ is preceded by ', so that no spreadsheet
executes it. Read it top to bottom: arguments, batches, answers, rows, shards, main; where images come from lies beside
it, in support/sources.py.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import datasets
import torch
from accelerate import Accelerator
from support.files import claimed, replace_text, replacing_file
from support.launching import (
    PATIENT,
    accept_any_encoding,
    count_cores,
    exiting_on,
    refuse_lone_process,
    share_cpus,
    use_cpu_threads,
)
from support.progress import progress
from support.sources import Batch, Item, Reader, Source, digest_names, keep_batch, list_items, open_source
from timm.models import get_model_args
from torch import Tensor
from torch.utils.data import DataLoader

import s3n_timm
from s3n_timm.early_exit import answer_batch
from s3n_timm.evaluation import Crop, magnified_boxes
from s3n_timm.images import expand_path, printable
from s3n_timm.outputs import score_classes

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
    exited=datasets.Value("bool"),
    peaks=datasets.Value("int64"),
    **{f"box_{branch}": BOX for branch in BRANCHES},
    error=datasets.Value("string"),
)
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for the beginning of one
BACKLOG = 8  # batches whose rows wait to be written


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", metavar="WEIGHTS", help="folder of s3n_timm.save, or hf-hub:USER/NAME")
    parser.add_argument("source", metavar="SOURCE", help="folder of images, Parquet file, or hub:NAME of a data set")
    parser.add_argument("--split", default="test", help="hub:NAME: which part (%(default)s)")
    parser.add_argument("--image-column", default="image", metavar="NAME", help="Parquet and hub:NAME (%(default)s)")
    parser.add_argument("--exit-entropy", type=float, metavar="NATS",
                        help="the original branch alone answers images of less entropy; 0: none; default: what the "
                             "model's config.json states, else 0")
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), help="folder (%(default)s)")
    parser.add_argument("--append", action="store_true", help="add rows for images that a folder did not hold before")
    parser.add_argument("--retry-errors", action="store_true", help="read shards again that have images with errors")
    parser.add_argument("--format", choices=tuple(WRITERS), default="parquet")
    parser.add_argument("--shard-size", type=int, default=1_000, metavar="ROWS")
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="per process")
    parser.add_argument("-j", "--workers", type=int,
                        help="processes that read images, per process; default: all cores, shared evenly; 2 on a CPU")
    parser.add_argument("--cpu-threads", type=int, help="per process, on a CPU; default: all cores, shared evenly")
    args = parser.parse_args(argv)
    for name in ("shard_size", "batch_size", "cpu_threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}.")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers must be at least 0, got {args.workers}.")
    if args.exit_entropy is not None and not args.exit_entropy >= 0:
        parser.error(f"--exit-entropy must be at least 0, got {args.exit_entropy}.")
    return args


# batches


def batch_items(items: Iterable[Item], args: argparse.Namespace, accelerator: Accelerator) -> Iterator[list[Item]]:
    """Batches of the shards that this process has to write, none of which spans two shards."""
    for shard, rows in itertools.groupby(items, lambda item: item.shard):
        if shard % accelerator.num_processes == accelerator.process_index and not find_shard(shard, args):
            while batch := list(itertools.islice(rows, args.batch_size)):
                yield batch


# answers


class Answers(NamedTuple):
    """What is known of the images of a batch that could be read, on the model's device."""

    probabilities: Tensor
    exited: Tensor
    peaks: Tensor | None = None
    boxes: dict[str, Tensor] | None = None  # B×4 by branch, NaN where nothing is magnified


@torch.inference_mode()
def answer(classifier: s3n_timm.Classifier, x: Tensor, sizes: Tensor) -> Answers:
    model, x = classifier.model, classifier.to_model(x)
    none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if not isinstance(model, s3n_timm.S3N):
        return Answers(score_classes(model(x), classifier.multi_label), none)
    if classifier.exit_entropy:
        prediction = answer_batch(model, x, classifier.exit_entropy)
        return Answers(prediction.probabilities, prediction.exited)
    logits, sample, _ = model.forward_branches(x, branches=model.answering)
    probabilities = score_classes(model.decide(logits), classifier.multi_label)
    if sample is None:
        return Answers(probabilities, none)
    sizes, crop = sizes.to(x.device), Crop.from_config(classifier.data_config)
    boxes = {branch: magnified_boxes(getattr(sample, branch).grid, sizes, crop) for branch in model.answering}
    return Answers(probabilities, none, sample.peaks.sum((1, 2)) if model.config.attention == "sparse" else None, boxes)


# rows


def make_rows(
        batch: Batch, answers: Answers | None, classifier: s3n_timm.Classifier,
) -> Iterator[dict[str, Any]]:
    """A row for every item of a batch, in order."""
    known = iter(() if answers is None else describe(answers, classifier))
    for (_, name), error in zip(batch.items, batch.errors):
        found = next(known) if error is None else dict(error=error.encode(errors="backslashreplace").decode())
        yield dict.fromkeys(FEATURES) | dict(image=printable(name)) | found


def describe(answers: Answers, classifier: s3n_timm.Classifier) -> Iterator[dict[str, Any]]:
    names, entropies = classifier.label_names, torch.special.entr(answers.probabilities)
    if classifier.multi_label:  # each class is there or not
        entropies = entropies + torch.special.entr(1 - answers.probabilities)
    entropy = entropies.sum(1).tolist()
    top = answers.probabilities.topk(min(5, len(names)))
    peaks = None if answers.peaks is None else answers.peaks.tolist()
    boxes = {branch: box.tolist() for branch, box in (answers.boxes or {}).items()}
    columns = zip(top.values.tolist(), top.indices.tolist(), answers.exited.tolist())
    for i, (values, indices, exited) in enumerate(columns):
        labels = [names[index] for index in indices]
        row = dict(label=labels[0], probability=values[0], top5=labels, top5_probability=values, entropy=entropy[i],
                   exited=exited, peaks=None if peaks is None else peaks[i])
        yield row | {f"box_{branch}": None if math.isnan(box[i][0]) else box[i] for branch, box in boxes.items()}


# shards


class Writer:
    """Turns answers into rows and rows into shards, in a thread, while the next batches are computed."""

    def __init__(self, classifier: s3n_timm.Classifier, args: argparse.Namespace) -> None:
        self.classifier, self.args = classifier, args
        self.thread = ThreadPoolExecutor(1)
        self.waiting: deque[Future] = deque()
        self.shard, self.rows = -1, list[dict[str, Any]]()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Write the last shard, unless an error ended the loop: then it may lack rows."""
        try:
            if kind is None:
                self._submit(self._write)
                while self.waiting:
                    self.waiting.popleft().result()
        finally:
            self.thread.shutdown(cancel_futures=True)

    def add(self, batch: Batch, answers: Answers | None) -> None:
        if answers is not None and answers.probabilities.device.type == "mps":  # torch aborts if two threads use it
            answers = answers._replace(**{name: each.cpu() for name, each in answers._asdict().items()
                                          if isinstance(each, Tensor)})
        self._submit(self._add, batch, answers)

    def _submit(self, function: Any, *args: Any) -> None:
        self.waiting.append(self.thread.submit(function, *args))
        while len(self.waiting) > BACKLOG or (self.waiting and self.waiting[0].done()):
            self.waiting.popleft().result()

    def _add(self, batch: Batch, answers: Answers | None) -> None:
        shard = batch.items[0][0]
        if shard != self.shard:
            self._write()
        self.shard = shard
        self.rows += make_rows(batch, answers, self.classifier)

    def _write(self) -> None:
        if self.rows:
            errors = sum(row["error"] is not None for row in self.rows)  # in the name: no later run has to read it
            path = self.args.output / f"shard-{self.shard:06d}-{errors}.{self.args.format}"
            write_shard(path, self.rows, self.args.format)
            self.rows = []


def write_shard(path: Path, rows: list[dict[str, Any]], format: str) -> None:
    table = datasets.Dataset.from_list(rows, features=FEATURES)
    if format == "csv":  # which has no lists
        lists = [name for name, feature in FEATURES.items() if not isinstance(feature, datasets.Value)]
        table = table.map(lambda row: {name: row[name] and json.dumps(row[name]) for name in lists},
                          features=datasets.Features(FEATURES | dict.fromkeys(lists, datasets.Value("string"))))
        texts = [name for name, feature in table.features.items() if feature.dtype == "string"]
        table = table.map(lambda row: {name: escape_formula(row[name]) for name in texts})
    with replacing_file(path) as partial:
        getattr(table, WRITERS[format])(str(partial))


def escape_formula(text: str | None) -> str | None:
    return f"'{text}" if text and text.startswith(FORMULAS) else text


def find_shard(number: int, args: argparse.Namespace) -> Path | None:
    return next(args.output.glob(f"shard-{number:06d}-*.{args.format}"), None)


def list_shards(args: argparse.Namespace) -> list[Path]:
    return sorted(args.output.glob(f"shard-*.{args.format}"))


def count_errors(shard: Path) -> int:
    return int(shard.stem.rpartition("-")[2])


# whose folder it is


def digest_model(classifier: s3n_timm.Classifier) -> str:
    """Of all that answers depend on, wherever it was loaded from: weights, options, preprocessing, names, threshold."""
    model = classifier.model
    options = [model.config.to_dict(), model.partition] if isinstance(model, s3n_timm.S3N) else get_model_args(model)
    about = [options, classifier.data_config, classifier.label_names, classifier.exit_entropy, classifier.multi_label]
    sha256 = hashlib.sha256(json.dumps(about, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def claim(
        source: Source,
        classifier: s3n_timm.Classifier,
        args: argparse.Namespace,
        accelerator: Accelerator,
) -> tuple[Source, list[int]]:
    """Refuse a folder that holds rows of another command, model or list of images; say in it whose it is.

    Returns:
        The source, in the order of the rows, and how many of its images each run with --append added.
    """
    path = args.output / "predictions.json"
    keys = ("weights", "source", "split", "image_column", "exit_entropy", "format", "shard_size")
    command = {name: str(getattr(args, name)) for name in keys} | dict(mixed_precision=accelerator.mixed_precision)
    for name in ("weights", "source"):
        if expand_path(command[name]).exists():
            command[name] = str(Path(command[name]))  # without a slash at its end
    parts = [] if source.names is None else [len(source.names)]
    model = digest_model(classifier)
    if path.is_file():
        before = read_manifest(path)
        for name in command:
            if before["command"].get(name) != command[name]:
                raise ValueError(f"--output {args.output} holds predictions of {name} {before['command'].get(name)}, "
                                 f"not of {command[name]}: choose another folder.")
        if before["model_sha256"] != model:
            raise ValueError(f"WEIGHTS {args.weights} changed since --output {args.output} was begun: its rows are "
                             "another model's answers; choose another folder.")
        source, parts = find_changes(source, before, args)
    elif args.output.is_dir() and any(not file.name.startswith((".", "images-")) for file in args.output.iterdir()):
        raise ValueError(f"--output {args.output} is not empty: choose another folder.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for shard in list_shards(args) if args.retry_errors else ():
            if count_errors(shard):
                shard.unlink()
        if source.names is not None:  # by a name of its own: the old list stays valid until predictions.json is new
            replace_text(args.output / f"images-{source.digest[:16]}.json", json.dumps(source.names))
        content = dict(command=command, model_sha256=model, images_sha256=source.digest, parts=parts)
        replace_text(path, json.dumps(content, indent=1))
    accelerator.wait_for_everyone()
    content = read_manifest(path)  # images may have come or gone while the processes listed them, one after the other
    if content["images_sha256"] != source.digest:
        if source.names is None:
            raise ValueError(f"SOURCE {args.source} changed while it was read: start again.")
        source, parts = Source(content["images_sha256"], read_names(content, args)), content["parts"]
    return source, parts


def read_names(manifest: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The images of an output folder, in the order of its rows."""
    return json.loads((args.output / f"images-{manifest['images_sha256'][:16]}.json").read_text(encoding="utf-8"))


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = dict(command=dict, model_sha256=str, images_sha256=str, parts=list)
        if all(isinstance(content[name], kind) for name, kind in known.items()):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is damaged or was written by another version: choose another folder for --output.")


def find_changes(source: Source, before: dict[str, Any], args: argparse.Namespace) -> tuple[Source, list[int]]:
    """The images that --output was begun with and, with --append, the new ones after them."""
    if source.digest == before["images_sha256"]:
        return source, before["parts"]
    if source.names is None:
        raise ValueError(f"SOURCE {args.source} changed since --output {args.output} was begun, so its rows may have "
                         "other numbers: choose another folder.")
    old = read_names(before, args)
    now, then = set(source.names), set(old)
    new = [name for name in source.names if name not in then]
    if not new and now == then:
        return Source(before["images_sha256"], old), before["parts"]  # appended to earlier, in another order
    if not args.append:
        raise ValueError(
            f"SOURCE {args.source} has {len(new)} new images and lacks {len(then - now)} since --output {args.output} "
            "was begun: give --append to add rows for the new ones, or choose another folder."
        )
    names = old + new
    return Source(digest_names(names), names), before["parts"] + [len(new)] * bool(new)


# main


def main(argv: Sequence[str] | None = None) -> int:
    accept_any_encoding()
    args = parse_args(argv)
    refuse_lone_process()
    share_cpus()
    accelerator = Accelerator(kwargs_handlers=[PATIENT])
    use_cpu_threads(args.cpu_threads, accelerator)
    datasets.disable_progress_bars()
    cuda = accelerator.device.type == "cuda"
    shared = count_cores() if cuda else 2
    with exiting_on(ValueError, OSError), contextlib.ExitStack() as stack:
        source = open_source(args)
        classifier = s3n_timm.Classifier.from_pretrained(
            args.weights, device=accelerator.device, exit_entropy=args.exit_entropy)
        if accelerator.is_main_process:
            if classifier.exit_entropy:
                print(f"Early exit below {classifier.exit_entropy:g} nats: rows have no peaks and boxes.")
            stack.enter_context(claimed(args.output))
        source, parts = claim(source, classifier, args, accelerator)
        loader = DataLoader(
            Reader(classifier),
            batch_sampler=batch_items(list_items(source, parts, args), args, accelerator),
            num_workers=shared if args.workers is None else args.workers,
            collate_fn=keep_batch,
            pin_memory=cuda,
        )
        bar = stack.enter_context(progress(unit=" images", disable=not accelerator.is_main_process))
        with Writer(classifier, args) as writer:
            for batch in loader:
                with accelerator.autocast():
                    answers = None if batch.images is None else answer(classifier, batch.images, batch.sizes)
                writer.add(batch, answers)
                bar.update(len(batch.items))
        accelerator.wait_for_everyone()
    shards = list_shards(args)
    errors = sum(map(count_errors, shards))
    accelerator.end_training()
    if accelerator.is_main_process:
        print(f"{len(shards)} shards in {args.output}.")
        if errors:
            print(f"predict.py: {errors} images could not be read: their rows hold the error. --retry-errors reads "
                  "them again.", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

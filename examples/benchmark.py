"""What S3N costs beside its backbone, on whatever device is there: `python examples/benchmark.py`.

Ratios are of the medians of calls that took turns in one process, so that a busy machine slows them alike. Read it top
to bottom, one function a section:

    stage   sampling against two bare grid_sample calls, three backbone passes, and loops over images and peaks
    model   forward and training step against three plain passes of the backbone: in float32, and with --amp and
            --compile also in that precision and, in the last one, compiled; the forward on a GPU as CUDA graphs, too
    growth  the forward as batch, image, classes and peaks grow
    data    the share of training's wall time in which the device computes
    soak    memory of inference over --minutes, only if asked for
"""

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import psutil
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from support.arguments import parse_args as parse_train_args
from support.columns import add_columns, check_columns, list_columns
from support.files import replace_text
from support.launching import accept_any_encoding, exiting_on
from support.loaders import TrainLoader, create_eval_loader, load_splits
from support.loops import GRID, STAGE, draw_peaks, sample_by_loops
from support.timing import Calls, peak_bytes, synchronize, time_by_turns
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

import s3n_timm
from s3n_timm.data import class_names, load
from s3n_timm.early_exit import answer_batch
from s3n_timm.hub import count_macs
from s3n_timm.sampling import SelectiveSample, sample_response

AMP = dict(bf16=torch.bfloat16, fp16=torch.float16)


def rounds(args: argparse.Namespace) -> dict[str, Any]:
    return dict(seconds=args.seconds, min_rounds=args.min_rounds, max_rounds=args.max_rounds)


# stage


def with_gradients(loss: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(loss(), inputs)


def measure_stage(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    rows, plain = [], create_models(args, device)[1].eval()
    for size, batch, peaks in [(s, b, p) for s in args.sizes for b in args.batch_sizes for p in args.peaks]:
        image, response = torch.rand(batch, 3, size, size, device=device), draw_peaks(batch, peaks, device)
        betas = [torch.tensor([value], device=device, requires_grad=True) for value in (3.9, 13.2)]

        def ours(image=image, response=response, betas=betas) -> SelectiveSample:
            return sample_response(image, response, beta_discriminative=betas[0], beta_complementary=betas[1], **STAGE)

        grids = [each.detach().requires_grad_() for each in (ours().discriminative.grid, ours().complementary.grid)]

        def bare(image=image, grids=grids) -> list[Tensor]:
            return [F.grid_sample(image, grid, align_corners=True) for grid in grids]

        def loops(image=image, response=response, betas=betas) -> list[Tensor]:
            return sample_by_loops(image, response, *betas)

        def passes(image=image) -> list[Tensor]:
            return [plain(image), plain(torch.cat([image, image]))]

        def images(call: Callable[[], Any]) -> list[Tensor]:
            made = call()
            return [made.discriminative.image, made.complementary.image] if isinstance(made, SelectiveSample) else made

        difference = max((a - b).abs().max().item() for a, b in zip(images(ours), images(loops)))
        calls = dict(ours=ours, bare=bare, loops=loops, passes=passes)
        learn = dict(ours=betas, bare=grids, loops=betas, passes=list(plain.parameters()))
        with torch.inference_mode():
            forward = time_by_turns(calls, device, **rounds(args))
        both = {name: with_gradients(lambda call=call: sum(each.sum() for each in images(call)), learn[name])
                for name, call in calls.items()}
        backward = time_by_turns(both, device, **rounds(args))
        for kind, seconds in (("forward", forward), ("forward + backward", backward)):
            rows.append(dict(
                size=size, batch=batch, peaks=peaks, kind=kind, milliseconds=1000 * seconds["ours"],
                times_bare=seconds["ours"] / seconds["bare"], loops_times_ours=seconds["loops"] / seconds["ours"],
                percent_of_passes=100 * seconds["ours"] / seconds["passes"],
                largest_difference=difference,
            ))
    return rows


# model


def create_models(args: argparse.Namespace, device: torch.device, classes: int = 200) -> tuple[nn.Module, nn.Module]:
    """An S3N and the same backbone alone, with weights of one seed."""
    models = []
    for name, options in (("s3n", dict(backbone=args.backbone)), (args.backbone, {})):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=classes, **options).to(device)
        models.append(model.to(memory_format=torch.channels_last) if args.channels_last else model)
    return models[0], models[1]


def draw_images(batch: int, size: int, args: argparse.Namespace, device: torch.device) -> Tensor:
    images = torch.rand(batch, 3, size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last) if args.channels_last else images


def step(
        model: nn.Module,
        copies: tuple[int, ...],
        x: Tensor,
        target: Tensor,
        criterion: nn.Module,
        amp: str | None = None,
) -> Callable[[], None]:
    """A training step on so many copies of the images, pass by pass: a warped image is one, and takes memory too."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def call() -> None:
        with torch.autocast(x.device.type, AMP.get(amp), enabled=amp is not None):
            losses = [criterion(model(torch.cat([x] * n) if n > 1 else x), target.repeat(n)) for n in copies]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def forward(model: nn.Module, copies: tuple[int, ...], x: Tensor, amp: str | None = None) -> Callable[[], None]:
    """Passes of so many copies of the images, one after the other."""
    def call() -> None:
        with torch.autocast(x.device.type, AMP.get(amp), enabled=amp is not None):
            for n in copies:
                model(torch.cat([x] * n) if n > 1 else x)

    return call


def measure_model(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    eager, rows = create_models(args, device), []
    variants = [("eager", amp, eager) for amp in dict.fromkeys((None, args.amp))]
    if args.compile:  # for each shape of its own: the plain backbone reads two
        modes = {"compiled": None, **({"graphs": "reduce-overhead"} if device.type == "cuda" else {})}
        variants += [(how, args.amp, tuple(torch.compile(model, dynamic=False, mode=mode) for model in eager))
                     for how, mode in modes.items()]
    for size, batch in [(s, b) for s in args.sizes for b in args.batch_sizes]:
        x = draw_images(batch, size, args, device)
        target = torch.zeros(batch, dtype=torch.long, device=device)
        for how, amp, (ours, plain) in variants:
            for kind in ("forward", "training step")[:1 if how == "graphs" else 2]:
                for model in eager:
                    model.train(kind != "forward")
                if kind == "forward":
                    calls: Calls = dict(ours=forward(ours, (1,), x, amp), plain=forward(plain, (1, 2), x, amp))
                else:
                    calls = dict(ours=step(ours, (1,), x, target, s3n_timm.S3NLoss(), amp),
                                 plain=step(plain, (1, 2), x, target, nn.CrossEntropyLoss(), amp))
                with torch.inference_mode(kind == "forward"):
                    seconds = time_by_turns(calls, device, **rounds(args))
                    memory = {name: peak_bytes(call, device) for name, call in calls.items()}
                rows.append(dict(
                    size=size, batch=batch, precision=amp or "float32", how=how, kind=kind, seconds=seconds["ours"],
                    images_per_second=batch / seconds["ours"], times_plain=seconds["ours"] / seconds["plain"],
                    megabytes=memory["ours"] / 1e6, memory_times_plain=memory["ours"] / memory["plain"],
                ))
    return rows


# growth


def measure_growth(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The forward, with one of batch, image size and classes changed, against three plain passes of the same."""
    size, batch = args.sizes[0], args.batch_sizes[-1]
    cases = [("batch", each, each, size, 200) for each in (1, 2, 4, 8, 16, 32)]
    cases += [("size", each, batch, each, 200) for each in (128, 224, 320, 448)]
    cases += [("classes", each, batch, size, each) for each in (10, 100, 1000, 10_000)]
    rows = []
    for name, value, images, side, classes in cases:
        ours, plain = (model.eval() for model in create_models(args, device, classes))
        x = draw_images(images, side, args, device)
        calls: Calls = dict(ours=forward(ours, (1,), x), plain=forward(plain, (1, 2), x))
        with torch.inference_mode():
            seconds = time_by_turns(calls, device, **rounds(args))
            memory = {kind: peak_bytes(call, device) for kind, call in calls.items()}
        rows.append(dict(
            grows=name, to=value, milliseconds_per_image=1000 * seconds["ours"] / images,
            times_plain=seconds["ours"] / seconds["plain"], megabytes=memory["ours"] / 1e6,
            memory_times_plain=memory["ours"] / memory["plain"],
        ))
    image = torch.rand(batch, 3, size, size, device=device)
    for peaks in (0, 5, 20, 50, 100):
        response = draw_peaks(batch, peaks, device)
        call = lambda r=response: sample_response(  # noqa: E731
            image, r, beta_discriminative=3.9, beta_complementary=13.2, **STAGE)
        with torch.inference_mode():
            seconds = time_by_turns(dict(ours=call), device, **rounds(args))
            rows.append(dict(grows="peaks (the stage alone)", to=peaks,
                             milliseconds_per_image=1000 * seconds["ours"] / batch,
                             megabytes=peak_bytes(call, device) / 1e6))
    return rows


# data


def measure_data(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Train as train.py does, on --dataset or drawn birds: how long it computes and how long it waits for images."""
    rows = []
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as folder:
            given = ["--output", folder, "-b", args.batch_sizes[-1], "--img-size", args.sizes[0], "--workers", workers]
            if args.dataset:
                given += ["--val-fraction", 0, "--dataset", args.dataset]
                given += ["--data-dir", args.data_dir] if args.data_dir else []
                given += [each for name, column in list_columns(args).items()
                          for each in (f"--{name.replace('_', '-')}", column)]
            train_args = parse_train_args([str(each) for each in given])
        accelerator = Accelerator(cpu=device.type == "cpu")
        split = load_splits(train_args, verify=False)["train"]
        ours, _ = create_models(args, device, len(class_names(split)))
        config = resolve_data_config(dict(img_size=args.sizes[0]), model=ours)
        shared = {name: config[name] for name in ("input_size", "interpolation", "mean", "std")}
        loader = TrainLoader(split, create_transform(**shared, is_training=True), train_args, accelerator, "RGB")
        ours.train()
        waited, computed = [], []
        if loader.updates_per_epoch < 2:
            raise ValueError(f"The first batch is not timed, and {len(split)} training images are no second one of "
                             f"{train_args.batch_size}: lower --batch-sizes.")
        batches, rest = loader.read(0, 0), min(loader.updates_per_epoch, 1 + args.max_rounds)
        last = time.perf_counter()
        for done in range(rest):
            batch = next(batches)
            waited.append(time.perf_counter() - last)
            call = step(ours, (1,), batch["image"].to(device), batch["label"].to(device), s3n_timm.S3NLoss())
            start = time.perf_counter()
            call()
            synchronize(device)
            last = time.perf_counter()
            computed.append(last - start)
            if done >= args.min_rounds and sum(waited) + sum(computed) > args.seconds:
                break
        waited, computed = waited[1:], computed[1:]  # the first starts workers and warms the device
        rows.append(dict(
            workers=workers, batch=train_args.batch_size, size=args.sizes[0], steps=len(computed),
            computes_percent=100 * sum(computed) / (sum(computed) + sum(waited)),
            images_per_second=train_args.batch_size * len(computed) / (sum(computed) + sum(waited)),
        ))
    return rows


# memory over time


def measure_soak(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Resident memory of the process while batches of changing size are answered, some images by O alone."""
    model, _ = create_models(args, device)
    sizes = random.Random(0)
    size, most = args.sizes[0], args.batch_sizes[-1]
    threshold = answer_batch(model.eval(), draw_images(most, size, args, device)).entropy.median().item()
    images, rows = 0, []
    for minute in range(args.minutes + 1):
        if minute:  # the first row is the memory before the first minute
            until = time.monotonic() + 60
            while time.monotonic() < until:
                batch = draw_images(sizes.randint(1, most), size, args, device)
                answer_batch(model, batch + 0.1 * torch.randn_like(batch), exit_entropy=threshold)
                images += len(batch)
        row = dict(minute=minute, images=images, resident_mb=psutil.Process().memory_info().rss / 1e6)
        if device.type == "cuda":
            row["device_mb"] = torch.cuda.memory_allocated(device) / 1e6
        rows.append(row)
    return rows


# trained models


def read_batches(model: nn.Module, test: Any, args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """--batches of test images from all over the data set, preprocessed as the model was trained; or of noise."""
    config, batch = resolve_data_config({}, model=model), args.batch_sizes[-1]
    if test is None:
        return [draw_images(batch, config["input_size"][-1], args, device)]
    count = min(args.batches, len(test) // batch) * batch
    spread = test.select([i * len(test) // count for i in range(count)])
    loading = argparse.Namespace(batch_size=batch, workers=0)
    accelerator = Accelerator(cpu=device.type == "cpu")
    loader = create_eval_loader(spread, create_transform(**config), loading, accelerator, "RGB")
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return [each["image"].contiguous(memory_format=layout) for each in loader]


def measure_weights(folders: list[str], args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Images per second of trained models, with early exit as well, and the multiply-accumulates of one image."""
    test = load(args.dataset, args.data_dir, "test", **list_columns(args)) if args.dataset else None
    if test is not None and len(test) < args.batch_sizes[-1]:
        raise ValueError(f"--batch-sizes {args.batch_sizes[-1]} is more than the {len(test)} test images: lower it.")
    calls: Calls = {}
    rows = []
    for folder in folders:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
        size = resolve_data_config({}, model=model)["input_size"]
        rows.append(dict(weights=folder, size=size[-1], gmacs=count_macs(model, size) / 1e9))
        model = model.to(memory_format=torch.channels_last) if args.channels_last else model
        batches = read_batches(model, test, args, device)
        images = sum(map(len, batches))
        calls[folder] = lambda m=model, batches=batches: [m(x) for x in batches]
        if args.exit_entropy is not None and isinstance(model, s3n_timm.S3N):
            answer = partial(answer_batch, model, exit_entropy=args.exit_entropy)
            exited = sum(int(answer(x).exited.sum()) for x in batches) / images
            rows.append(dict(weights=f"{folder}, early exit", size=size[-1], exited=exited))
            calls[f"{folder}, early exit"] = lambda answer=answer, batches=batches: [answer(x) for x in batches]
    with torch.inference_mode():
        seconds = time_by_turns(calls, device, **rounds(args))
    for row in rows:
        row["images_per_second"] = images / seconds[row["weights"]]
        row["times_first"] = seconds[row["weights"]] / seconds[folders[0]]
    return rows


# main

SECTIONS: dict[str, Callable[[argparse.Namespace, torch.device], list[dict[str, Any]]]] = dict(
    stage=measure_stage, model=measure_model, growth=measure_growth, data=measure_data, soak=measure_soak)


def check_names(args: argparse.Namespace, sections: Iterable[str], parser: argparse.ArgumentParser) -> None:
    unknown = [name for name in args.sections if name not in sections]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}: choose of {', '.join(sections)}.")
    if not timm.is_model(args.backbone):
        parser.error(f"--backbone {args.backbone} is not a timm model.")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = f"of {', '.join(SECTIONS)}; all but soak if left out"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=every)
    parser.add_argument("--weights", nargs="+", metavar="FOLDER", help="time these trained models side by side instead")
    parser.add_argument("--dataset", help="of train.py: its test images for --weights, in place of noise, and its "
                                          "training images for data, in place of drawn birds")
    parser.add_argument("--data-dir", type=Path)
    add_columns(parser)
    parser.add_argument("--batches", type=int, default=20, help="of --dataset")
    parser.add_argument("--exit-entropy", type=float, metavar="NATS", help="for --weights: with early exit as well")
    parser.add_argument("--backbone", default="resnet18", help="name of a timm model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448], metavar="PX")
    parser.add_argument("-b", "--batch-sizes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--peaks", type=int, nargs="+", default=[5, 50], help="for stage")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="for data")
    parser.add_argument("--device", type=torch.device, help="cuda, cuda:1, cpu, …; default: the GPU, if there is one")
    parser.add_argument("--amp", choices=tuple(AMP), help="for model: in this mixed precision as well")
    parser.add_argument("--compile", action="store_true", help="for model: compiled as well")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=5, help="for each comparison")
    parser.add_argument("--min-rounds", type=int, default=5)
    parser.add_argument("--max-rounds", type=int, default=200)
    parser.add_argument("--minutes", type=int, default=30, help="for soak")
    parser.add_argument("--cpu-threads", type=int)
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    check_names(args, SECTIONS, parser)
    if args.exit_entropy is not None and not args.weights:
        parser.error("--exit-entropy needs --weights.")
    if args.dataset and not args.weights and args.sections and "data" not in args.sections:
        parser.error("--dataset needs --weights or the section data.")
    check_columns(args, parser)
    if args.exit_entropy is not None and not args.dataset:
        parser.error("--exit-entropy needs --dataset: how many images leave early depends on them.")
    for name in ("sizes", "batch_sizes", "batches", "peaks", "min_rounds", "max_rounds", "seconds", "minutes"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}.")
    if max(args.peaks) > 100:
        parser.error(f"--peaks can be 100 at most on the {GRID}×{GRID} grid, got {max(args.peaks)}.")
    return args


def show(name: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*(column.replace("_", " ") for column in columns), title=name)
    for row in rows:
        table.add_row(*(f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns))
    Console(width=160).print(table)


def describe(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Where and how something was measured."""
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}",
        threads=torch.get_num_threads(),
        versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
                      s3n_timm=s3n_timm.__version__),
        args={name: str(value) if isinstance(value, (Path, torch.device)) else value
              for name, value in vars(args).items()},
    )


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    args = parse_args(argv)
    device = args.device or Accelerator().device
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    results = describe(args, device)
    print(f"{results['device']}, {results['threads']} threads, torch {torch.__version__}, backbone {args.backbone}")
    sections = args.sections or [name for name in SECTIONS if name != "soak"]
    chosen: Calls = {name: lambda f=SECTIONS[name]: f(args, device) for name in sections}
    if args.weights:
        chosen = dict(weights=lambda: measure_weights(args.weights, args, device))
    for name, call in chosen.items():
        with exiting_on(ValueError, OSError):
            results[name] = call()
        show(name, results[name])
        if args.output:  # after each section: a benchmark that is stopped keeps what it has
            replace_text(args.output, json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

"""Train S3N on one device or many: `accelerate launch examples/train.py`.

Without arguments it learns the drawn birds that come with the package. Flags carry timm's names where timm has them.
Read it top to bottom: arguments, data, optimizer, one epoch, evaluation, checkpoints, main.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from rich.console import Console
from rich.table import Table
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import s3n_timm
from s3n_timm.datasets import load

RECIPES = Path(__file__).parent / "recipes"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="birds", help="birds, cub, aircraft, cars, folder, parquet or hub:NAME")
    data.add_argument("--data-dir", help="folder of the data set; drawn birds and the Hub need none")
    data.add_argument("--num-images", type=int, default=3000, help="drawn birds: training images")
    data.add_argument("--num-classes", type=int, default=8, help="drawn birds: classes")
    data.add_argument("--val-fraction", type=float, default=0.1, help="held out to choose the best epoch; 0: the last")
    data.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="decode every image first")
    data.add_argument("-j", "--workers", type=int, default=max(1, min(4, (os.cpu_count() or 2) // 2)))
    data.add_argument("--img-size", type=int, metavar="PX")
    data.add_argument("--scale", type=float, nargs=2, metavar="PCT", help="random resize scale of training crops")
    data.add_argument("--color-jitter", type=float, default=0.0, metavar="PCT")
    data.add_argument("--crop-pct", type=float, help="centre crop of test images")
    data.add_argument("--crop-mode", choices=("center", "squash", "border"), help="how test images are resized")
    data.add_argument("-b", "--batch-size", type=int, help="per process")

    model = parser.add_argument_group("model")
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    model.add_argument("--recipe", choices=recipes, help="defaults of all flags; birds for drawn birds, else paper")
    model.add_argument("--backbone", help="any timm model with global average pooling and one classifier")
    model.add_argument("--preset", choices=tuple(s3n_timm.model.PRESETS))
    model.add_argument("--pretrained", action=argparse.BooleanOptionalAction, help="start from ImageNet weights")
    model.add_argument("--pretrained-path", help="a file with those weights, or with S3N's, in place of the Hub")
    model.add_argument("--branches", default="O+D+C", choices=s3n_timm.model.BRANCH_SETS)
    model.add_argument("--attention", default="sparse", choices=s3n_timm.model.ATTENTIONS)
    model.add_argument("--model-kwargs", type=json.loads, default={}, metavar="JSON", help="further arguments of S3N")

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int)
    train.add_argument("--opt", help="any optimizer of timm.optim")
    train.add_argument("--momentum", type=float)
    train.add_argument("--weight-decay", type=float)
    train.add_argument("--lr", type=float, help="of new layers")
    train.add_argument("--backbone-lr-scale", type=float, default=1.0, help="of the backbone and necks, to --lr")
    train.add_argument("--beta-lr-scale", type=float, default=1.0, help="of β, to --lr")
    train.add_argument("--sched", help="any scheduler of timm.scheduler")
    train.add_argument("--warmup-epochs", type=int, default=0)
    train.add_argument("--decay-milestones", type=int, nargs="+", default=[], metavar="EPOCH")
    train.add_argument("--smoothing", type=float, default=0.0, help="label smoothing of every output")
    train.add_argument("--grad-accum-steps", type=int, default=1)
    train.add_argument("--clip-grad", type=float, metavar="NORM")
    train.add_argument("--model-ema", action="store_true", help="average the weights and evaluate the average")
    train.add_argument("--model-ema-decay", type=float, default=0.9998)
    train.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    train.add_argument("--cpu-threads", type=int, help="per process, on a CPU; default: all cores, shared evenly")
    train.add_argument("--seed", type=int, default=42)

    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=Path("output/s3n"))
    run.add_argument("--resume", nargs="?", const="auto", metavar="PATH", help="go on from a checkpoint, or the newest")
    run.add_argument("--checkpoint-hist", type=int, default=2, help="checkpoints to keep")

    first = parser.parse_args(argv)
    name = first.recipe or ("birds" if first.dataset == "birds" else "paper")
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    if first.backbone not in (None, recipe["backbone"]):
        recipe.pop("model_kwargs", None)  # meant for the recipe's own backbone
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    if args.pretrained_path is not None:
        args.pretrained = True
        if not Path(args.pretrained_path).is_file():
            parser.error(f"--pretrained-path {args.pretrained_path} is not a file.")
    for name in ("img_size", "batch_size", "epochs", "lr", "grad_accum_steps", "checkpoint_hist"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}.")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must lie in [0, 1), got {args.val_fraction}.")
    if args.output.exists() and any(args.output.iterdir()) and not args.resume:
        parser.error(f"--output {args.output} is not empty: add --resume to continue, or choose another folder.")
    return args


# data


def load_splits(args: argparse.Namespace) -> dict[str, datasets.Dataset]:
    """Training, validation and test images; without a validation part the test split is watched in its place."""
    options: list[dict[str, Any]] = [dict(verify=args.verify)] * 2
    if args.dataset == "birds":
        options = [dict(num_images=n, num_classes=args.num_classes, size=args.img_size)
                   for n in (args.num_images, max(args.num_images // 4, args.num_classes))]
    train, test = (load(args.dataset, args.data_dir, split, **opts) for split, opts in zip(("train", "test"), options))
    if not args.val_fraction:
        return dict(train=train, val=test, test=test)
    try:
        parts = train.train_test_split(args.val_fraction, stratify_by_column="label", seed=args.seed)
    except ValueError as error:
        raise ValueError(f"--val-fraction {args.val_fraction} cannot be held out of training: {error}") from error
    return dict(train=parts["train"], val=parts["test"], test=test)


def create_loader(
        dataset: datasets.Dataset,
        transform: Callable,
        args: argparse.Namespace,
        shuffle: bool = False,
) -> DataLoader:
    def transform_batch(batch: dict[str, list]) -> dict[str, list]:
        return dict(image=[transform(image.convert("RGB")) for image in batch["image"]], label=batch["label"])

    return DataLoader(
        dataset.select_columns(["image", "label"]).with_transform(transform_batch),
        batch_size=args.batch_size,
        shuffle=shuffle,
        num_workers=args.workers,
        drop_last=shuffle and len(dataset) > args.batch_size,
    )


# optimizer


def group_parameters(model: s3n_timm.S3N, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The paper's two learning rates, for what is pretrained and what is new, and β's own."""
    new = tuple(f"{name}." for name in (*model.pretrained_cfg["classifier"], "saliency"))
    groups: dict[str, list[nn.Parameter]] = dict(backbone=[], new=[], beta=[])
    for name, parameter in model.named_parameters():
        kind = "beta" if name.startswith("beta_") else "new" if name.startswith(new) else "backbone"
        groups[kind].append(parameter)
    scales = dict(backbone=args.backbone_lr_scale, new=1.0, beta=args.beta_lr_scale)
    return [
        dict(params=params, lr_scale=scales[kind], weight_decay=0.0 if kind == "beta" else args.weight_decay)
        for kind, params in groups.items() if params
    ]


# one epoch


def train_epoch(
        epoch: int,
        model: nn.Module,
        loader: DataLoader,
        criterion: s3n_timm.S3NLoss,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        progress: "Progress",
        args: argparse.Namespace,
        accelerator: Accelerator,
) -> float:
    model.train()
    for each in (accelerator.unwrap_model(model), *([] if progress.ema is None else [progress.ema.module])):
        each.set_epoch(epoch)
    total = 0.0
    bar = tqdm(loader, desc=f"epoch {epoch + 1}/{args.epochs}", disable=not accelerator.is_main_process, leave=False)
    for batch in bar:
        images = batch["image"]
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(model):
            loss = criterion(model(images), batch["label"])
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss became {value} at update {progress.updates} of epoch {epoch + 1}: lower --lr "
                    f"({args.lr}), add --clip-grad or --warmup-epochs, and --resume."
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.clip_grad:
                accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            # not prepared by Accelerate, which would step it once a process
            progress.updates += 1
            scheduler.step_update(progress.updates)
            if progress.ema is not None:
                progress.ema.update(accelerator.unwrap_model(model), step=progress.updates)
        total += value
        bar.set_postfix(loss=f"{value:.3f}", lr=f"{optimizer.param_groups[-1]['lr']:.2g}")
    return total / len(loader)


# evaluation


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator, desc: str = "") -> dict[str, float]:
    """Top-1 accuracy in % of every branch and of their fusion; images that even out the processes count once."""
    model.eval()
    bare = accelerator.unwrap_model(model)
    bare.set_branch_logits(True)
    hits: dict[str, list[Tensor]] = {}
    for batch in tqdm(loader, desc=desc, disable=not accelerator.is_main_process, leave=False):
        for name, logits in model(batch["image"])._asdict().items():
            if logits is not None:
                hits.setdefault(name, []).append(accelerator.gather_for_metrics(logits.argmax(1) == batch["label"]))
    bare.set_branch_logits(None)
    return {name: 100 * torch.cat(hit).float().mean().item() for name, hit in hits.items()}


# checkpoints


class Progress:
    """How far training has come; saved with every checkpoint."""

    def __init__(self, ema: ModelEmaV3 | None) -> None:
        self.epoch, self.updates, self.best, self.ema = 0, 0, -1.0, ema

    def state_dict(self) -> dict[str, Any]:
        state = dict(epoch=self.epoch, updates=self.updates, best=self.best)
        return state if self.ema is None else dict(state, ema=self.ema.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.updates, self.best = state["epoch"], state["updates"], state["best"]
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


@contextmanager
def replacing(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A folder to write to that takes the place of `folder` once it is whole."""
    partial_folder = folder.with_name(f".{folder.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield partial_folder
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)


def list_checkpoints(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").glob("epoch-*"), key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    if not args.resume:
        return None
    if args.resume != "auto":
        if not (Path(args.resume) / "custom_checkpoint_0.pkl").is_file():
            raise ValueError(f"--resume {args.resume} is not a checkpoint of this script: name an epoch-N folder.")
        return Path(args.resume)
    return next(reversed(list_checkpoints(args.output)), None)


# main


@contextmanager
def exiting_on(*kinds: type[Exception]) -> Iterator[None]:
    """End with the message alone of errors that the user can mend; all others keep their traceback."""
    try:
        yield
    except kinds as error:
        sys.exit(f"train.py: {error}")


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(args.seed)
    if accelerator.device.type == "cpu":  # accelerate launch leaves a process one thread unless told of processes
        torch.set_num_threads(args.cpu_threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    with exiting_on(ValueError, TypeError, OSError, RuntimeError):
        checkpoint = find_checkpoint(args)
        with accelerator.main_process_first():
            splits = load_splits(args)
        names = splits["train"].features["label"].names
        model = timm.create_model(
            "s3n",
            backbone=args.backbone,
            pretrained=args.pretrained,
            pretrained_cfg_overlay=dict(file=args.pretrained_path) if args.pretrained_path else None,
            num_classes=len(names),
            preset=args.preset,
            branches=args.branches,
            attention=args.attention,
            **args.model_kwargs,
        )
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)

    evaluation = dict(img_size=args.img_size, crop_pct=args.crop_pct, crop_mode=args.crop_mode)
    data_config = resolve_data_config(evaluation, model=model)
    shared = {name: data_config[name] for name in ("input_size", "interpolation", "mean", "std")}
    augment = create_transform(**shared, is_training=True, scale=tuple(args.scale), color_jitter=args.color_jitter)
    squash = create_transform(**shared, crop_pct=args.crop_pct, crop_mode=args.crop_mode)
    train_loader = create_loader(splits["train"], augment, args, shuffle=True)
    val_loader, test_loader = (create_loader(splits[split], squash, args) for split in ("val", "test"))

    criterion = s3n_timm.S3NLoss(args.smoothing)
    optimizer = create_optimizer_v2(group_parameters(model, args), opt=args.opt, lr=args.lr, momentum=args.momentum)
    model, optimizer, train_loader, val_loader, test_loader = accelerator.prepare(
        model, optimizer, train_loader, val_loader, test_loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        decay_milestones=args.decay_milestones,
        step_on_epochs=False,
        updates_per_epoch=math.ceil(len(train_loader) / args.grad_accum_steps),
    )
    bare = accelerator.unwrap_model(model)
    progress = Progress(ModelEmaV3(bare, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None)
    accelerator.register_for_checkpointing(progress)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"Resumed from {checkpoint} after epoch {progress.epoch}.")

    judged = model if progress.ema is None else progress.ema.module
    watched = "val" if args.val_fraction else "test"
    sizes = ", ".join(f"{len(part)} {split}" for split, part in splits.items())
    accelerator.print(f"S3N ({args.preset}) on {args.backbone}, {args.img_size} px, {len(names)} classes: {sizes}")
    started = time.monotonic()
    for epoch in range(progress.epoch, args.epochs):
        train_loader.set_epoch(epoch)
        with exiting_on(FloatingPointError):
            loss = train_epoch(epoch, model, train_loader, criterion, optimizer, scheduler, progress, args, accelerator)
        top1 = evaluate(judged, val_loader, accelerator, desc=watched)
        accelerator.print(
            f"epoch {epoch + 1}/{args.epochs}  loss {loss:.3f}  {watched} top-1 % "
            + ", ".join(f"{name} {value:.1f}" for name, value in top1.items())
            + f"  ({time.monotonic() - started:.0f} s)"
        )
        progress.epoch = epoch + 1
        better = not args.val_fraction or top1["joint"] > progress.best
        progress.best = top1["joint"] if better else progress.best
        for kind in ("last", "best") if better else ("last",):
            with replacing(args.output / kind, accelerator) as folder:
                if accelerator.is_main_process:
                    s3n_timm.save(accelerator.unwrap_model(judged), folder, label_names=names, data_config=data_config)
        with replacing(args.output / "checkpoints" / f"epoch-{progress.epoch}", accelerator) as folder:
            accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            for old in list_checkpoints(args.output)[:-args.checkpoint_hist]:
                shutil.rmtree(old)

    report(test_loader, names, args, accelerator)


def report(loader: DataLoader, names: list[str], args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Test the last and the best weights once and print a closing table."""
    results = {}
    for kind in ("last", "best"):
        model = timm.create_model(f"local-dir:{args.output / kind}", pretrained=True).to(accelerator.device)
        results[kind] = evaluate(model, loader, accelerator, desc=f"test, {kind}")
    if not accelerator.is_main_process:
        return
    (args.output / "results.json").write_text(json.dumps(dict(test_top1=results, args=vars(args)), default=str))
    table = Table("branch", *(f"{kind} epoch" for kind in results), title="top-1 % on the test split")
    for branch in results["last"]:
        table.add_row(branch, *(f"{result[branch]:.1f}" for result in results.values()))
    table.add_row("chance", *[f"{100 / len(names):.1f}"] * 2)
    Console().print(table)
    print(f'Load it: import s3n_timm, timm; timm.create_model("local-dir:{args.output / "best"}", pretrained=True)')


if __name__ == "__main__":
    main()

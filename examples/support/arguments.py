"""Flags of train.py, and the recipes that fill those which are left out."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

import s3n_timm
from s3n_timm.model import ANSWERS, ATTENTIONS, BRANCH_SETS, PRESETS

RECIPES = Path(__file__).parents[1] / "recipes"

# what may differ between a run and the one that goes on from its checkpoint
FREE_TO_CHANGE = frozenset((
    "output", "resume", "recipe", "epochs", "patience", "workers", "verify", "cpu_threads", "data_dir",
    "pretrained_path", "checkpoint_every", "checkpoint_hist", "log_with", "val_interval",
    "batch_size", "grad_accum_steps",  # their product must stay
))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    on_off = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="birds", help="birds, cub, aircraft, cars, folder, parquet or hub:NAME")
    data.add_argument("--data-dir", help="folder of the data set; drawn birds and the Hub need none")
    data.add_argument("--num-images", type=int, help="training images of drawn birds, or of an epoch of a stream")
    data.add_argument("--num-classes", type=int, default=8, help="drawn birds: classes")
    data.add_argument("--image-column", default="image", help="of parquet and the Hub")
    data.add_argument("--label-column", default="label", help="of parquet and the Hub")
    data.add_argument("--train-split", default="train", help="of the Hub")
    data.add_argument("--val-split", help="of the Hub, in place of --val-fraction")
    data.add_argument("--test-split", default="test", help="of the Hub")
    data.add_argument("--streaming", action="store_true", help="read the Hub's images as they are needed")
    data.add_argument("--shuffle-buffer", type=int, default=1000, help="images that a stream is shuffled among")
    data.add_argument("--val-fraction", type=float, default=0.1, help="held out to choose the best epoch; 0: the last")
    data.add_argument("--balanced", action="store_true", help="draw every class equally often")
    data.add_argument("--verify", action=on_off, default=True, help="decode every image, and compare splits, first")
    data.add_argument("-j", "--workers", type=int, default=max(1, min(4, (os.cpu_count() or 2) // 2)))
    data.add_argument("-b", "--batch-size", type=int, help="per process")
    data.add_argument("--img-size", type=int, metavar="PX")
    data.add_argument("--crop-pct", type=float, help="centre crop of test images")
    data.add_argument("--crop-mode", choices=("center", "squash", "border"), help="how test images are resized")
    data.add_argument("--scale", type=float, nargs=2, metavar="PCT", help="random resize scale of training crops")
    data.add_argument("--color-jitter", type=float, default=0.0, metavar="PCT")
    data.add_argument("--reprob", type=float, default=0.0, metavar="PCT", help="random erasing")
    data.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA")
    data.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA")

    model = parser.add_argument_group("model")
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    model.add_argument("--recipe", help=f"paper, original, {', '.join(names)} or a file; default: the data set's")
    model.add_argument("--preset", choices=tuple(PRESETS), default="paper", help="of the model and of the recipe")
    model.add_argument("--backbone", help="any timm model with global average pooling and one classifier")
    model.add_argument("--plain", action="store_true", help="train the backbone alone, a baseline")
    model.add_argument("--pretrained", action=on_off, help="start from ImageNet weights")
    model.add_argument("--pretrained-path", help="a file with those weights, or with S3N's, in place of the Hub")
    model.add_argument("--branches", default="O+D+C", choices=BRANCH_SETS)
    model.add_argument("--attention", default="sparse", choices=ATTENTIONS)
    model.add_argument("--answer", default="joint", choices=ANSWERS, help="which output answers, and chooses the epoch")
    model.add_argument("--model-kwargs", type=json.loads, default={}, metavar="JSON", help="further arguments of S3N")
    model.add_argument("--sync-bn", action="store_true", help="batch-norm statistics over all processes")
    model.add_argument("--freeze-bn", action="store_true", help="keep the batch-norm statistics of the start")
    model.add_argument("--channels-last", action=on_off, default=True)
    model.add_argument("--grad-checkpointing", action="store_true", help="less memory for more computation")
    model.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="compile with torch")

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int)
    train.add_argument("--opt", help="any optimizer of timm.optim")
    train.add_argument("--momentum", type=float)
    train.add_argument("--weight-decay", type=float)
    train.add_argument("--lr", type=float, help="of new layers")
    train.add_argument("--backbone-lr-scale", type=float, default=1.0, help="of the backbone and necks, to --lr")
    train.add_argument("--beta-lr-scale", type=float, default=1.0, help="of β, to --lr")
    train.add_argument("--layer-decay", type=float, help="factor of the rate from each layer to the one below it")
    train.add_argument("--freeze-epochs", type=int, default=0, help="first epochs that leave the backbone as it is")
    train.add_argument("--sched", help="any scheduler of timm.scheduler that steps by updates")
    train.add_argument("--warmup-epochs", type=int, default=0)
    train.add_argument("--decay-milestones", type=int, nargs="+", default=[], metavar="EPOCH")
    train.add_argument("--smoothing", type=float, default=0.0, help="label smoothing of every output")
    train.add_argument("--distillation", type=float, default=0.0, help="weight of learning from all outputs together")
    train.add_argument("--grad-accum-steps", type=int, default=1)
    train.add_argument("--clip-grad", type=float, metavar="NORM")
    train.add_argument("--model-ema", action="store_true", help="average the weights, and evaluate both")
    train.add_argument("--model-ema-decay", type=float, default=0.9998)
    train.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="default: accelerate launch's")
    train.add_argument("--val-interval", type=int, default=1, metavar="EPOCHS", help="between two evaluations")
    train.add_argument("--patience", type=int, metavar="EPOCHS", help="stop after so many epochs without a better one")
    train.add_argument("--seed", type=int, default=42)

    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=Path("output/s3n"))
    run.add_argument("--resume", nargs="?", const="auto", metavar="PATH", help="go on from a checkpoint, or the newest")
    run.add_argument("--checkpoint-every", type=int, metavar="UPDATES", help="save within epochs as well")
    run.add_argument("--checkpoint-hist", type=int, default=2, help="checkpoints to keep")
    run.add_argument("--log-with", nargs="+", default=[], metavar="TRACKER", help="tensorboard, wandb, … of Accelerate")
    run.add_argument("--cpu-threads", type=int, help="per process, on a CPU; default: all cores, shared evenly")

    first = parser.parse_args(argv)
    if first.recipe in PRESETS:  # the data set's recipe in that version
        parser.set_defaults(preset=first.recipe)
        first = parser.parse_args([*(sys.argv[1:] if argv is None else argv), "--recipe", ""])
    recipe = _read_recipe(first, parser)
    if first.plain:
        recipe.pop("answer", None)  # meant for S3N
    if first.backbone not in (None, recipe["backbone"]):
        recipe.pop("model_kwargs", None)  # meant for the recipe's own backbone
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    args.pretrained = args.pretrained or args.pretrained_path is not None
    _check(args, parser)
    return args


def _read_recipe(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What the recipe's parts `shared` and `paper` or `original` say."""
    own = RECIPES / f"{args.dataset}.yaml"
    name = args.recipe or (args.dataset if own.is_file() else "own")
    path = RECIPES / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        parser.error(f"--recipe {name} is neither a file nor one of {RECIPES}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe: dict[str, Any] = content["shared"] | content.get(args.preset, {})
    for key in recipe:
        if key not in vars(args):
            parser.error(f"{path} sets {key!r}, which is no flag of this script: see --help.")
    return recipe


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what can be refused before anything is read."""
    for name in ("img_size", "batch_size", "epochs", "lr", "grad_accum_steps", "checkpoint_hist", "checkpoint_every",
                 "patience", "val_interval", "num_images", "shuffle_buffer", "clip_grad", "layer_decay"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}.")
    if args.pretrained_path is not None and not Path(args.pretrained_path).is_file():
        parser.error(f"--pretrained-path {args.pretrained_path} is not a file.")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must lie in [0, 1), got {args.val_fraction}.")
    if not 0 <= args.freeze_epochs <= args.epochs:
        parser.error(f"--freeze-epochs must lie in 0 to --epochs {args.epochs}, got {args.freeze_epochs}.")
    if args.sched in ("none", "plateau"):
        parser.error(f"--sched {args.sched} does not step by updates: use constant, cosine, multistep, …")
    if args.patience and not (args.val_fraction or args.val_split):
        parser.error("--patience needs validation images: give --val-fraction or --val-split.")
    if args.val_split and not args.dataset.startswith("hub:"):
        parser.error("--val-split names a split of the Hub: use --val-fraction for other data.")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"--mixup and --cutmix mix pairs: --batch-size must be even, got {args.batch_size}.")
    if args.streaming:
        if not args.dataset.startswith("hub:"):
            parser.error("--streaming reads --dataset hub:NAME, or hub:FOLDER, only.")
        if args.balanced:
            parser.error("--balanced needs all labels at hand: leave out --streaming.")
        if args.val_fraction and not args.val_split:
            parser.error("--streaming can't hold images out: give --val-split NAME or --val-fraction 0.")
    if args.plain and (args.branches != "O+D+C" or args.attention != "sparse"):
        parser.error("--plain has no branches and no attention: leave out --branches and --attention.")
    if args.plain and args.answer != "joint":
        parser.error(f"--plain has one output: leave out --answer {args.answer}.")
    if args.plain and args.distillation:
        parser.error("--plain has one output and nobody to learn from: leave out --distillation.")
    if args.output.exists() and any(args.output.iterdir()) and not args.resume:
        parser.error(f"--output {args.output} is not empty: add --resume to continue, or choose another folder.")


def trajectory(args: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must have in common, as JSON knows it."""
    kept = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    kept["images an update"] = args.batch_size * args.grad_accum_steps * world_size
    kept["s3n_timm"] = s3n_timm.__version__
    return json.loads(json.dumps(kept, default=str))

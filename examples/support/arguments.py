"""Flags of train.py, and the recipes that give defaults to them."""

import argparse
import difflib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import LoggerType
from support.files import LOCK
from support.launching import count_default_workers
from support.publishing import add_hub_flags, check_hub_flags
from timm.optim import list_optimizers

import s3n_timm
from s3n_timm.checkpoints import CROP_MODES
from s3n_timm.config import ANSWERS, BRANCH_SETS, PRESETS
from s3n_timm.images import is_of_system
from s3n_timm.sampling import ATTENTIONS

MAX_SEED = 2**32 - 1  # of numpy
RECIPES = Path(__file__).parents[1] / "recipes"

# of timm.scheduler, which returns no scheduler at all for a name that it does not know; plateau steps by epochs
SCHEDULES = ("constant", "cosine", "multistep", "poly", "rsqrt", "tanh", "wsd")
TRACKERS = tuple(str(name) for name in LoggerType)
# flags without a default, which a recipe gives
NEEDED = ("backbone", "img_size", "batch_size", "epochs", "opt", "momentum", "weight_decay", "lr", "sched", "scale")

# options of the model that --model-kwargs leaves to flags and to the data set
SETTLED = frozenset((
    "backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "num_classes", "preset", "branches",
    "attention", "answer",
))

# what may differ between a run and the one that goes on from its checkpoint, without a change of what is learned
FREE_TO_CHANGE = frozenset((
    "output", "resume", "recipe", "epochs", "patience", "workers", "verify", "cpu_threads", "data_dir",
    "pretrained_path", "checkpoint_every", "checkpoint_hist", "log_with", "val_interval",
    "push_to_hub", "push_backbone", "hub_private",
    "batch_size", "grad_accum_steps",  # their product must stay
))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    on_off = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="birds",
                      help="birds, cub, aircraft, cars, folder, multi-label, parquet or hub:NAME")
    data.add_argument("--data-dir", help="folder of the data set; not for birds and hub:NAME")
    data.add_argument("--num-images", type=int, help="size of the drawn training set, or of a stream's epoch")
    data.add_argument("--num-classes", type=int, default=8, help="classes of the drawn birds")
    data.add_argument("--image-column", default="image", help="image column of parquet and hub data sets")
    data.add_argument("--label-column", default="label", help="label column of parquet and hub data sets")
    data.add_argument("--train-split", default="train", help="training split of a hub data set")
    data.add_argument("--val-split", help="validation split of a hub data set, instead of --val-fraction")
    data.add_argument("--test-split", default="test", help="test split of a hub data set")
    data.add_argument("--streaming", action="store_true", help="stream a hub data set instead of downloading it")
    data.add_argument("--shuffle-buffer", type=int, default=1000, help="images in a stream's shuffle buffer")
    data.add_argument("--val-fraction", type=float, default=0.1,
                      help="fraction of the training images held out for validation, one of each class at least (with "
                           "several labels an image: of all); with 0 the last epoch is kept. A validation part of the "
                           "data, such as DATA/val, takes its place")
    data.add_argument("--balanced", action="store_true", help="sample all classes equally often, with replacement")
    data.add_argument("--verify", action=on_off, default=True,
                      help="decode all images and look for duplicates between splits before training")
    data.add_argument("-j", "--workers", type=int, default=count_default_workers(),
                      help="data loading workers per process")
    data.add_argument("-b", "--batch-size", type=int, help="images per process and step")
    data.add_argument("--img-size", type=int, metavar="PX", help="input size in pixels")
    data.add_argument("--crop-pct", type=float, help="center crop of evaluation images, as a fraction")
    data.add_argument("--crop-mode", choices=CROP_MODES, help="timm's crop mode for evaluation")
    data.add_argument("--scale", type=float, nargs=2, metavar="PCT", help="area range of random resized crops")
    data.add_argument("--color-jitter", type=float, default=0.0, metavar="PCT", help="color jitter factor")
    data.add_argument("--reprob", type=float, default=0.0, metavar="PCT", help="random erasing probability")
    data.add_argument("--aa", metavar="POLICY", help="timm's auto augment policy, such as rand-m9-mstd0.5-inc1")
    data.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup alpha; 0 is off")
    data.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="CutMix alpha; 0 is off")

    model = parser.add_argument_group("model")
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    model.add_argument("--recipe", help=f"paper, original, {', '.join(names)} or a YAML file (default: by --dataset)")
    model.add_argument("--preset", choices=tuple(PRESETS), default="paper", help="preset of the model and its recipe")
    model.add_argument("--backbone", help="any timm model with global average pooling and a single classifier")
    model.add_argument("--plain", action="store_true", help="train the backbone alone, as a baseline")
    model.add_argument("--pretrained", action=on_off, help="start from pretrained backbone weights")
    model.add_argument("--pretrained-path", metavar="PATH",
                       help="pretrained backbone weights from a file, or from a model that train.py saved (its folder, "
                            "or s3n_test_resnet, which comes with the package), not from the Hub")
    model.add_argument("--branches", default="O+D+C", choices=BRANCH_SETS, help="branches of S3N")
    model.add_argument("--attention", default="sparse", choices=ATTENTIONS, help="what the sampling maps are made of")
    model.add_argument("--answer", default="joint", choices=ANSWERS,
                       help="output to predict with; its validation accuracy selects the best epoch")
    model.add_argument("--model-kwargs", type=_read_object, default={}, metavar="JSON", help="further arguments of S3N")
    model.add_argument("--sync-bn", action="store_true", help="synchronize batch norm over all processes")
    model.add_argument("--freeze-bn", action="store_true", help="keep batch norm in eval mode")
    model.add_argument("--channels-last", action=on_off, default=True, help="channels-last memory format")
    model.add_argument("--grad-checkpointing", action="store_true", help="trade computation for memory")
    model.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile backend")

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, help="epochs to train")
    train.add_argument("--opt", help="optimizer, any of timm.optim.list_optimizers()")
    train.add_argument("--momentum", type=float, help="momentum of the optimizer")
    train.add_argument("--weight-decay", type=float, help="weight decay")
    train.add_argument("--lr", type=float, help="learning rate of newly initialized layers")
    train.add_argument("--backbone-lr-scale", type=float, default=1.0, help="factor of --lr for backbone and necks")
    train.add_argument("--beta-lr-scale", type=float, default=1.0, help="factor of --lr for beta")
    train.add_argument("--layer-decay", type=float, help="layer-wise learning rate decay")
    train.add_argument("--freeze-epochs", type=int, default=0, metavar="EPOCHS",
                       help="train only the new layers for the first epochs")
    train.add_argument("--sched", help=f"learning rate schedule: {', '.join(SCHEDULES)}")
    train.add_argument("--warmup-epochs", type=int, default=0, metavar="EPOCHS", help="linear warmup")
    train.add_argument("--decay-milestones", type=int, nargs="+", default=[], metavar="EPOCH",
                       help="epochs at which --sched multistep decays the rate")
    train.add_argument("--smoothing", type=float, default=0.0, help="label smoothing")
    train.add_argument("--class-weights", metavar="WEIGHTS",
                       help="weights of the classes in the loss: balanced, by their training images, or a file: "
                            ".csv with the columns class and weight, or .json with names and numbers")
    train.add_argument("--bce-loss", action="store_true", help="binary cross-entropy of every class, as timm has it")
    train.add_argument("--bce-sum", action="store_true", help="sum that loss over the classes instead of its mean")
    train.add_argument("--bce-target-thresh", type=float, metavar="SHARE",
                       help="with --bce-loss: labels of mixed images count whole above this share, and else not at all")
    train.add_argument("--grad-accum-steps", type=int, default=1, metavar="STEPS", help="gradient accumulation")
    train.add_argument("--clip-grad", type=float, metavar="NORM", help="maximum gradient norm")
    train.add_argument("--model-ema", action="store_true", help="keep and evaluate a moving average of the weights")
    train.add_argument("--model-ema-decay", type=float, default=0.9998, help="decay of that average")
    train.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="(default: accelerate's setting)")
    train.add_argument("--val-interval", type=int, default=1, metavar="EPOCHS", help="epochs between evaluations")
    train.add_argument("--patience", type=int, metavar="EPOCHS", help="stop after this long without a better epoch")
    train.add_argument("--seed", type=int, default=42, help="random seed")

    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, default=Path("output/s3n"), help="folder for weights and results")
    run.add_argument("--resume", nargs="?", const="auto", metavar="PATH",
                     help="continue from a checkpoint; without PATH from the newest in --output")
    run.add_argument("--checkpoint-every", type=int, metavar="UPDATES", help="save within epochs, too")
    run.add_argument("--checkpoint-hist", type=int, default=2, help="number of checkpoints to keep")
    run.add_argument("--log-with", nargs="+", default=[], metavar="TRACKER", help=f"any of {', '.join(TRACKERS)}")
    run.add_argument("--cpu-threads", type=int, help="threads per process on a CPU (default: all cores, shared evenly)")
    add_hub_flags(parser)

    first = parser.parse_args(argv)
    if first.recipe in PRESETS:  # the data set's recipe in that version
        parser.set_defaults(preset=first.recipe)
        first = parser.parse_args([*(sys.argv[1:] if argv is None else argv), "--recipe", ""])
    recipe = _read_recipe(first, parser)
    if first.plain:
        recipe.pop("answer", None)  # meant for S3N
        given = sorted(first.model_kwargs.keys() - {"backbone_args"})
        if given:
            parser.error(f"--plain has no {given[0]}: --model-kwargs may give backbone_args alone.")
    if first.backbone not in (None, recipe.get("backbone")):
        recipe.pop("pretrained_path", None)  # meant for the recipe's own backbone, as is the next
        recipe["model_kwargs"] = {name: value for name, value in recipe.get("model_kwargs", {}).items()
                                  if name != "backbone_args"}
    if first.pretrained is False:
        recipe.pop("pretrained_path", None)
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    args.bce_loss |= args.dataset == "multi-label"
    args.pretrained = args.pretrained or args.pretrained_path is not None
    _check(args, parser)
    return args


def _read_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} must be an object, such as {{\"fwhm\": 13}}.")
    return value


def _read_recipe(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults from the recipe's section `shared` and that of the preset."""
    own = RECIPES / f"{args.dataset}.yaml"
    name = args.recipe or (args.dataset if own.is_file() else "own")
    path = RECIPES / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        parser.error(f"--recipe {name} is neither a file nor one of {RECIPES}.")
    content = _load_yaml(path, parser)
    recipe: dict[str, Any] = content["shared"] | content.get(args.preset, {})
    actions = {action.dest: action for action in parser._actions}
    for key, value in recipe.items():
        if key not in vars(args):
            parser.error(f"{path} sets {key!r}, which is no flag of this script: see --help.")
        if value is not None and not _fits(actions[key], value):
            parser.error(f"{path} sets {key} to {value!r}, which --{key.replace('_', '-')} does not take: see --help.")
    missing = [name for name in NEEDED if name not in recipe and getattr(args, name) is None]
    if missing:
        parser.error(f"{path} lacks {', '.join(missing)}: give what it builds on, such as base: own.")
    return recipe


def _fits(action: argparse.Action, value: Any) -> bool:
    """Whether a flag takes a value of a recipe, which argparse does not look at."""
    if isinstance(value, dict):  # by output, or for models
        return action.dest in ("smoothing", "model_kwargs")
    several = action.nargs == "+" or (isinstance(action.nargs, int) and action.nargs > 0)
    if several != isinstance(value, list):
        return False
    values = value if several else [value]
    kinds: tuple[type, ...] = {int: (int,), float: (int, float)}.get(action.type, (object,))  # type: ignore[call-overload]
    return all(isinstance(each, kinds) and (not action.choices or each in action.choices) for each in values)


def _load_yaml(path: Path, parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """A recipe's sections; those of the recipe that it names as `base` stand below its own."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path} is not YAML: {' '.join(str(error).split())}")
    sections: dict[str, dict[str, Any]] = {}
    own = dict(content) if isinstance(content, dict) else {}
    if "base" in own:
        base = RECIPES / f"{own.pop('base')}.yaml"
        if not base.is_file() or base == path:
            parser.error(f"{path} has base {base.stem!r}, which is none of the recipes in {RECIPES}.")
        sections = _load_yaml(base, parser)
    for name, section in own.items():
        if name not in ("shared", *PRESETS) or not isinstance(section, dict):
            parser.error(f"{path} may hold base: NAME and the sections shared, {', '.join(PRESETS)}; got {name}.")
        sections[name] = sections.get(name, {}) | section
    if "shared" not in sections:
        parser.error(f"{path} has no section shared.")
    return sections


def _check_name(flag: str, name: str, known: Sequence[str], parser: argparse.ArgumentParser) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        advice = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}."
        parser.error(f"{flag} {name} is unknown: {advice}")


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what can be refused before anything is read."""
    for name in ("img_size", "batch_size", "epochs", "lr", "grad_accum_steps", "checkpoint_hist",
                 "checkpoint_every", "patience", "val_interval", "num_images", "shuffle_buffer", "clip_grad",
                 "layer_decay", "cpu_threads", "crop_pct"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}.")
    for name, most in dict(mixup=math.inf, cutmix=math.inf, color_jitter=math.inf, weight_decay=math.inf, reprob=1,
                           warmup_epochs=math.inf, backbone_lr_scale=math.inf, beta_lr_scale=math.inf,
                           momentum=1, model_ema_decay=1, seed=MAX_SEED).items():
        if not 0 <= getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must lie in 0 to {most:g}, got {getattr(args, name)}.")
    if not 0 < args.scale[0] <= args.scale[1] <= 1:
        parser.error(f"--scale must be two parts of the area, the smaller one first, got {args.scale}.")
    if args.pretrained_path not in (None, "s3n_test_resnet") and not Path(args.pretrained_path).exists():
        parser.error(f"--pretrained-path {args.pretrained_path} is neither a file nor a folder.")
    if not 0 <= args.val_fraction < 1:
        parser.error(f"--val-fraction must lie in [0, 1), got {args.val_fraction}.")
    if not 0 <= args.freeze_epochs <= args.epochs:
        parser.error(f"--freeze-epochs must lie in 0 to --epochs {args.epochs}, got {args.freeze_epochs}.")
    if args.sched in ("none", "plateau"):
        parser.error(f"--sched {args.sched} does not step by updates: use one of {', '.join(SCHEDULES)}.")
    _check_name("--sched", args.sched, SCHEDULES, parser)
    if args.sched == "multistep" and not args.decay_milestones:
        parser.error("--sched multistep decays at --decay-milestones: give some.")
    least = dict(rsqrt=1, wsd=0).get(args.sched)
    if least is not None and not least <= args.warmup_epochs < args.epochs:
        parser.error(f"--sched {args.sched} needs --warmup-epochs from {least} to below --epochs {args.epochs}.")
    optimizer = args.opt.lower().removeprefix("lookahead_")
    _check_name("--opt", optimizer, list_optimizers(), parser)
    if optimizer == "adahessian":
        parser.error("--opt adahessian needs second derivatives, which are not computed: choose another.")
    for options in (args.model_kwargs, args.model_kwargs.get("backbone_args")):
        for name in sorted(SETTLED.intersection(options)) if isinstance(options, dict) else ():
            parser.error(f"--model-kwargs cannot hold {name}: a flag or the data set settles it.")
    for name in args.log_with:
        _check_name("--log-with", name, TRACKERS, parser)
    own = args.dataset in ("folder", "multi-label", "parquet")  # which may have a validation part
    if args.patience and not (args.val_fraction or args.val_split or own):
        parser.error("--patience needs validation images: give --val-fraction or --val-split.")
    if args.val_split and not args.dataset.startswith("hub:"):
        parser.error("--val-split names a split of the Hub: use --val-fraction for other data.")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"--mixup and --cutmix mix pairs: --batch-size must be even, got {args.batch_size}.")
    if args.class_weights not in (None, "balanced"):
        if Path(args.class_weights).suffix.lower() not in (".csv", ".json"):
            parser.error(f"--class-weights must be balanced, or a .csv or .json file, got {args.class_weights}.")
        if not Path(args.class_weights).is_file():
            parser.error(f"--class-weights {args.class_weights} is not a file.")
    if args.class_weights == "balanced" and args.balanced:
        parser.error("--balanced draws all classes equally often already: leave out --class-weights balanced.")
    if not args.bce_loss and (args.bce_sum or args.bce_target_thresh is not None):
        parser.error("--bce-sum and --bce-target-thresh need --bce-loss.")
    if args.bce_target_thresh is not None and not 0 <= args.bce_target_thresh < 1:
        parser.error(f"--bce-target-thresh must lie in [0, 1), got {args.bce_target_thresh}.")
    if args.dataset == "multi-label" and args.balanced:
        parser.error("--balanced draws by the one label of an image: with --dataset multi-label use --class-weights.")
    if args.streaming:
        if args.class_weights == "balanced":
            parser.error("--class-weights balanced counts all labels: leave out --streaming, or give a file.")
        if not args.dataset.startswith("hub:"):
            parser.error("--streaming reads --dataset hub:NAME, or hub:FOLDER, only.")
        if args.balanced:
            parser.error("--balanced needs all labels at hand: leave out --streaming.")
        if args.val_fraction and not args.val_split:
            parser.error("--streaming can't hold images out: give --val-split NAME or --val-fraction 0.")
    warmup = args.model_kwargs.get("partition_warmup_epochs", PRESETS[args.preset]["partition_warmup_epochs"])
    if not args.plain and isinstance(warmup, int) and 0 < warmup >= args.epochs:
        parser.error(f"The peaks would be divided as in the first {warmup} epochs to the end: give more than --epochs "
                     f"{args.epochs}, or --model-kwargs '{{\"partition_warmup_epochs\": …}}'.")
    if args.dataset == "birds" and args.num_images is None:
        parser.error("--dataset birds needs --num-images, since the recipe gives none.")
    if args.plain and (args.branches != "O+D+C" or args.attention != "sparse"):
        parser.error("--plain has no branches and no attention: leave out --branches and --attention.")
    if args.plain and args.answer != "joint":
        parser.error(f"--plain has one output: leave out --answer {args.answer}.")
    check_hub_flags(args, parser)
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file: choose a folder.")
    if args.output.exists() and not args.resume and any(
            path.name != LOCK and not is_of_system(path.name) for path in args.output.iterdir()):
        parser.error(f"--output {args.output} is not empty: add --resume to continue, or choose another folder.")


def trajectory(args: argparse.Namespace, world_size: int) -> dict[str, Any]:
    """What a checkpoint and the run that continues from it must have in common, in JSON's types."""
    kept = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE}
    kept["images an update"] = args.batch_size * args.grad_accum_steps * world_size
    kept["s3n_timm"] = s3n_timm.__version__
    return json.loads(json.dumps(kept, default=str))

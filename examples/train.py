"""Train S3N on one device or many: `accelerate launch examples/train.py`.

Without arguments it learns the drawn birds that come with the package. Read it top to bottom: the model, the optimizer,
one epoch, evaluation, what is written, main. Beside it lie its flags (arguments.py), images (data.py) and checkpoints
(checkpoints.py).
"""

import argparse
import json
import math
import signal
import time
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, TorchDynamoPlugin, set_seed
from rich.console import Console
from rich.table import Table
from support.arguments import parse_args, trajectory
from support.checkpoints import Progress, find_checkpoint, replacing, save_checkpoint, write_summary
from support.files import replace_text
from support.launching import exiting_on, start_all_processes, use_cpu_threads
from support.loaders import TrainLoader, count_images, create_eval_loader, load_splits, mix_seeds
from support.sync_bn import synchronize
from timm.data import Mixup, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

import s3n_timm
from s3n_timm import S3N

# model


def create_model(args: argparse.Namespace, num_classes: int, accelerator: Accelerator) -> nn.Module:
    options: dict[str, Any] = dict(pretrained=args.pretrained, num_classes=num_classes)
    if args.pretrained_path:
        options["pretrained_cfg_overlay"] = dict(file=args.pretrained_path)
    if args.plain:
        model = timm.create_model(args.backbone, **options, **args.model_kwargs.get("backbone_args", {}))
        if num_classes != model.pretrained_cfg.get("num_classes"):
            model.reset_classifier(num_classes)  # as S3N does, so that both start alike
    else:
        options.update(preset=args.preset, branches=args.branches, attention=args.attention, answer=args.answer)
        model = timm.create_model("s3n", backbone=args.backbone, **options, **args.model_kwargs)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.sync_bn and accelerator.num_processes > 1:
        model = synchronize(model, accelerator.device)
    if args.channels_last and accelerator.distributed_type != DistributedType.FSDP:  # it shards contiguous weights only
        model = model.to(memory_format=torch.channels_last)
    return model


def unwrap(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def list_frozen(model: nn.Module, args: argparse.Namespace) -> list[nn.Module]:
    """Modules of the backbone that --freeze-epochs leaves as they are: all but its classifier."""
    classifiers = _classifier_names(model)
    backbone = model.backbone if isinstance(model, S3N) else model
    prefix = "backbone." if isinstance(model, S3N) else ""
    return [module for name, module in backbone.named_modules()
            if not list(module.children()) and f"{prefix}{name}" not in classifiers] if args.freeze_epochs else []


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


# optimizer


def group_parameters(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The paper's two learning rates, for what is pretrained and what is new, β's own, and timm's layer decay."""
    new = tuple(f"{name}." for name in (*_classifier_names(model), "saliency"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [dict(params=list(names), weight_decay=args.weight_decay, lr_scale=1.0)]
    if args.layer_decay:
        groups = param_groups_layer_decay(
            model,
            weight_decay=args.weight_decay,
            no_weight_decay_list=model.no_weight_decay() if hasattr(model, "no_weight_decay") else (),
            layer_decay=args.layer_decay,
        )
    scales = dict(backbone=args.backbone_lr_scale, new=1.0, beta=args.beta_lr_scale)
    divided = []
    for group in groups:
        parts: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            name = names[parameter]
            kind = "beta" if name.startswith("beta_") else "new" if name.startswith(new) else "backbone"
            parts.setdefault(kind, []).append(parameter)
        for kind, params in parts.items():
            decay = 0.0 if kind == "beta" else group["weight_decay"]
            divided.append(dict(params=params, weight_decay=decay, lr_scale=group["lr_scale"] * scales[kind]))
    return divided


# one epoch


def seed_batch(args: argparse.Namespace, model: nn.Module, images: Tensor, update: int, part: int) -> None:
    """Make what this batch draws a function of the seed and of the images' place in training.

    An update's images draw in one row, however many processes and accumulation steps they are divided among: the peaks'
    draws (eq. 4) of the parts before this one are passed over.
    """
    set_seed(mix_seeds(args.seed, update))
    if isinstance(model, S3N) and model.partition in ("probability", "random"):
        for _ in range(part):
            torch.rand(len(images), *model.sample_options["grid_size"], device=images.device)


def train_epoch(
        epoch: int,
        model: nn.Module,
        loader: TrainLoader,
        criterion: s3n_timm.S3NLoss,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        mixup: Mixup | None,
        progress: Progress,
        args: argparse.Namespace,
        accelerator: Accelerator,
        run: "Run",
) -> None:
    """Train what is left of an epoch; `run.stopped` tells whether a signal ended it early."""
    bare = unwrap(model, accelerator)
    model.train()
    for each in (bare, *([] if progress.ema is None else [progress.ema.module])):
        if isinstance(each, S3N):
            each.set_epoch(epoch)
    frozen = list_frozen(bare, args) if epoch < args.freeze_epochs else []
    still = [m for m in bare.modules() if args.freeze_bn and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in (*frozen, *still):
        module.eval()

    start = progress.updates - epoch * loader.updates_per_epoch
    bar = tqdm(
        total=loader.updates_per_epoch,
        initial=start,
        desc=f"epoch {epoch + 1}/{args.epochs}",
        disable=not accelerator.is_main_process,
        leave=False,
    )
    for step, batch in enumerate(loader.read(epoch, start)):
        images, target = batch["image"], batch["label"]
        part = step % args.grad_accum_steps * accelerator.num_processes + accelerator.process_index
        seed_batch(args, bare, images, progress.updates, part)
        if mixup is not None:
            images, target = mixup(images, target)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(model):
            loss = criterion(model(images), target)
            # one exchange tells all processes the loss, and whether one of them was asked to stop
            signals = torch.stack([loss.detach().float(), loss.new_tensor(float(run.asked_to_stop))])
            value, stop = accelerator.reduce(signals, "mean").tolist()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss became {value} at update {progress.updates} of epoch {epoch + 1}: lower --lr "
                    f"({args.lr}), add --clip-grad or --warmup-epochs, and --resume."
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                for parameter in (p for module in frozen for p in module.parameters()):
                    parameter.grad = None  # optimizers pass over it, momentum and weight decay too
                if args.clip_grad:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        progress.loss += value
        if not accelerator.sync_gradients:
            continue
        progress.updates += 1
        scheduler.step_update(progress.updates)  # not prepared by Accelerate, which would step it once a process
        if progress.ema is not None:
            progress.ema.update(bare, step=progress.updates)
        rate = optimizer.param_groups[-1]["lr"]
        bar.update()
        bar.set_postfix(loss=f"{value:.3f}", lr=f"{rate:.2g}")
        if args.log_with:
            accelerator.log(dict(loss=value, lr=rate), step=progress.updates)
        if stop or (args.checkpoint_every and progress.updates % args.checkpoint_every == 0):
            run.save(progress)
        if stop:
            run.stopped = True
            break
    bar.close()


# evaluation


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, accelerator: Accelerator, desc: str = "") -> dict[str, float]:
    """Top-1 accuracy in % of every output; images that even out the processes count once."""
    model.eval()
    bare = unwrap(model, accelerator)
    if isinstance(bare, S3N):
        bare.set_branch_logits(True)
    hits: dict[str, list[Tensor]] = {}
    for batch in tqdm(loader, desc=desc, disable=not accelerator.is_main_process, leave=False):
        with accelerator.autocast():
            output = model(batch["image"])
        known = output._asdict() | {bare.answer: bare.decide(output)} if isinstance(bare, S3N) else dict(joint=output)
        for name, logits in known.items():
            if logits is not None:
                hits.setdefault(name, []).append(accelerator.gather_for_metrics(logits.argmax(1) == batch["label"]))
    if isinstance(bare, S3N):
        bare.set_branch_logits(None)
    return {name: 100 * torch.cat(hit).double().mean().item() for name, hit in hits.items()}


# what is written


class Run:
    """What a run writes and when it must stop."""

    def __init__(self, args: argparse.Namespace, names: list[str], data_config: dict, accelerator: Accelerator) -> None:
        self.args, self.names, self.data_config, self.accelerator = args, names, data_config, accelerator
        self.trajectory = dict(trajectory(args, accelerator.num_processes), classes=names)
        self.asked_to_stop = self.stopped = False
        signal.signal(signal.SIGTERM, self.ask_to_stop)  # how a cluster announces that it takes the machine away

    def ask_to_stop(self, *_: Any) -> None:
        self.asked_to_stop = True

    def save(self, progress: Progress) -> None:
        save_checkpoint(self.args.output, progress, self.trajectory, self.args.checkpoint_hist, self.accelerator)

    def export(self, model: nn.Module, kind: str) -> None:
        """Write weights that timm loads."""
        state_dict = self.accelerator.get_state_dict(model)  # of all processes, where each holds a shard
        state_dict = {name.replace("_orig_mod.", ""): tensor for name, tensor in state_dict.items()}  # torch.compile's
        bare = unwrap(model, self.accelerator)
        with replacing(self.args.output / kind, self.accelerator) as folder:
            if self.accelerator.is_main_process:
                s3n_timm.save(
                    bare, folder, label_names=self.names, data_config=self.data_config, state_dict=state_dict)


def report(loader: Any, kinds: list[str], run: Run) -> None:
    """Test each kind of weights once and print a closing table."""
    top1 = {}
    for kind in kinds:
        model = timm.create_model(f"local-dir:{run.args.output / kind}", pretrained=True).to(run.accelerator.device)
        top1[kind] = evaluate(model, loader, run.accelerator, desc=f"test, {kind}")
    if not run.accelerator.is_main_process:
        return
    top1.setdefault("best", top1["last"])  # the same weights, where the last epoch is the best
    replace_text(run.args.output / "results.json", json.dumps(dict(test_top1=top1, args=vars(run.args)), default=str))
    table = Table("branch", *top1, title="top-1 % on the test split")
    for branch in top1["last"]:
        table.add_row(branch, *(f"{result[branch]:.1f}" for result in top1.values()))
    table.add_row("chance", *[f"{100 / len(run.names):.1f}"] * len(top1))
    Console().print(table)
    print(f'Load it: import s3n_timm, timm; timm.create_model("local-dir:{run.args.output / "best"}", pretrained=True)')


# main


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    missing = [name for name in args.log_with if name != "all" and name not in map(str, get_available_trackers())]
    if missing:
        raise ValueError(f"--log-with {missing[0]} needs that tracker's package: pip install {missing[0]}")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.grad_accum_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.log_with or None,
        project_dir=args.output,
        dynamo_plugin=TorchDynamoPlugin(backend=args.torchcompile) if args.torchcompile else None,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU: use bf16 on a CPU.")
    if args.model_ema and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--model-ema averages whole weights, of which FSDP leaves each process a shard: leave it out.")
    return accelerator


def main() -> None:
    args = parse_args()
    start_all_processes()
    with exiting_on(ValueError):
        accelerator = create_accelerator(args)
    set_seed(args.seed)
    use_cpu_threads(args.cpu_threads, accelerator)
    with exiting_on(ValueError, TypeError, OSError, RuntimeError):
        with accelerator.main_process_first():
            splits = load_splits(args)
        names = splits["train"].features["label"].names
        model = create_model(args, len(names), accelerator)
        evaluation = dict(img_size=args.img_size, crop_pct=args.crop_pct, crop_mode=args.crop_mode)
        data_config = resolve_data_config(evaluation, model=model)
        run = Run(args, names, data_config, accelerator)
        checkpoint, refused = find_checkpoint(args.output, args.resume, run.trajectory)
        shared = {name: data_config[name] for name in ("input_size", "interpolation", "mean", "std")}
        augment = create_transform(
            **shared,
            is_training=True,
            scale=tuple(args.scale),
            color_jitter=args.color_jitter,
            re_prob=args.reprob,
        )
        squash = create_transform(**shared, crop_pct=args.crop_pct, crop_mode=args.crop_mode)
        train_loader = TrainLoader(splits["train"], augment, args, accelerator)
        val_loader, test_loader = (create_eval_loader(splits[name], squash, args, accelerator)
                                   for name in ("val", "test"))
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=0.0, num_classes=len(names))
    criterion = s3n_timm.S3NLoss(args.smoothing, args.distillation)
    groups = group_parameters(model, args)
    optimizer = create_optimizer_v2(groups, opt=args.opt, lr=args.lr, momentum=args.momentum)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        decay_milestones=args.decay_milestones,
        step_on_epochs=False,
        updates_per_epoch=train_loader.updates_per_epoch,
    )
    bare = unwrap(model, accelerator)
    ema = ModelEmaV3(bare, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None
    progress = Progress(ema)
    accelerator.register_for_checkpointing(progress)
    for line in refused:
        accelerator.print(line)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        scheduler.step_update(progress.updates)
        accelerator.print(f"Resumed from {checkpoint} after {progress.epoch} epochs and {progress.updates} updates.")

    judged = dict(live=model) if ema is None else dict(live=model, ema=ema.module)
    watched = "val" if args.val_fraction or args.val_split else "test"
    sizes = ", ".join(f"{count_images(part) or 'streamed'} {split}" for split, part in splits.items())
    kind = "plain" if args.plain else f"S3N ({args.preset})"
    accelerator.print(f"{kind} on {args.backbone}, {args.img_size} px, {len(names)} classes: {sizes}; "
                      f"{train_loader.images_per_update} images an update, {accelerator.num_processes} process(es)")
    if args.log_with:
        accelerator.init_trackers("s3n_timm", {name: str(value) for name, value in vars(args).items()})
    started = time.monotonic()
    for epoch in range(progress.epoch, args.epochs):
        if args.patience and epoch - progress.best_epoch >= args.patience:
            accelerator.print(f"No better epoch for {args.patience}: stopped early after {epoch} epochs.")
            break
        with exiting_on(FloatingPointError):
            train_epoch(epoch, model, train_loader, criterion, optimizer, scheduler, mixup, progress, args,
                        accelerator, run)
        if run.stopped:
            accelerator.print(f"Stopped by SIGTERM after {progress.updates} updates, all saved: go on with --resume.")
            accelerator.end_training()
            return
        set_seed(mix_seeds(args.seed, progress.updates))  # for a partition that draws in eval mode
        due = progress.epoch + 1 == args.epochs or (progress.epoch + 1) % args.val_interval == 0
        top1 = {name: evaluate(each, val_loader, accelerator, desc=watched) for name, each in judged.items() if due}
        loss = progress.loss / (train_loader.updates_per_epoch * args.grad_accum_steps)
        progress.epoch, progress.loss = epoch + 1, 0.0
        row: dict[str, float] = dict(epoch=progress.epoch, loss=loss, lr=optimizer.param_groups[-1]["lr"])
        for name, figures in top1.items():
            text = ", ".join(f"{branch} {value:.1f}" for branch, value in figures.items())
            text = f"{watched} top-1 % {text}" if name == "live" else f"averaged weights {text}"
            accelerator.print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.3f}  {text}  "
                              f"({time.monotonic() - started:.0f} s)")
            row |= {f"{watched}_{branch}{'' if name == 'live' else '_ema'}": v for branch, v in figures.items()}
        progress.history.append(row)
        best = max(top1, key=lambda name: top1[name][args.answer], default=None)
        if best is not None and watched == "test":  # no epoch is chosen on the test split
            best, progress.best = "live", -1.0
        if best is not None and top1[best][args.answer] > progress.best:
            progress.best, progress.best_epoch = top1[best][args.answer], progress.epoch
            run.export(judged[best], "best")
        run.export(model, "last")
        if ema is not None:
            run.export(ema.module, "ema")
        if accelerator.is_main_process:
            write_summary(args.output / "summary.csv", progress.history)
        if args.log_with:
            accelerator.log({name: value for name, value in row.items() if name != "epoch"}, step=progress.updates)
        run.save(progress)
    same = ema is None and progress.best_epoch == progress.epoch
    report(test_loader, ["last", *(["ema"] if ema else []), *([] if same else ["best"])], run)
    accelerator.end_training()


if __name__ == "__main__":
    main()

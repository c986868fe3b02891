"""Train S3N on one device or many: `python examples/train.py`, `torchrun --nproc_per_node 2 examples/train.py`,
`accelerate launch examples/train.py`.

Without arguments it learns the drawn birds that come with the package. Read it top to bottom: the model, the optimizer,
an update, an epoch, what follows an epoch, main. Flags, images, checkpoints, evaluation and results are in support/.
"""

import argparse
import time
from contextlib import ExitStack
from typing import Any

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import timm
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    TorchDynamoPlugin,
    gather_object,
    set_seed,
)
from support.arguments import parse_args, trajectory
from support.checkpoints import (
    OutputError,
    Progress,
    describe_images,
    find_checkpoint,
    load_checkpoint,
    refuse_pickled_shards,
    set_aside_newer,
    write_summary,
)
from support.files import claimed
from support.launching import (
    PATIENT,
    DataError,
    StopSignal,
    accept_any_encoding,
    decide_together,
    exiting_on,
    reading,
    refuse_lone_process,
    share_cpus,
    use_cpu_threads,
)
from support.loaders import TrainLoader, count_images, create_eval_loader, load_splits, mix_seeds
from support.losses import create_criterion, list_class_weights
from support.models import read_pretrained, refuse_single_values
from support.progress import progress as show_progress
from support.publishing import ask_hub, publish
from support.results import evaluate, finish_training
from support.run import Exchange, Run, unwrap
from support.sync_bn import synchronize
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from s3n_timm import S3N
from s3n_timm.checkpoints import as_names, mark_multi_label
from s3n_timm.data import class_names
from s3n_timm.images import image_mode, input_config

# model


def create_model(args: argparse.Namespace, num_classes: int, accelerator: Accelerator) -> nn.Module:
    options: dict[str, Any] = dict(pretrained=args.pretrained, num_classes=num_classes)
    if args.pretrained_path:
        options["pretrained_cfg_overlay"] = read_pretrained(args.pretrained_path)
    cfg = timm.models.get_pretrained_cfg(args.backbone)
    if cfg is not None and cfg.fixed_input_size and "scan_size" not in args.model_kwargs:
        options["img_size"] = args.img_size
    if args.plain:
        model = timm.create_model(args.backbone, **options | args.model_kwargs.get("backbone_args", {}))
        if num_classes != model.pretrained_cfg.get("num_classes"):
            model.reset_classifier(num_classes)  # as S3N does, so that both start alike
    else:
        options.update(preset=args.preset, branches=args.branches, attention=args.attention, answer=args.answer)
        model = timm.create_model("s3n", backbone=args.backbone, **options | args.model_kwargs)
    if args.dataset == "multi-label":
        mark_multi_label(model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.sync_bn and accelerator.num_processes > 1:
        model = synchronize(model, accelerator.device)
    if args.channels_last and accelerator.distributed_type != DistributedType.FSDP:  # it shards contiguous weights only
        model = model.to(memory_format=torch.channels_last)
    return model


def freeze(model: nn.Module) -> list[nn.Parameter]:
    """Put what --freeze-epochs does not train into eval mode, the backbone without its classifier; its parameters."""
    classifiers = as_names(model.pretrained_cfg["classifier"])
    backbone = model.backbone if isinstance(model, S3N) else model
    prefix = "backbone." if isinstance(model, S3N) else ""
    for name, module in backbone.named_modules():
        if not list(module.children()) and f"{prefix}{name}" not in classifiers:
            module.eval()
    return [parameter for name, parameter in backbone.named_parameters()
            if not f"{prefix}{name}".startswith(tuple(f"{classifier}." for classifier in classifiers))]


# optimizer


def group_parameters(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Parameter groups of the paper's two learning rates, pretrained and new layers, of β's own, and of layer decay."""
    new = tuple(f"{name}." for name in (*as_names(model.pretrained_cfg["classifier"]), "saliency"))
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
            kind = "beta" if name.startswith("beta.") else "new" if name.startswith(new) else "backbone"
            parts.setdefault(kind, []).append(parameter)
        for kind, params in parts.items():
            decay = 0.0 if kind == "beta" else group["weight_decay"]
            divided.append(dict(params=params, weight_decay=decay, lr_scale=group["lr_scale"] * scales[kind]))
    return divided


# an update


def seed_batch(args: argparse.Namespace, model: nn.Module, images: Tensor, update: int, part: int) -> None:
    """Make the random draws of a batch a function of the seed and of the images' place in training.

    The peaks of an update (eq. 4) are drawn from one sequence, however many processes and accumulation steps its images
    are divided among: the draws of the parts before this one are skipped. Mixup and dropout differ from part to part.
    """
    set_seed(mix_seeds(args.seed, update, part))
    if isinstance(model, S3N) and model.partition in ("probability", "random"):
        torch.manual_seed(mix_seeds(args.seed, update))
        for _ in range(part):
            torch.rand(len(images), *model.config.grid_size, device=images.device)


def set_modes(run: Run, epoch: int) -> list[nn.Parameter]:
    """Set what trains in an epoch; the parameters that don't."""
    bare = run.bare
    run.model.train()
    for each in (bare, *([] if run.ema is None else [run.ema.module])):
        if isinstance(each, S3N):
            each.set_epoch(epoch)
    for module in bare.modules():
        if run.args.freeze_bn and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return freeze(bare) if epoch < run.args.freeze_epochs else []


# an epoch


def train_epoch(run: Run, epoch: int, loader: TrainLoader) -> bool:
    """Train what is left of an epoch; True where a signal stopped it, after everything was saved."""
    args, accelerator, progress, optimizer = run.args, run.accelerator, run.progress, run.optimizer
    bare, frozen = run.bare, set_modes(run, epoch)
    start, end = progress.updates - epoch * loader.updates_per_epoch, (epoch + 1) * loader.updates_per_epoch
    bar = show_progress(total=loader.updates_per_epoch, initial=start, desc=f"epoch {epoch + 1}/{args.epochs}",
                        disable=not accelerator.is_main_process, leave=False)
    exchange, total, stopped = Exchange(run), torch.zeros((), device=accelerator.device), False
    for step, batch in enumerate(reading(loader.read(epoch, start))):
        images, target = batch["image"], batch["label"]
        part = step % args.grad_accum_steps * accelerator.num_processes + accelerator.process_index
        seed_batch(args, bare, images, progress.updates, part)
        if run.mixup is not None:
            images, target = run.mixup(images, target)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.accumulate(run.model):
            loss = run.criterion(run.model(images), target)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                for parameter in frozen:
                    parameter.grad = None  # optimizers skip it, with its momentum and weight decay
                if args.clip_grad:
                    accelerator.clip_grad_norm_(run.model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
        if not accelerator.sync_gradients:
            continue
        progress.updates += 1
        exchange.send(total / args.grad_accum_steps, run.rate)
        total = torch.zeros_like(total)
        run.scheduler.step_update(progress.updates)  # not prepared by Accelerate, which would step it once a process
        if run.ema is not None:
            run.ema.update(bare, step=progress.updates)
        due = bool(args.checkpoint_every) and progress.updates % args.checkpoint_every == 0
        for value, rate, stop in exchange.receive(leave=0 if due or progress.updates == end else 1):
            stopped |= stop
            bar.set_postfix(loss=f"{value:.3f}", lr=f"{rate:.2g}", refresh=False)
        bar.update()
        if due or stopped:
            for _ in exchange.receive():  # nothing is saved before its loss is known
                pass
            run.save()
        if stopped:
            break
    bar.close()
    if not stopped and progress.updates != end:
        raise RuntimeError(f"Epoch {epoch + 1} ended after {progress.updates} of {end} updates.")
    return stopped


# after an epoch


def finish_epoch(run: Run, epoch: int, loader: TrainLoader, val_loader: Any, started: float) -> bool:
    """Evaluate an epoch, keep its weights and save; True where a signal stopped it."""
    args, progress, accelerator = run.args, run.progress, run.accelerator
    run.save()  # before the evaluation: a run that is killed in it has the epoch
    set_seed(mix_seeds(args.seed, progress.updates))  # for a partition that draws in eval mode
    judged = dict(live=run.model) if run.ema is None else dict(live=run.model, ema=run.ema.module)
    top1: dict[str, dict[str, float]] = {}
    if epoch + 1 == args.epochs or (epoch + 1) % args.val_interval == 0:
        for name, model in judged.items():
            result = evaluate(run, model, val_loader, desc=run.watched)
            if result is None:
                return True
            top1[name] = result
    loss = progress.loss / loader.updates_per_epoch
    progress.epoch, progress.loss = epoch + 1, 0.0
    row: dict[str, float] = dict(epoch=progress.epoch, loss=loss, lr=run.rate)
    head = f"epoch {epoch + 1}/{args.epochs}  loss {loss:.3f}"
    for name, metrics in top1.items():
        text = ", ".join(f"{branch} {value:.1f}" for branch, value in metrics.items())
        text = f"{run.watched} {run.metric} % {text}" if name == "live" else f"averaged weights {text}"
        accelerator.print(f"{head}  {text}  ({time.monotonic() - started:.0f} s)")
        row |= {f"{run.watched}_{branch}{'' if name == 'live' else '_ema'}": v for branch, v in metrics.items()}
    if not top1:
        accelerator.print(f"{head}  ({time.monotonic() - started:.0f} s)")
    progress.history.append(row)
    best = max(top1, key=lambda name: top1[name][args.answer], default=None)
    if best is not None and run.watched == "test":  # no epoch is chosen on the test split
        best, progress.best = "live", -1.0
    if best is not None and top1[best][args.answer] > progress.best:
        progress.best, progress.best_epoch = top1[best][args.answer], progress.epoch
        run.export(judged[best], "best")
    run.export(run.model, "last")
    if run.ema is not None:
        run.export(run.ema.module, "ema")
    if accelerator.is_main_process:
        write_summary(args.output / "summary.csv", progress.history)
    if args.log_with:
        accelerator.log({name: value for name, value in row.items() if name.startswith(run.watched)},
                        step=progress.updates)
    run.save()
    return False


def lost_patience(args: argparse.Namespace, progress: Progress) -> bool:
    """Whether the last epoch was evaluated, and as many as --patience have passed since the best one."""
    evaluated = progress.epoch and progress.epoch % args.val_interval == 0
    return bool(args.patience and evaluated and progress.epoch - progress.best_epoch >= args.patience)


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
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),  # where memory is pinned
        kwargs_handlers=[PATIENT],
    )
    if accelerator.gradient_accumulation_steps != args.grad_accum_steps:
        raise ValueError(f"Accelerate is set to {accelerator.gradient_accumulation_steps} accumulation steps by its "
                         "configuration or ACCELERATE_GRADIENT_ACCUMULATION_STEPS, and --grad-accum-steps is "
                         f"{args.grad_accum_steps}: make them agree.")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU: use bf16 on a CPU.")
    if args.model_ema and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("--model-ema averages whole weights, of which FSDP leaves each process a shard: leave it out.")
    refuse_pickled_shards(accelerator)
    return accelerator


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    args = parse_args(argv)
    refuse_lone_process()
    share_cpus()
    with StopSignal() as stop, exiting_on(OutputError, DataError, FloatingPointError):
        with exiting_on(ValueError):
            accelerator = create_accelerator(args)
        set_seed(args.seed)
        use_cpu_threads(args.cpu_threads, accelerator)
        with ExitStack() as stack:
            with exiting_on(ValueError, OSError):
                if accelerator.is_main_process:
                    ask_hub(args)
                    stack.enter_context(claimed(args.output))
            accelerator.wait_for_everyone()
            train(args, accelerator, stop)


def train(args: argparse.Namespace, accelerator: Accelerator, stop: StopSignal) -> None:
    """Set up a run, or continue it, and train it to its end or to a signal."""
    with exiting_on(ValueError, TypeError, OSError, RuntimeError, AssertionError):
        with accelerator.local_main_process_first():
            splits = load_splits(args, verify=args.verify if accelerator.is_local_main_process else None)
        if args.patience and splits["val"] is splits["test"]:
            raise ValueError("--patience needs validation images: give --val-fraction, or a folder val beside train.")
        names = class_names(splits["train"])
        if len(names) < 2:
            raise ValueError(f"--dataset {args.dataset} has one class, {names[0]!r}: there is nothing to tell apart.")
        class_weights = list_class_weights(args, names, splits["train"])
        # torch's batch norm and pooling, read backwards, failed or were wrong for channels-last on Apple's GPUs
        args.channels_last &= accelerator.device.type != "mps"
        model = create_model(args, len(names), accelerator)
        evaluation = dict(img_size=args.img_size, crop_pct=args.crop_pct, crop_mode=args.crop_mode)
        data_config = input_config(model, evaluation)
        refuse_single_values(model, args, data_config["input_size"])
        images = describe_images(splits)
        if any(other != images for other in gather_object([images])):
            raise ValueError("The processes read different images: files came or went meanwhile, or machines have "
                             "copies that differ. Start again with the same files everywhere.")
        held = dict(trajectory(args, accelerator.num_processes), classes=names, images=images,
                    class_weights=class_weights)
        checkpoint, notes = decide_together(lambda: find_checkpoint(args.output, args.resume, held), accelerator)
        shared = {name: data_config[name] for name in ("input_size", "interpolation", "mean", "std")}
        augment = create_transform(
            **shared,
            is_training=True,
            scale=tuple(args.scale),
            color_jitter=args.color_jitter,
            re_prob=args.reprob,
            auto_augment=args.aa,
        )
        squash = create_transform(**shared, crop_pct=args.crop_pct, crop_mode=args.crop_mode)
        mode = image_mode(data_config["input_size"][0])
        train_loader = TrainLoader(splits["train"], augment, args, accelerator, mode)
        val_loader, test_loader = (create_eval_loader(splits[name], squash, args, accelerator, mode)
                                   for name in ("val", "test"))
        groups = group_parameters(model, args)
        model, optimizer = accelerator.prepare(
            model, create_optimizer_v2(groups, opt=args.opt, lr=args.lr, momentum=args.momentum))
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            decay_milestones=args.decay_milestones,
            step_on_epochs=False,
            updates_per_epoch=train_loader.updates_per_epoch,
        )
        criterion = create_criterion(args, class_weights, len(names)).to(accelerator.device)
    bare = unwrap(model, accelerator)
    mixup: Mixup | None = None
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=0.0, num_classes=len(names),
                      multi_label=criterion.multi_label)
    ema = ModelEmaV3(bare, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None
    run = Run(args, accelerator, model, ema, criterion, optimizer, scheduler, mixup, Progress(), held, names,
              data_config, stop)
    progress = run.progress
    for line in notes:
        accelerator.print(line)
    if checkpoint is not None:
        with exiting_on(ValueError):
            load_checkpoint(checkpoint, progress, ema, accelerator)
        aside = [] if args.resume == "auto" else set_aside_newer(args.output, progress, accelerator)
        if aside:
            accelerator.print(f"Newer checkpoints were renamed: {', '.join(path.name for path in aside)}.")
        scheduler.step_update(progress.updates)
        accelerator.print(f"Resumed from {checkpoint} after {progress.epoch} epochs and {progress.updates} updates.")

    sizes = ", ".join(f"{count_images(part) or 'streamed'} {split}" for split, part in splits.items())
    kind = "plain" if args.plain else f"S3N ({args.preset})"
    accelerator.print(f"{kind} on {args.backbone}, {args.img_size} px, {len(names)} classes: {sizes}; "
                      f"{train_loader.images_per_update} images an update, {accelerator.num_processes} process(es)")
    if args.log_with:
        accelerator.init_trackers("s3n_timm", {name: str(value) for name, value in vars(args).items()})
    started = time.monotonic()
    stopped = False
    stop.wait()
    for epoch in range(progress.epoch, args.epochs):
        if lost_patience(args, progress):
            accelerator.print(f"No better epoch for {args.patience}: stopped early after {epoch} epochs.")
            break
        stopped = train_epoch(run, epoch, train_loader)
        stopped = stopped or finish_epoch(run, epoch, train_loader, val_loader, started)
        if stopped:
            break
    train_loader.close()
    stopped = stopped or finish_training(run, splits["test"], test_loader)
    if stopped:
        run.say_stopped()
    accelerator.end_training()
    if accelerator.is_main_process and not stopped:
        publish(args)


if __name__ == "__main__":
    main()

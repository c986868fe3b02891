"""Evaluation, and what a run leaves at its end: results, the plain backbone, a picture and a table."""

import json
from collections.abc import Callable
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from support.checkpoints import explaining_output, replacing
from support.files import replace_text, replacing_file
from support.launching import decide_together, reading
from support.loaders import create_eval_loader
from support.measuring import describe_results
from support.progress import progress as show_progress
from support.publishing import measured_path, pushed
from support.run import Run, unwrap
from timm.data import create_transform
from torch import Tensor, nn

import s3n_timm
from s3n_timm import S3N
from s3n_timm.checkpoints import has_peaks
from s3n_timm.draw import draw_explanation
from s3n_timm.evaluation import (
    mean_average_precision,
    measure_batch,
    measure_labels,
    summarize,
    summarize_labels,
)
from s3n_timm.images import image_mode, input_config

Measure = Callable[[Any], dict[str, Tensor]]


@torch.inference_mode()
def gather_rows(run: Run, loader: Any, desc: str, measure: Measure) -> dict[str, Tensor] | None:
    """What `measure` makes of each batch, of all processes, each image once; None where a signal stopped it.

    The rows come to the main process, into its memory, and are empty on the others: a device has no room for the
    logits of many images and classes.
    """
    accelerator = run.accelerator
    kept: list[dict[str, Tensor]] = []
    last: dict[str, Tensor] = {}

    def keep(rows: dict[str, Tensor]) -> bool:
        """Whether to go on."""
        if accelerator.is_main_process:
            kept.append({name: each.cpu() for name, each in rows.items()})
        return not rows["stop"].any()

    for batch in reading(show_progress(loader, desc=desc, disable=not accelerator.is_main_process, leave=False)):
        with accelerator.autocast():
            rows = measure(batch)
        rows["stop"] = torch.full((len(batch["label"]),), run.stop.name is not None, device=accelerator.device)
        before, last = last, accelerator.gather_for_metrics({name: each.contiguous() for name, each in rows.items()})
        if before and not keep(before):  # one batch late, as in training
            return None
    keep(last)
    return {name: torch.cat([rows[name] for rows in kept]) for name in last} if kept else {}


def evaluate(run: Run, model: nn.Module, loader: Any, desc: str = "") -> dict[str, float] | None:
    """`run.metric` in % of every output, each image counted once; None where a signal stopped it.

    With several labels an image it is the mean of the classes' average precision, without classes that no image of the
    split shows.
    """
    accelerator = run.accelerator
    model.eval()
    bare = unwrap(model, accelerator)
    if isinstance(bare, S3N):
        bare.set_branch_logits(True)
    names: list[str] = []

    def measure(batch: Any) -> dict[str, Tensor]:
        output = model(batch["image"])
        known = dict(joint=output)
        if isinstance(bare, S3N):
            known = output._asdict() | {bare.config.answer: bare.decide(output)}
        known = {name: logits for name, logits in known.items() if logits is not None}
        names[:] = known
        label = batch["label"]
        if run.multi_label:  # the labels once, for the ranking of all images
            return dict(columns=torch.stack([*(logits.float() for logits in known.values()), label], 1))
        return dict(columns=torch.stack([logits.argmax(1) == label for logits in known.values()], 1))

    rows = gather_rows(run, loader, desc, measure)
    if rows is None:
        return None
    if isinstance(bare, S3N):
        bare.set_branch_logits(None)

    def summarize_columns() -> dict[str, float]:
        if run.multi_label:
            *outputs, labels = rows["columns"].unbind(1)
            return {name: 100 * mean_average_precision(logits, labels) for name, logits in zip(names, outputs)}
        return dict(zip(names, (100 * rows["columns"].double().mean(0)).tolist()))

    return decide_together(summarize_columns, accelerator)


def export_backbone(run: Run, best: nn.Module, test: Any) -> dict[str, float] | None:
    """Write the O branch of the best weights as a plain timm model; its accuracy as others will load it.

    Empty where the network has no O branch, None where a signal stopped the evaluation.
    """
    if not isinstance(best, S3N) or "O" not in best.config.branches:
        return {}
    with replacing(run.args.output / "backbone", run.accelerator) as folder:
        if run.accelerator.is_main_process:
            s3n_timm.save(s3n_timm.extract_backbone(best), folder, label_names=run.names, data_config=None)
    plain = timm.create_model(f"local-dir:{run.args.output / 'backbone'}", pretrained=True)
    config = input_config(plain)
    mode = image_mode(config["input_size"][0])
    loader = create_eval_loader(test, create_transform(**config), run.args, run.accelerator, mode)
    return evaluate(run, plain.to(run.accelerator.device), loader, desc="test, backbone")


def measure_for_card(run: Run, kind: str, test: Any) -> bool:
    """Measure the weights of a folder as evaluate.py does, for their card; False where a signal stopped it."""
    args, accelerator = run.args, run.accelerator
    model = timm.create_model(f"local-dir:{args.output / kind}", pretrained=True).to(accelerator.device).eval()
    data_config = input_config(model)
    mode = image_mode(data_config["input_size"][0])
    loader = create_eval_loader(test, create_transform(**data_config), args, accelerator, mode)

    def measure(batch: Any) -> dict[str, Tensor]:
        measure_rows = measure_labels if run.multi_label else measure_batch
        return measure_rows(model, dict(batch, index=torch.zeros_like(batch["label"])))

    rows = gather_rows(run, loader, f"test, for the card of {kind}", measure)
    if rows is None:
        return False
    if not accelerator.is_main_process:
        return True
    results = describe_results(
        model,
        data_config,
        summarize_labels(rows, run.names) if run.multi_label else summarize(rows, seed=args.seed),
        accelerator,
        weights=str(args.output / kind),
        dataset=args.dataset,
        split=args.test_split if args.dataset.startswith("hub:") else "test",
        images=len(rows["label"]),
    )
    path = measured_path(args.output, kind)
    with explaining_output(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(results, indent=1, allow_nan=False))
    return True


def draw_picture(run: Run, best: nn.Module, image: Tensor) -> None:
    """Draw what the best weights see in a 3×H×W test image, where they have peaks."""
    if not isinstance(best, S3N) or not has_peaks(best):
        return
    figure = draw_explanation(best.eval(), image.cpu(), run.data_config["mean"], run.data_config["std"], run.names)
    path = run.args.output / "picture.png"
    with explaining_output(path), replacing_file(path) as partial:
        figure.savefig(partial)
    print(f"What the model sees in a test image: {path}")


def finish_training(run: Run, test: Any, test_loader: Any) -> bool:
    """Test each kind of weights once, write results and a picture, print a table; True where a signal stopped it."""
    output, accelerator = run.args.output, run.accelerator
    same = run.ema is None and run.progress.best_epoch == run.progress.epoch
    kinds = ["last", *(["ema"] if run.ema else []), *([] if same else ["best"])]
    top1: dict[str, dict[str, float]] = {}
    for kind in kinds:
        model = timm.create_model(f"local-dir:{output / kind}", pretrained=True).to(accelerator.device)
        result = evaluate(run, model, test_loader, desc=f"test, {kind}")
        if result is None:
            return True
        top1[kind] = result
    top1.setdefault("best", top1["last"])  # the same weights, where the last epoch is the best
    best = timm.create_model(f"local-dir:{output / 'best'}", pretrained=True)
    backbone = export_backbone(run, best, test)
    if backbone is None:
        return True
    image = next(iter(test_loader))["image"][0]
    if not all(measure_for_card(run, kind, test) for kind in pushed(run.args)):
        return True
    if not accelerator.is_main_process:
        return False
    key = "map" if run.multi_label else "top1"
    results: dict[str, Any] = {f"test_{key}": top1, "args": vars(run.args)}
    if backbone:
        results[f"backbone_{key}"] = backbone["joint"]
    with explaining_output(output):
        replace_text(output / "results.json", json.dumps(results, default=str))
    table = Table("branch", *top1, title=f"{run.metric} % on the test split")
    for branch in top1["last"]:
        table.add_row(branch, *(f"{result[branch]:.1f}" for result in top1.values()))
    if backbone:
        table.add_row("backbone/ alone", *(f"{backbone['joint']:.1f}" if kind == "best" else "" for kind in top1))
    if not run.multi_label:
        table.add_row("chance", *[f"{100 / len(run.names):.1f}"] * len(top1))
    Console().print(table)
    draw_picture(run, best, image)
    folder = output.as_posix()  # a backslash would have to be doubled in Python's strings
    print(f'Load it: import s3n_timm, timm; timm.create_model("local-dir:{folder}/best", pretrained=True)')
    if backbone:
        print(f'Its backbone, without s3n_timm: timm.create_model("local-dir:{folder}/backbone", pretrained=True)')
    return False

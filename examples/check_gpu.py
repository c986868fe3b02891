"""Check an installation on a GPU, in some minutes: `python examples/check_gpu.py --output check.json`.

Does the device give the numbers of the CPU, at which speed, in how much memory? Ratios are of calls that took turns, as
in benchmark.py, which measures. Read it top to bottom, one function a section:

    parity    the model and the sampling stage on the device against the CPU, in float32
    samplers  torch's own bilinear sampler, which the stage takes, against that of zeros outside (cuDNN's)
    stage     sampling against two bare grid_sample calls, three backbone passes, and loops over images and peaks
    model     forward and training step against three plain passes, in float32 and in mixed precision
    memory    the same with many classes

The status is 1 where parity fails. With --device cpu --small it takes a minute and shows that the script itself works.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import benchmark
import torch
import torch.nn.functional as F
from support.files import replace_text
from support.launching import accept_any_encoding, exiting_on
from support.loops import STAGE, draw_peaks
from support.timing import Calls, peak_bytes, time_by_turns
from torch import Tensor, nn

import s3n_timm
from s3n_timm.sampling import sample_response, warp_grid

CLASSES = 10_000  # for memory


@contextmanager
def exact() -> Iterator[None]:
    """TF32 off, which cuDNN has on by default."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in settings]
    for each in settings:
        each.allow_tf32 = False
    try:
        yield
    finally:
        for each, value in zip(settings, before):
            each.allow_tf32 = value


def smooth_images(batch: int, size: int) -> Tensor:
    """Images whose neighboring pixels are alike, so that a hundredth of a pixel is no visible difference."""
    coarse = torch.rand(batch, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)


# parity


def run_model(model: s3n_timm.S3N, x: Tensor) -> dict[str, Tensor]:
    """What a model makes of images, and the gradients of its loss, on the CPU."""
    model.zero_grad()
    target = torch.arange(len(x), device=x.device)
    seen = model.explain(x)
    s3n_timm.S3NLoss()(model(x), target).backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    parts = dict(response=seen.sample.response, peaks=seen.sample.peaks, original=seen.logits.original,
                 joint=seen.logits.joint, gradients=torch.cat(gradients))
    return {name: part.detach().cpu() for name, part in parts.items()}


def run_stage(x: Tensor, response: Tensor) -> dict[str, Tensor]:
    betas = [torch.tensor([value], device=x.device, requires_grad=True) for value in (3.9, 13.2)]
    made = sample_response(x, response, beta_discriminative=betas[0], beta_complementary=betas[1], **STAGE)
    branches = (made.discriminative, made.complementary)
    learned = torch.autograd.grad(sum(branch.image.square().sum() for branch in branches), betas)
    parts = dict(grids=torch.stack([branch.grid for branch in branches]),
                 images=torch.stack([branch.image for branch in branches]), beta=torch.cat(learned))
    return {name: part.detach().cpu() for name, part in parts.items()}


def measure_parity(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Differences from the CPU, as parts of the largest value (of the norm for gradients).

    Sums of thousands of float32 terms in another order differ by 1e-5; layers add up. A peak moves only where two cells
    are as close, and takes its image's logits along: a hundredth of the peaks may, and joint logits are compared where
    none did, gradients if none did.
    """
    model, _ = benchmark.create_models(args, torch.device("cpu"))
    model.eval().set_branch_logits(True)
    with torch.no_grad():
        for module in model.modules():  # timm starts the last norm of a residual branch at 0
            if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                module.weight.fill_(0.5)
    x, response = smooth_images(4, args.sizes[0]), draw_peaks(4, args.peaks[-1], torch.device("cpu"))
    with exact():
        theirs = run_model(model, x) | run_stage(x, response)
        ours = run_model(model.to(device), x.to(device)) | run_stage(x.to(device), response.to(device))
    either = (ours["peaks"] | theirs["peaks"]).sum().item()
    moved = (ours["peaks"] != theirs["peaks"]).flatten(1).any(1)
    rows = [dict(what="peaks", difference=(ours["peaks"] != theirs["peaks"]).sum().item() / max(1, either),
                 allowed=0.01)]
    for name, allowed in (("response", 1e-3), ("original", 1e-3), ("joint", 1e-3), ("gradients", 1e-2),
                          ("grids", 1e-4), ("images", 1e-3), ("beta", 1e-3)):
        kept = ~moved if name == "joint" else slice(None)
        a, b = ours[name][kept], theirs[name][kept]
        if not len(b) or (name == "gradients" and moved.any()):
            continue
        difference = ((a - b).norm() / b.norm() if name == "gradients" else (a - b).abs().max() / b.abs().max()).item()
        rows.append(dict(what=name, difference=difference, allowed=allowed))
    return [dict(row, ok=row["difference"] <= row["allowed"]) for row in rows]


# speed


def measure_samplers(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for size, batch in [(s, b) for s in args.sizes for b in args.batch_sizes]:
        x = benchmark.draw_images(batch, size, args, device)
        response = draw_peaks(batch, args.peaks[0], device)
        grid = warp_grid(0.09 + response, (size, size)).requires_grad_()

        def read(padding: str, x: Tensor = x, grid: Tensor = grid) -> Tensor:
            return F.grid_sample(x, grid, padding_mode=padding, align_corners=True)

        def learn(padding: str, read: Callable[[str], Tensor] = read, grid: Tensor = grid) -> tuple[Tensor, ...]:
            return torch.autograd.grad(read(padding).sum(), grid)

        for kind, call in (("forward", read), ("forward + backward", learn)):
            calls: Calls = {padding: lambda p=padding, c=call: c(p) for padding in ("border", "zeros")}
            with torch.inference_mode(kind == "forward"):
                seconds = time_by_turns(calls, device, **benchmark.rounds(args))
            rows.append(dict(size=size, batch=batch, kind=kind, milliseconds=1000 * seconds["border"],
                             times_zeros=seconds["border"] / seconds["zeros"]))
    return rows


# memory


def measure_memory(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The largest of --batch-sizes and --sizes with CLASSES classes: peak memory against three plain passes."""
    size, batch, rows = args.sizes[-1], args.batch_sizes[-1], []
    ours, plain = benchmark.create_models(args, device, CLASSES)
    x, target = benchmark.draw_images(batch, size, args, device), torch.zeros(batch, dtype=torch.long, device=device)
    for kind in ("forward", "training step"):
        for model in (ours, plain):
            model.train(kind != "forward")
        if kind == "forward":
            calls: Calls = dict(ours=benchmark.forward(ours, (1,), x, args.amp),
                                plain=benchmark.forward(plain, (1, 2), x, args.amp))
        else:
            calls = dict(ours=benchmark.step(ours, (1,), x, target, s3n_timm.S3NLoss(), args.amp),
                         plain=benchmark.step(plain, (1, 2), x, target, nn.CrossEntropyLoss(), args.amp))
        with torch.inference_mode(kind == "forward"):
            held = {name: peak_bytes(call, device) for name, call in calls.items()}
        rows.append(dict(classes=CLASSES, size=size, batch=batch, precision=args.amp, kind=kind,
                         megabytes=held["ours"] / 1e6, times_plain=held["ours"] / held["plain"]))
    return rows


# main

SECTIONS: dict[str, Callable[[argparse.Namespace, torch.device], list[dict[str, Any]]]] = dict(
    parity=measure_parity, samplers=measure_samplers, stage=benchmark.measure_stage, model=benchmark.measure_model,
    memory=measure_memory)


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """What to do, and benchmark.py's arguments for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all if left out")
    parser.add_argument("--device", type=torch.device, default="cuda", help="cuda, cuda:1, cpu, …")
    parser.add_argument("--backbone", default="resnet50", help="name of a timm model")
    parser.add_argument("--amp", choices=tuple(benchmark.AMP), default="bf16", help="precision beside float32")
    parser.add_argument("--compile", action="store_true", help="time compiled models as well, which takes minutes more")
    parser.add_argument("--seconds", type=float, default=3, help="for each comparison")
    parser.add_argument("--small", action="store_true", help="a small network on small images, to try the script")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    benchmark.check_names(args, SECTIONS, parser)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: give another --device, or install torch with CUDA.")
    if args.seconds <= 0:
        parser.error(f"--seconds must be positive, got {args.seconds}.")
    words = ["--sizes", "448", "-b", "16", "--backbone", args.backbone, "--seconds", str(args.seconds)]
    if args.small:
        words = ["--sizes", "64", "-b", "2", "--peaks", "5", "--backbone", "test_resnet", "--seconds", "0.1",
                 "--min-rounds", "1"]
    return args, benchmark.parse_args([*words, "--amp", args.amp, *(["--compile"] if args.compile else [])])


def main(argv: list[str] | None = None) -> int:
    accept_any_encoding()
    args, measured = parse_args(argv)
    results = benchmark.describe(measured, args.device)
    print(f"{results['device']}, torch {torch.__version__}, backbone {measured.backbone}")
    for name in args.sections or SECTIONS:
        with exiting_on(ValueError, OSError):
            results[name] = SECTIONS[name](measured, args.device)
        benchmark.show(name, results[name])
        if args.output:  # after each section: what was measured outlives what comes after it
            replace_text(args.output, json.dumps(results, indent=1))
    wrong = [row["what"] for row in results.get("parity", []) if not row["ok"]]
    if wrong:
        print(f"check_gpu.py: {args.device} and the CPU differ in {', '.join(wrong)}.", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

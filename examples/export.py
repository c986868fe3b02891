"""Export trained weights to ONNX and torch.export, and compare: `python examples/export.py output/s3n/best`.

Every runtime (eager, torch.compile, the exported program, ONNX Runtime) gets the same images at several batch sizes; a
table shows latencies and how far logits are from eager's. Read it top to bottom: arguments, model, images, files,
runtimes, comparison, main. int8 lies beside it, in quantization.py.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import support.missing  # noqa: F401  (names a package that is missing, so it comes first)
import onnxruntime
import onnxscript  # noqa: F401  (torch.onnx needs it)
import timm
import torch
from rich.console import Console
from rich.table import Table
from support.columns import add_columns, check_columns
from support.files import replace_text, replacing_file
from support.launching import accept_any_encoding, exiting_on
from support.quantization import export_int8, load_int8_data
from torch import Tensor, nn

import s3n_timm
from s3n_timm.data import drawn_birds, read_stored
from s3n_timm.images import expand_path, find_images
from s3n_timm.peaks import PARTITION_MODES

FORMATS = ("onnx", "pt2")
RANDOM = ("probability", "random")
ONNX_BYTES = 1_900_000_000  # protobuf's limit of 2 GiB, less what is not weights
Run = Callable[[Tensor], Tensor]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("weights", metavar="WEIGHTS", help="folder of s3n_timm.save, hf-hub:USER/NAME, or a timm name")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--opset", type=int, default=18, help="of ONNX, 18 or later; TensorRT wants less than 20")
    modes = [mode for mode in PARTITION_MODES if mode not in RANDOM]
    parser.add_argument("--partition-eval", choices=modes, help="how peaks are divided, if not the model's way")

    compare = parser.add_argument_group("comparison")
    compare.add_argument("--images", type=Path, nargs="+", help="files or folders; drawn birds if left out")
    compare.add_argument("--num-images", type=int, default=8, help="at most so many of them")
    compare.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    compare.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit from eager's")
    compare.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="also torch.compile")
    compare.add_argument("--repetitions", type=int, default=10, help="timed runs of each runtime and batch size")
    compare.add_argument("--cpu-threads", type=int, default=torch.get_num_threads(), help="of every runtime")

    int8 = parser.add_argument_group("int8")
    int8.add_argument("--int8", choices=("dynamic", "static"), help="also a quantized ONNX model")
    int8.add_argument("--dataset", help="birds, cub, aircraft, cars, folder, parquet or hub:NAME, for its accuracy")
    int8.add_argument("--data-dir", help="folder of the data set; drawn birds and the Hub need none")
    add_columns(int8)
    int8.add_argument("--num-calibration", type=int, default=32, help="static: training images to find ranges on")
    int8.add_argument("--num-test", type=int, default=500, help="at most so many test images")

    args = parser.parse_args(argv)
    for name in ("num_images", "tolerance", "repetitions", "cpu_threads", "num_calibration", "num_test"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}.")
    if min(args.batch_sizes) < 1:
        parser.error(f"--batch-sizes must be positive, got {min(args.batch_sizes)}.")
    if args.opset < 18:
        parser.error(f"--opset must be 18 or later, got {args.opset}: PyTorch writes no earlier ones.")
    if bool(args.int8) != bool(args.dataset):
        parser.error("--int8 and --dataset belong together: the accuracy of int8 is measured on labeled images.")
    check_columns(args, parser)
    if args.int8 and "onnx" not in args.formats:
        parser.error("--int8 quantizes the ONNX model: add onnx to --formats.")
    return args


# model


def load_model(args: argparse.Namespace) -> nn.Module:
    """The model in eval mode, with the partition that the arguments ask for."""
    name = args.weights
    untrained = timm.is_model(name) and not Path(name).is_dir()
    if untrained:
        print(f"{name} is untrained: its logits and peaks are those of random weights.")
        torch.manual_seed(0)
    try:
        model = s3n_timm.load_model(name, pretrained=not untrained).eval()
    except ValueError as error:
        raise ValueError(f"WEIGHTS {error}") from error
    if isinstance(model, s3n_timm.S3N) and model.config.attention == "sparse" and model.answering:
        if args.partition_eval:
            model.configure(partition_eval=args.partition_eval)
        if model.partition in RANDOM:
            raise ValueError(
                f"WEIGHTS {name} divides peaks by {model.partition!r}, at random also at inference, which ONNX cannot "
                "repeat: give --partition-eval expected."
            )
    elif args.partition_eval:
        raise ValueError(f"--partition-eval {args.partition_eval} needs a model with peaks: leave it out.")
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if "onnx" in args.formats and size > ONNX_BYTES:
        raise ValueError(f"WEIGHTS {name} has {size / 1e9:.1f} GB, too much for one ONNX file: give --formats pt2.")
    return model


# images


def load_images(args: argparse.Namespace, data_config: dict[str, Any], read: Callable) -> tuple[Tensor, list[str]]:
    """Preprocessed images and their names, evenly taken from those that were given."""
    if args.images is None:
        rows = drawn_birds("test", args.num_images, size=max(128, *data_config["input_size"][1:]))
        images = [row["image"] for row in rows]
        names = [f"drawn bird {i}" for i in range(len(images))]
    else:
        paths = []
        for path in map(expand_path, args.images):
            found = [path]
            if path.is_dir():
                found = list(find_images(path))
            if not found:
                raise ValueError(f"--images {path} holds no image: no file in it has the suffix of one.")
            paths += found
        count = min(args.num_images, len(paths))
        paths = [paths[i * len(paths) // count] for i in range(count)]
        images = paths
        names = [str(path) for path in paths]
    return torch.stack([read(image) for image in images]), names


# files


def export_files(
        model: nn.Module,
        image: Tensor,
        classifier: s3n_timm.Classifier,
        args: argparse.Namespace,
) -> None:
    """model.pt2 and model.onnx for any batch size, and preprocessing.json, which says what images they want."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (torch.stack([image] * 3),), dynamic_shapes=({0: batch},))
        if "pt2" in args.formats:
            with replacing_file(args.output / "model.pt2") as path:
                torch.export.save(program, path)
        if "onnx" in args.formats:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=args.opset,
                input_names=["image"],
                output_names=["logits"],
                verbose=False,
            )
            with replacing_file(args.output / "model.onnx") as path:
                exported.save(path, external_data=False)
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    preprocessing = {name: classifier.data_config[name] for name in names}
    preprocessing["label_names"] = classifier.label_names
    replace_text(args.output / "preprocessing.json", json.dumps(preprocessing, indent=1))


# runtimes


def start_onnx(path: Path, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])


def start_compiled(model: nn.Module) -> Run:
    compiled = torch.compile(model, fullgraph=True)

    def run(images: Tensor) -> Tensor:
        if len(images) > 1:  # one graph for all sizes but 1, which torch compiles apart
            torch._dynamo.mark_dynamic(images, 0)
        return compiled(images)

    return run


def start_runtimes(model: nn.Module, args: argparse.Namespace) -> dict[str, Run]:
    """What is compared, eager first; files are read back from disk."""
    runtimes: dict[str, Run] = {"eager": model}
    if args.compile:
        runtimes["torch.compile"] = start_compiled(model)
    if "pt2" in args.formats:
        runtimes["torch.export"] = torch.export.load(args.output / "model.pt2").module()
    if "onnx" in args.formats:
        runtimes["ONNX Runtime"] = start_onnx(args.output / "model.onnx", args.cpu_threads)
    if args.int8:
        runtimes["ONNX Runtime int8"] = start_onnx(args.output / "model.int8.onnx", args.cpu_threads)
    return runtimes


# comparison


def median_latencies(runtimes: dict[str, Run], images: Tensor, repetitions: int) -> dict[str, float]:
    """Milliseconds a batch, the runtimes in turn: what else the machine does slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(repetitions):
        for name, run in runtimes.items():
            started = time.perf_counter()
            run(images)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in times.items()}


@torch.no_grad()
def compare(runtimes: dict[str, Run], images: Tensor, names: list[str], args: argparse.Namespace) -> list[dict]:
    """A row for each runtime and batch size: its latency, and how far its logits are from eager's."""
    rows = []
    for size in args.batch_sizes:
        # all of one size: the last is filled up from the beginning
        batches = images[torch.arange(-(-len(images) // size) * size) % len(images)].split(size)
        logits = {name: torch.cat([run(batch) for batch in batches])[:len(images)] for name, run in runtimes.items()}
        latencies = median_latencies(runtimes, batches[0], args.repetitions)
        for name, values in logits.items():
            differences = (values - logits["eager"]).abs().amax(1).nan_to_num(nan=torch.inf)
            worst = int(differences.argmax())
            difference, largest = differences[worst].item(), logits["eager"].abs().max().item()
            rows.append(dict(
                runtime=name,
                batch=size,
                latency_ms=latencies[name],
                ratio=latencies[name] / latencies["eager"],
                difference=difference,
                relative=difference / largest if largest else difference,
                worst_image=names[worst],
            ))
    return rows


def report(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("runtime")
    for column in ("batch", "median ms", "× eager", "largest difference", "of largest logit"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["runtime"], str(row["batch"]), f"{row['latency_ms']:.1f}", f"{row['ratio']:.2f}",
                      f"{row['difference']:.1e}", f"{row['relative']:.1e}")
    console.print(table)


# main


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    args = parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(args.cpu_threads)
    with exiting_on(ValueError, OSError):
        model = load_model(args)
        classifier = s3n_timm.Classifier(model, exit_entropy=0)
        data_config = classifier.data_config

        def read(image: Any) -> Tensor:
            return classifier.transform(read_stored(image, classifier.mode))

        images, names = load_images(args, data_config, read)
        labeled = load_int8_data(args, model, read) if args.int8 else None
        args.output.mkdir(parents=True, exist_ok=True)
        export_files(model, images[0], classifier, args)
        int8 = export_int8(start_onnx, labeled, args, console) if labeled else None
    try:
        rows = compare(start_runtimes(model, args), images, names, args)
    except torch._dynamo.exc.TorchDynamoException as error:
        sys.exit(f"export.py: torch.compile cannot build this model ({str(error).splitlines()[0]}): give --no-compile.")
    versions = dict(torch=torch.__version__, timm=timm.__version__, onnxruntime=onnxruntime.__version__)
    content = dict(weights=args.weights, opset=args.opset, cpu_threads=args.cpu_threads, versions=versions,
                   images=len(images), rows=rows, int8=int8)
    replace_text(args.output / "export.json", json.dumps(content, indent=1))
    report(rows, f"{args.weights}, {len(images)} images, {args.cpu_threads} thread(s)", console)
    print(f"Files: {args.output}")
    if args.opset >= 20 and "onnx" in args.formats:
        print(f"Opset {args.opset}: TensorRT computes its GridSample with the nearest pixel in place of bilinear "
              "weights (NVIDIA/TensorRT #4646): for TensorRT give --opset 18.")
    exact = [row for row in rows if row["runtime"] != "ONNX Runtime int8"]
    worst = max(exact, key=lambda row: row["difference"])
    if not worst["difference"] <= args.tolerance:
        sys.exit(
            f"export.py: {worst['runtime']} differs from eager by {worst['difference']:.2g} at batch size "
            f"{worst['batch']} ({worst['worst_image']}), more than --tolerance {args.tolerance:g}."
        )


if __name__ == "__main__":
    main()

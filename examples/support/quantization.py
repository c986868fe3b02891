"""int8 for export.py: which layers of an ONNX model are quantized, how, and what that costs in accuracy.

Only what belongs to a module of the network is quantized: its convolutions and linear layers. The sampling stage (the
merging of maps, peaks, attention, warp) is computed outside all modules and stays in float32, where a rounded response
would move peaks.

`dynamic` quantizes linear layers alone and finds each activation's range when it runs. ONNX Runtime has convolutions
of that kind (ConvInteger), but on a CPU they took 2.6 times as long as float32 ones and cost accuracy, so convolutions
stay as they are. `static` quantizes both, with ranges found beforehand on calibration images.
"""

import argparse
import ast
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from rich.console import Console
from rich.table import Table
from support.columns import list_columns
from support.files import replacing_file
from support.measuring import match_classes
from torch import Tensor, nn

from s3n_timm.data import is_multi_label, load, store_images

Run = Callable[[Tensor], Tensor]
LINEAR = ("MatMul", "Gemm")
OLD_RUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2])) <= (1, 23)
LAYERS = ("Conv", *LINEAR)
CLAMPS = ("Relu", "Clip")  # a layer's rounding takes these over: its integers end where they cut


class Images(CalibrationDataReader):
    """Calibration images, one at a time."""

    def __init__(self, images: Tensor) -> None:
        self.rows = iter(images.numpy())

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self.rows, None)
        return None if row is None else {"image": row[None]}


def load_labeled(
        args: argparse.Namespace,
        split: str,
        count: int,
        model: nn.Module,
        read: Callable[[Any], Tensor],
) -> tuple[Tensor, Tensor]:
    """Images, preprocessed by `read`, and labels of a split; `count` of them drawn at random, where it has more."""
    options: dict[str, Any] = dict(list_columns(args))
    if args.dataset == "birds":
        options = dict(num_images=count, num_classes=model.num_classes)
    dataset = load(args.dataset, args.data_dir, split, **options)
    if is_multi_label(dataset):
        raise ValueError(f"--dataset {args.dataset} has several labels an image: quantization is measured by top-1.")
    _, classes = match_classes(dataset, model, args.dataset, args.weights)
    if not len(dataset):
        raise ValueError(f"--dataset {args.dataset} has no image in its {split} split.")
    dataset = dataset.shuffle(seed=0).select(range(min(count, len(dataset))))
    images = torch.stack([read(row["image"]) for row in store_images(dataset)])
    return images, torch.tensor(classes)[torch.tensor(dataset["label"][:])]


class Int8Data(NamedTuple):
    """Preprocessed images: what calibrates int8, where that is done, and labeled ones that measure it."""

    calibration: Tensor | None
    images: Tensor
    labels: Tensor


def load_int8_data(args: argparse.Namespace, model: nn.Module, read: Callable[[Any], Tensor]) -> Int8Data:
    """`read` preprocesses an image as a data set stores it.

    Raises:
        ValueError: the data set has other classes than the model, no image, or several labels an image.
    """
    calibration = None
    if args.int8 == "static":
        calibration, _ = load_labeled(args, "train", args.num_calibration, model, read)
    return Int8Data(calibration, *load_labeled(args, "test", args.num_test, model, read))


def list_nodes(model: onnx.ModelProto, kinds: tuple[str, ...]) -> list[str]:
    """Names of the nodes of some kinds that belong to a module; layers only where they have a weight."""
    constants = {tensor.name for tensor in model.graph.initializer}
    names = []
    for node in model.graph.node:
        properties = {entry.key: entry.value for entry in node.metadata_props}
        # the last scope is the operation, the first the whole model: between them are the modules
        scopes = ast.literal_eval(properties.get("pkg.torch.onnx.name_scopes", "[]"))[:-1]
        weighted = node.op_type not in LAYERS or node.input[1] in constants
        if node.op_type in kinds and any(scopes) and weighted:
            names.append(node.name)
    return names


def fold_transposes(model: onnx.ModelProto) -> None:
    """Store weights as layers want them, in place: the exporter leaves large ones to be transposed at run time."""
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type != "Transpose" or node.input[0] not in values:
            kept.append(node)
            continue
        order = next((entry.ints for entry in node.attribute if entry.name == "perm"), None)
        value = numpy_helper.to_array(values[node.input[0]]).transpose(order)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.output[0]))
    _replace_nodes(graph, kept)


def fold_batch_norms(model: onnx.ModelProto) -> None:
    """Fold batch norms into the convolutions before them, in place.

    The backbone reads the original and the warped images by the same weights: what they fold to is stored once.
    """
    graph = model.graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    folded: set[str] = set()
    kept = []
    for node in graph.node:
        conv = producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        whole = conv is not None and conv.op_type == "Conv" and all(name in values for name in conv.input[1:])
        if not whole or readers[conv.output[0]] > 1:
            kept.append(node)
            continue
        name = "+".join([*conv.input[1:], *node.input[1:2]])
        if name not in folded:
            epsilon = next((entry.f for entry in node.attribute if entry.name == "epsilon"), 1e-5)
            scale, shift, mean, variance = (numpy_helper.to_array(values[key]) for key in node.input[1:])
            weight, *bias = (numpy_helper.to_array(values[key]) for key in conv.input[1:])
            factor = scale / np.sqrt(variance + epsilon)
            weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
            bias = ((bias[0] if bias else 0) - mean) * factor + shift
            graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
            graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), f"{name}.bias"))
            folded.add(name)
        conv.input[:] = [conv.input[0], name, f"{name}.bias"]
        conv.output[0] = node.output[0]
    _replace_nodes(graph, kept)


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Keep these nodes and the constants that they read."""
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def count_quantized(model: onnx.ModelProto) -> int:
    """Layers that compute with integers, or stand between the conversions that let a runtime do so."""
    makers = {output: node.op_type for node in model.graph.node for output in node.output}

    def reads_integers(node: onnx.NodeProto) -> bool:
        return all(makers.get(name) == "DequantizeLinear" for name in node.input[:2])

    kinds = Counter(node.op_type for node in model.graph.node if node.op_type not in LAYERS or reads_integers(node))
    return kinds["MatMulInteger"] + sum(kinds[kind] for kind in LAYERS)


def quantize(source: Path, target: Path, kind: str, calibration: Tensor | None) -> str:
    """Write an int8 model, under a temporary name until it is whole, and say in a sentence what it holds."""
    if kind == "dynamic" and OLD_RUNTIME:
        raise ValueError(f"--int8 dynamic needs a newer onnxruntime than {onnxruntime.__version__}, whose quantizer "
                         "mistakes the shapes of linear layers; on Python 3.10 there is none.")
    model = onnx.load(source)
    fold_transposes(model)
    layers = list_nodes(model, LAYERS)
    nodes = list_nodes(model, LINEAR) if kind == "dynamic" else layers
    if not nodes:
        raise ValueError("--int8 dynamic is for linear layers, of which this model has none: use --int8 static.")
    nodes = [*nodes, *(f"{name}_MatMul" for name in nodes)]  # what ONNX Runtime makes of a Gemm before it quantizes it
    with replacing_file(target) as partial, _quiet():
        if kind == "dynamic":
            quantize_dynamic(
                model,
                partial,
                op_types_to_quantize=list(LINEAR),
                nodes_to_quantize=nodes,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        else:
            fold_batch_norms(model)
            quantize_static(
                model,
                partial,
                Images(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=[*LAYERS, *CLAMPS],
                nodes_to_quantize=nodes + list_nodes(model, CLAMPS),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        quantized = count_quantized(onnx.load(partial))
    rest = "convolutions and the sampling stage stay" if kind == "dynamic" else "the sampling stage stays"
    return f"int8 ({kind}): {quantized} of {len(layers)} layers quantized; {rest} in float32."


def top1(run: Run, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in %."""
    predictions = torch.cat([run(batch).argmax(1) for batch in images.split(8)])
    return 100 * (predictions == labels).double().mean().item()


def export_int8(
        start: Callable[[Path, int], Run],
        data: Int8Data,
        args: argparse.Namespace,
        console: Console,
) -> dict[str, Any]:
    """Write model.int8.onnx and measure it beside model.onnx on labeled images that did not calibrate it."""
    calibration, images, labels = data
    sentence = quantize(args.output / "model.onnx", args.output / "model.int8.onnx", args.int8, calibration)
    console.print(sentence, highlight=False)
    result: dict[str, Any] = dict(kind=args.int8, dataset=args.dataset, images=len(images), note=sentence)
    table = Table("ONNX model", "top-1 %", "MB", title=f"{len(images)} test images of {args.dataset}")
    for name, file in (("float32", "model.onnx"), ("int8", "model.int8.onnx")):
        accuracy = top1(start(args.output / file, args.cpu_threads), images, labels)
        megabytes = (args.output / file).stat().st_size / 1e6
        result[name] = dict(top1=accuracy, megabytes=megabytes)
        table.add_row(name, f"{accuracy:.1f}", f"{megabytes:.1f}")
    console.print(table)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to fold batch norms first, which is done."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)

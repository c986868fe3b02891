"""Checkpoints of the authors' released implementation, read into S3N.

Its network is a torchvision ResNet with the two necks, four classifiers, the scales ρ and the kernel k as parameters
(sections 5 to 7 of the method); `preset="original"` has them all.
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from .checkpoints import check_regular_file, check_shapes, check_values, check_weights_file, join_names
from .config import MAX_CLASSES, check_count
from .model import S3N
from .sampling import gaussian_kernel

_logger = logging.getLogger(__name__)

GRID = 31  # G
FWHM = 13  # F, in cells

# the original's modules and S3N's
MODULES = {
    "features.0": "backbone.conv1",
    "features.1": "backbone.bn1",
    "features.4": "backbone.layer1",
    "features.5": "backbone.layer2",
    "features.6": "backbone.layer3",
    "features.7": "backbone.layer4",
    "raw_classifier": "backbone.fc",
    "sampler_buffer": "neck.discriminative",
    "sampler_buffer1": "neck.complementary",
    "sampler_classifier": "classifier.discriminative",
    "sampler_classifier1": "classifier.complementary",
    "con_classifier": "fusion",
}
DEPTHS = {6: 50, 23: 101, 36: 152}  # of a ResNet, by the number of blocks in its layer3

# beyond it the dense form of k is used (section 6): second singular value over the first
SEPARABLE = 1e-4
# Σ|k - Gaussian| over Σ Gaussian: what moves the warp by no more than the original's own rounding in float32
SAME_KERNEL = 1e-5


def load_original_checkpoint(path: str | Path, num_classes: int | None = None) -> S3N:
    """Read a ResNet-50, 101 or 152 checkpoint of the original implementation into S3N with `preset="original"`.

    The file is what `torch.save` wrote of the state dict, with or without `module.` before its names, alone or under
    the key `model` beside other things. Nothing but tensors and containers is unpickled. The depth is found from the
    number of blocks. A kernel k that training has changed is kept (`kernel="learned"`), so that the model computes
    what the checkpoint was trained to compute. The model is past its warm-up: it evaluates with `extreme`.

    Args:
        path: the checkpoint.
        num_classes: C; None for the checkpoint's. With another number every classifier is new, and a log line says so.

    Returns:
        The model, float32, on the CPU and in train mode as timm's models are; its `pretrained_cfg` has the original's
        preprocessing (squash to 600×600, crop 448×448).

    Raises:
        OSError: the file cannot be opened.
        RuntimeError: the file holds other things than tensors or is damaged; keys are left over or missing; tensors
            have a wrong shape, a wrong dtype or values that are not finite. The message lists them.
        ValueError: `num_classes` is out of range.
    """
    if num_classes is not None:
        check_count("num_classes", num_classes, 0, MAX_CLASSES)
    state = _read_state_dict(path)
    depth = _find_depth(state)
    classifier = state.get("raw_classifier.weight")
    classes = max(classifier.shape[0], 1) if classifier is not None and classifier.ndim else 1
    model = _create(depth, classes, "gaussian")
    _check_fit(state, model)
    _compare_map_origin(state)
    kernel = state["filter.weight"][0, 0].double()
    if not is_fixed_gaussian(kernel):
        _logger.info("The checkpoint's kernel k is not the Gaussian of width %d: it is kept in its dense form.", FWHM)
        model = _create(depth, classes, "learned")

    own = model.state_dict()
    added = {
        "beta.discriminative": math.sqrt(2) * GRID * state["radius.scale"].double(),
        "beta.complementary": math.sqrt(2) * GRID * state["radius_inv.scale"].double(),
        "partition_warm": torch.tensor(True),
        "kernel": kernel,
    }
    tensors = {name: added[name] if name in added else state[_original_name(name)] for name in own}
    copies = {
        name: tensor.to("cpu", own[name].dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # the model was made without memory; these tensors become its own
    model.load_state_dict(copies, assign=True)
    if num_classes is not None and num_classes != classes:
        model.reset_classifier(num_classes)
        _logger.info(
            "The checkpoint has %d classes, not %d; newly initialized: %s.",
            classes,
            num_classes,
            ", ".join(model.pretrained_cfg["classifier"]),
        )
    return model


def is_fixed_gaussian(kernel: Tensor) -> bool:
    """Whether k is the fixed Gaussian, but for a factor, which the warp does not see (eq. 8).

    It is not where it is not separable (section 6), and neither where it is a separable kernel of another shape.

    Args:
        kernel: 61×61.
    """
    kernel = kernel.double()
    first, second = torch.linalg.svdvals(kernel)[:2]
    if second > SEPARABLE * first:
        return False
    gaussian = gaussian_kernel((GRID, GRID), FWHM).double()
    return bool((kernel / kernel.sum() - gaussian / gaussian.sum()).abs().sum() <= SAME_KERNEL)


def _create(depth: int, classes: int, kernel: str) -> S3N:
    """The network without memory for its weights."""
    # how the original prepares test images; the rest is as for the ImageNet weights that it started from
    preparation = dict(input_size=(3, 448, 448), pool_size=(14, 14), crop_pct=448 / 600, crop_mode="squash")
    with torch.device("meta"):
        return timm.create_model(
            f"s3n_resnet{depth}",
            num_classes=classes,
            preset="original",
            grid_size=GRID,
            fwhm=FWHM,
            kernel=kernel,
            pretrained_cfg_overlay=dict(preparation, num_classes=classes),
        )


def _read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The original's names, without `module.`, to tensors."""
    check_regular_file(path)  # an OSError that names it; what torch says of other faults is for its makers
    try:
        check_weights_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file torch and pickle raise anything
        raise RuntimeError(
            f"{path} cannot be read as tensors and plain containers, and nothing in it was run "
            f"({type(error).__name__}): it is damaged, or holds other objects; where you trust it, save its state dict "
            "alone."
        ) from error
    state = content
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        state = content["model"]
    if not isinstance(state, Mapping) or not state:
        raise RuntimeError(f"{path} holds no state dict, neither bare nor under the key 'model'.")
    strange = [str(name)[:80] for name, x in state.items() if not (isinstance(name, str) and isinstance(x, Tensor))]
    if strange:
        raise RuntimeError(f"{path} has entries that are not named tensors: {join_names(strange)}.")
    names = {name: name.removeprefix("module.") for name in state}
    twice = [name for name, bare in names.items() if name != bare and bare in state]
    if twice:
        raise RuntimeError(f"{path} has keys both with and without 'module.': {join_names(twice)}.")
    return {names[name]: tensor for name, tensor in state.items()}


def _find_depth(state: Mapping[str, Tensor]) -> int:
    found = {match[1] for name in state if (match := re.match(r"features\.6\.(\d+)\.", name))}
    if len(found) not in DEPTHS:
        raise RuntimeError(
            f"The checkpoint has {len(found)} blocks in layer3 (features.6): those of ResNet-50, 101 and 152, which "
            "can be read, have 6, 23 and 36."
        )
    return DEPTHS[len(found)]


def _original_name(name: str) -> str:
    """S3N's name of a tensor in the original."""
    ours = {module: original for original, module in MODULES.items()}
    module = next(module for module in ours if name.startswith(f"{module}."))
    return ours[module] + name.removeprefix(module)


def _check_fit(state: Mapping[str, Tensor], model: S3N) -> None:
    """Compare names, shapes and values with those of the original network of the model's depth and classes."""
    added = ("beta.", "partition_warm", "kernel")
    expected = {_original_name(name): x for name, x in model.state_dict().items() if not name.startswith(added)}
    classifier = expected["raw_classifier.weight"]
    expected |= {
        "radius.scale": torch.empty(1, device="meta"),
        "radius_inv.scale": torch.empty(1, device="meta"),
        "filter.weight": torch.empty(1, 1, 2 * GRID - 1, 2 * GRID - 1, device="meta"),
        "map_origin.weight": classifier[..., None, None],
        "map_origin.bias": expected["raw_classifier.bias"],
    }
    left_over = [name for name in state if name not in expected]
    missing = [name for name in expected if name not in state]
    if left_over or missing:
        lists = [f"keys left over: {join_names(left_over)}"] if left_over else []
        lists += [f"keys missing: {join_names(missing)}"] if missing else []
        raise RuntimeError(f"The checkpoint does not fit the original network; {'; '.join(lists)}.")
    check_shapes(state, expected)
    check_values(state, expected)
    for name in ("radius.scale", "radius_inv.scale", "filter.weight"):
        if state[name].sum() == 0:
            raise RuntimeError(f"The checkpoint's {name} sums to 0, which warps by 0 over 0.")


def _compare_map_origin(state: Mapping[str, Any]) -> None:
    """Say where the second copy of the first classifier differs: the original overwrites it in every pass."""
    for part in ("weight", "bias"):
        copy, classifier = state[f"map_origin.{part}"], state[f"raw_classifier.{part}"]
        if not torch.equal(copy.flatten().float(), classifier.flatten().float()):
            _logger.warning(
                "map_origin.%s differs from raw_classifier.%s, which is what counts: the original copies it over "
                "map_origin in every pass.",
                part,
                part,
            )

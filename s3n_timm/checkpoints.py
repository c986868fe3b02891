"""What a checkpoint must be before it becomes a model: its files, its config, its names, shapes and values.

A folder of `save`, or a repository that was pushed, is one whole model: every tensor of the architecture that its
`config.json` states, and no other. This is checked on the header of the weight file against a model on the meta
device, before anything is allocated. The weights of a plain backbone come by `pretrained_cfg_overlay` alone.
"""

import logging
import os
import reprlib
import stat
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, get_model_args, get_model_traits
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .backbones import MAX_BUILT_SIZE
from .config import MAX_CHANNELS, MAX_CLASSES, MAX_SIDE, check_count
from .model import S3N

_logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CLASSIFIERS = ("classifier.discriminative", "classifier.complementary", "fusion")  # beside the backbone's own
MULTI_LABEL = "problem_type: multi_label_classification"  # a plain model's note: timm's cfg has no such field
MAX_TENSORS = 5_000  # large models of timm have some 1,200
MAX_PARAMETERS = 5_000_000_000  # timm's largest has 4.4 billion
MAX_INPUT = 3 * MAX_BUILT_SIZE**2  # numbers of an input image: a backbone reads one while it is built
MAX_RESIZED = 4_096**2  # pixels of an image before its crop


# class names


def known_label_names(model: nn.Module) -> dict[int, str]:
    """Names by class index, of the classes that the model's classifier still stands for; empty where none are known."""
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names, classes = cfg.get("label_names") or (), int(getattr(model, "num_classes", 0))
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    known = {int(index): str(name) for index, name in pairs if str(index).isdecimal() and int(index) < classes}
    # a classifier of another size is a new one, whose first class is not the first of the names
    fits = cfg.get("num_classes", classes) == classes or len(names) == len(known) == classes
    return known if fits else {}


def is_multi_label_model(model: nn.Module) -> bool:
    """Whether a model was trained for any number of labels an image, so that its scores are sigmoids."""
    if isinstance(model, S3N):
        return model.config.multi_label
    return MULTI_LABEL in ((getattr(model, "pretrained_cfg", None) or {}).get("notes") or ())


def has_peaks(model: nn.Module) -> bool:
    """Whether a model warps images around peaks: an S3N with sparse attention and a warped branch."""
    return isinstance(model, S3N) and model.config.attention == "sparse" and bool(model.warped)


def mark_multi_label(model: Any) -> None:
    """Make a model, an S3N or a plain one, remember through saving and loading that it is `is_multi_label_model`."""
    if isinstance(model, S3N):
        model.configure(multi_label=True)
    else:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        model.pretrained_cfg = dict(cfg, notes=[*(cfg.get("notes") or ()), MULTI_LABEL])


def label_names(model: nn.Module) -> list[str]:
    """A name for each class of a model, in the order of its logits.

    Args:
        model: any timm model. `pretrained_cfg["label_names"]` may be a list, or a dict by index with gaps.

    Returns:
        C names. A class without a name has its number; so have all classes of a classifier that was replaced by one
        of another size, whose classes the names do not tell of.
    """
    known = known_label_names(model)
    return [known.get(index, str(index)) for index in range(int(model.num_classes))]  # type: ignore[arg-type]


# names, shapes and values


def join_names(names: Iterable[str], most: int = 8) -> str:
    """Names for a message, the list cut after `most`."""
    names = list(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def check_names(unexpected: Iterable[str], missing: Iterable[str]) -> None:
    """Refuse a checkpoint with keys that are too many or missing.

    Raises:
        RuntimeError: there are such keys; the message lists them.
    """
    for names, fault in ((list(unexpected), "has keys that fit nowhere"), (list(missing), "lacks keys of the model")):
        if names:
            raise RuntimeError(
                f"The checkpoint {fault}: {join_names(names)}; create the variant, with the branches and neck, that "
                "it was saved from."
            )


def check_shapes(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose shape is not that of the model's; torch alone would take a vector's first for a scalar.

    Raises:
        RuntimeError: shapes differ; the message lists them.
    """

    def sides(tensor: Tensor) -> str:
        return "×".join(map(str, tensor.shape)) or "a single number"

    wrong = [
        f"{name} ({sides(value)}, not {sides(own[name])})"
        for name, value in state_dict.items() if value.shape != own[name].shape
    ]
    if wrong:
        raise RuntimeError(f"The checkpoint has tensors of the wrong shape: {join_names(wrong)}.")


# numbers of these kinds become one another by rounding; any other change would alter what a tensor means
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_values(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors that a model cannot hold, or that would make it give NaN.

    Args:
        state_dict: names to tensors, of the model's shapes or of another number of classes or channels.
        own: the model's tensors by name; names that it lacks are passed over.

    Raises:
        RuntimeError: a tensor is not dense, is of another kind of number, or is NaN or infinite in the model's dtype.
    """
    pairs = {name: (value, own[name].dtype) for name, value in state_dict.items() if name in own}
    wrong = [
        f"{name} ({str(value.dtype).removeprefix('torch.')})"
        for name, (value, dtype) in pairs.items()
        if value.is_meta
        or value.layout is not torch.strided
        or not (value.dtype in _FLOATS if dtype.is_floating_point else value.dtype == dtype)
    ]
    if wrong:
        raise RuntimeError(f"The checkpoint has tensors of a kind that the model cannot hold: {join_names(wrong)}.")
    infinite = [name for name, (value, dtype) in pairs.items() if not value.to(dtype).isfinite().all()]
    if infinite:
        raise RuntimeError(
            f"The checkpoint has NaN or infinite values in {join_names(infinite)}: the file is damaged, or its "
            "training diverged."
        )


# what timm asks of a state dict that it has read


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: S3N) -> dict[str, Tensor]:
    """Bring a checkpoint of S3N, or of its plain backbone, to the names of `model`.

    What S3N adds to a plain backbone keeps its initialization; one log line names it.

    Args:
        state_dict: names to tensors, of the classes and channels that the model's `pretrained_cfg` states. From a
            folder or from the Hub they are those of a whole S3N; a plain backbone may lack its classifier alone.
        model: the model that will load it.

    Returns:
        The state dict for `model`; timm drops its classifiers where the number of classes differs.

    Raises:
        RuntimeError: a key fits nowhere, one of the model's is missing, or a tensor holds what no weight can be.
    """
    own, cfg = model.state_dict(), model.pretrained_cfg
    # what timm read need not be tensors, where the file is a pickle
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()):
        raise RuntimeError("The checkpoint holds other things than named tensors: give it as a bare state dict.")
    classifiers = (f"backbone.{model.head.classifier}", *CLASSIFIERS)
    strange = [name for name in as_names(cfg.get("classifier")) if name not in classifiers]
    if strange:  # timm leaves out what these name where the number of classes differs
        raise RuntimeError(f"pretrained_cfg: classifier names other modules than classifiers: {join_names(strange)}.")
    if cfg.get("source") in ("local-dir", "hf-hub") or any(name.startswith("backbone.") for name in state_dict):
        whole = dict(state_dict)
    else:
        backbone = _load_backbone(state_dict, model)
        added = {name: value for name, value in own.items() if not name.startswith("backbone.")}
        _logger.info("Loading the backbone's weights alone; newly initialized: %s.", ", ".join(added))
        whole = {f"backbone.{name}": value for name, value in backbone.items()} | added
    # classifiers may be left over in a model without classes: timm drops them next
    left = tuple(f"{name}." for name in classifiers) if model.num_classes == 0 else ()
    check_names(
        (name for name in whole if name not in own and not name.startswith(left)),
        (name for name in own if name not in whole),
    )
    # timm adapts these, where classes or channels differ, and torch checks them after that
    adapted = tuple(f"{name}." for name in (*classifiers, *as_names(cfg.get("first_conv"))))
    check_values(whole, own)
    whole = _resize(whole, model)
    check_shapes({name: value for name, value in whole.items() if not name.startswith(adapted)}, own)
    return whole


def as_names(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """timm's configs name a module by one name, several, or none."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _resize(whole: dict[str, Tensor], model: S3N) -> dict[str, Tensor]:
    """Let timm resample what depends on the image size, such as position embeddings, where another one was saved."""
    saved = getattr(model, "pretrained_model_args", {}).get("img_size")
    if saved is None or to_2tuple(saved) == get_model_traits(model.backbone).get("img_size"):
        return whole
    backbone = {name.removeprefix("backbone."): value for name, value in whole.items() if name.startswith("backbone.")}
    with suppress(Exception):  # what timm cannot resample, check_shapes names
        whole = whole | {f"backbone.{name}": value for name, value in _load_backbone(backbone, model).items()}
    return whole


def _load_backbone(state_dict: dict[str, Tensor], model: S3N) -> dict[str, Tensor]:
    """Let timm load plain backbone weights into a twin of the backbone, strictly: it knows each family's remapping."""
    cfg, name = model.pretrained_cfg, model.config.backbone
    if not state_dict:
        raise RuntimeError("The checkpoint is empty.")
    if name is None:
        return state_dict
    # of as many classes as the checkpoint: with another number timm would not be strict
    args = get_model_args(model.backbone) | dict(num_classes=cfg["num_classes"], in_chans=cfg["input_size"][0])
    args["pretrained_model_args"] = getattr(model, "pretrained_model_args", {})  # tells timm the size to resample from

    def load(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        overlay = dict(state_dict=dict(state), num_classes=cfg["num_classes"])
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args).state_dict()

    try:
        return load(state_dict)
    except (RuntimeError, KeyError) as error:
        with torch.device("meta"):
            twin = timm.create_model(name, **args).state_dict()
        prefix = f"{model.head.classifier}."
        new = {key: _start(model, key, value) for key, value in twin.items() if key.startswith(prefix)}
        if not new.keys() & state_dict.keys():
            with suppress(RuntimeError, KeyError):
                loaded = load(state_dict | new)
                _logger.info("The checkpoint has no classifier; newly initialized: %s.", ", ".join(new))
                return loaded
        raise RuntimeError(f"The checkpoint is neither one of this S3N nor of its backbone {name}: {error}") from error


def _start(model: S3N, name: str, twin: Tensor) -> Tensor:
    """A new classifier's tensor: the model's own, or any where timm will leave it out for its number of classes."""
    own = model.state_dict().get(f"backbone.{name}")
    return torch.zeros(twin.shape, dtype=twin.dtype) if own is None or own.shape != twin.shape else own


# files


def check_regular_file(path: str | Path) -> None:
    """Refuse what cannot be opened, and pipes and devices, on which a reader would wait forever.

    Raises:
        OSError: there is no such file, it may not be read, or it is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file.")
    with open(path, "rb"):
        pass


def check_weights_file(path: str | Path) -> None:
    """Refuse a weight file that would hang or fill the memory while it is read.

    Raises:
        OSError: as for `check_regular_file`.
        ValueError: it is a compressed archive: torch.save does not compress.
    """
    check_regular_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > os.path.getsize(path):
            raise ValueError(f"{path} is a compressed archive, which torch.save does not write.")


def read_header(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a folder's `model.safetensors` by name, on the meta device: nothing but the header is read.

    Raises:
        OSError: the folder has no such file, or it is not a regular one.
        RuntimeError: it is not a whole safetensors file.
    """
    path = Path(folder) / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}, which s3n_timm.save writes.")
    check_regular_file(path)
    with explain_damage(path), safe_open(path, framework="pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118


# what safetensors and torch raise besides RuntimeError, ValueError and OSError on a file that is not theirs
_UNREADABLE = (SafetensorError, EOFError, LookupError, AttributeError)


@contextmanager
def explain_damage(what: str | Path) -> Iterator[None]:
    """Turn what readers raise on a corrupt file into one RuntimeError."""
    try:
        yield
    except _UNREADABLE as error:
        raise RuntimeError(
            f"The weights of {what} cannot be read ({type(error).__name__}: {error}): is the file whole?"
        ) from error


# config.json


def check_cfg(cfg: Mapping[str, Any], *, plain: bool = False) -> None:
    """Refuse a `pretrained_cfg` of a config.json whose values would fail later, or fill the memory.

    Args:
        cfg: what timm read.
        plain: it is that of a model of timm, which may have a `label_offset`.

    Raises:
        ValueError: a value is of the wrong type or out of range, or there is not one label name for each class.
    """
    given = {name: value for name, value in cfg.items() if value is not None}
    classes = given.get("num_classes", PretrainedCfg.num_classes)
    check_count("pretrained_cfg: num_classes", classes, 0, MAX_CLASSES)
    for name, (accepts, rule) in _CFG_RULES.items():
        if name in given and not accepts(given[name]):
            raise ValueError(f"pretrained_cfg: {name} must be {rule}, got {reprlib.repr(given[name])}.")
    for name in ("input_size", "test_input_size"):
        size = given.get(name, (1, 1, 1))
        for value, most in zip(size, (MAX_CHANNELS, MAX_SIDE, MAX_SIDE)):
            check_count(f"pretrained_cfg: {name}", value, 1, most)
        channels, rows, columns = size
        if channels * rows * columns > MAX_INPUT:
            raise ValueError(f"pretrained_cfg: {name} has more than {MAX_INPUT:,} numbers, got {list(size)}.")
        for crop in ("crop_pct", "test_crop_pct"):
            if rows * columns / given.get(crop, 1) ** 2 > MAX_RESIZED:
                raise ValueError(
                    f"pretrained_cfg: {crop} {given[crop]} would resize images to more than {MAX_RESIZED:,} pixels."
                )
    # both change which weights are read, and S3N saves neither
    for name in ("custom_load",) if plain else ("custom_load", "label_offset"):
        if given.get(name):
            raise ValueError(f"pretrained_cfg: {name} must be left out, as these weights have none.")
    labels = given.get("label_names")
    # a dict names classes by their index and may leave some out
    if labels is not None and (len(labels) > classes or (len(labels) < classes and not isinstance(labels, Mapping))):
        raise ValueError(f"pretrained_cfg: label_names has {len(labels)} names for {classes} classes.")


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low < value < high


def _are_numbers(values: Any, low: float, high: float) -> bool:
    return _is_list(values) and bool(values) and all(_is_number(value, low, high) for value in values)


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list))


CROP_MODES = ("center", "squash", "border")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_SIZE_RULE = (lambda value: _is_list(value) and len(value) == 3, "(channels, rows, columns)")
_CROP_RULE = (lambda value: _is_number(value, 0, 1e3), "a positive number")
_CFG_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": _SIZE_RULE,
    "test_input_size": _SIZE_RULE,
    "min_input_size": _SIZE_RULE,
    "mean": (lambda value: _are_numbers(value, -1e6, 1e6), "a number for each channel"),
    "std": (lambda value: _are_numbers(value, 0, 1e6), "a number for each channel, each positive"),
    "crop_pct": _CROP_RULE,
    "test_crop_pct": _CROP_RULE,
    "crop_mode": (lambda value: value in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
    "interpolation": (lambda value: value in _INTERPOLATIONS, f"one of {', '.join(_INTERPOLATIONS)}"),
    "classifier": (
        lambda value: isinstance(value, str) or (_is_list(value) and all(isinstance(name, str) for name in value)),
        "a module's name or a list of names",
    ),
    "label_names": (lambda value: isinstance(value, (tuple, list, dict)), "a list of names"),
    "notes": (lambda value: isinstance(value, (tuple, list, str)), "a list of texts"),
}


def check_numbers(name: str, value: Any) -> None:
    """Refuse arguments of a config.json with numbers that no layer has, wherever they stand in it.

    Raises:
        ValueError: a number is too large.
    """
    if isinstance(value, Mapping):
        for key, each in value.items():
            check_numbers(f"{name}: {key}", each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            check_numbers(name, each)
    elif isinstance(value, (int, float)) and not abs(value) <= MAX_SIDE:
        raise ValueError(f"{name} must be at most {MAX_SIDE}, got {reprlib.repr(value)}.")


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module | None:
    """Build a model without memory for its weights, to see what it would be.

    Args:
        build: makes it.

    Returns:
        The model; None where its constructor does not work on the meta device.

    Raises:
        ValueError: it would have more than `MAX_TENSORS` parameter tensors or `MAX_PARAMETERS` parameters.
        Exception: what `build` raises.
    """
    tensors, numbers, thread = 0, 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal tensors, numbers
        if parameter is None or threading.get_ident() != thread:
            return
        tensors, numbers = tensors + 1, numbers + parameter.numel()
        if tensors > MAX_TENSORS or numbers > MAX_PARAMETERS:
            raise ValueError(
                f"the model would have more than {MAX_PARAMETERS:,} parameters, or more than {MAX_TENSORS:,} tensors."
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:
        if "meta tensor" not in str(error):
            raise
        return None
    finally:
        handle.remove()

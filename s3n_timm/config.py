"""The options of S3N, each written once: meaning, default, and what it may be."""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .peaks import PARTITION_MODES, PEAK_FLOORS
from .response import GATES
from .sampling import ATTENTIONS, BORDERS

BRANCH_SETS = ("O", "O+D", "O+C", "D+C", "O+D+C")
NECKS = ("none", "conv")
KERNELS = ("gaussian", "learned")
GATE_SCORES = ("logits", "maps")
ANSWERS = ("joint", "mean", "original", "discriminative", "complementary")

# Upper bounds: options come from any config.json, and a wrong one must not exhaust the memory.
MAX_GRID = 255  # sparse attention holds G³ numbers per image: 66 MB here
MAX_CLASSES = 65_536  # three times ImageNet-21k: the classifiers of a ResNet-50 then take 3.2 GB
MAX_CHANNELS = 1_024  # of an image; hyperspectral cameras have a few hundred
MAX_SIDE = 65_536  # pixels an image is resized, scanned or zoomed to
MAX_EPOCHS = 1_000_000
# in cells or in units of attention: float32 rounds values beyond these, or their squares, to 0 and infinity
MIN_SCALE, MAX_SCALE = 1e-6, 1e6

PRESETS: dict[str, dict[str, Any]] = {
    # the paper's text; at inference its random partition is replaced by `expected`, its mean
    "paper": dict(
        partition_train="probability",
        partition_eval="expected",
        partition_warmup_epochs=0,
        neck="none",
        gate_scores="logits",
    ),
    # the authors' released code where it differs: its epochs 0 to 20 are warm-up
    "original": dict(
        partition_train="probability",
        partition_eval="extreme",
        partition_warmup_epochs=21,
        neck="conv",
        gate_scores="maps",
    ),
}


def check_choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    """Give `value` back, or raise a ValueError that names the argument where it is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {reprlib.repr(value)}.")
    return value


def check_number(name: str, value: Any, low: float, high: float) -> Any:
    """Give `value` back, or raise a ValueError that names the argument where it is no number from `low` to `high`."""
    fits = isinstance(value, Real) and not isinstance(value, bool)
    if not (fits and low <= value <= high):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {reprlib.repr(value)}.")
    return value if isinstance(value, (int, float)) else float(value)  # numpy's have no place in JSON


def check_count(name: str, value: Any, low: int, high: int, odd: bool = False) -> Any:
    """Give `value` back, or raise a ValueError that names the argument where it is no whole number in that range."""
    fits = isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high
    if not fits or (odd and value % 2 == 0):
        kind = "an odd" if odd else "a"
        raise ValueError(f"{name} must be {kind} whole number from {low} to {high}, got {reprlib.repr(value)}.")
    return int(value)


def _read_pair(name: str, value: Any, most: int, form: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, Integral) else value
    fits = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(
        isinstance(side, Integral) and not isinstance(side, bool) and 2 <= int(side) <= most for side in pair
    )
    if not fits:
        raise ValueError(f"{name} must be {form}, each from 2 to {most}, got {reprlib.repr(value)}.")
    return int(pair[0]), int(pair[1])


def _option(default: Any, about: str, read: Callable[[str, Any], Any]) -> Any:
    """A field of `S3NConfig`: its default, its meaning, and what checks a value and brings it to its final form."""
    return dataclasses.field(default=default, metadata=dict(about=about, read=read))


def _choice(default: str | None, choices: Sequence[str], about: str) -> Any:
    about = f"{about} One of {', '.join(f'`{each!r}`' for each in choices)}."
    return _option(default, about, lambda name, value: check_choice(name, value, choices))


def _number(default: float | None, about: str, low: float = MIN_SCALE, high: float = MAX_SCALE) -> Any:
    return _option(default, about, lambda name, value: check_number(name, value, low, high))


def _count(default: int | None, low: int, high: int, about: str, odd: bool = False) -> Any:
    return _option(default, about, lambda name, value: check_count(name, value, low, high, odd))


def _pair(default: int | None, most: int, form: str, about: str) -> Any:
    def read(name: str, value: Any) -> Any:
        return None if value is None else _read_pair(name, value, most, form)

    return _option(default, about, read)


def _pixels(about: str) -> Any:
    return _pair(None, MAX_SIDE, "pixels, one number or (H, W)", about)


def _read_backbone(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be the name of a timm model, got {reprlib.repr(value)}.")
    return value


def _read_entropy(name: str, value: Any) -> Any:
    return None if value is None else check_number(name, value, 0, MAX_SCALE)


def _read_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {reprlib.repr(value)}.")
    return value


def _read_arguments(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must map names to values, got {reprlib.repr(value)}.")
    return dict(value or {})


@dataclass(frozen=True)
class S3NConfig:
    """All options of S3N, checked and complete: what `config.json` holds under `model_args`.

    Raises:
        ValueError: an option is out of range or unknown; the message names it.

    Options:
    """

    backbone: str | None = _option("resnet50", "Name of a timm model; None for one without a name.", _read_backbone)
    preset: str = _choice("paper", tuple(PRESETS), "Fills the options whose default is None by its own.")
    branches: str = _choice(
        "O+D+C", BRANCH_SETS,
        "What is fused. The backbone always reads X, which gives the peaks; under `'D+C'` its own classifier, which "
        "gives the maps, is the D branch's.")
    attention: str = _choice(
        "sparse", ATTENTIONS,
        "Sparse as in the paper, or the dense kinds of table 3, which warp both images alike. The layer of saliency "
        "learns through the warps, from features that it does not teach.")
    partition_train: str = _choice(None, PARTITION_MODES, "How peaks are divided in train mode (eq. 4).")
    partition_eval: str = _choice(None, PARTITION_MODES, "How peaks are divided in eval mode.")
    partition_warmup_epochs: int = _count(
        None, 0, MAX_EPOCHS, "So many first epochs divide by `'all'` in train and `'probability'` in eval mode.")
    neck: str = _choice(
        None, NECKS, "`'conv'` puts conv 3×3 stride 2, batch norm and ReLU before the pooling of D and C.")
    beta_discriminative: float = _number(None, "Start value of β₁ in cells; √2·0.09·G by default.")
    beta_complementary: float = _number(None, "Start value of β₂ in cells; √2·0.3·G by default.")
    grid_size: tuple[int, int] = _pair(
        31, MAX_GRID, "one number or (rows, columns)", "G, or (rows, columns) for inputs that are not square.")
    window: int = _count(3, 1, MAX_GRID, "Side of a peak's window in cells.", odd=True)
    peak_floor: str = _choice("mean", PEAK_FLOORS, "How high a peak must be, see `find_peaks`.")
    floor: float = _number(0.09, "b, attention far from every peak.")
    fwhm: float = _number(13, "F, full width at half maximum of the kernel k in cells.")
    kernel: str = _choice(
        "gaussian", KERNELS,
        "`'learned'` keeps k as a (2G-1)×(2G-1) buffer: the same Gaussian until a checkpoint brings another one.")
    threshold: float = _number(0.2, "δ of the entropy gate in nats.", -math.inf, math.inf)
    topk: int = _count(5, 1, MAX_CLASSES, "Classes that count in the gate.")
    gate: str = _choice("paper", GATES, "How the gate takes its probabilities, see `gate_weights`.")
    gate_scores: str = _choice(
        None, GATE_SCORES, "Class scores of the gate: the logits, or the means of the maps resized to the grid.")
    scan_size: tuple[int, int] | None = _pixels(
        "Pixels of the reduced copy that the original branch reads; the input as it is by default. Not the paper's, "
        "nor are the options below.")
    zoom_size: tuple[int, int] | None = _pixels(
        "Pixels of the warped images, which are sampled from the input at its full resolution, see `zoom`.")
    border: str = _choice("replicate", BORDERS, "How sampling maps are padded, see `warp_grid`.")
    answer: str = _choice(
        "joint", ANSWERS,
        "What a call gives in eval mode: the logits of the fusion layer; the geometric mean of the probabilities of "
        "all outputs, see `mean_answer`; or the logits of one of `branches`. A branch is read only if the answer "
        "needs it: `'original'` takes one pass.")
    multi_label: bool = _option(
        False, "An image has any number of labels: its scores are sigmoids of the logits. The gate still takes their "
        "softmax, which only chooses the maps that say where to look.", _read_switch)
    exit_entropy: float | None = _option(
        None, "τ in nats: `Classifier` and predict.py answer an image whose original branch has less entropy by that "
        "branch alone; None reads all branches for every image.", _read_entropy)
    backbone_args: dict[str, Any] = _option(
        None, "Further arguments of `timm.create_model` for the backbone.", _read_arguments)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {name: value for name, value in PRESETS[self.preset].items() if values[name] is None}
        rows, columns = _read_pair("grid_size", self.grid_size, MAX_GRID, "one number or (rows, columns)")
        for name, share in (("beta_discriminative", 0.09), ("beta_complementary", 0.3)):
            if values[name] is None:
                values[name] = math.sqrt(2) * share * math.sqrt(rows * columns)
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, field.metadata["read"](field.name, values[field.name]))
        if self.answer not in ("joint", "mean") and self.answer[0].upper() not in self.branches:
            raise ValueError(
                f"answer={self.answer!r} needs that branch, and this model has branches={self.branches!r}.")

        if self.multi_label and self.exit_entropy:
            raise ValueError("exit_entropy judges by the probabilities of one label an image: set it to None.")

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


OPTIONS = tuple(field.name for field in dataclasses.fields(S3NConfig))
# help(S3NConfig) lists what each field says of itself
S3NConfig.__doc__ = f"{S3NConfig.__doc__}" + "\n".join(
    f"        {field.name}: {field.metadata['about']} Default: {field.default!r}."
    for field in dataclasses.fields(S3NConfig)
)

# Options that decide which parameters a model has, of which shape, or which sizes it reads; the others may change on a
# model that exists.
STRUCTURE = ("backbone", "preset", "branches", "attention", "neck", "beta_discriminative", "beta_complementary",
             "grid_size", "kernel", "partition_warmup_epochs", "backbone_args", "scan_size", "zoom_size")

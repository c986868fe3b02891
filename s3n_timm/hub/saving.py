"""Models to and from folders: safetensors beside the config.json that timm rebuilds them from.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads what `save` wrote; `load_model` does so from anywhere.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from timm.models import build_model_with_cfg, get_model_args, model_entrypoint
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import Tensor, nn

from ..checkpoints import (
    build_on_meta,
    check_cfg,
    check_numbers,
    check_regular_file,
    check_values,
    explain_damage,
    is_multi_label_model,
    join_names,
    known_label_names,
    read_header,
)
from ..checkpoints import (
    label_names as names_of,
)
from ..files import replacing_file
from ..images import expand_path, image_mode, input_config, read_image
from ..model import S3N
from .benchmark import benchmark_file
from .card import model_card
from .download import CONFIG, WEIGHTS, download

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
MAX_CONFIG = 50_000_000  # bytes of a config.json: 65,536 names take some 3 MB


# saving


def save(
        model: nn.Module,
        folder: str | Path,
        *,
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        card: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json`; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Each file takes its name once it is complete and on disk, so that a reader, or a crash, meets the old or the new
    one. A plain timm model also loads in `transformers`, by its `pipeline("image-classification", model=FOLDER)`.

    Args:
        model: an S3N, or a plain timm model, unwrapped.
        folder: where to write; made if need be.
        label_names: a name for each class, in order; those that the model has if left out.
        data_config: the preprocessing the model was trained with, as `timm.data.resolve_data_config` gives it.
        state_dict: the weights, where the model itself holds but a shard of them.
        card: writes a model card, `README.md`, as well: the arguments of `s3n_timm.hub.model_card` beyond those
            above, such as `dict(results="evaluation/results.json")`, or `{}`. Its `picture` is the path of a picture,
            or a `PIL.Image` to be drawn as the model, with all three branches, sees it (needs the extra "train"). With
            `benchmark_task`, see `s3n_timm.hub.benchmark_file`, the results lie in `.eval_results` as well.

    Returns:
        The folder.

    Raises:
        ValueError: the backbone has no timm name to rebuild it from, the model was built with an argument that JSON
            can't hold, the number of names is not that of classes, or the card can't be written from what it is given.
            Nothing is written then.
        OSError: a file can't be read or written.
    """
    try:
        args = model.config.to_dict() if isinstance(model, S3N) else get_model_args(model)
    except ValueError as error:
        raise ValueError(f"config.json cannot hold what this model was built with: {error}.") from error
    if args.get("backbone", "") is None or not getattr(model, "pretrained_cfg", {}).get("architecture"):
        raise ValueError("This model's backbone is not one of timm's by name, so config.json could not rebuild it.")
    if label_names is None and known_label_names(model):
        label_names = names_of(model)
    if isinstance(label_names, Mapping):
        raise ValueError(f"label_names must be a list of {model.num_classes} names, one for each class in order.")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"label_names has {len(label_names)} names for {model.num_classes} classes.")
    beside: dict[str, bytes] = {} if card is None else card_files(model, card, label_names, data_config)
    config = _config_text(model, dict(args), label_names, data_config)
    folder = expand_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict() if state_dict is None else state_dict
    # safetensors wants contiguous tensors, which a model trained in channels-last does not have
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing_file(folder / WEIGHTS) as path:
        try:
            save_file(tensors, path, metadata=dict(format="pt"))
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
    write_files(folder, {CONFIG: config.encode(), **beside})
    return folder


def _config_text(
        model: nn.Module,
        args: dict[str, Any],
        label_names: Sequence[str] | None,
        data_config: Mapping[str, Any] | None,
) -> str:
    """What timm writes to config.json."""
    beyond: dict[str, Any] = {} if label_names is None else dict(label_names=list(map(str, label_names)))
    if is_multi_label_model(model):
        beyond["problem_type"] = "multi_label_classification"  # what transformers goes by
    with TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        try:
            save_config_for_hf(model, str(path), model_config=beyond, model_args=args,
                               data_config=None if data_config is None else dict(data_config))
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.json cannot hold what this model was built with: {error}.") from error
        config = json.loads(path.read_text(encoding="utf-8"))
    # timm takes it from the top of the file, and transformers, which gives both to timm, fails on two
    config["model_args"].pop("num_classes", None)
    return json.dumps(config, indent=2)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files, by their paths in a folder, each as `save` writes its own."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with replacing_file(folder / name) as path:
            path.write_bytes(content)


def card_files(
        model: nn.Module,
        card: Mapping[str, Any],
        label_names: Sequence[str] | None,
        data_config: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The card and what it comes with, a picture and an entry for a benchmark, by their paths; as for `save`."""
    about = dict(card, label_names=label_names, data_config=data_config)
    picture, task = about.pop("picture", None), about.pop("benchmark_task", None)
    files = {}
    if isinstance(picture, Image.Image):
        files["picture.png"] = _draw(model, picture, label_names, data_config)
    elif picture is not None:
        path = Path(picture)
        if path.suffix.lower() not in PICTURES:
            raise ValueError(f"picture {path} must end in one of {', '.join(PICTURES)}.")
        check_regular_file(path)
        files[f"picture{path.suffix.lower()}"] = path.read_bytes()
    text = model_card(model, **about, picture=next(iter(files), None)).content
    if task is not None:
        name, content = benchmark_file(model, about.get("results"), task)
        files[name] = content.encode()
    return dict(files, **{"README.md": text.encode()})


def _draw(
        model: nn.Module,
        picture: Image.Image,
        label_names: Sequence[str] | None,
        data_config: Mapping[str, Any] | None,
) -> bytes:
    """What the model sees in a picture, as PNG."""
    from ..draw import draw_explanation

    if not isinstance(model, S3N):
        raise ValueError("picture can't be drawn for a plain model, which has no peaks: give a file, or none.")
    config = input_config(model, data_config)
    image = create_transform(**config)(read_image(picture, image_mode(config["input_size"][0])))
    image = image.to(next(model.parameters()).device)
    with torch.no_grad():
        figure = draw_explanation(model, image, config["mean"], config["std"], label_names)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


# loading


def load_model(
        name: str | Path,
        *,
        pretrained: bool = True,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Load a model from a folder, from the Hub, or by its name in timm.

    The weights of a folder or a repository are those of one whole model: every tensor of the architecture that
    `config.json` states, of its shape, finite. Files from the Hub are compared with the hashes that it states.

    Args:
        name: a folder that `save` wrote, with or without `local-dir:`; `USER/NAME` or `USER/NAME@REVISION` on the
            Hub, with or without `hf-hub:`; or a name of `timm.list_models()`, such as `s3n_resnet50`.
        pretrained: load the weights; without them the model is newly initialized.
        token: of the Hub; that of `hf auth login` or of the variable HF_TOKEN if left out.
        cache_dir: the Hub's cache, if not the client's own.
        kwargs: further arguments of `timm.create_model`, such as `num_classes`, which makes new classifiers where the
            number differs, or `in_chans`.

    Returns:
        An S3N or a plain timm model, in train mode as timm's are.

    Raises:
        ValueError: there is no such model, or it can't be loaded; the message says why, and the cause is attached.
    """
    try:
        folder = _find_folder(name, token, cache_dir)
        if folder is not None:
            return _load_folder(folder, pretrained, kwargs)
        return timm.create_model(str(name), pretrained=pretrained, cache_dir=cache_dir, **kwargs)
    except Exception as error:  # timm's constructors hardly check: what does not fit fails anywhere and anyhow
        said = " ".join(str(error).split()).rstrip(".")
        kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) and said else f"{type(error).__name__}: "
        said = said if len(said) < 2_000 else f"{said[:2_000]}…"
        raise ValueError(f"{name} cannot be loaded: {kind}{said}.") from error


def _find_folder(name: str | Path, token: str | None, cache_dir: str | Path | None) -> Path | None:
    """The folder of a model's files, brought from the Hub if need be; None for a name of timm's."""
    text = str(name)
    if text.startswith("hf-hub:"):
        return download(text, token=token, cache_dir=cache_dir)
    folder = Path(text.removeprefix("local-dir:")).expanduser()
    if (folder / CONFIG).exists():
        return folder
    if not isinstance(name, Path) and not text.startswith("local-dir:"):
        if "/" not in text and timm.is_model(text):
            return None
        user = text.split("/")[0]
        # a path that starts in a folder that is here is a misspelled path
        if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[^@]+)?", text) and not Path(user).is_dir():
            return download(text, token=token, cache_dir=cache_dir)
    if not folder.is_dir():
        raise ValueError("there is no such folder, and no model of that name in timm; names on the Hub are USER/NAME")
    raise ValueError(f"the folder has no {CONFIG}: name one that s3n_timm.save wrote")


# what a config.json must not hand on to timm: it could load other weights, or these without a check
_RESERVED = {"checkpoint_path", "features_only", *build_model_with_cfg.__annotations__} - {"return", "kwargs"}


def _load_folder(folder: Path, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    path = folder / CONFIG
    check_regular_file(path)
    if path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{CONFIG} has more than {MAX_CONFIG:,} bytes")
    config = json.loads(path.read_text(encoding="utf-8"))
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{CONFIG} states the architecture {architecture!r:.80}, which is no name of timm's")
    if model_entrypoint(architecture).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **kwargs)  # it does what follows itself
    cfg, _, args = load_model_config_from_path(folder)
    check_cfg(cfg, plain=True)
    reserved = [name for name in args if name in _RESERVED]
    if reserved:
        raise ValueError(f"model_args of {CONFIG} must not have {join_names(reserved)}")
    check_numbers("model_args", args)
    if args.get("num_classes", cfg["num_classes"]) != cfg["num_classes"]:
        raise ValueError(f"{CONFIG} states {cfg['num_classes']} classes, and others in its model_args")
    # with as many classes as were saved timm is strict; another number of them comes after that
    classes = kwargs.pop("num_classes", None) if pretrained else None
    pool = {"global_pool": kwargs.pop("global_pool")} if classes is not None and "global_pool" in kwargs else {}
    saved = build_on_meta(lambda: timm.create_model(f"local-dir:{folder}"))
    if pretrained:
        header = read_header(folder)
        stored = sum(tensor.numel() for tensor in header.values())
        # names may be older ones, that timm knows to translate, so that sums alone can be compared before
        if saved is not None and sum(tensor.numel() for tensor in saved.state_dict().values()) > 2 * stored:
            raise ValueError(f"its weights have {stored:,} numbers, too few for {architecture}")
    with explain_damage(folder / WEIGHTS):
        model = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **kwargs)
        if pretrained:
            own = model.state_dict()
            check_values(load_file(folder / WEIGHTS), own)
            check_values(own, own)
    if classes is not None and classes != model.num_classes:
        model.reset_classifier(classes, **pool)
    return model

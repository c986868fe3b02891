"""Models to and from folders and the Hugging Face Hub: safetensors beside the config.json that timm rebuilds them from.

`timm.create_model("local-dir:FOLDER", pretrained=True)` and `timm.create_model("hf-hub:USER/NAME", pretrained=True)`
load what `save` and `push_to_hub` wrote. `load` does the second with every file's hash checked.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..images import read_image
from ..model import S3N
from .card import Source, model_card
from .download import CONFIG, WEIGHTS, download, one_sentence

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


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

    Args:
        model: an S3N, or the plain timm model that it is compared with, unwrapped.
        folder: where to write; made if need be.
        label_names: a name for each class, in order.
        data_config: the preprocessing the model was trained with, as `timm.data.resolve_data_config` gives it.
        state_dict: the weights, where the model itself holds but a shard of them.
        card: writes a model card, `README.md`, as well: the arguments of `s3n_timm.hub.model_card` beyond those
            above, such as `dict(results="evaluation/results.json")`, or `{}`. Its `picture` is the path of a picture,
            or a `PIL.Image` to be drawn as the model, with all three branches, sees it (needs matplotlib).

    Returns:
        The folder.

    Raises:
        ValueError: the backbone has no timm name to rebuild it from, the number of names is not that of classes, or
            the card can't be written from what it is given. Nothing is written then.
        OSError: a file can't be read or written.
    """
    args = model.config.to_dict() if isinstance(model, S3N) else get_model_args(model)
    if args.get("backbone", "") is None:
        raise ValueError("This model's backbone is not one of timm's by name, so config.json could not rebuild it.")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"label_names has {len(label_names)} names for {model.num_classes} classes.")
    beside: dict[str, bytes] = {} if card is None else _card_files(model, card, label_names, data_config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict() if state_dict is None else state_dict
    # safetensors wants contiguous tensors, which a model trained in channels-last does not have
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata=dict(format="pt"))
    save_config_for_hf(
        model,
        str(folder / CONFIG),
        model_config=None if label_names is None else dict(label_names=list(label_names)),
        model_args=dict(args),
        data_config=None if data_config is None else dict(data_config),
    )
    for name, content in beside.items():
        (folder / name).write_bytes(content)
    return folder


def _card_files(
        model: nn.Module,
        card: Mapping[str, Any],
        label_names: Sequence[str] | None,
        data_config: Mapping[str, Any] | None,
) -> dict[str, bytes]:
    """The card and its picture, if it has one, by file name."""
    if label_names is None:
        label_names = getattr(model, "pretrained_cfg", {}).get("label_names")
    about = dict(card, label_names=label_names, data_config=data_config)
    picture = about.pop("picture", None)
    files = {}
    if isinstance(picture, Image.Image):
        files["picture.png"] = _draw(model, picture, label_names, data_config)
    elif picture is not None:
        path = Path(picture)
        if path.suffix.lower() not in PICTURES:
            raise ValueError(f"picture {path} must end in one of {', '.join(PICTURES)}.")
        files[f"picture{path.suffix.lower()}"] = path.read_bytes()
    text = model_card(model, **about, picture=next(iter(files), None)).content
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
    config = resolve_data_config(dict(data_config or {}), model=model)
    image = create_transform(**config)(read_image(picture))
    image = image.to(next(model.parameters()).device)
    with torch.no_grad():
        figure = draw_explanation(model, image, config["mean"], config["std"], label_names)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        *,
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        results: Source | None = None,
        recipe: Source | None = None,
        dataset: str | None = None,
        licence: str = "apache-2.0",
        picture: str | Path | Image.Image | None = None,
        limits: Sequence[str] = (),
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Add model",
) -> str:
    """Write what `save` writes, with a model card, to a repository on the Hub, in one commit.

    The commit holds all files or is not made; a new repository is left empty then. Files of earlier commits that this
    one does not write stay.

    Args:
        model: as for `save`.
        repo_id: USER/NAME; the repository is made if need be.
        label_names: as for `save`.
        data_config: as for `save`.
        state_dict: as for `save`.
        results: as for `s3n_timm.hub.model_card`.
        recipe: as for `s3n_timm.hub.model_card`.
        dataset: as for `s3n_timm.hub.model_card`.
        licence: as for `s3n_timm.hub.model_card`.
        picture: as for `save`.
        limits: as for `s3n_timm.hub.model_card`.
        private: make the repository private; one that exists must be.
        token: of the Hub; that of `hf auth login` or of the variable HF_TOKEN if left out.
        revision: branch to commit to, made if need be; `main` if left out.
        commit_message: first line of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as for `save`, or `private` is asked of a repository that is public.
        PermissionError: the token may not write there.
        ConnectionError: the Hub can't be reached, or the connection broke.
        OSError: the Hub refused for another reason.
    """
    about = dict(results=results, recipe=recipe, dataset=dataset, licence=licence, picture=picture, limits=limits)
    api = HfApi(token=token, library_name="s3n_timm")
    # timm's push_to_hf_hub keeps a card that is there, takes no further files and no state_dict, and writes a pickle
    # unless told otherwise: this commits the very folder that save writes
    with TemporaryDirectory() as folder:
        card = dict(about, name=repo_id)
        save(model, folder, label_names=label_names, data_config=data_config, state_dict=state_dict, card=card)
        with one_sentence(f"Pushing to {repo_id}"):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.model_info(repo_id).private:
                raise ValueError(f"{repo_id} exists and is public: make it private first, or push with private=False.")
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
            )
    return commit.commit_url


def load(name: str, *, token: str | None = None, cache_dir: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """Load a model from the Hub like `timm.create_model("hf-hub:USER/NAME", pretrained=True)`, its files verified.

    Args:
        name: as for `download`.
        token: as for `download`.
        cache_dir: as for `download`.
        kwargs: further arguments of `timm.create_model`, such as `num_classes` or `in_chans`.

    Returns:
        The model.

    Raises:
        ValueError: as for `download`.
        OSError: as for `download`.
    """
    folder = download(name, token=token, cache_dir=cache_dir)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)

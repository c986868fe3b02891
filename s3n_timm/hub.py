"""Models to and from folders: safetensors weights beside the config.json that timm rebuilds them from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from .model import S3N


def save(
        model: nn.Module,
        folder: str | Path,
        *,
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json`; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

    Args:
        model: an S3N, or the plain timm model that it is compared with, unwrapped.
        folder: where to write; made if need be.
        label_names: a name for each class, in order.
        data_config: the preprocessing the model was trained with, as `timm.data.resolve_data_config` gives it.
        state_dict: the weights, where the model itself holds but a shard of them.

    Returns:
        The folder.

    Raises:
        ValueError: the backbone has no timm name to rebuild it from, or the number of names is not that of classes.
    """
    args = model.config if isinstance(model, S3N) else get_model_args(model)
    if args.get("backbone", "") is None:
        raise ValueError("This model's backbone is not one of timm's by name, so config.json could not rebuild it.")
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"label_names has {len(label_names)} names for {model.num_classes} classes.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict() if state_dict is None else state_dict
    # safetensors wants contiguous tensors, which a model trained in channels-last does not have
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
    save_config_for_hf(
        model,
        str(folder / "config.json"),
        model_config=None if label_names is None else dict(label_names=list(label_names)),
        model_args=dict(args),
        data_config=None if data_config is None else dict(data_config),
    )
    return folder

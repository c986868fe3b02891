"""Models to the Hugging Face Hub, each in one commit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor, nn

from .card import Source
from .download import one_sentence
from .saving import save


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

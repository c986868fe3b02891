"""Models to the Hugging Face Hub, each in one commit, and what can be known before whether a push will be allowed."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from torch import Tensor, nn

from ..checkpoints import known_label_names
from ..checkpoints import label_names as names_of
from ..images import expand_path
from .card import Source
from .download import CONFIG, WEIGHTS, one_sentence
from .saving import card_files, load_model, save, write_files


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
        benchmark_task: str | None = None,
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
        benchmark_task: as `task` for `s3n_timm.hub.benchmark_file`.
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
    about = dict(results=results, recipe=recipe, dataset=dataset, licence=licence, picture=picture, limits=limits,
                 benchmark_task=benchmark_task)
    # timm's push_to_hf_hub keeps a card that is there, takes no further files and no state_dict, and writes a pickle
    # unless told otherwise: this commits the very folder that save writes
    with TemporaryDirectory() as folder:
        card = dict(about, name=repo_id)
        save(model, folder, label_names=label_names, data_config=data_config, state_dict=state_dict, card=card)
        return _commit(folder, repo_id, private, token, revision, commit_message)


def push_folder(
        folder: str | Path,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Add model",
        **about: Any,
) -> str:
    """Write the weights and `config.json` of a folder, as they are, and a model card to a repository on the Hub.

    It is one commit, as that of `push_to_hub`.

    Args:
        folder: what `save` wrote, of an S3N or a plain timm model; a card that lies there is not taken over.
        repo_id: as for `push_to_hub`.
        private: as for `push_to_hub`.
        token: as for `push_to_hub`.
        revision: as for `push_to_hub`.
        commit_message: as for `push_to_hub`.
        about: what the card says: `results`, `recipe`, `dataset`, `licence`, `picture`, `limits` and
            `benchmark_task`, as for `push_to_hub`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the folder holds no whole model; or as for `push_to_hub`.
        OSError: as for `push_to_hub`.
    """
    folder = expand_path(folder)
    model = load_model(f"local-dir:{folder}").eval()
    names = names_of(model) if known_label_names(model) else None
    files = card_files(model, dict(about, name=repo_id), names)
    with TemporaryDirectory() as copy:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / name, Path(copy) / name)
        write_files(Path(copy), files)
        return _commit(copy, repo_id, private, token, revision, commit_message)


def _commit(
        folder: str, repo_id: str, private: bool, token: str | None, revision: str | None, commit_message: str,
) -> str:
    api = HfApi(token=token, library_name="s3n_timm")
    with one_sentence(f"Pushing to {repo_id}"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private:
            _refuse_public(api, repo_id)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
        )
    return commit.commit_url


# before a push


def check_repo_id(repo_id: str) -> str:
    """Give a repository's name back if the Hub could have one of that name.

    Raises:
        ValueError: it is no USER/NAME.
    """
    said = "" if repo_id.count("/") == 1 else "one / between the two"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        said = said or "letters, digits, '-', '_' and '.' alone, at most 96, with no '-' or '.' at an end or doubled"
    if said:
        raise ValueError(f"{repo_id!r} must be USER/NAME, the name of a repository on the Hub: {said}.")
    return repo_id


def check_push(repo_id: str, *, private: bool = False, token: str | None = None) -> None:
    """Refuse a push that the Hub would refuse, before the work whose result is to be pushed.

    Asked are the token's role and its user's organizations, and whether the repository is public. What only the Hub
    can decide, such as the scope of a fine-grained token that may write somewhere, is left to the push.

    Args:
        repo_id: as for `push_to_hub`.
        private: as for `push_to_hub`.
        token: as for `push_to_hub`.

    Raises:
        ValueError: `repo_id` is no USER/NAME, or `private` is asked of a repository that is public.
        PermissionError: there is no token, or it may not write there.
        ConnectionError: the Hub can't be reached, or the connection broke.
        OSError: the Hub refused for another reason.
    """
    owner = check_repo_id(repo_id).split("/")[0]
    if token is None and get_token() is None:
        raise PermissionError(
            f"Pushing to {repo_id} needs a token that may write: log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token, library_name="s3n_timm")
    with one_sentence(f"Asking the Hub who may push to {repo_id}"):
        who = api.whoami()
        if private:
            with suppress(RepositoryNotFoundError):  # the push makes it
                _refuse_public(api, repo_id)
    access = (who.get("auth") or {}).get("accessToken") or {}
    role = access.get("role")
    if role == "fineGrained":
        scopes = (access.get("fineGrained") or {}).get("scoped")
        if scopes is not None and not any("repo.write" in (scope.get("permissions") or ()) for scope in scopes):
            role = "read"
    if role == "read":
        raise PermissionError(
            f"Pushing to {repo_id} needs a token that may write, and that of {who.get('name')} may only read: make one "
            "at https://huggingface.co/settings/tokens and log in with `hf auth login`."
        )
    roles = {each.get("name"): each.get("roleInOrg") for each in who.get("orgs") or ()}
    if role == "write" and owner != who.get("name") and roles.get(owner, "read") == "read":
        raise PermissionError(
            f"Pushing to {repo_id} is not for the token of {who.get('name')}, who may not write in {owner}: name a "
            "repository of that user or of an organization that lets the user write."
        )


def _refuse_public(api: HfApi, repo_id: str) -> None:
    if not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: make it private first, or don't ask for a private one.")

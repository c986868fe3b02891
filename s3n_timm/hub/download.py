"""Files of a model from the Hugging Face Hub, each compared with the hash that the Hub states; its errors in words."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from timm.models._hub import hf_split

from ..checkpoints import WEIGHTS

_logger = logging.getLogger(__name__)

CONFIG = "config.json"


def download(name: str, *, token: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Bring a model from the Hub into the cache and compare every file with the hash that the Hub states for it.

    The Hub's client compares sizes alone, so that bytes which changed on their way, or on the disk, would load. A file
    that differs is removed from the cache. Files that are there already are checked as well, offline too.

    Args:
        name: USER/NAME, or USER/NAME@REVISION with a branch, a tag or a commit; `hf-hub:` may precede it.
        token: of the Hub; that of `hf auth login` or of the variable HF_TOKEN if left out.
        cache_dir: the cache, if not the client's own.

    Returns:
        The folder of one commit with `config.json` and `model.safetensors`.

    Raises:
        ValueError: `name` is no such name.
        PermissionError: the repository does not exist, or the token may not read it; the Hub does not tell which.
        FileNotFoundError: the revision or a file does not exist, or, offline, is not in the cache.
        ConnectionError: the Hub can't be reached, or the connection broke.
        OSError: a file came down short or with another hash, or the Hub refused for another reason.
    """
    if name.count("@") > 1:
        raise ValueError(f"{name!r} must be USER/NAME or USER/NAME@REVISION.")
    repo_id, revision = hf_split(name.removeprefix("hf-hub:"))
    options: dict[str, Any] = dict(token=token, cache_dir=cache_dir, library_name="s3n_timm")
    with one_sentence(f"Loading {name}"):
        config = Path(hf_hub_download(repo_id, CONFIG, revision=revision, **options))
        commit = config.parent.name  # so that both files are of one commit
        weights = Path(hf_hub_download(repo_id, WEIGHTS, revision=commit, **options))
        for path in (config, weights):
            _verify(path, repo_id, commit, token)
    return config.parent


def verified_cfg(pretrained_cfg: Any, cache_dir: str | Path | None = None) -> Any:
    """Point the config of a model on the Hub to its verified files.

    Args:
        pretrained_cfg: what `timm.create_model` hands to a model's entry point.
        cache_dir: as for `download`.

    Returns:
        For weights that `hf-hub:` names, a config that loads them from the cache's folder; else what was given.

    Raises:
        OSError: as for `download`.
    """
    if not isinstance(pretrained_cfg, Mapping) or pretrained_cfg.get("source") != "hf-hub":
        return pretrained_cfg
    folder = download(pretrained_cfg["hf_hub_id"], cache_dir=cache_dir)
    return dict(pretrained_cfg, source="local-dir", file=str(folder))


def _verify(path: Path, repo_id: str, commit: str, token: str | None) -> None:
    """Compare a cached file with its hash, and remove it if it differs."""
    blob = path.resolve()
    expected: str | None = blob.name  # the cache names a file by the hash that the Hub states: huggingface.co/docs
    if blob == path.absolute() or path.name == blob.name:  # no link: a file system without them, so ask again
        try:
            url = hf_hub_url(repo_id, path.name, revision=commit)
            expected = get_hf_file_metadata(url, token=token).etag
        except OfflineModeIsEnabled:
            _logger.warning("%s of %s can't be verified offline in a cache without links.", path.name, repo_id)
            return
    with blob.open("rb") as file:
        if expected and re.fullmatch("[0-9a-f]{64}", expected):
            kind, actual = "sha256", sha_fileobj(file).hex()
        elif expected and re.fullmatch("[0-9a-f]{40}", expected):
            kind, actual = "git's sha1", git_hash(file.read())
        else:
            _logger.warning("%s of %s can't be verified: the server states no hash of it.", path.name, repo_id)
            return
    if actual != expected:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise _Damaged(
            f"{path.name} has another content than the Hub states ({kind} {actual[:12]}… instead of {expected[:12]}…) "
            "and was removed from the cache: load it again, and if that repeats, the repository itself is damaged."
        )


class _Damaged(OSError):
    """A file with a wrong hash."""


@contextmanager
def one_sentence(doing: str) -> Iterator[None]:
    """Turn what the Hub's client raises into built-in errors of one sentence each."""
    try:
        yield
    except _Damaged as error:
        raise OSError(f"{doing} failed: {error}") from error
    except Exception as error:
        root: BaseException = error
        # the client wraps what went wrong while it uploads, or while it looks for a file
        while isinstance(root, (RuntimeError, LocalEntryNotFoundError)) and root.__cause__ is not None:
            root = root.__cause__
        kind, reason = _explain(root)
        if isinstance(error, LocalEntryNotFoundError) and isinstance(root, OfflineModeIsEnabled):
            kind, reason = _explain(LocalEntryNotFoundError(""))
        if kind is None:
            raise
        raise kind(f"{doing} failed: {reason}.") from error


def _explain(error: BaseException) -> tuple[type[OSError] | None, str]:
    """A built-in error and the reason in words; None for what is not the Hub's."""
    if isinstance(error, RepositoryNotFoundError):
        return PermissionError, (
            "there is no such repository, or it is private and the token in use, if any, may not read it; check the "
            "name, or log in with `hf auth login`, or give token="
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError, "the repository has no such revision; name a branch, a tag or a whole commit"
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError, "the client is offline; unset HF_HUB_OFFLINE"
    if isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError, "the client is offline and the cache does not hold all of it; go online"
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError, f"the repository lacks {CONFIG} or {WEIGHTS}, which s3n_timm.push_to_hub writes"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or "").split()).rstrip(".")
        if status in (401, 403):
            return PermissionError, (
                f"the token in use may not do that ({said or status}); log in with `hf auth login` as someone who may, "
                "or give token="
            )
        return OSError, f"the Hub answered with status {status}{f' ({said})' if said else ''}; try again later"
    # the HTTP library, which has changed with the versions of huggingface_hub
    if any(kind.__module__.split(".")[0] in ("httpx", "httpx2", "requests") for kind in type(error).__mro__):
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        return ConnectionError, f"the connection to the Hub broke ({said}); try again, nothing half is kept"
    if isinstance(error, OSError) and error.errno is None and "Consistency check" in str(error):
        return OSError, "a file came down shorter or longer than the Hub states; try again, nothing half is kept"
    return None, ""

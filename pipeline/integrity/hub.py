"""Repositories of the Hugging Face hub: `hf://owner/name` or `hf://owner/name@revision`.

huggingface_hub is an optional dependency (`pip install 'jkoflow[hub]'`), imported when a name is
one of the hub. A repository is of unknown origin, so its size is bounded before its download.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.integrity.limits import require_size
from pipeline.integrity.reason import reason_of

#: a `Path` of the name has one slash less
_NAME = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_START = re.compile("^hf:/{1,2}")
_SECONDS = 20.0
#: folder of the downloads; None is that of huggingface_hub
_CACHE: Path | None = None


def is_hub(name: str | Path) -> bool:
    """Return whether a name is that of a repository of the hub."""
    return str(name).startswith("hf:/")


def download(name: str | Path, patterns: Sequence[str], kind: str = "model") -> Path:
    """Download the files of a repository that match patterns; return their folder in hub's cache.

    The kind of a repository is `model` or `dataset`.

    Without a network, or with `HF_HUB_OFFLINE`, the files of an earlier download are used.

    Raises:
        ValueError: the name is malformed, the repository does not exist, cannot be reached or
            exceeds the limit, or huggingface_hub is missing.
    """
    repository, revision = split(name)
    hub = library()
    options: dict[str, Any] = {"allow_patterns": list(patterns), "endpoint": endpoint()}
    options["repo_type"] = kind
    options["cache_dir"] = _CACHE
    try:
        _check_size(repository, revision, patterns, kind)
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of many libraries
        try:
            return Path(
                hub.snapshot_download(
                    repository, revision=revision, local_files_only=True, **options
                )
            )
        except Exception:  # noqa: BLE001
            raise _unreachable(repository, error) from error
    try:
        return Path(hub.snapshot_download(repository, revision=revision, **options))
    except Exception as error:  # noqa: BLE001
        raise _unreachable(repository, error) from error


def _check_size(
    repository: str, revision: str | None, patterns: Sequence[str], kind: str
) -> None:
    """Check the size of the files of a repository."""
    info = library().HfApi(endpoint=endpoint()).repo_info(
        repository, repo_type=kind, revision=revision, timeout=_SECONDS, files_metadata=True
    )  # fmt: skip
    files = [f for f in info.siblings or [] if any(fnmatch(f.rfilename, p) for p in patterns)]
    require_size(sum(file.size or 0 for file in files), f"hf://{repository}")


def upload(folder: Path, name: str, private: bool) -> str:
    """Upload a folder as a repository, which is created if it is absent; return its address.

    Raises:
        ValueError: the name is malformed, or the hub refuses it or cannot be reached.
    """
    repository, revision = split(name if is_hub(name) else f"hf://{name}")
    hub = library()
    api = hub.HfApi(endpoint=endpoint())
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision,
            commit_message="Upload a jkoflow run",
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of many libraries
        raise _unreachable(repository, error) from error
    return str(url)


def split(name: str | Path) -> tuple[str, str | None]:
    """Split a name into OWNER/NAME and the revision, if it has one.

    Raises:
        ValueError: the name is malformed.
    """
    match = _NAME.fullmatch(str(name))
    if match is None or ".." in str(name):
        given = _START.sub("hf://", str(name))
        raise ValueError(
            f"the name {given} is none of the hub; expected hf://owner/name or "
            "hf://owner/name@revision; correct it"
        )
    return match[1], match[2]


def endpoint() -> str | None:
    """Return the address of the hub, if `HF_ENDPOINT` sets one."""
    return os.environ.get("HF_ENDPOINT")


def library() -> Any:  # noqa: ANN401 - an untyped library
    """Import huggingface_hub; a ValueError says how to install it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            "the huggingface_hub library is not installed; expected it for hf:// names; run: "
            "pip install 'jkoflow[hub]'"
        ) from error
    return huggingface_hub


def _unreachable(repository: str, error: Exception) -> ValueError:
    """Describe a failed request."""
    reason = reason_of(error)
    return ValueError(
        f"the repository {repository} of the hub cannot be used ({reason}); check the name, the "
        "network and `hf auth login`"
    )

"""Where the weights of a name lie: in the package, in a file, or on the Hugging Face hub."""

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from .. import __version__
from .safe_reading import WeightsError, WeightsFile, first_bytes, one_line

WEIGHTS = Path(__file__).parent / "weights"
_HUB = "hf-hub:"
_SOURCE = re.compile(r"hf-hub:(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?")


def bundled_index() -> dict[str, Any]:
    """What ships with litzoo.

    Returns:
        Name -> `file`, `sha256` and `card`; empty where none are installed.

    Raises:
        WeightsError: if the index is broken.

    Example:
        >>> bundledbundled_index()["pointnet_furniture"]["file"]
        'pointnet_furniture.safetensors'
    """
    path = WEIGHTS / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WeightsError(f"the index of the trained models, {path}, is not JSON ({one_line(error, 120)}): reinstall litzoo") from error
    if not isinstance(index, dict):
        raise WeightsError(f"the index of the trained models, {path}, is not a table of names: reinstall litzoo")
    return index


def is_on_hub(source: str | os.PathLike[str]) -> bool:
    """Whether a source names a repository of the hub.

    Args:
        source: what `find_weights` takes.

    Returns:
        True for `hf-hub:...`.

    Example:
        >>> is_on_hub("hf-hub:me/pointnet"), is_on_hub("pointnet.safetensors")
        (True, False)
    """
    return isinstance(source, str) and source.startswith(_HUB)


def find_weights(source: str | os.PathLike[str]) -> WeightsFile:
    """Find the file of some weights; those that ship are checked against their digest, those of the hub are downloaded into its cache.

    Args:
        source: a bundled name, the path of a file, which need not exist, or `hf-hub:owner/repo[@revision][:file]`.

    Returns:
        The file.

    Raises:
        WeightsError: if there is no such name, a bundled file is damaged, or the hub does not give it.

    Example:
        >>> find_weights("pointnet_furniture").path.name
        'pointnet_furniture.safetensors'
    """
    if isinstance(source, str) and is_on_hub(source):
        return _download(source)
    path = Path(source).expanduser()
    file = WeightsFile(path, os.fspath(source), "copy it again, or export its checkpoint again")
    if not isinstance(source, str) or path.name != source or path.suffix in (".safetensors", ".ckpt"):
        return file
    index = bundled_index()
    if source in index:
        return _bundled(source, index[source])
    if path.is_file():
        return file
    if ":" in source:
        raise WeightsError(f"no source {source!r} of weights; those outside litzoo are timm:NAME and hf-hub:owner/repo")
    close = difflib.get_close_matches(source, index, n=1, cutoff=0.5)
    known = f"there are: {', '.join(sorted(index))}" if index else "this installation holds none: give the path of a .safetensors file"
    raise WeightsError(f"no trained model {source!r}; " + (f"did you mean {close[0]}?" if close else known))


def _bundled(name: str, entry: Any) -> WeightsFile:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or not isinstance(entry.get("sha256"), str):
        raise WeightsError(f"the entry of {name!r} in {WEIGHTS / 'index.json'} lacks its file or its sha256: reinstall litzoo")
    place = WeightsFile(WEIGHTS / entry["file"], f"the trained model {name!r} ({WEIGHTS / entry['file']})", "reinstall litzoo")
    if not place.path.is_file():
        raise WeightsError(f"{place.label} is missing: {place.cure}")
    first_bytes(place)
    with place.path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry["sha256"]:
        raise WeightsError(
            f"{place.label} is damaged or replaced (its sha256 is {found[:12]}..., expected {entry['sha256'][:12]}...): {place.cure}"
        )
    return place


def _download(source: str) -> WeightsFile:
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise WeightsError(
            f"{source} is not an address on the hub: write hf-hub:owner/repo, hf-hub:owner/repo@revision or hf-hub:owner/repo:file"
        )
    repo, revision, file = match["repo"], match["revision"], match["file"] or "model.safetensors"
    if not file.endswith(".safetensors"):
        raise WeightsError(f"{source} names a file that is not a .safetensors file; only those are loaded from the hub")

    from huggingface_hub import errors, hf_hub_download

    try:
        path = hf_hub_download(repo, file, revision=revision, library_name="litzoo", library_version=__version__)
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise WeightsError(
            f"{source} is not in the local cache and the hub cannot be reached: "
            "check the connection (and that HF_HUB_OFFLINE is not set), or download the file and give its path"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{source}: the hub has no repository {repo}, or it is private: check the spelling, or log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(
            f"{source}: the repository {repo} has no revision {revision!r}; name a branch, a tag or a commit of it"
        ) from error
    except errors.EntryNotFoundError as error:
        raise WeightsError(f"{source}: the repository {repo} has no file {file}; name the right one as hf-hub:{repo}:FILE") from error
    except Exception as error:  # errors of its HTTP client get through, too
        raise WeightsError(f"{source} cannot be fetched from the hub: {one_line(error, 200)}") from error
    return WeightsFile(Path(path), source, f"delete {path} to have it downloaded again")

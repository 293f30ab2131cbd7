"""SAEs on the Hugging Face hub: which files of a repository are fetched, and from which commit.

Ids are judged before a socket opens. Only safetensors, npz and json files are fetched, into the hub's own cache; a
connection that breaks is resumed where it broke. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they
always do. No database.
"""

from __future__ import annotations

import difflib
import importlib.util
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import yaml

from app.errors import AtlasError, BadFile, BadInput, NotFound, TooLarge, Unavailable
from app.settings import Settings

Report = Callable[[float, str], None]

PATTERNS = (".safetensors", ".npz", ".json")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,-]{0,127}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
NEURONPEDIA_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}/(\d{1,4})-([a-z0-9][a-z0-9_-]{0,63})")


@dataclass(frozen=True)
class Place:
    """Where an SAE lies on the hub."""

    repo: str
    subfolder: str = ""
    revision: str = ""
    """Branch, tag or commit; empty is the repository's main branch."""
    neuronpedia_id: str = ""
    release: str = ""
    """SAELens' name of the release, where it was asked for by that."""
    norm_scale: float = 0.0
    """What SAELens multiplies its input by, where its list says so; 0 where it does not."""
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What SAELens' list puts in place of what the SAE's own config says."""

    @property
    def where(self) -> str:
        return f"{self.repo}/{self.subfolder}".rstrip("/")


def neuronpedia_id(config: Mapping[str, Any], wanted: Place | None = None) -> dict[str, str]:
    """Return an SAE's id on Neuronpedia for its origin, as SAELens' list or its own config tells it, or nothing."""
    known = (wanted.neuronpedia_id if wanted else "") or config["metadata"].get("neuronpedia_id")
    return {"neuronpedia_id": known} if isinstance(known, str) and NEURONPEDIA_ID.fullmatch(known) else {}


class Fetched(NamedTuple):
    """A directory of fetched files and the commit they are of."""

    directory: Path
    commit: str


def place(repo: str, subfolder: str = "", revision: str = "") -> Place:
    """Return a usable place. Raises BadInput before anything is opened or fetched."""
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise BadInput(f"{repo[:200]!r} is no hub id; write owner/name, such as EleutherAI/sae-pythia-70m-32k.")
    parts = PurePosixPath(subfolder).parts if subfolder else ()
    if len(parts) > 8 or not all(_PART.fullmatch(part) and ".." not in part for part in parts):
        raise BadInput(f"{subfolder[:200]!r} is no folder of a repository; write names joined by /.")
    if revision and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise BadInput(f"{revision[:100]!r} is no revision; write a branch, a tag or a commit.")
    return Place(repo, "/".join(parts), revision)


def fetch(settings: Settings, wanted: Place, report: Report) -> Fetched:
    """Bring the files of an SAE into the hub's cache, or find them there when HF_HUB_OFFLINE is set.

    Raises NotFound for a repository or revision that is not there, BadFile for one without safetensors or npz,
    TooLarge, and Unavailable when the hub cannot be reached. Files that are whole in the cache are not fetched twice.
    """
    from huggingface_hub import constants, errors

    # Whichever HTTP library this version of huggingface_hub uses, its errors' root is a base of the hub's own.
    network_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    try:
        return _cached(wanted) if constants.HF_HUB_OFFLINE else _download(settings, wanted, report)
    except errors.RevisionNotFoundError:
        raise NotFound(f"{wanted.repo} has no revision {wanted.revision or 'main'!r}.") from None
    except errors.GatedRepoError:
        raise NotFound(f"{wanted.repo} is gated; accept its terms on the hub and set HF_TOKEN.") from None
    except errors.RepositoryNotFoundError:
        raise NotFound(f"{wanted.repo} is not on the hub, or is private; set HF_TOKEN for the latter.") from None
    except errors.LocalEntryNotFoundError:
        raise Unavailable(f"HF_HUB_OFFLINE is set, and {wanted.where} is not in the hub's cache.") from None
    except network_error as error:
        raise Unavailable(f"{constants.ENDPOINT} cannot be reached: {str(error).splitlines()[0][:200]}.") from None


def _download(settings: Settings, wanted: Place, report: Report) -> Fetched:
    from huggingface_hub import HfApi, hf_hub_download

    report(0.0, f"Asking for {wanted.repo}")
    info = HfApi().model_info(wanted.repo, revision=wanted.revision or None, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    names = _chosen(wanted, list(sizes))
    total = sum(sizes[name] for name in names)
    if total > settings.max_sae_bytes:
        raise TooLarge(
            f"{wanted.where} takes {total:,} bytes; SAE_ATLAS_MAX_SAE_BYTES allows {settings.max_sae_bytes:,}."
        )
    bar = _bar(report, total)
    paths = [hf_hub_download(wanted.repo, name, revision=wanted.revision or None, tqdm_class=bar) for name in names]
    root = Path(paths[0]).parents[len(PurePosixPath(names[0]).parts) - 1]
    if any(not Path(path).is_relative_to(root) for path in paths) or root.name != info.sha:
        raise AtlasError(f"{wanted.repo} changed while it was fetched; run the command again.")
    return Fetched(root / wanted.subfolder, root.name)


def _cached(wanted: Place) -> Fetched:
    from huggingface_hub import snapshot_download

    root = Path(snapshot_download(wanted.repo, revision=wanted.revision or None, local_files_only=True))
    _chosen(wanted, [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()])
    return Fetched(root / wanted.subfolder, root.name)


def _chosen(wanted: Place, names: list[str]) -> list[str]:
    """The files of the folder itself, and Llama Scope's checkpoints in it. Raises BadFile naming what is there."""
    prefix = f"{wanted.subfolder}/" if wanted.subfolder else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    own = [name for name in inside if "/" not in name or name.startswith("checkpoints/")]
    chosen = [name for name in own if name.endswith(PATTERNS)]
    if any(name.endswith((".safetensors", ".npz")) for name in chosen):
        return [prefix + name for name in sorted(chosen)]
    folders = sorted({name.partition("/")[0] for name in inside if "/" in name})
    holds = ", ".join(sorted(own)[:6]) or "no files"
    more = f" Its folders are {', '.join(folders[:8])}{', ...' if len(folders) > 8 else ''}." if folders else ""
    way = (
        "pickles are not fetched. Download that folder yourself and add the directory: its ae.pt is then opened by a "
        f"process of its own that accepts tensors alone (hf download {wanted.repo}, then sae-atlas sae add DIRECTORY)."
        if "ae.pt" in own
        else "pickles are not fetched."
    )
    raise BadFile(f"{wanted.where} holds no .safetensors or .npz weights, but {holds}; {way}{more}")


def _bar(report: Report, total: int) -> Any:
    """A tqdm class that prints nothing and reports the bytes of all files together."""
    from tqdm import tqdm

    done = [0]

    class Bar(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})
            self.update(0)
            done[0] += int(kwargs.get("initial") or 0)  # what an earlier run had fetched

        def update(self, n: float | None = 1) -> bool | None:
            done[0] += int(n or 0)
            report(min(done[0] / max(total, 1), 1.0), f"Fetched {done[0]:,} of {total:,} bytes")
            return super().update(n)

    return Bar


# Releases of SAELens ---------------------------------------------------------------------------------------------

_READABLE = (None, "sparsify", "gemma_2", "gemma_2_transcoder", "gemma_3", "llama_scope")
"""SAELens' names for the formats that app.formats reads; its other converters unpickle or build on such files."""


def release(name: str, sae_id: str) -> Place:
    """Return where SAELens' list says that an SAE lies. Its loaders are not run. Raises NotFound, BadFile."""
    releases = _releases()
    if name not in releases:
        near = difflib.get_close_matches(name, releases, 3, 0.4)
        raise NotFound(f"SAELens lists no release {name[:100]!r}. Near are {', '.join(near) or 'none'}.")
    entry = cast(dict[str, Any], releases[name])
    saes = {str(sae["id"]): cast(dict[str, Any], sae) for sae in entry["saes"]}
    if sae_id not in saes:
        near = difflib.get_close_matches(sae_id, saes, 3, 0.4) or list(saes)[:3]
        raise NotFound(f"{name} has no SAE {sae_id[:100]!r}, but {len(saes)}: {', '.join(near)}, ...")
    if entry.get("conversion_func") not in _READABLE:
        raise BadFile(
            f"SAELens reads {name} with its converter {entry['conversion_func']!r}; that format is not known here. "
            "Load it with sae-lens, save it by SAE.save_model, and add that directory."
        )
    sae = saes[sae_id]
    found = place(entry["repo_id"], str(sae["path"]))
    return Place(
        repo=found.repo,
        subfolder=found.subfolder,
        neuronpedia_id=str(sae.get("neuronpedia") or ""),
        release=f"{name} {sae_id}",
        norm_scale=float(sae.get("norm_scaling_factor") or 0),
        overrides={**(entry.get("config_overrides") or {}), **(sae.get("config_overrides") or {})},
    )


def _releases() -> dict[str, Any]:
    """Read the list that comes with sae-lens, without importing it: that would import torch."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or spec.origin is None:
        raise AtlasError("--saelens needs SAELens' list of releases: pip install sae-lens.")
    with (Path(spec.origin).parent / "pretrained_saes.yaml").open(encoding="utf-8") as file:
        return yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe

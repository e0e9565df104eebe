"""Weights of Hugging Face, which the login node brings into the shared cache, so that compute nodes ask nobody.

    folder = cache_folder(cluster, environment)              # where the job will look
    found = cached("google/vit-base-patch16-224", folder)    # the folder of a whole snapshot, or None
    fetch("google/vit-base-patch16-224", folder, print)      # with a progress bar; raises Unreachable

Looking needs no library: the cache is folders and links. huggingface_hub is imported by `fetch` alone.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import disks
from launch.cluster import Cluster, filled_in

ASK_S = 10.0
"""For an answer of the hub; a login node without internet often drops packets instead of refusing them."""
_TRUE = {"1", "ON", "YES", "TRUE"}
"""As huggingface_hub reads its variables."""


class Unreachable(RuntimeError):
    """The weights cannot be had from here; the text says why in one line."""


def cache_folder(cluster: Cluster | None, env: Mapping[str, str]) -> Path | None:
    """The folder of models that huggingface_hub uses in the job; None if a variable in hf_home is not set here.

    `env`: that of the shell that submits, which the job has too, unless the profile says export: none.
    """
    home = env.get("HOME") or str(Path.home())
    if cluster and cluster.export == "none":
        env = {"HOME": home, **{name: str(value) for name, value in cluster.env.items()}}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return Path(env[name]).expanduser()
    if cluster and cluster.hf_home:
        place = filled_in(cluster.hf_home, env)
        return Path(place, "hub") if place else None
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser() / "hub"
    return Path(env.get("XDG_CACHE_HOME") or f"{home}/.cache", "huggingface", "hub")


def is_offline(env: Mapping[str, str]) -> bool:
    """Whether the shell forbids the hub (HF_HUB_OFFLINE, or its older name)."""
    return any(env.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def cached(model: str, folder: Path) -> Path | None:
    """The snapshot of a model that is whole as far as a run needs it; None if it is not there."""
    home = folder / f"models--{model.replace('/', '--')}"
    try:
        snapshot = home / "snapshots" / (home / "refs" / "main").read_text(encoding="utf-8").strip()
        names = [path.name for path in snapshot.iterdir() if path.exists()]  # links, whose ends may be missing
    except (OSError, UnicodeDecodeError):
        return None
    return snapshot if "config.json" in names and _has_weights(snapshot, names) else None


def _has_weights(snapshot: Path, names: Sequence[str]) -> bool:
    if "model.safetensors" in names or "pytorch_model.bin" in names:
        return True
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index in names:
            try:
                parts = json.loads((snapshot / index).read_text(encoding="utf-8"))["weight_map"].values()
            except (OSError, ValueError, KeyError, AttributeError):
                continue
            return set(parts) <= set(names)
    return False


def needed(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that a run reads: configuration, pixels, and one set of weights."""
    wanted = [name for name in ("config.json", "preprocessor_config.json") if name in names]
    for single, index, ending in (
        ("model.safetensors", "model.safetensors.index.json", ".safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin"),
    ):
        if single in names:
            return [*wanted, single]
        if index in names:
            stem = single.rpartition(".")[0]
            return [*wanted, index, *(n for n in names if n.startswith(f"{stem}-") and n.endswith(ending))]
    return wanted


def fetch(model: str, folder: Path, say: Callable[[str], None], endpoint: str | None = None) -> Path:
    """Bring what a run needs of a model into the cache, with a progress bar on a terminal; returns its snapshot.

    Raises Unreachable for a hub that does not answer in ASK_S seconds, a model that it does not have or does not give.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        hub = huggingface_hub.HfApi(endpoint=endpoint)
        about: Any = hub.model_info(model, timeout=ASK_S, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in about.siblings or []}
        names = needed(list(sizes))
        if not any(name.endswith((".safetensors", ".bin")) for name in names):
            raise Unreachable(f"{model} has no weights that transformers reads (model.safetensors, pytorch_model.bin)")
        size, room = sum(sizes[name] for name in names), disks.free(folder).bytes
        if room is not None and room < size:
            raise Unreachable(f"{folder} has {room / 1e9:.2f} GB, and it takes {size / 1e9:.2f} GB")
        say(f"fetching {model} into {folder}: {size / 1e9:.2f} GB, once for all runs")
        # Of the branch, not of its commit: the job looks the model up as `main`.
        place = huggingface_hub.snapshot_download(
            model, cache_dir=folder, allow_patterns=names, etag_timeout=ASK_S, endpoint=endpoint
        )
    except Unreachable:
        raise
    except KeyboardInterrupt:
        raise Unreachable("interrupted; the same command goes on where it was") from None
    except Exception as error:  # of httpx, urllib3 and the hub's own: no common ancestor
        raise Unreachable(_brief(error)) from None
    return Path(place)


_PLAINLY = {
    "RepositoryNotFoundError": "there is no such model, or you may not see it: `hf auth login`",
    "GatedRepoError": "it is given out only to who accepts its terms on its page, and `hf auth login`",
    "HFValidationError": "that is no name of a model: ORG/NAME",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
}


def _brief(error: Exception) -> str:
    """In one line, without the help that follows in the next ones."""
    if said := _PLAINLY.get(type(error).__name__):
        return said
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__

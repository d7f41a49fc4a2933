"""Models of the Hugging Face Hub by name, hf://org/name[@revision]: weights, configs and tokenizers, nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

SCHEME = "hf://"
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""What a model directory may hold; never a pickle or code."""
NEVER = ("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "*/*")

_NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def is_remote(model: str | Path) -> bool:
    """Whether this names a model of the hub. (`Path` makes hf:/ of hf://.)"""
    return str(model).startswith(("hf:/", SCHEME))


def resolve(model: str | Path) -> Path:
    """The directory of a model: the path itself, or of hf://org/name[@revision] its copy in the hub's cache, fetched
    if it is not there. Without a network what the cache holds is taken.

    Raises:
        ValueError: a name of another form, or a repository or revision that is unknown or closed to this user.
        ModuleNotFoundError: huggingface_hub is not installed.
        FileNotFoundError: the hub cannot be reached and the cache does not hold the model.
    """
    if not is_remote(model):
        return Path(model)
    name = re.sub(r"^hf:/+", SCHEME, str(model))
    found = _NAME.fullmatch(name)
    if found is None or ".." in name:
        raise ValueError(
            f"{str(model)!r} names no model of the hub: expected hf://org/name or hf://org/name@revision"
        )
    folder = Path(_download(name, found["repo"], found["revision"]))
    print(f"{name} is commit {folder.name}", file=sys.stderr)
    return folder


def _download(name: str, repo: str, revision: str | None) -> str:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ModuleNotFoundError(f"{name} needs the package huggingface_hub: pip install 'coterie[hf]'") from None
    options: dict[str, Any] = {"allow_patterns": list(PATTERNS), "ignore_patterns": list(NEVER)}
    try:
        return huggingface_hub.snapshot_download(repo, revision=revision, **options)
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is open only to those its owners admit: ask on its page, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"the hub has no model {repo}, or it is private: check the name, or `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(
            f"the hub's model {repo} has no revision {revision!r}: give a branch, a tag or a commit"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise FileNotFoundError(f"the hub cannot be reached and its cache does not hold all of {name}") from None
    except Exception as error:  # a lost connection is of the HTTP library's own kind
        raise FileNotFoundError(f"{name} could not be fetched: {' '.join(str(error).split())[:300]}") from None

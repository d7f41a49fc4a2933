"""What a run was made with: versions, git commit, machine, command. Written beside its config."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import __version__

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "megatron-core", "tyro")


def describe_environment(world: int = 1) -> dict[str, Any]:
    """Facts as JSON holds them; what cannot be found out is null."""
    return {
        "coterie": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _changed(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "world": world,
        "command": sys.argv,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Of this package's checkout; None when it was installed from a wheel, or there is no git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _changed() -> int | None:
    """How many tracked files differ from the commit."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else len(status.splitlines())

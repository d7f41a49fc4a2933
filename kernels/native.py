"""The CPU kernels of `native/`: compiled at first use by the system's C++ compiler, kept, and called through ctypes.

They serve inference alone. Without a compiler, or with COTERIE_NATIVE=0, torch does the work and the log says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backend import is_torch_on_cpu

FOLDER = Path(__file__).parent / "native"
_LIMIT_S = 120  # of one call of the compiler
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp"]
# No contraction: one expression must round alike wherever it is inlined.
_FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-ffp-contract=off"]
_KINDS = (torch.bfloat16, torch.float32)

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_why: str | None = None
_tried = False
_heard: Listener | None = None


def ready(*tensors: Tensor) -> bool:
    """Whether the library can take these operands: inference mode, contiguous bf16 or fp32 on the CPU, and no other
    backend was forced."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return False
    for t in tensors:
        if not t.is_cpu or t.dtype not in _KINDS or not t.is_contiguous():
            return False
    return (_library is not None or library() is not None) and is_torch_on_cpu()


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where torch has to do the work: see `why_not`. The first call may compile."""
    global _library, _why, _tried
    if not _tried:
        with _lock:
            if not _tried:
                try:
                    _library = _open()
                except (OSError, RuntimeError) as error:
                    _why = str(error)
                    _log.info("CPU kernels: torch does the work, as %s", _why)
                _tried = True
    return _library


def why_not() -> str | None:
    """Why there is no library, as one sentence; None where there is one."""
    library()
    return _why


class Function:
    """A C function of the library. Pointers are passed as integers (`Tensor.data_ptr`), None is a null pointer."""

    __slots__ = ("_entry",)

    def __init__(self, entry: Any) -> None:
        self._entry = entry

    def __call__(self, *args: float | None) -> Any:
        result = self._entry(*args)
        if _heard is not None:
            _heard(self._entry, args)
        return result

    @property
    def restype(self) -> type | None:
        """None: it returns nothing. `ctypes.c_int`: 0 for success."""
        return self._entry.restype

    @restype.setter
    def restype(self, kind: type | None) -> None:
        self._entry.restype = kind


def function(name: str, *kinds: type) -> Function:
    """The C function `name` of the library, which must be there, with the types of its arguments."""
    handle = library()
    assert handle is not None
    entry = getattr(handle, name)
    entry.argtypes, entry.restype = kinds, None
    return Function(entry)


Listener = Callable[[Callable[..., Any], tuple[float | None, ...]], None]


@contextlib.contextmanager
def hear(listener: Listener) -> Iterator[None]:
    """Tells `listener` of every call of the library in the block, once it is done: one block at a time."""
    global _heard
    assert _heard is None
    _heard = listener
    try:
        yield
    finally:
        _heard = None


_log = logging.getLogger("coterie")


def _open() -> ctypes.CDLL:
    """Loads the kept library, or compiles it.

    Raises:
        OSError, RuntimeError: it cannot be had, and why.
    """
    if os.environ.get("COTERIE_NATIVE", "1") == "0":
        raise RuntimeError("COTERIE_NATIVE=0 says so")
    if sys.platform == "win32":
        raise RuntimeError("Windows is not supported")
    command = _compiler()
    file = _cache_folder() / f"{_key(command)}.so"
    if file.exists():
        _check_owner(file)
        with contextlib.suppress(OSError):  # damaged: it is compiled again
            return _load(file)
    started = time.perf_counter()
    _compile(command, file)
    _log.info("CPU kernels compiled in %.1f s to %s", time.perf_counter() - started, file)
    return _load(file)


def _load(file: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(file), mode=os.RTLD_NOW)


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        if not command or shutil.which(command[0]) is None:
            raise RuntimeError(f"CXX={named} is no command here")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("there is no C++ compiler (c++, g++, clang++ or $CXX)")


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.cpp"))


def _key(command: list[str]) -> str:
    """Names the library by all that it is made of."""
    parts = [_run([*command, "--version"]), " ".join([*command, *_FLAGS]), _processor(), torch.__version__]
    parts += [f"{p.name}\n{p.read_text()}" for p in [*sorted(FOLDER.glob("*.h")), *_sources()]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


def _cache_folder() -> Path:
    """~/.cache/coterie/native, made private. The library in it is run, so no one else may have written it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base.mkdir(parents=True, exist_ok=True)
    folder = base
    for name in ("coterie", "native"):
        folder = folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_owner(folder)
    return folder


def _check_owner(path: Path) -> None:
    """Raises RuntimeError where another user could have written `path`."""
    if not hasattr(os, "getuid"):
        return
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise RuntimeError(f"{path} is a link, and code is loaded only from a plain private folder")
    if found.st_uid != os.getuid():
        raise RuntimeError(f"{path} belongs to another user")
    if found.st_mode & 0o022:
        raise RuntimeError(f"{path} can be written by other users (chmod go-w it)")


def _compile(command: list[str], file: Path) -> None:
    """Compiles every source at once, links them, and puts the library in its place in one step."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix="build-") as name:
        build = Path(name)
        objects = [build / f"{source.stem}.o" for source in _sources()]
        started = [
            subprocess.Popen(
                [*command, *_FLAGS, "-c", str(source), "-o", str(target)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, target in zip(_sources(), objects, strict=True)
        ]
        try:
            for process in started:
                _, errors = process.communicate(timeout=_LIMIT_S)
                _succeed(command, process.returncode, errors)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} took more than {_LIMIT_S} s") from None
        finally:
            for process in started:
                process.kill()
                process.wait()
        linked = build / file.name
        # torch brings an OpenMP runtime: a second one would have threads of its own. Only where torch's is hidden
        # from the library is one linked.
        shared = ["-shared", *map(str, objects), "-o", str(linked)]
        _run([*command, *shared])
        try:
            _load(linked)
        except OSError:
            _run([*command, *shared, "-fopenmp"])
        os.replace(linked, file)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} took more than {_LIMIT_S} s") from None
    _succeed(command, done.returncode, done.stderr)
    return done.stdout


def _succeed(command: Sequence[str], code: int, errors: str) -> None:
    if code:
        lines = errors.splitlines() or ["nothing was said"]
        told = next((line for line in lines if "error" in line), lines[0])
        raise RuntimeError(f"{command[0]} failed: {told[:300]}")

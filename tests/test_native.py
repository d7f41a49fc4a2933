"""The CPU library is compiled once, kept in a private folder, shared by processes, and done without where it must."""

import ctypes
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from coterie.kernels import backend, native

SOURCE = 'extern "C" int answer(int *out) { return *out = 42; }\n'
pytestmark = pytest.mark.skipif(os.name == "nt", reason="no -march=native")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one function, with a cache folder of its own; gives the cache folder."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(native, "FOLDER", tmp_path / "sources")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("COTERIE_NATIVE", raising=False)
    _forget(monkeypatch)
    return tmp_path / "cache" / "coterie" / "native"


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_library", None), ("_why", None), ("_tried", False)):
        monkeypatch.setattr(native, name, value)


@pytest.fixture
def compiler() -> None:
    try:
        native._compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


def _answer() -> int:
    out = ctypes.c_int()
    function = native.function("answer", ctypes.c_void_p)
    assert function(ctypes.addressof(out)) is None
    assert function.restype is None
    function.restype = ctypes.c_int
    assert function(ctypes.addressof(out)) == out.value
    return out.value


@pytest.mark.usefixtures("compiler")
def test_compiles_once_and_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "coterie")
    assert native.library() is not None
    assert native.why_not() is None
    assert _answer() == 42
    assert [r.message.startswith("CPU kernels compiled in") for r in caplog.records] == [True]
    (file,) = place.iterdir()
    assert place.stat().st_mode & 0o777 == 0o700
    written = file.stat().st_mtime_ns
    _forget(monkeypatch)
    assert _answer() == 42
    assert file.stat().st_mtime_ns == written
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("compiler")
def test_other_sources_or_flags_are_another_library(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _answer() == 42
    (native.FOLDER / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    _forget(monkeypatch)
    assert _answer() == 43
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-DOTHER"])
    _forget(monkeypatch)
    assert _answer() == 43
    assert len(list(place.iterdir())) == 3


@pytest.mark.usefixtures("compiler")
def test_a_damaged_library_is_compiled_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir(parents=True, mode=0o700)
    file = place / f"{native._key(native._compiler())}.so"
    file.write_bytes(b"half a library")
    file.chmod(0o600)
    assert _answer() == 42


@pytest.mark.usefixtures("compiler")
def test_a_source_that_does_not_compile_is_one_sentence(place: Path) -> None:
    (native.FOLDER / "answer.cpp").write_text("void answer( {")
    assert native.library() is None
    why = native.why_not()
    assert why is not None
    assert "failed" in why
    assert "error" in why
    assert "\n" not in why
    assert list(place.iterdir()) == []


def test_without_a_compiler_torch_works_and_the_log_says_so_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "coterie")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    x = torch.ones(2, 3)
    with torch.inference_mode():
        assert not native.ready(x)
        assert not native.ready(x)
    assert native.why_not() == "there is no C++ compiler (c++, g++, clang++ or $CXX)"
    assert [r.message for r in caplog.records] == [f"CPU kernels: torch does the work, as {native.why_not()}"]
    assert not place.exists()


def test_a_compiler_named_in_vain(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    assert native.library() is None
    assert native.why_not() == "CXX=no-such-compiler -x is no command here"


def test_it_can_be_switched_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_NATIVE", "0")
    assert native.library() is None
    assert native.why_not() == "COTERIE_NATIVE=0 says so"
    assert not place.exists()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("mode", [0o720, 0o702])
@pytest.mark.parametrize("what", ["the folder above", "the folder", "the library"])
def test_what_others_may_write_is_not_run(place: Path, monkeypatch: pytest.MonkeyPatch, mode: int, what: str) -> None:
    assert _answer() == 42
    (file,) = place.iterdir()
    path = {"the folder above": place.parent, "the folder": place, "the library": file}[what]
    path.chmod(mode)
    _forget(monkeypatch)
    assert native.library() is None
    assert native.why_not() == f"{path} can be written by other users (chmod go-w it)"


@pytest.mark.usefixtures("compiler")
def test_what_belongs_to_another_is_not_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir(parents=True, mode=0o700)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert native.library() is None
    assert native.why_not() == f"{place.parent} belongs to another user"


@pytest.mark.usefixtures("compiler")
def test_a_link_is_not_followed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.parent.mkdir(parents=True, mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    assert native.library() is None
    assert "is a link" in str(native.why_not())


@pytest.mark.usefixtures("compiler")
def test_threads_that_ask_at_once_compile_once(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coterie")
    with ThreadPoolExecutor(4) as pool:
        found = [f.result() for f in [pool.submit(native.library) for _ in range(8)]]
    assert found[0] is not None
    assert all(library is found[0] for library in found)
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("compiler")
def test_two_processes_at_once(place: Path) -> None:
    script = (
        "import ctypes, pathlib, sys\nfrom coterie.kernels import native\n"
        "native.FOLDER = pathlib.Path(sys.argv[1])\nout = ctypes.c_int()\n"
        "native.function('answer', ctypes.c_void_p)(ctypes.addressof(out))\nprint(out.value)"
    )
    command = [sys.executable, "-c", script, str(native.FOLDER)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ["42", "42"]
    assert [p.suffix for p in place.iterdir()] == [".so"]


def test_what_it_takes() -> None:
    if native.library() is None:
        pytest.skip(str(native.why_not()))
    x = torch.ones(4, 6)
    assert not native.ready(x), "training is left alone"
    with torch.no_grad():
        assert not native.ready(x)
    with torch.inference_mode():
        assert native.ready(x)
        assert native.ready(x, x.bfloat16())
        assert not native.ready(x, x.t())
        assert not native.ready(x.double())
        assert not native.ready(x.half())
        assert not native.ready(x.to("meta"))
        with backend.forced("torch"):
            assert native.ready(x)
        with backend.forced("reference"):
            assert not native.ready(x)

"""The one command for CUDA machines: whatever its parts do, there is one JSON and one table."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

from coterie.benchmarks import gpu_check

ROWS = '[{"case": "c", "impl": "coterie", "metric": "m", "value": 2.5, "unit": "ms", "fraction": 0.5}]'
WRITE = f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text({ROWS!r})"
ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
PYTEST = """print('''tests/test_a.py::test_one[x-1] PASSED [ 10%]
tests/test_a.py::test_two FAILED [ 20%]
tests/test_a.py::test_three SKIPPED (why) [ 30%]
=== short test summary info ===
ERROR tests/test_b.py - ModuleNotFoundError: No module named 'hypothesis'
FAILED tests/test_a.py::test_two - AssertionError
''', flush=True)
"""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "machine", lambda environment: {"device": "a device", "torch": "2"})


def _steps(monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    monkeypatch.setattr(gpu_check, "STEPS", {name: ["-c", code, "{json}"] for name, code in programs.items()})


def _run(folder: Path, seconds: float = 60) -> tuple[int, dict, str]:
    with pytest.raises(SystemExit) as left:
        gpu_check.main(["--out", str(folder), "--seconds", str(seconds)])
    results = json.loads((folder / "gpu_check.json").read_text())["results"]
    return int(left.value.code or 0), results, (folder / "gpu_check.txt").read_text()


def test_parts_that_fail_leave_the_others(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    _steps(monkeypatch, tests=PYTEST + "raise SystemExit(1)", layer=f"{WRITE}\n{crash}", train=WRITE)
    code, results, text = _run(tmp_path / "out")
    assert code == 1
    assert [results[name]["exit"] for name in ("tests", "layer", "train")] == [1, 139, 0]
    assert results["tests"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert results["tests"]["failed"] == ["tests/test_a.py::test_two", "tests/test_b.py"]
    assert results["layer"]["rows"] == results["train"]["rows"] == json.loads(ROWS)
    assert "failed: tests/test_a.py::test_two" in text
    assert text.count("2.5 ms  0.50 of the limit") == 2


def test_parts_that_hang_are_stopped(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they started, and what they had said and written is kept."""
    hang = "import time; time.sleep(60)"
    _steps(monkeypatch, tests=PYTEST + hang, layer=f"{WRITE}\n{ORPHAN}", train=f"{WRITE}\n{hang}")
    start = time.perf_counter()
    code, results, text = _run(tmp_path, seconds=6)
    assert time.perf_counter() - start < 20
    assert code == 1
    assert [results[name]["exit"] for name in ("tests", "layer", "train")] == [124, 0, 124]
    assert results["tests"]["counts"]["passed"] == 1
    assert results["train"]["rows"] == json.loads(ROWS)
    assert "train: stopped, its time was over," in text


def test_rows_that_are_none_are_left_out(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _steps(monkeypatch, layer="import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('[{')")
    monkeypatch.setattr(gpu_check, "SHARES", {"layer": 1.0})
    code, results, _ = _run(tmp_path)
    assert code == 0
    assert "rows" not in results["layer"]


def test_a_checkout_needs_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    environment = gpu_check.surroundings(str(tmp_path))
    assert "TRITON_INTERPRET" not in environment
    script = "import coterie.benchmarks.rows as rows; print(rows.__file__)"
    code, said = gpu_check.run([sys.executable, "-c", script], environment, 60, tmp_path / "log")
    assert code == 0
    assert said.startswith(str(tmp_path))
    assert gpu_check.machine(environment)["python"] == sys.version.split()[0]


def test_every_step_can_be_started_and_has_a_share() -> None:
    assert gpu_check.SHARES.keys() == gpu_check.STEPS.keys()
    assert sum(gpu_check.SHARES.values()) == pytest.approx(1)
    for command in gpu_check.STEPS.values():
        assert importlib.util.find_spec(command[1]) is not None

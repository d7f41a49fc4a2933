"""Everything that needs a CUDA machine, in one command: the gpu tests, then the benchmarks.

    python benchmarks/gpu_check.py --out DIR      (from a checkout, which need not be installed)

Writes DIR/gpu_check.json (tidy rows and test counts) and DIR/gpu_check.txt (the same as a table) after every part. A
part that fails, hangs or is killed costs nothing of the others. It needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = ["--timeout=300"] if importlib.util.find_spec("pytest_timeout") else []
TESTS = ["-m", "pytest", "-v", "-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider", *TIMEOUT]
STEPS = {
    "tests": TESTS,
    "layer": ["-m", "coterie.benchmarks.layer", "--json", "{json}"],
    "train": ["-m", "coterie.benchmarks.train", "--json", "{json}"],
    "experts": ["-m", "coterie.benchmarks.experts_gpu", "--json", "{json}"],
    "tiles": ["-m", "coterie.benchmarks.experts_gpu", "--tiles", "--json", "{json}"],
    "decode": ["-m", "coterie.benchmarks.decode_shapes", "olmoe", "qwen3_30b", "--json", "{json}"],
}
SHARES = {"tests": 0.3, "layer": 0.15, "train": 0.1, "experts": 0.12, "tiles": 0.08, "decode": 0.25}
"""Of the time; what a step leaves goes to those after it."""
MACHINE = """
import json, sys, torch
names = {"torch": torch.__version__, "python": sys.version.split()[0]}
try:
    import triton
    names["triton"] = triton.__version__
except ImportError:
    names["triton"] = "none"
names["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
print(json.dumps(names))
"""


def run_step(name: str, environment: dict[str, str], seconds: float) -> dict:
    """One step in its own process: a crash or a hang of one costs nothing of the others."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, *(part.replace("{json}", str(rows)) for part in STEPS[name])]
        start = time.perf_counter()
        code, output = run(command, environment, seconds, Path(folder) / "output")
        result: dict = {"seconds": round(time.perf_counter() - start, 1), "exit": code, "tail": output[-4000:]}
        if name == "tests":
            result |= count_tests(output)
        with contextlib.suppress(FileNotFoundError, ValueError):
            result["rows"] = json.loads(rows.read_text())
        return result


def run(command: list[str], environment: dict[str, str], seconds: float, log: Path) -> tuple[int, str]:
    """(exit status, what it said); 124 when its time was over, as `timeout` says, and 128 + n after signal n.

    The whole session of the command is killed, and its output goes to a file: a process that it left behind would
    hold a pipe open for ever.
    """
    with log.open("wb") as sink:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return code if code >= 0 else 128 - code, log.read_text(errors="replace")


def count_tests(output: str) -> dict:
    """Counts of pytest's verbose lines, which are there also when it was stopped, and the names of what failed."""
    outcomes = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    broken = set(re.findall(r"^ERROR (tests/\S+\.py)(?: |$)", output, re.MULTILINE))  # could not be imported
    words = [word.lower() for _, word in outcomes] + ["error"] * len(broken)
    bad = [name for name, word in outcomes if word in ("FAILED", "ERROR")]
    return {"counts": {word: words.count(word) for word in dict.fromkeys(words)}, "failed": [*bad, *sorted(broken)]}


def table(results: dict[str, dict]) -> str:
    """The results as text: one line a row."""
    lines = []
    for name, result in results.items():
        counts = ", ".join(f"{n} {word}" for word, n in result.get("counts", {}).items())
        ended = "stopped, its time was over," if result["exit"] == 124 else f"exit {result['exit']}"
        lines.append(f"{name}: {ended} after {result['seconds']} s {counts}".rstrip())
        lines += [f"  failed: {test}" for test in result.get("failed", [])]
        if result["exit"] != 0:
            lines += ["  " + line for line in result["tail"].splitlines()[-25:]]
        for row in result.get("rows", []):
            limit = f"  {row['fraction']:.2f} of the limit" if row.get("fraction") is not None else ""
            name_of_row = f"{row['case']:<32} {row['impl']:<20} {row['metric']:<16}"
            lines.append(f"  {name_of_row} {row['value']:>10.4g} {row['unit']}{limit}")
    return "\n".join(lines) + "\n"


def machine(environment: dict[str, str]) -> dict[str, str]:
    """What is measured on, asked in another process: this one must take no memory of the device."""
    with tempfile.TemporaryDirectory() as folder:
        code, output = run([sys.executable, "-c", MACHINE], environment, 120, Path(folder) / "output")
    lines = output.strip().splitlines() or ["it said nothing"]
    if code != 0:
        raise SystemExit(f"gpu_check: torch does not start here: {lines[-1]}")
    return json.loads(lines[-1])


def surroundings(folder: str) -> dict[str, str]:
    """The environment of every step. `folder` gets a link of the package's name to the checkout, whose root is the
    package, so that nothing has to be installed."""
    (Path(folder) / "coterie").symlink_to(ROOT, target_is_directory=True)
    # What forces other kernels than those of the device would make every answer about something else.
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "COTERIE_BACKEND")}
    path = f"{folder}{os.pathsep}{kept['PYTHONPATH']}" if kept.get("PYTHONPATH") else folder
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def main(arguments: list[str] | None = None) -> None:
    """Runs the steps, each under its own time limit, and writes after every one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the two result files")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--seconds", type=float, default=540, help="limit of all steps together")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + given.seconds
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = surroundings(folder)
        found = machine(environment)
        if not found["device"]:
            raise SystemExit("gpu_check: torch sees no CUDA device here")
        for i, name in enumerate(given.only):
            left = max(deadline - time.perf_counter(), 1)
            share = SHARES[name] / sum(SHARES[other] for other in given.only[i:])
            results[name] = run_step(name, environment, left * share)
            record = {"machine": found, "results": results}
            (given.out / "gpu_check.json").write_text(json.dumps(record, indent=1))
            (given.out / "gpu_check.txt").write_text(f"{found}\n{table(results)}")
    print(table(results))
    raise SystemExit(int(any(result["exit"] for result in results.values())))


if __name__ == "__main__":
    main()

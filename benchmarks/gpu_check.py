"""Everything that needs a CUDA machine, in one command: the gpu tests, then the layer and training benchmarks.

    python benchmarks/gpu_check.py --out DIR      (from a checkout; nothing has to be installed but torch and pytest)

Writes DIR/gpu_check.json (tidy rows and test counts) and DIR/gpu_check.txt (the same as a table).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "tests": ["-m", "pytest", "-q", "-m", "gpu", "--timeout=600", "-p", "no:cacheprovider"],
    "layer": ["-m", "coterie.benchmarks.layer", "--json", "{json}"],
    "train": ["-m", "coterie.benchmarks.train", "--json", "{json}"],
}


def run_step(name: str, environment: dict[str, str], seconds: float) -> dict:
    """One step in its own process: a crash or a hang of one costs nothing of the others."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, *(part.format(json=rows) for part in STEPS[name])]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True, check=False
            )
            output, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            output, code = (late.stdout or b"").decode(errors="replace"), 124
        result = {"seconds": round(time.perf_counter() - start, 1), "exit": code, "tail": output[-4000:]}
        if rows.exists():
            result["rows"] = json.loads(rows.read_text())
        if name == "tests":
            result["counts"] = {
                word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)
            }
        return result


def table(results: dict[str, dict]) -> str:
    """The results as text: one line a row."""
    lines = []
    for name, result in results.items():
        lines.append(f"{name}: exit {result['exit']} after {result['seconds']} s {result.get('counts', '')}")
        if result["exit"] != 0:
            lines += ["  " + line for line in result["tail"].splitlines()[-25:]]
        for row in result.get("rows", []):
            limit = f"  {row['fraction']:.2f} of the limit" if row.get("fraction") is not None else ""
            name_of_row = f"{row['case']:<32} {row['impl']:<20} {row['metric']:<16}"
            lines.append(f"  {name_of_row} {row['value']:>10.4g} {row['unit']}{limit}")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str]:
    """What was measured on."""
    import torch

    names = {"torch": torch.__version__, "python": sys.version.split()[0]}
    try:
        import triton

        names["triton"] = triton.__version__
    except ImportError:
        names["triton"] = "none"
    names["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return names


def main() -> None:
    """Runs the steps, each under its own time limit, and writes after every one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the two result files")
    parser.add_argument("--only", nargs="*", choices=sorted(STEPS), default=list(STEPS))
    parser.add_argument("--seconds", type=float, default=540, help="limit of all steps together")
    arguments = parser.parse_args()
    if machine()["device"] == "no CUDA device":
        raise SystemExit("gpu_check: torch sees no CUDA device here")
    arguments.out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        # The checkout's root is the package: a link of its name lets it be imported without an installation.
        (Path(folder) / "coterie").symlink_to(ROOT, target_is_directory=True)
        environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        results: dict[str, dict] = {}
        text = ""
        for name in arguments.only:
            results[name] = run_step(name, environment, max(deadline - time.perf_counter(), 1))
            text = table(results)
            record = {"machine": machine(), "results": results}
            (arguments.out / "gpu_check.json").write_text(json.dumps(record, indent=1))
            (arguments.out / "gpu_check.txt").write_text(text)
    print(text)
    raise SystemExit(max(result["exit"] for result in results.values()))


if __name__ == "__main__":
    main()

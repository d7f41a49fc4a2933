"""What a run tells: one line on the terminal, one JSON row in metrics.jsonl, one set of TensorBoard scalars."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..moe.gate import Stats
from ..moe.metrics import loads, summarize

METRICS = "metrics.jsonl"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run directory or of a metrics.jsonl; lines that a crash or a full disk has cut are left out."""
    path = Path(path)
    file = path / METRICS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: is {path} a run directory?")
    rows = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def router_row(stats: Sequence[Stats]) -> dict[str, Any]:
    """A row's part on routing, from sums over the global batch: loads of every expert, and summaries over layers."""
    if not stats:
        return {"loads": []}
    summary = summarize(stats)
    asked = sum(int(s.asked_E.sum()) for s in stats)
    kept = sum(int(s.kept_E.sum()) for s in stats)
    return {
        "max_mean": summary["load_worst"],
        "drop": 1 - kept / asked if asked else 0.0,
        "entropy": summary["entropy_p50"],
        "router": summary,
        "loads": loads(stats),
    }


class MetricsWriter:
    """Writes a run's rows; only rank 0 has one. A full disk costs rows, not the run."""

    def __init__(self, directory: Path, *, start: int, every: int = 1, tensorboard: bool = True) -> None:
        """`start`: the step that the run resumes from; rows of later steps will be written again, so they go."""
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / METRICS
        if start == 0 and self._file.is_file() and self._file.stat().st_size:
            self._file.replace(self._file.with_name(f"aside_{METRICS}"))  # as checkpoints are, of a run begun anew
        self._every = max(every, 1)
        self._separator = ""
        self._told: set[str] = set()
        kept = [r for r in read_metrics(self._file) if r["step"] <= start] if self._file.exists() else []
        draft = self._file.with_suffix(".new")
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        draft.replace(self._file)
        self._board = _tensorboard(directory / "tensorboard", start) if tensorboard else None
        self._times: list[float] = []

    def write(self, row: dict[str, Any], *, total_steps: int) -> None:
        """Appends `row` and prints its line. Values that are not finite are stored as null."""
        with self._going_on(str(self._file)):
            text, self._separator = f"{self._separator}{json.dumps(_finite(row))}\n", "\n"
            with self._file.open("a") as file:
                file.write(text)
            self._separator = ""  # else a part of the row may stand there, and the next one begins a line
        if self._board is not None:
            with self._going_on("TensorBoard's events"):
                for name, value in _scalars(row).items():
                    self._board.add_scalar(name, value, row["step"])
        self._times.append(time.monotonic())
        last = row["step"] == total_steps
        if row["step"] % self._every == 0 or last or "valid_loss" in row or row.get("bad"):
            print(self._line(row, total_steps), flush=True)

    def _line(self, row: dict[str, Any], total_steps: int) -> str:
        parts = [f"step {row['step']:>{len(str(total_steps))}}/{total_steps}", f"loss {row['loss']:.4f}"]
        if "valid_loss" in row:
            parts.append(f"valid {row['valid_loss']:.4f}")
        parts += [f"lr {row['lr']:.2e}", f"norm {row['grad_norm']:.3f}", f"{row['tokens_per_s']:,.0f} tok/s"]
        parts.append(f"mfu {100 * row['mfu']:.1f}%")
        if row["loads"]:
            router = row["router"]
            parts += [f"load {router['load_p50']:.2f}/{router['load_p95']:.2f}", f"drop {100 * row['drop']:.1f}%"]
        if row.get("bad"):
            parts.append(f"SKIPPED (not finite; {row['skipped']} so far)")
        return "  ".join([*parts, f"eta {_duration(self._eta(total_steps - row['step']))}"])

    def _eta(self, steps: int) -> float:
        recent = self._times[-50:]
        pace = (recent[-1] - recent[0]) / (len(recent) - 1) if len(recent) > 1 else math.nan
        return pace * steps

    def close(self) -> None:
        if self._board is not None:
            with self._going_on("TensorBoard's events"):
                self._board.close()

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """What cannot be written is told of once."""
        try:
            yield
        except OSError as error:
            if what not in self._told:
                print(f"{what} cannot be written: {error.strerror or error}; the run goes on", file=sys.stderr)
            self._told.add(what)


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    flat = {f"time/{k}": v for k, v in row["time"].items()}
    flat |= {f"sent/{k}": v for k, v in row.get("sent", {}).items()}
    names = ("loss", "valid_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "aux", "z", "skipped")
    flat |= {f"train/{k}": row[k] for k in names if k in row}
    flat |= {f"router/{k}": v for k, v in row.get("router", {}).items()}
    return {k: float(v) for k, v in flat.items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _tensorboard(directory: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:  # the extra `train` is not installed; metrics.jsonl has everything
        return None
    return SummaryWriter(str(directory), purge_step=start + 1)

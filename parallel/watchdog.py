"""Ends a rank that waits too long for the others. Torch's flight recorder knows what it waits for."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch._C._distributed_c10d as c10d

from .collectives import size

STATUS = 1
"""The exit status of a rank that was ended so: a restart may help."""


class Watchdog(threading.Thread):
    """For the length of a `with` block: when a collective has been open for `timeout_s` seconds, writes what torch
    recorded of the latest ones to `folder`, tells on standard error where the run stands, and ends the process. (The
    thread that waits cannot: it is inside the collective.) Does nothing where there is one rank.

    Args:
        where: where the run stands, such as "at step 3 in forward".
    """

    def __init__(self, rank: int, timeout_s: float, folder: Path, where: Callable[[], str]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.timeout_s, self.folder, self.where = rank, timeout_s, folder, where
        self._done = threading.Event()
        self._seen: dict[tuple[Any, ...], float] = {}

    def __enter__(self) -> Watchdog:
        if size() > 1:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.is_alive():
            self.join()  # a thread inside torch while the process ends would abort it

    def run(self) -> None:
        while not self._done.wait(min(self.timeout_s / 10, 5.0)):
            late = self._late()
            if late is not None and not self._done.is_set():
                self._end(late)

    def _late(self) -> dict[str, Any] | None:
        """The collective that has been open for too long."""
        now, before = time.monotonic(), self._seen
        entries = {(e["process_group"][0], e["record_id"]): e for e in _record() if not e["retired"]}
        self._seen = {key: before.get(key, now) for key in entries}
        return next((e for key, e in entries.items() if now - self._seen[key] >= self.timeout_s), None)

    def _end(self, late: dict[str, Any]) -> NoReturn:
        path = self.folder / f"rank{self.rank}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_record(), indent=1))
            told = f"torch's flight record is in {path}"
        except OSError as error:
            told = f"torch's flight record could not be written: {error.strerror or error}"
        print(
            f"coterie: rank {self.rank} has waited {self.timeout_s:g} s {self.where()} for the other ranks in "
            f"{late['profiling_name']}: a rank that does not say so hangs or is gone; {told}; "
            "the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(STATUS)


def keep_record() -> None:
    """Has torch record the latest collectives; to be called before the process group is opened."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1000")


def _record() -> list[dict[str, Any]]:
    """Torch's entries of the latest collectives, of gloo's and NCCL's; one that is over is "retired"."""
    dumps = [getattr(c10d, name, None) for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json")]
    return [entry for dump in dumps if dump for entry in json.loads(dump(True, False)).get("entries", ())]

"""Recording an engine's routes while it runs: in bounded memory, and now and then in a file. No torch."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from .outputs import StepReport
from .routes import Recorder, load, save

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("coterie")
SAMPLED = 4
"""Tokens of a step whose choices are kept."""
EVERY_S = 300.0


class Recording:
    """Records every step of an engine until it is closed, and replaces its file whole at the end and now and then.

        with coterie.pipeline(MODEL) as pipe, Recording(pipe.engine, "day.routes"):
            pipe(prompts, max_new_tokens=64)

    Attributes:
        path: of the file.
        steps, tokens: that the engine computed since the recording began, kept or not.
        saved: how many of the steps had come when the file was last written.
    """

    def __init__(self, engine: Engine, path: str | Path, *, every_s: float = EVERY_S) -> None:
        """
        Args:
            engine: running or not.
            path: see `check_path`.
            every_s: seconds between writes.

        Raises:
            ValueError: the model has no experts, or the file cannot be written.
        """
        experts = [moe.num_experts for moe in engine.model.moe_layers]
        if not experts:
            raise ValueError("the model has no experts, so there are no routes to record")
        check_path(path)
        self.path, self.steps, self.tokens, self.saved = Path(path), 0, 0, 0
        self._recorder = Recorder(experts, engine.model.config.moe.top_k, sampled=SAMPLED)
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._now_and_then, args=(every_s,), name="coterie-recording")
        self._thread.daemon = True
        self._unwatch = engine.watch(self._take, sampled=SAMPLED)
        self._thread.start()

    @property
    def kept(self) -> int:
        """Steps in memory."""
        return len(self._recorder)

    @property
    def bytes(self) -> int:
        """Of the steps in memory."""
        return self._recorder.bytes

    def _take(self, report: StepReport) -> None:
        """After each step, on the engine's thread."""
        if not report.loads:
            return
        prompts = max(0, report.tokens - report.decodes - report.drafted)
        with self._lock:
            self.steps += 1
            self.tokens += report.tokens
            self._recorder.add(report.loads, report.routes_LMK, prompts)

    def save(self) -> None:
        """Writes what is kept, unless nothing came since the last time. OSError: the file cannot be written."""
        with self._lock:
            if self.steps == self.saved:
                return
            steps, routes = self.steps, self._recorder.routes()
        save(routes, self.path)
        self.saved = steps

    def _now_and_then(self, every_s: float) -> None:
        while not self._ending.wait(every_s):
            try:
                self.save()
            except OSError as error:
                log.error("the routes cannot be written, and are kept for the next time: %s", error)

    def close(self) -> None:
        """Ends it and writes the rest; OSError as in `save`."""
        self._unwatch()
        self._ending.set()
        self._thread.join()
        self.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_path(path: str | Path) -> None:
    """Whether routes can be recorded there: in a folder that is there and can be written, at a name that is free or
    has routes from before, which are replaced. ValueError: it says why not."""
    path = Path(path)
    if path.exists():
        try:
            load(path)
        except ValueError:
            raise ValueError(f"{path} is there and holds no routes: give another name to record to") from None
    part = path.with_name(path.name + ".part")
    try:
        part.open("wb").close()
        part.unlink()
    except OSError as error:
        raise ValueError(f"routes cannot be recorded to {path}: {error.strerror}") from None

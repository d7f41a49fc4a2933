"""One engine in a process of its own, for `coterie bench decode`: prompts in and tokens out, as lines of JSON.

A process for each engine keeps their memory and start-up apart, and lets them take turns in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from ..infer.engine import Engine
    from ..infer.outputs import StepReport

IMPLS = ("coterie", "transformers")


class Generates(Protocol):
    """Greedy generation of exactly `new` tokens; in what it tells may be `bytes` that the run had to read."""

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], dict[str, Any]]: ...


class Measured(Protocol):
    """An engine that can be asked, wherever it runs.

    Attributes:
        impl: its name.
        startup: seconds until its first answer.
        peak: bytes of memory that it had at most.
    """

    impl: str
    startup: float
    peak: int

    def ask(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """`tokens`, `seconds`, and what the engine tells beside them."""
        ...


class Coterie:
    """Our engine, stepped by the caller."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: list[StepReport] = []
        engine.watch(self._steps.append)

    @classmethod
    def open(cls, model: str, dtype: str, device: str | None) -> Coterie:
        """With its own settings."""
        from ..infer.config import EngineConfig
        from ..infer.engine import Engine

        return cls(Engine.open(model, EngineConfig(device=device, dtype=dtype)))  # type: ignore[arg-type]

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], dict[str, Any]]:
        from ..infer.outputs import Delta
        from ..infer.request import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        made: list[list[int]] = [[] for _ in prompts]
        errors: list[str] = []
        self._steps.clear()
        for prompt, tokens in zip(prompts, made, strict=True):

            def sink(delta: Delta, tokens: list[int] = tokens) -> None:
                tokens.extend(delta.tokens)
                errors.extend(filter(None, [delta.error]))

            self._engine.submit(prompt, params, sink)
        while self._engine.step():
            pass
        if errors:
            raise RuntimeError(errors[0])
        return made, self._read()

    def _read(self) -> dict[str, Any]:
        """Bytes of weights that the steps had to read, by the experts really visited; keys and values are counted
        by who knows the lengths."""
        traffic = self._engine.core.traffic
        total = 0.0
        for step in self._steps:
            visited = sum(size * count for size, count in zip(traffic.experts, step.distinct, strict=True))
            total += traffic.dense + visited + (traffic.head if step.generated else 0)
        decodes = [step.distinct for step in self._steps if step.decodes and not step.prompts and step.distinct]
        distinct = [sum(layers) / len(layers) for layers in decodes]
        mean = sum(distinct) / len(distinct) if distinct else 0.0
        return {"bytes": total, "kv_token": traffic.token, "distinct": mean, "steps": len(self._steps)}


class Transformers:
    """`generate` with its defaults: SDPA, a dynamic cache, its own choice of experts."""

    def __init__(self, model: str, dtype: str, device: str | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._torch = torch
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model = loaded.eval().to(self._device)
        self._model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], dict[str, Any]]:
        torch = self._torch
        tokens_BS = torch.tensor(prompts, device=self._device)
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            all_BS = self._model.generate(tokens_BS, attention_mask=torch.ones_like(tokens_BS), **settings)
        return all_BS[:, tokens_BS.shape[1] :].tolist(), {}


class Worker:
    """The other end: a process that was started with `impl`, and has given its first answer.

    Attributes:
        startup: seconds from the start of the process to the end of its first answer, of 2 tokens.
        peak: bytes of memory that it had at most, as of its last answer; pages of mapped files count.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """

    def __init__(self, impl: str, model: str | Path, dtype: str, device: str | None, threads: int = 0) -> None:
        where = [] if device is None else ["--device", device]
        command = [sys.executable, "-m", "coterie.benchmarks.decode_worker", impl, str(model), dtype, *where]
        env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        started = time.perf_counter()
        self.impl, self.peak = impl, 0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        try:
            self.ask([[1, 2, 3, 4, 5, 6, 7, 8]], 2)
        except BaseException:
            self.close()
            raise
        self.startup = time.perf_counter() - started

    def ask(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """See `Measured`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has said why
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            said = self._process.stderr.read().strip().splitlines()
            raise RuntimeError(said[-1] if said else f"{self.impl} ended without a word")
        found = json.loads(line)
        self.peak = found["peak"]
        if any(len(tokens) != new for tokens in found["tokens"]) or len(found["tokens"]) != len(prompts):
            raise RuntimeError(f"{self.impl} gave other numbers of tokens than {len(prompts)} x {new}")
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def peak_bytes() -> int:
    """This process's most resident memory. Not getrusage: that begins with the parent's, of before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _serve(engine: Generates, lines: TextIO, out: TextIO) -> None:
    for line in lines:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens, more = engine.generate(asked["prompts"], asked["new"])
        found = {"tokens": tokens, "seconds": time.perf_counter() - started, "peak": peak_bytes()}
        out.write(json.dumps(found | more) + "\n")
        out.flush()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("impl", choices=IMPLS)
    parser.add_argument("model")
    parser.add_argument("dtype")
    parser.add_argument("--device")
    given = parser.parse_args(argv)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not part of an answer
    kind = {"coterie": Coterie.open, "transformers": Transformers}[given.impl]
    _serve(kind(given.model, given.dtype, given.device), sys.stdin, out)


if __name__ == "__main__":
    main()

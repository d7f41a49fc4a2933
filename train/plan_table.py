"""What `coterie plan` prints and writes: the table, why layouts were left out, tidy rows, the command of the best."""

from __future__ import annotations

import json as json_module
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models.gpt import Recompute
from ..models.params import count_params, flops_per_token
from .config import TrainConfig
from .machines import GIB, Machine, machine
from .plan import DEGREES, Plan, Row, plan
from .plan_memory import memory
from .pretrain import parse


def main(
    recipe: str,
    overrides: Sequence[str],
    *,
    gpus: int,
    gpu: str,
    node: int = 8,
    json: Path | None = None,
    rows: int = 15,
) -> None:
    """Plans a recipe and prints the `rows` fastest layouts; `json` gets all that fit.

    Raises:
        ValueError: what was asked cannot be planned, or fits nowhere: one sentence.
    """
    given, rest = _given(overrides)
    on = machine(gpu)
    config = parse([recipe, *rest])
    if config is None:
        return
    found = plan(config, gpus, on, node, given)
    if not found.rows:
        raise ValueError(_nowhere(recipe, config, found, gpus, on, node, given))
    on = on.shared(min(node, gpus))
    records = [tidy(config, row, on) for row in found.rows]
    if json is not None:
        json.write_text(json_module.dumps(records, indent=1) + "\n")
    print(_heading(recipe, config, gpus, on, node))
    print(table(records[:rows]))
    print(f"{len(records)} layouts fit in {on.usable:.0%} of {on.memory / GIB:.1f} GiB")
    print(_reasons("do not divide", found.undivided))
    print(_reasons("need more memory, most of it", found.too_large))
    best = found.rows[0]
    kinds: tuple[Recompute, ...] = ("none", "selective", "full")
    peaks = {k: memory(config.model, best.layout, best.run._replace(recompute=k)).peak / GIB for k in kinds}
    print("GiB of the first, by recompute: " + ", ".join(f"{peak:.2f} {kind}" for kind, peak in peaks.items()))
    print(torchrun_line(recipe, best, node, rest))


def _given(overrides: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Degrees that the user fixed with --parallel.NAME, and the other overrides."""
    given, rest, words = {}, [], iter(overrides)
    for word in words:
        flag, _, value = word.partition("=")
        name = flag.removeprefix("--parallel.").replace("-", "_")
        if not flag.startswith("--parallel.") or name not in DEGREES:
            rest.append(word)
            continue
        value = value or next(words, "")
        if not value.isdigit():
            raise ValueError(f"{flag} {value!r} is not a number of ranks: give 1 or more")
        given[name] = int(value)
    return {name: degree for name, degree in given.items() if degree or name != "dp_shard"}, rest


def _nowhere(
    recipe: str, config: TrainConfig, found: Plan, gpus: int, on: Machine, node: int, given: dict[str, int]
) -> str:
    """Why there is no row, and the smallest number of GPUs, by doubling, on which there is one."""
    if found.smallest is None:
        fixed = f" with {', '.join(f'{n}={d}' for n, d in given.items())}" if given else ""
        reason = found.undivided.most_common(1)
        why = reason[0][0] if reason else "the degrees do not divide the ranks"
        return f"{recipe} divides over no layout of {gpus} {on.name}{fixed} ({why}): change --gpus or --batch-size"
    peak, usable = found.smallest.memory.peak / GIB, on.usable * on.shared(min(node, gpus)).memory / GIB
    says = (
        f"{recipe} fits no layout of {gpus} {on.name}: the smallest needs {peak:.1f} GiB of the usable {usable:.1f}"
    )
    for more in (gpus << doublings for doublings in range(1, 8)):
        if (more <= node or more % node == 0) and plan(config, more, on, node).rows:
            return f"{says}; {more} would do"
    return f"{says}; give larger GPUs, or a smaller --micro-batch"


def _heading(recipe: str, config: TrainConfig, gpus: int, on: Machine, node: int) -> str:
    count = count_params(config.model)
    return (
        f"{recipe}: {count.total / 1e9:.2f}B parameters ({count.activated / 1e9:.2f}B activated), "
        f"{config.batch_size} x {config.seq_len} tokens a step, {config.parallel.dtype}, "
        f"on {gpus} {on.name}, {node} a node"
    )


def _reasons(what: str, counted: Counter[str]) -> str:
    """The most frequent reasons, with their counts."""
    some = "; ".join(f"{reason} ({number})" for reason, number in counted.most_common(6))
    more = len(counted) - 6
    return (
        f"{counted.total()} {what}" + (f": {some}" if some else "") + (f"; {more} other reasons" if more > 0 else "")
    )


def torchrun_line(recipe: str, row: Row, node: int, overrides: Sequence[str] = ()) -> str:
    """The command that starts this layout on every host."""
    layout, node = row.layout, min(node, row.layout.world)
    hosts = layout.world // node
    where = "--standalone" if hosts == 1 else f"--nnodes {hosts} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    degrees = {name: getattr(layout, name) for name in DEGREES if name != "dp_shard"}
    flags = [f"--parallel.{n.replace('_', '-')} {d}" for n, d in degrees.items() if d > 1 or n in ("tp", "ep")]
    words = [recipe, *_without_micro(overrides), *flags, f"--micro-batch {row.run.micro}"]
    return f"torchrun {where} --nproc-per-node {node} -m coterie.train.pretrain {' '.join(words)}"


def _without_micro(overrides: Sequence[str]) -> list[str]:
    """The overrides but for the micro-batch, which the line names itself."""
    kept, words = [], iter(overrides)
    for word in words:
        name, same, _ = word.partition("=")
        if name.replace("_", "-") != "--micro-batch":
            kept.append(word)
        elif not same:
            next(words, None)
    return kept


def tidy(config: TrainConfig, row: Row, on: Machine) -> dict[str, Any]:
    """One flat record of a layout: degrees, bytes, flows and seconds."""
    record: dict[str, Any] = {"gpu": on.name, "world": row.layout.world, **asdict(row.layout)}
    record |= {"micro_batch": row.run.micro, "micro_batches": row.run.micros, "recompute": row.run.recompute}
    record |= {f"bytes_{name}": value for name, value in row.memory._asdict().items()}
    record["bytes_peak"] = row.memory.peak
    for name, flow in row.traffic._asdict().items():
        record |= {f"{name}_{field}": value for field, value in asdict(flow).items()}
    record |= {f"seconds_{name}": value for name, value in row.step._asdict().items()}
    pace = config.step_tokens / row.step.total
    flops = flops_per_token(config.model, config.seq_len) * pace / row.layout.world
    peak = on.bf16 if row.run.work == 2 else on.fp32
    return record | {"seconds_step": row.step.total, "tokens_per_s": pace, "mfu": flops / peak}


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as aligned columns."""
    head = "dp_rep dp_shard   tp   ep  etp micro  GiB/rank  step s compute    fsdp      tp     a2a  Mtok/s   MFU"
    lines = [head]
    for r in records:
        lines.append(
            f"{r['dp_replicate']:>6} {r['dp_shard']:>8} {r['tp']:>4} {r['ep']:>4} {r['etp']:>4}"
            f" {r['micro_batch']:>2}x{r['micro_batches']:<3}{r['bytes_peak'] / GIB:>9.2f} {r['seconds_step']:>7.3f}"
            f" {r['seconds_compute']:>7.3f} {r['seconds_fsdp']:>7.3f} {r['seconds_tensor']:>7.3f}"
            f" {r['seconds_exchange']:>7.3f} {r['tokens_per_s'] / 1e6:>7.3f} {r['mfu']:>5.1%}"
        )
    return "\n".join(lines)

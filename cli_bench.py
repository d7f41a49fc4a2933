"""`coterie bench WHAT`: one function for each benchmark, with the flags of its own. It holds no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from .benchmarks.serving_load import Load


def layer(json: Path | None = None, quick: bool = False) -> None:
    """Time one MoE layer, forward and backward, beside a dense one of equal FLOPs and beside peers.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and repeats.
    """
    from .benchmarks.layer import main as run

    run(json=json, quick=quick)


def train(json: Path | None = None, quick: bool = False) -> None:
    """Time a full training step beside peers and the machine's limit.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and repeats.
    """
    from .benchmarks.train import main as run

    run(json=json, quick=quick)


def alltoall(json: Path | None = None, quick: bool = False, netns: bool = False) -> None:
    """Time the exchanges of expert parallelism.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and repeats.
        netns: Hosts are network namespaces, with links of 1 ms and 1 Gbit/s between them. Needs root.
    """
    from .benchmarks.alltoall import main as run

    run(json=json, quick=quick, netns=netns)


def layouts(json: Path | None = None, quick: bool = False) -> None:
    """Time a training step under several layouts.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and repeats.
    """
    from .benchmarks.layouts import main as run

    run(json=json, quick=quick)


def plan(json: Path | None = None, quick: bool = False, netns: bool = False) -> None:
    """Compare the planner's predictions with measured training steps.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and repeats.
        netns: Hosts are network namespaces, with links of 1 ms and 1 Gbit/s between them. Needs root.
    """
    if netns:
        from .benchmarks.plan_hosts import main as over_hosts

        over_hosts(json=json, quick=quick)
        return
    from .benchmarks.plan import main as run

    run(json=json, quick=quick)


def load(json: Path | None = None, quick: bool = False) -> None:
    """Time loading a checkpoint from disk.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and repeats.
    """
    from .benchmarks.loading import main as run

    run(json=json, quick=quick)


def serve(load: tyro.conf.OmitArgPrefixes[Load]) -> None:
    """Load a server that speaks OpenAI's completions, and measure what its clients see.

    The API key comes from the environment variable OPENAI_API_KEY. Pin the client with `taskset` where it shares
    cores with the server; its own share of a core is among the rows.
    """
    from .benchmarks.serving import main as run

    run(load)


def decode(
    model: Path | None = None,
    shape: Literal["olmoe", "qwen3_30b", "tiny"] | None = None,
    json: Path | None = None,
    quick: bool = False,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    batches: tuple[int, ...] | None = None,
    repeats: int = 3,
    device: Literal["cpu", "cuda"] | None = None,
    peer: bool = True,
) -> None:
    """Generate in process: tokens a second by batch, beside what the memory's measured rate allows.

    Args:
        model: A model directory; none: a random one with skewed routers, written for this run.
        shape: In place of it a published shape, with random bf16 weights drawn on the device; no peer.
        json: Write the tidy rows here too.
        quick: A tiny model, two batches, few tokens.
        dtype: Of weights and arithmetic.
        batches: Sequences at a time; none: 1 to 64.
        repeats: Of each number.
        device: cpu or cuda; none: cuda where there is one.
        peer: Also transformers' generate, in turns, where it is installed.
    """
    from .benchmarks import decode, decode_shapes

    if shape is not None:
        asked = batches or decode_shapes.BATCHES
        decode_shapes.main(shape, json=json, quick=quick, batches=asked, repeats=repeats, device=device)
        return
    asked = batches or decode.BATCHES
    decode.main(model, json=json, quick=quick, dtype=dtype, batches=asked, repeats=repeats, device=device, peer=peer)


def policies(json: Path | None = None, quick: bool = False) -> None:
    """Compare the scheduler's policies on one engine: SplitFuse, a static budget, prefill first, no chunks.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and repeats.
    """
    from .benchmarks.policies import main as run

    run(json=json, quick=quick)


def soak(json: Path | None = None, quick: bool = False, minutes: float = 30.0) -> None:
    """Load a server with mixed, cut and wrong requests, and look for wrong answers and for what is not given back.

    Args:
        json: Write the tidy rows here too.
        quick: A short one.
        minutes: How long.
    """
    from .benchmarks.soak import main as run

    run(json=json, quick=quick, minutes=minutes)


def experts(json: Path | None = None, quick: bool = False, device: Literal["cpu", "cuda"] = "cpu") -> None:
    """Time the experts of a decode step, by tokens, beside the memory's rate.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and repeats.
        device: cuda: layers of OLMoE's and Qwen3-30B-A3B's shapes, beside other kernels that are installed.
    """
    if device == "cuda":
        from .benchmarks.experts_gpu import main as on_gpu

        on_gpu(json=json, quick=quick)
        return
    from .benchmarks.experts import main as run

    run(json=json, quick=quick)


def placement(
    json: Path | None = None,
    quick: bool = False,
    routes: Path | None = None,
    nodes: int = 2,
    ranks: int = 4,
    slots: int = 9,
    html: Path | None = None,
) -> None:
    """Compare the placement of experts with DeepSeek's EPLB, round robin and the optimum, out of window.

    Args:
        json: Write the tidy rows here too.
        quick: Fewer cases and steps.
        routes: A recorded file of routes, judged in place of the synthetic ones.
        nodes: With --routes: nodes of the cluster.
        ranks: With --routes: ranks of a node.
        slots: With --routes: experts of a layer that a rank holds.
        html: With --routes: write a page with heat maps of the load before and after the plan, and what it gains.
    """
    from .benchmarks.placement import main as run
    from .infer.placement import Cluster

    run(json=json, quick=quick, routes=routes, cluster=Cluster(nodes, ranks, slots), html=html)


def latency(json: Path | None = None, quick: bool = False, measure: bool = False) -> None:
    """Print DeepSpeed-MoE's latency table on paper, beside what it says; or predictions beside steps of this machine.

    Args:
        json: Write the tidy rows here too.
        quick: With --measure: few layouts.
        measure: Time steps on 1 to 8 ranks of this machine instead, beside what is predicted of them.
    """
    if measure:
        from .benchmarks.latency_measured import main as run_measured

        run_measured(json, quick)
        return
    from .benchmarks.latency import main as run

    run(json=json)


def moved(json: Path | None = None, quick: bool = False, netns: bool = False) -> None:
    """Steps of a served model over 2 hosts of 2 ranks, with experts where they lie at first and as planned.

    Args:
        json: Write the rows there.
        quick: Few repeats.
        netns: Hosts are network namespaces with links of 1 ms and 1 Gbit/s between them (needs root).
    """
    from .benchmarks.moved import main as run

    run(json, quick, netns)


_ALL = (
    layer,
    train,
    alltoall,
    layouts,
    plan,
    load,
    serve,
    decode,
    policies,
    soak,
    experts,
    placement,
    moved,
    latency,
)
BENCHES = {f.__name__: f for f in _ALL}


def main(argv: list[str]) -> None:
    """Runs one benchmark: `argv` is what follows `coterie bench`."""
    about = "Measure, side by side with peers and with what the machine allows."
    tyro.extras.subcommand_cli_from_dict(BENCHES, prog="coterie bench", args=argv, description=about)

"""What the planner knows of machines: arithmetic, memory and links of a GPU among its like, each with its source."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from ..parallel.cost import Links, Rate, Rings

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One rank's GPU, or a CPU's core, and its links."""

    name: str
    bf16: float
    """Dense FLOP/s of the data sheet, in bf16."""
    fp32: float
    """The same in fp32, without TF32."""
    fraction: float
    """Of these, what the products of a whole training step reach, with all that is done between them."""
    memory: float
    """Bytes that a process finds."""
    memory_rate: float
    """Bytes per second to and from that memory."""
    intra: Rate
    """Links to ranks of the same node."""
    inter: Rate
    """Links to other nodes."""
    cores: int = 0
    """Cores of a node that its ranks share, the figures above being one core's; 0: each rank has its own GPU."""
    usable: float = 0.9
    """Share of the memory that a plan may fill: the rest is for CUDA's context, NCCL's buffers and fragments."""
    fraction_bf16: float | None = None
    """The fraction of the peak in bf16, where it is another."""
    overlaps: bool = True
    """FSDP's collectives run beside the products. Gloo's are waited for, and take the core's time."""
    launch: float = 0.0
    """Seconds until an operator begins its work, where nothing hides them. 0: behind a GPU's kernels."""
    waits: float = 0.0
    """Seconds that ranks wait for the slowest one, for each second of computing; 0: `fraction` has them in it."""
    rings: Rings | None = None
    """None: ring collectives are as fast as all-to-alls."""

    def rate(self, work: int) -> float:
        """FLOP/s of a training step's products with numbers of `work` bytes."""
        if work == 2:
            return self.bf16 * (self.fraction_bf16 or self.fraction)
        return self.fp32 * self.fraction

    def ring(self, kind: str) -> Links:
        """The links of a ring collective: gather, scatter or total."""
        return Links(self.intra, self.inter) if self.rings is None else getattr(self.rings, kind)

    def shared(self, ranks: int) -> Machine:
        """What one of `ranks` ranks of a node has: all of a GPU, but a share of the cores. Several cores start no
        operator faster. Gloo computes too, so with more ranks than cores its links are slower by as much."""
        if not self.cores:
            return self
        share = self.cores / ranks
        times = 1 / min(share, 1.0)
        intra, inter = Links(self.intra, self.inter).slower(times)
        return replace(
            self,
            bf16=self.bf16 * share,
            fp32=self.fp32 * share,
            memory=self.memory * share,
            memory_rate=self.memory_rate * share,
            intra=intra,
            inter=inter,
            launch=self.launch * times,
            rings=None if self.rings is None else Rings(*(links.slower(times) for links in self.rings)),
            cores=0,
        )


# Peaks, memory rates and NVLink: NVIDIA's data sheets of A100 SXM (312 TFLOP/s, 1.555 and 2.039 TB/s, 600 GB/s both
# ways), H100 SXM (989.4, 3.35 TB/s, 900 GB/s), H200 SXM (989.4, 4.8 TB/s, 900 GB/s) and HGX B200 (18 PFLOP/s dense
# and 62 TB/s for 8 GPUs, 1.8 TB/s a GPU).
# Fractions: A100 163 of 312 TFLOP/s in Megatron-LM's 1T run (arXiv 2104.04473, table 1; communication is in it);
# H100 and H200 49% on Mixtral 8x22B, 39% on Qwen2-57B-A14B (arXiv 2504.14960): 0.45; B200 750 of 2500 TFLOP/s on
# Mixtral 8x22B on GB200 (Megatron-MoE-ModelZoo), which has exposed communication in it: 0.33.
# Memory: what torch.cuda reports as the total.
# Links: NCCL reaches 235 GB/s inside an A100 node (the limit in NCCL's tuning.cc; 232.5 measured in nccl-tests #175)
# and 24 GB/s of a 200 Gbit/s NIC (same thread); 48 GB/s of a 400 Gbit/s NIC (NVIDIA in nccl-tests #267 and #290), one
# NIC a GPU. Inside an H100 node 360 GB/s, the same 0.8 of the data sheet; B200 likewise 720 GB/s, not measured.
# Latencies are NCCL's own (src/graph/tuning.cc): baseLat of a ring with Simple, and for each message hwLat of a
# ring with LL, over NVLink and over the network.
_BASE, _NVLINK, _NETWORK = 8.4e-6, 0.47e-6, 2.7e-6
_FAST, _SLOW = Rate(_BASE, 48e9, _NETWORK), Rate(_BASE, 24e9, _NETWORK)
_HOPPER = {"bf16": 989.4e12, "fp32": 67e12, "fraction": 0.45, "intra": Rate(_BASE, 360e9, _NVLINK), "inter": _FAST}
_AMPERE = {"bf16": 312e12, "fp32": 19.5e12, "fraction": 0.5, "intra": Rate(_BASE, 235e9, _NVLINK), "inter": _SLOW}

# One of two gloo ranks of one thread each on a 2-core AMD EPYC (Zen 4) virtual machine that was busy otherwise: a
# 1024-cube product in each type, a copy of 128 MiB, all_to_all_single of 32 MiB and of 8 bytes. There is no network:
# the second link is a copy of the first. Seconds an operator: where the line begins that a small dense model's passes
# with one and with eight sequences make; waiting: of a dense model's step on two ranks. `coterie bench plan` measures
# all of it anew, and rings too.
_GLOO = Rate(45e-6, 0.94e9, 45e-6)
_CORE = {"bf16": 0.42e12, "fp32": 0.143e12, "fraction": 0.6, "intra": _GLOO, "inter": _GLOO, "cores": 2}
_CORE |= {"overlaps": False, "launch": 5e-6, "waits": 0.23}

MACHINES: dict[str, Machine] = {
    "a100-40": Machine("a100-40", memory=39.4 * GIB, memory_rate=1.555e12, **_AMPERE),
    "a100-80": Machine("a100-80", memory=79.2 * GIB, memory_rate=2.039e12, **_AMPERE),
    "h100": Machine("h100", memory=79.1 * GIB, memory_rate=3.35e12, **_HOPPER),
    "h200": Machine("h200", memory=139.8 * GIB, memory_rate=4.8e12, **_HOPPER),
    "b200": Machine(
        "b200", 2.25e15, 75e12, 0.33, 178.3 * GIB, 7.7e12, intra=Rate(_BASE, 720e9, _NVLINK), inter=_FAST
    ),
    "cpu": Machine("cpu", memory=11.5 * GIB, memory_rate=18e9, **_CORE),
}


def machine(name: str) -> Machine:
    """The machine of this name.

    Raises:
        ValueError: there is none; all are listed.
    """
    if name in MACHINES:
        return MACHINES[name]
    near = difflib.get_close_matches(name.lower(), list(MACHINES), n=1)
    hint = f"; do you mean {near[0]}?" if near else ""
    raise ValueError(f"there is no GPU {name!r}: choose among {', '.join(MACHINES)}{hint}")

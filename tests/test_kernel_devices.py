"""What the Triton kernels need of a CUDA device, checked without one: the right device, and code that compiles."""

import contextlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from coterie.kernels.backend import HAS_TRITON, forced
from coterie.kernels.cross_entropy import linear_cross_entropy
from coterie.kernels.expert_mlp import expert_mlp
from coterie.kernels.gate import gate
from coterie.kernels.grouped_gemm import grouped_gemm
from coterie.kernels.kl import linear_kl
from coterie.kernels.permute import permute, plan_rows, plan_slots, unpermute
from coterie.kernels.rmsnorm import rms_norm, rms_norm_add
from coterie.kernels.rope import rope, rope_table

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def _every_operation() -> None:
    """Forward and backward of all that has Triton kernels."""
    x, w = torch.randn(6, 8, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    gate(x, 2).weights_TK.sum().backward()
    plan = plan_rows(torch.randint(0, 3, (6, 2)), 3)
    plan_slots(torch.randint(0, 3, (6, 2)), 3, 4)
    unpermute(permute(x, plan), plan, w).sum().backward()
    w_in, w_out = torch.randn(3, 10, 8, requires_grad=True), torch.randn(3, 8, 5, requires_grad=True)
    b_in, b_out = torch.randn(3, 10, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    expert_mlp(x, plan, w_in, w_out, weights_TK=w, b_in_EN=b_in, b_out_ED=b_out).sum().backward()
    grouped_gemm(x, w_in, torch.tensor([2, 0, 4])).sum().backward()
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    rms_norm_add(x, x, torch.ones(8), 1e-5)[0].sum().backward()
    rope(x.view(1, 6, 2, 4), *rope_table(torch.arange(6), 4, 1e4)).sum().backward()
    linear_cross_entropy(x, w_in[0], torch.randint(0, 10, (6,))).backward()
    linear_kl(x, w_in[0], torch.randn(6, 3), torch.randn(10, 3)).backward()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="looks into the interpreter")
def test_every_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    depth, launched, astray = [0], set(), set()

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor):
        depth[0] += 1
        yield
        depth[0] -= 1

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        (launched if depth[0] else astray).add(name)
        run(self, *args, **kwargs)

    run = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", call)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with forced("interpret"):
        _every_operation()
    assert not astray
    assert len(launched) == 18


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from coterie.kernels import cross_entropy, expert_mlp_triton as mlp, expert_sums_triton as sums, gate_triton as gate
from coterie.kernels import expert_decode_triton as decode, paged_attention_triton as paged, route_triton as route
from coterie.kernels import grouped_gemm_triton as gemm, kl, permute_triton as permute, rmsnorm, rope

H, I, W, i = "*bf16", "*i64", "*fp32", "i32"
NUMBERS = ("rows tokens assignments blocks capacity T S H HALF stride_b stride_s stride_h table_b sign"
    " ignore_index").split()
TYPES = dict.fromkeys(NUMBERS, i) | dict(eps="fp32", temperature="fp32", load_EB="*i32", valid_T="*i1", valid="*i8")
TYPES |= dict.fromkeys("source_ptr counts_ptr slot_ptr ids_A rank_A slot_A source_R first_EB slot_TK ids_TK counts_E"
    " replay_TK targets".split(), I)
TYPES |= dict.fromkeys("weights_ptr parts_ptr weights_TK dweights_TK logits_TE scores_TE dscores_TE dlogits_TE bias_E"
    " loss scale dw cos sin".split(), W)
TYPES |= dict.fromkeys("tables_ptr starts_ptr lengths_ptr done_ptr".split(), "*i32") | dict.fromkeys("A N"
    " table_stride".split(), i) | dict.fromkeys("k_scale_ptr v_scale_ptr sinks_ptr sums_ptr part_ptr".split(), W)
TYPES |= dict(rate="fp32", factor="fp32", ids_ptr=I, weight_ED=W)
TILE = dict(V=16, GROUP=8, PER_SM=1, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64)
GEMM = dict(TILE, C=256, D=256, F=128, M=256, N=384, E=8, K=2, TURNED=True, TAIL=True, GATED=True, HAS_BIAS=True,
    GATHER_A=False, GATHER_B=True, HAS_SOURCE=True, HAS_WEIGHTS=True)
SUMS = dict(GEMM, P=1, GATHER=True, BLOCK_T=16, BLOCK_D=128, BLOCK_P=1, BLOCK_R=64, BLOCK_C=64)
GATE = dict(E=60, K=6, G=6, TOPK_GROUPS=3, P=8, Q=16, C=64, SOFTMAX=True, BLOCK_T=16)
MOVE = dict(D=2880, K=8, BLOCK=128, CHUNK=32, SLOTS=True, BLOCK_R=2, BLOCK_T=2, BLOCK_D=1024)
ROWS = dict(ADD=True, GRAD=True, MASKED=True, BLOCK=4096)
CASES = [(k, GEMM) for k in (gemm._rows_kernel, gemm._weights_kernel, mlp._up_kernel, mlp._down_grad_kernel)]
CASES += [(k, SUMS) for k in (sums._choices_kernel, sums._columns_kernel)]
CASES += [(gate._gate_kernel, GATE), (gate._gate_kernel, dict(GATE, replay_TK=None)), (gate._gate_kernel,
    dict(GATE, G=1, P=1, Q=64, valid_T=None, replay_TK=None, bias_E=None)), (gate._gate_backward_kernel, GATE)]
CASES += [(route._logits_kernel, dict(D=2048, E=128, BLOCK_E=8, BLOCK_D=512)), (route._route_kernel, dict(GATE,
    SOFTMAX=False, RENORMALIZE=True, BLOCK_K=8, BLOCK_T=1)), (route._route_kernel, dict(GATE, G=1, P=1, Q=64,
    bias_E=None, RENORMALIZE=True, BLOCK_K=8, BLOCK_T=1, tokens=1))]
CASES += [(k, MOVE) for k in (permute._rank_kernel, permute._place_kernel, permute._permute_kernel,
    permute._unpermute_kernel, permute._unpermute_backward_kernel)]
CASES += [(k, ROWS) for k in (rmsnorm._forward_kernel, rmsnorm._backward_kernel, cross_entropy._loss_kernel,
    kl._kl_kernel)] + [(rope._rope_kernel, dict(HEADS=32, BLOCK=64))]
PAGED = dict(H=32, D=128, PART=512, WINDOW=128, HAS_SINKS=True, G=4, SIZE=16, SCALED=False, BLOCK_H=8, BLOCK_T=8,
    BLOCK_D=128, BLOCK_N=64)
FEW = dict(D=2048, F=768, K=8, BLOCK_A=128, BLOCK_T=16, HAS_BIAS=True, GATED=True, HAS_WEIGHTS=True)
CASES += [(paged._attention_kernel, dict(PAGED, SPLIT=split)) for split in (False, True)]
# Triton makes a constant of a count that is 1.
CASES += [(paged._attention_kernel, dict(PAGED, SPLIT=True, T=1, N=1)), (paged._combine_kernel, dict(PAGED, T=1, N=1,
    BLOCK_H=32))]
CASES += [(paged._combine_kernel, dict(PAGED, BLOCK_H=32)), (decode._up_kernel, dict(FEW, BLOCK_F=32, BLOCK_D=128)),
    (decode._down_kernel, dict(FEW, BLOCK_D=32, BLOCK_F=128))]
for kernel, values in CASES:
    function = kernel.fn if hasattr(kernel, "configs") else kernel
    names = function.arg_names
    types = {n: "constexpr" if n in values else i if n in ("V", "D", "E") else TYPES.get(n, H) for n in names}
    constants = {(at,): values[n] for at, n in enumerate(names) if n in values}
    aligned = {(at,): [["tt.divisibility", 16]] for at, n in enumerate(names) if types[n].startswith("*")}
    both = values is GEMM  # what the tensor cores do differs; the rest is compiled for one of the two
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async"))[0 if both else 1 :]:
        made = triton.compile(
            ASTSource(function, types, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 8, "num_stages": 3},
        )
        ptx = made.asm["ptx"]
        assert made.metadata.shared <= 160 * 1024, (function.__name__, made.metadata.shared)
        assert values is not GEMM or instruction in ptx, function.__name__
        assert made.asm["cubin"]
        if function is cross_entropy._loss_kernel:
            # A thread overwrites only the logits that it reads itself: all other reads come before the last barrier.
            last = ptx[ptx.rindex("bar.sync"):]
            assert last.count("ld.global.b16") == last.count("st.global.b16") > 0, function.__name__
"""


@pytest.mark.slow
def test_compiles_for_gpus_that_are_not_here(tmp_path: Any) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

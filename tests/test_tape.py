"""A recorded step of a whole model gives what the model gives, and torch's own work in it is refused."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from coterie.kernels import native
from coterie.kernels.linear import linear
from coterie.kernels.norm_native import norm, plus_
from coterie.kernels.tape import Tape
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    if native.library() is None:
        pytest.skip(str(native.why_not()))
    with torch.inference_mode():
        yield


class Values:
    """Attention to the token itself, as the first token of a sequence has it."""

    losses, length = False, 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replays_a_step(dtype: torch.dtype) -> None:
    w, weight, x = (torch.randn(*shape).to(dtype) for shape in ((40, 40), (40,), (3, 40)))

    def step() -> Tensor:
        return plus_(linear(norm(x, weight, 1e-5), w), x)

    tape = Tape(step)
    for _ in range(3):
        x.normal_()
        assert torch.equal(tape.replay(), step())


def test_a_recording_keeps_its_memory() -> None:
    x, w = torch.ones(1, 512), torch.eye(512)
    tape = Tape(lambda: linear(linear(linear(x, w), w), w))
    others = [torch.full((1, 512), torch.nan) for _ in range(64)]
    assert torch.equal(tape.replay(), x)
    assert all(bool(t.isnan().all()) for t in others)


def test_what_torch_computes_is_refused() -> None:
    x, w = torch.ones(2, 8), torch.eye(8)
    for step in (lambda: linear(x + 1, w), lambda: linear(x, w).float().sum(), lambda: linear(x, w) * x.sum().item()):
        with pytest.raises(RuntimeError, match="cannot be recorded: torch computes aten::"):
            Tape(step)
    assert Tape(lambda: linear(x, w)).replay().equal(x), "a refusal leaves nothing behind"


def test_a_call_that_fails_in_a_replay_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.ones(1, 8), torch.eye(8)
    tape = Tape(lambda: linear(x, w))

    def experts(*_: object) -> int:
        return 2

    monkeypatch.setattr(tape, "_calls", [(experts, ())])
    with pytest.raises(RuntimeError, match="experts failed in a recorded step"):
        tape.replay()


def test_other_threads_are_not_recorded() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, w, other = torch.ones(1, 8), torch.eye(8), torch.ones(1, 8)

    def elsewhere() -> None:
        with torch.inference_mode():
            plus_(other, x)

    with ThreadPoolExecutor(1) as pool:

        def step() -> Tensor:
            pool.submit(elsewhere).result()
            return linear(x, w)

        tape = Tape(step)
    before = other.clone()
    tape.replay()
    assert torch.equal(other, before)


@pytest.mark.parametrize("options", [{}, {"qk_norm": "head"}, {"qk_norm": "all", "attention_bias": "all"}])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_replays_a_model_without_feed_forward(options: dict, norm: str, positions: str) -> None:
    sizes = {"vocab_size": 41, "max_positions": 64, "layers": 2, "dim": 24, "heads": 4, "kv_heads": 2, "hidden": 8}
    config = ModelConfig(**sizes, norm=norm, positions=positions, **options)
    model = GPT(config, dtype=torch.float32).eval()
    for block in model.blocks:
        block.mlp = torch.nn.Identity()
    tokens, at, cache = torch.tensor([[3, 5]]), torch.tensor([[0, 9]]), Values()
    tape = Tape(lambda: model(tokens, at, cache=cache).logits_BSV)
    for _ in range(3):
        tokens.random_(41)
        at.random_(64)
        assert torch.equal(tape.replay(), model(tokens, at, cache=cache).logits_BSV)

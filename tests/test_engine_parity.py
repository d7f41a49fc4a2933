"""Greedy tokens equal those of transformers' generate; prompts are cut, blocks are lost and prefixes shared."""

import random
from typing import Any

import pytest
import torch
from hf_models import config_for, model_of

from coterie.infer.config import EngineConfig
from coterie.infer.engine import Engine
from coterie.infer.paged import block_bytes
from coterie.infer.request import SamplingParams
from coterie.models.weights import load_model

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "llama")
LONGEST = 600
NEW = 12


def _prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Lengths 1 to 600, of few prompts mostly short; every third begins as the one before it."""
    r = random.Random(count)
    rest = [r.randint(1, LONGEST) if count > 100 else int(LONGEST ** r.random()) for _ in range(count - 2)]
    lengths = [1, LONGEST, *rest]
    found: list[list[int]] = []
    for i, length in enumerate(lengths):
        ids = [r.randrange(2, vocabulary) for _ in range(length)]
        if i % 3 == 2:
            shared = found[-1][: r.randint(1, len(found[-1]))]
            ids = (shared + ids)[: max(length, 1)]
        found.append(ids)
    return found


def _theirs(model: Any, ids: list[int]) -> list[int]:
    ids_1S = torch.tensor([ids])
    out_1S = model.generate(ids_1S, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out_1S[0, len(ids) :].tolist()


def _gap(model: Any, ids: list[int]) -> float:
    """Between the two likeliest next tokens."""
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def _ours(folder: Any, prompts: list[list[int]]) -> list[list[int]]:
    model = load_model(folder)
    longest, size = LONGEST + NEW, 8
    memory = (-(-longest // size) + 20) * block_bytes(model.config, size, "auto", torch.float32)
    config = EngineConfig(
        block_size=size,
        budget=53,
        max_model_len=longest,
        kv_memory=memory,
        max_sequences=24,
        max_queued_requests=4096,
    )
    engine, answers = Engine(model, None, config), [list[int]() for _ in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=NEW)
    for ids, answer in zip(prompts, answers, strict=True):
        engine.submit(ids, params, lambda delta, answer=answer: answer.extend(delta.tokens))
    cut = [0]
    engine.watch(lambda report: cut.append(report.tokens))
    roster, r = engine.core.scheduler.roster, random.Random(1)
    while not engine.idle:
        engine.step()
        if len(cut) % 10 == 0 and len(roster.running) > 1:  # all but the oldest: something must get on
            roster.preempt(r.choice(list(roster.running.values())[1:]))
    assert max(cut) <= 53
    report = engine.report()
    assert report["preemptions"], "no sequence ever lost its blocks"
    assert report["prefix_hits"], "no prefix was ever shared"
    return answers


@pytest.mark.parametrize(
    ("family", "count"),
    [(f, 24) for f in FAMILIES] + [pytest.param(f, 200, marks=pytest.mark.long) for f in FAMILIES],
)
def test_greedy_tokens_equal_those_of_transformers(tmp_path, family: str, count: int) -> None:
    config = config_for(family, 0)
    config.max_position_embeddings, config.vocab_size = LONGEST + NEW, 211
    theirs = model_of(config, 1)
    theirs.save_pretrained(tmp_path)
    prompts = _prompts(count, config.vocab_size)
    expected = [_theirs(theirs, ids) for ids in prompts]
    assert len({token for tokens in expected for token in tokens}) > 40, "a model that repeats itself shows nothing"
    gaps = []
    for ids, want, got in zip(prompts, expected, _ours(tmp_path, prompts), strict=True):
        assert len(got) == NEW
        same = next((i for i in range(NEW) if want[i] != got[i]), NEW)
        if same < NEW:
            gaps.append(_gap(theirs, ids + want[:same]))
    assert not gaps, f"{len(gaps)} of {count} differ, where the two likeliest tokens' logits are apart by {gaps}"

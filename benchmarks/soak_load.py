"""The soak's requests: those whose answer is known beforehand, and those that are rude, wrong or too many."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..infer.config import EngineConfig
from ..infer.engine import Engine
from ..infer.pipeline import Generated, Pipeline
from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.tokenizer import Tokenizer, train_bpe
from ..models.weights import save_model
from ..moe.config import MoEConfig
from .soak_client import Reply

MODEL = "soak"
LENGTH = 320
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
_TEXT = "the cat sat on a mat and saw small dogs run after one red ball while rain fell over grey old roofs"
_WORDS = _TEXT.split()
_CHOICES = ["yes", "no", "perhaps not"]
_SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["a", "bb"]}},
    "required": ["sure", "kind"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """One request and what must come back.

    Attributes:
        check: says what is wrong with an answer of status 200, or None.
    """

    kind: str
    path: str
    body: bytes
    check: Callable[[Reply], str | None]


def make_model(folder: Path) -> None:
    """Writes a tiny random model with experts, its tokenizer and a chat template."""
    config = ModelConfig(
        vocab_size=512, max_positions=LENGTH, layers=2, dim=64, heads=4, kv_heads=2, hidden=64, init_std=0.3,
        tied_head=False, experts=(8, 8), moe=MoEConfig(top_k=2, hidden=48),
    )  # fmt: skip
    model = GPT(config)
    model.init_weights(5)
    save_model(folder, model, train_bpe([_TEXT, "<user><assistant>{}[]:,0123456789 true false"] * 8, 400))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def known(folder: Path, count: int, seed: int = 0) -> list[Case]:
    """Requests whose answers are computed here, each alone in an engine of its own.

    Args:
        count: of each kind.
    """
    engine = Engine.open(folder, EngineConfig(device="cpu", max_sequences=8, kv_memory=64 << 20, budget=64))
    pipe, luck = Pipeline(engine), random.Random(seed)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    cases = []
    for _ in range(count):
        cases += _greedy(pipe, tokenizer, luck)
        cases += _sampled(pipe, luck)
        cases.append(_stopped(pipe, luck))
    engine.stop()
    return cases


def _prompt(luck: random.Random, words: int) -> str:
    return " ".join(luck.choices(_WORDS, k=words))


def _greedy(pipe: Pipeline, tokenizer: Tokenizer, luck: random.Random) -> list[Case]:
    short, long = _prompt(luck, luck.randint(2, 20)), _prompt(luck, 200)
    tokens = luck.randint(4, 48)
    told = {"model": MODEL, "temperature": 0, "max_tokens": tokens}
    answer = pipe(short, temperature=0, max_tokens=tokens)
    cases = [
        _completion("plain", told | {"prompt": short}, answer),
        _completion("stream", told | {"prompt": short, "stream": True}, answer),
        _completion("twice", told | {"prompt": short, "n": 2}, answer * 2),
    ]
    ids = tokenizer.encode(long)[: LENGTH - 30]
    answer = pipe([ids], temperature=0, max_tokens=24)
    cases.append(_completion("long", told | {"prompt": ids, "max_tokens": 24}, answer))
    answer = pipe([tokenizer.encode(f"<user>{short}<assistant>")], temperature=0, max_tokens=tokens)
    body = told | {"messages": [{"role": "user", "content": short}], "stream": luck.random() < 0.5}
    cases.append(Case("chat", "/v1/chat/completions", json.dumps(body).encode(), _same(answer, body["stream"])))
    return cases


def _sampled(pipe: Pipeline, luck: random.Random) -> list[Case]:
    """A seed gives the same text whoever else is in the batch."""
    prompt, settings = _prompt(luck, 8), {"temperature": 0.9, "top_p": 0.95, "seed": luck.randrange(2**31), "n": 2}
    answer = pipe(prompt, max_tokens=20, **settings)
    return [_completion("seeded", {"model": MODEL, "prompt": prompt, "max_tokens": 20, **settings}, answer)]


def _stopped(pipe: Pipeline, luck: random.Random) -> Case:
    prompt = _prompt(luck, 6)
    text = pipe(prompt, temperature=0, max_tokens=32)[0].text
    at = luck.randrange(max(1, len(text) - 3))
    stop = text[at : at + luck.randint(1, 3)] or "never"
    answer = pipe(prompt, temperature=0, max_tokens=32, stop=[stop])
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 32, "stop": [stop], "stream": True}
    return _completion("stop", body, answer)


def _completion(kind: str, body: dict[str, Any], answer: Sequence[Generated]) -> Case:
    check = _same(answer, bool(body.get("stream")))
    return Case(kind, "/v1/completions", json.dumps(body).encode(), check)


def _same(answer: Sequence[Generated], stream: bool) -> Callable[[Reply], str | None]:
    expected = [(one.text, one.finish_reason) for one in answer]

    def check(reply: Reply) -> str | None:
        texts, ends = [""] * len(expected), [""] * len(expected)
        for part in reply.events() if stream else [reply.json()]:
            for choice in part["choices"]:
                said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
                texts[choice["index"]] += said.get("content") or ""
                ends[choice["index"]] = choice.get("finish_reason") or ends[choice["index"]]
        got = list(zip(texts, ends, strict=True))
        return None if got == expected else f"expected {expected}, got {got}"

    return check


def free(luck: random.Random) -> Case:
    """A request whose answer nobody knows, but whose form is: sampled, or after a grammar."""
    body: dict[str, Any] = {"model": MODEL, "prompt": _prompt(luck, luck.randint(1, 60)), "max_tokens": 40}
    kind = luck.choice(("sampled", "choice", "schema", "logprobs"))

    def check(reply: Reply) -> str | None:
        choice = reply.json()["choices"][0]
        text = choice["text"]
        if kind == "choice" and text not in _CHOICES:
            return f"{text!r} is not one of the choices"
        if kind == "schema" and choice["finish_reason"] == "stop" and set(json.loads(text)) != {"sure", "kind"}:
            return f"{text!r} does not follow the schema"
        return None

    if kind == "choice":
        body["structured_outputs"] = {"choice": _CHOICES}
    elif kind == "schema":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}
    elif kind == "logprobs":
        body |= {"logprobs": 3, "frequency_penalty": 0.5, "presence_penalty": 0.5, "min_p": 0.05}
    return Case(kind, "/v1/completions", json.dumps(body).encode(), check)


def bad(luck: random.Random) -> Case:
    """A request that must be refused."""
    wrong: list[Any] = [
        b"{", b"[]", b"\xff\xfe", b"null", b"[" * 5000, b"{}",
        {"temperature": -1}, {"temperature": "hot"}, {"max_tokens": 0}, {"max_tokens": 10**9}, {"n": 10**6},
        {"n": True}, {"top_p": 0}, {"prompt": []}, {"prompt": [10**6]}, {"prompt": "x " * 5000}, {"stop": ["a"] * 99},
        {"logit_bias": {"99999": 1}}, {"unheard_of": 1}, {"seed": 1.5}, {"model": "other"},
        {"structured_outputs": {"regex": "(("}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}}},
    ]  # fmt: skip
    what = luck.choice(wrong)
    body = what if isinstance(what, bytes) else json.dumps({"model": MODEL, "prompt": "a", **what}).encode()
    path = luck.choice(("/v1/completions", "/v1/chat/completions", "/v1/nowhere"))
    return Case("bad", path, body, lambda reply: f"{body[:80]!r} was taken")

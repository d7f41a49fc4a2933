"""Passes over blocks of keys and values, the pipeline, and `coterie generate`."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close_rms, greedy, stepwise

import coterie
from coterie.cli import main
from coterie.infer.open_model import open_model
from coterie.infer.pipeline import GenerationError, Pipeline, pipeline, stream_text
from coterie.infer.request import RequestError
from coterie.models.config import ModelConfig, RopeScaling
from coterie.models.gpt import GPT
from coterie.models.tokenizer import train_bpe
from coterie.models.weights import save_model
from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.gate import Gate

MODERN = ModelConfig(
    vocab_size=300,
    max_positions=40,
    layers=3,
    dim=48,
    heads=6,
    kv_heads=2,
    hidden=28,
    qk_norm="head",
    init_std=0.3,
    tied_head=False,
    experts=(0, 4, 8),
    moe=MoEConfig(top_k=2, hidden=20, residual=True),
)
GPT2 = replace(
    MODERN,
    kv_heads=0,
    positions="learned",
    norm="layernorm",
    activation="gelu",
    attention_bias="all",
    mlp_bias=True,
    qk_norm="none",
    moe=MoEConfig(top_k=1, hidden=20, activation="gelu", bias=True, gate=GateConfig(capacity_factor=1.0)),
)
# Queries and keys normed over all heads, slower rotations.
OLMOE = replace(MODERN, qk_norm="all", attention_bias="qkv", rope_scaling=RopeScaling("llama3", 4.0, 1.0, 2.0, 12))


def _model(config: ModelConfig) -> GPT:
    model = GPT(config)
    model.init_weights(8)
    return model.eval()


@pytest.mark.parametrize("config", [MODERN, GPT2, OLMOE], ids=["modern", "gpt2", "olmoe"])
@pytest.mark.parametrize("pieces", [[7, 1, 1, 1, 1], [3, 4, 1, 3], [11]], ids=str)
def test_a_cached_pass_equals_a_whole_one(config: ModelConfig, pieces: list[int]) -> None:
    model, tokens_BS = _model(config), torch.randint(0, 300, (3, 11))
    expected_BSV = model(tokens_BS).logits_BSV
    found = torch.cat(list(stepwise(model, tokens_BS, pieces)), 1)
    assert_close_rms(found, expected_BSV, 1e-5)


def test_logits_of_some_rows_are_those_of_all() -> None:
    model, tokens_BS = _model(MODERN), torch.randint(0, 300, (3, 5))
    with torch.no_grad():
        whole_BSV = model(tokens_BS).logits_BSV
        some_1RV = model(tokens_BS, rows_R=torch.tensor([14, 0, 6])).logits_BSV
    assert_close_rms(some_1RV, whole_BSV.flatten(0, 1)[[14, 0, 6]][None], 1e-6)


def test_a_cached_pass_computes_nothing_that_only_training_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_BS = _model(MODERN), torch.randint(0, 300, (3, 5))
    assert model(tokens_BS).aux > 0
    monkeypatch.setattr(Gate, "_losses", lambda *_: pytest.fail("the router's losses were computed"))
    assert len(list(stepwise(model, tokens_BS, [5]))) == 1


@pytest.mark.parametrize("config", [MODERN, GPT2], ids=["modern", "gpt2"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_greedy_equals_recomputing_everything(config: ModelConfig, device: str) -> None:
    model, whole_BS = _model(config).to(device), torch.randint(0, 300, (3, 6)).to(device)
    got = greedy(model, whole_BS, 20)
    for _ in range(20):
        whole_BS = torch.cat([whole_BS, model(whole_BS).logits_BSV[:, -1:].argmax(-1)], 1)
    assert got == whole_BS[:, 6:].tolist()
    assert len({token for row in got for token in row}) > 10, "a model that repeats itself would show nothing"


def test_a_model_with_a_capacity_is_served_without() -> None:
    """Whether a token is dropped would depend on its batch."""
    gate = GateConfig(capacity_factor=0.5, eval_capacity_factor=0.5)
    capped, free = (_model(replace(MODERN, moe=replace(MODERN.moe, gate=g))) for g in (gate, GateConfig()))
    rows = torch.randint(0, 300, (3, 9))
    assert not torch.equal(capped(rows).logits_BSV, free(rows).logits_BSV)
    assert greedy(capped, rows, 12) == greedy(free, rows, 12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "run" / "model", _model(MODERN), train_bpe(["hello world, hello text"] * 3, 290))
    return tmp_path / "run"


@pytest.fixture
def pipe(folder: Path) -> Pipeline:
    return coterie.pipeline(folder, device="cpu")


def test_importing_the_package_stays_light() -> None:
    code = "import coterie, sys; assert 'torch' not in sys.modules; from coterie import pipeline; assert pipeline"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        coterie.nothing  # noqa: B018


def test_a_pipeline_answers_texts_and_ids_alike(pipe: Pipeline) -> None:
    tokenizer = pipe.engine.tokenizer
    assert tokenizer is not None
    settings = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    texts = ["hello", "world, hello", ""]
    found = pipe(texts, **settings)
    assert [one.text for one in found] == [pipe(text, **settings)[0].text for text in texts]
    assert found[:2] == pipe([tokenizer.encode(text) for text in texts[:2]], **settings)
    assert found[0] == pipe(tokenizer.encode("hello"), **settings)[0]
    assert [one.prompt_tokens for one in found] == [len(tokenizer.encode(t)) or 1 for t in texts]
    assert all(one.finish_reason == "length" and len(one.tokens) == 8 and one.stop is None for one in found)
    assert "".join(pipe.stream("hello", **settings)) == found[0].text
    two = pipe("hello", n=2, temperature=2.0, seed=1, max_tokens=8, logprobs=0)
    assert two[0].tokens != two[1].tokens
    assert all(len(one.logprobs) == len(one.tokens) for one in two)
    stop = found[0].text[2:4]
    (stopped,) = pipe("hello", stop=stop, **settings)
    assert (stopped.text, stopped.stop, stopped.finish_reason) == (found[0].text[:2], stop, "stop")


def test_seeds_decide_and_nothing_global_moves(pipe: Pipeline) -> None:
    state = torch.get_rng_state()
    first, again, other = (pipe("hello", temperature=2.0, seed=seed)[0].tokens for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "prompt is empty"),
        ([1] * 38, {"max_new_tokens": 4}, "38 tokens and max_tokens 4 are 42 tokens, but the model has 40 positions"),
        ([1, 300], {}, "token 300, but the vocabulary has 300"),
        ([1, -2], {}, "the prompt's token is -2"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"temperature": float("inf")}, "temperature is inf"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"top_k": -1}, "top_k is -1"),
        ([1], {"max_new_tokens": -1}, "max_tokens is -1"),
        ([1], {"top_q": 1}, "top_q is no setting: .*top_k, top_p are"),
        ([1], {"max_tokens": 1, "max_new_tokens": 1}, "max_tokens and max_new_tokens are one setting"),
        ("caf\udce9", {}, "the prompt is not UTF-8"),
    ],
)
def test_bad_requests_are_refused_before_any_work(pipe: Pipeline, prompt, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pipe(prompt, **settings)
    if prompt != []:
        with pytest.raises(ValueError, match=words):
            pipe.stream(prompt[0] if prompt == [[]] else prompt, **settings)
    assert pipe.engine.idle


def test_one_bad_prompt_of_several_leaves_none_behind(pipe: Pipeline) -> None:
    with pytest.raises(RequestError):
        pipe([[1, 2], [300]])
    assert pipe.engine.idle
    assert pipe.engine.core.pool.used == 0


def test_a_stream_that_is_left_is_aborted(pipe: Pipeline) -> None:
    pieces = pipe.stream("hello", max_new_tokens=30, ignore_eos=True, temperature=0.0)
    next(pieces)
    assert not pipe.engine.idle
    pieces.close()
    assert pipe.engine.idle
    assert pipe.engine.core.pool.used == 0
    with pytest.raises(ValueError, match="n 2 texts cannot be one stream"):
        pipe.stream("hello", n=2)


def test_many_more_prompts_than_may_wait(folder: Path) -> None:
    """MII's pipeline in a loop deadlocks."""
    with pipeline(folder, device="cpu", max_queued_requests=2, max_sequences=2) as pipe:
        for _ in range(3):
            found = pipe([[n] for n in range(1, 20)], temperature=0.0, max_new_tokens=3, ignore_eos=True)
            assert [len(one.tokens) for one in found] == [3] * 19
        engine = pipe.engine
    assert not engine.alive


def test_a_pipeline_may_have_an_engine_that_runs_already(pipe: Pipeline) -> None:
    expected = pipe(["hello", "world"], temperature=0.0)
    pipe.engine.start()
    assert pipeline(pipe.engine)(["hello", "world"], temperature=0.0) == expected
    assert "".join(pipe.stream("hello", temperature=0.0)) == expected[0].text
    pipe.close()


def test_settings_of_the_engine_are_checked(folder: Path) -> None:
    for settings, words in (
        ({"policy": "best"}, "policy 'best' is not one of"),
        ({"kv_dtype": "int4"}, "kv_dtype 'int4'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_sequences": True}, "max_sequences is True"),
        ({"itl_target_ms": 0.0}, "itl_target_ms is 0.0"),
        ({"itl_limit_ms": -1.0}, "itl_limit_ms is -1.0"),
        ({"blocks": 3}, "blocks is no setting"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(folder, **settings)


def test_damaged_weights_are_told() -> None:
    model = _model(MODERN)
    with torch.no_grad():
        model.final_norm.weight[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationError, match="logits are not finite"):
            pipeline(model)([[1, 2]], max_new_tokens=4, temperature=temperature)


def test_models_open_by_their_directory_or_their_run(folder: Path) -> None:
    for path in (folder, folder / "model"):
        model, tokenizer = open_model(path, device="cpu")
        assert model.config == MODERN
        assert not model.training
        assert tokenizer is not None
    pieces = list(stream_text(folder, "hello", max_new_tokens=10, device="cpu", temperature=0))
    again = list(stream_text(folder / "model", "hello", max_new_tokens=10, device="cpu", temperature=0))
    assert "".join(pieces) == "".join(again)
    assert "".join(stream_text(folder, "", max_new_tokens=5, device="cpu", seed=1)) is not None
    save_model(folder / "model", open_model(folder, device="cpu")[0], file_bytes=20_000)
    assert not (folder / "model" / "model.safetensors").exists()
    for path in (folder, folder / "model"):
        assert "".join(stream_text(path, "hello", max_new_tokens=10, device="cpu", temperature=0)) == "".join(pieces)


def test_the_command_refuses_before_it_writes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["generate", str(folder), "--prompt", "hello", "--device", "cpu", "--max-new-tokens"]
    with pytest.raises(SystemExit):
        main([*words, "4000"])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("coterie: ")
    assert "but the model has 40 positions" in said.err
    main([*words, "4"])
    assert capsys.readouterr().out.startswith("hello")


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_told(folder: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device '?{device}"):
        open_model(folder, device=device)


def test_a_prompt_that_is_no_text_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="the prompt is not UTF-8"):
        stream_text(folder, "caf\udce9", device="cpu")


def test_what_is_no_model_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        open_model(tmp_path)
    (folder / "model" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        list(stream_text(folder, "hello", device="cpu"))
    (folder / "model" / "model.safetensors").unlink()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="has not written its model/ yet"):
        open_model(folder)


def test_the_checkpoint_says_how_to_sample(folder: Path) -> None:
    file = folder / "model" / "generation_config.json"
    file.write_text('{"temperature": 0.9, "top_k": 1, "top_p": null, "do_sample": true, "eos_token_id": 0, "x": []}')
    told = {"max_new_tokens": 24, "ignore_eos": True}
    with pipeline(folder, device="cpu") as pipe:
        greedy = pipe("hello", temperature=0.0, **told)
        assert pipe.engine.defaults == {"temperature": 0.9, "top_k": 1}
        assert pipe("hello", **told) == greedy
        assert "".join(pipe.stream("hello", **told)) == greedy[0].text
        assert pipe("hello", seed=1, top_k=0, temperature=100.0, **told) != greedy
        assert pipeline(pipe.engine)("hello", **told) == greedy
    with pipeline(folder, device="cpu", generation_config=False) as pipe:
        assert pipe.engine.defaults == {}
        assert pipe("hello", seed=1, temperature=100.0, **told) != greedy
    file.write_text('{"top_k": -1}')
    with pipeline(folder, device="cpu") as pipe:
        assert pipe.engine.defaults == {"top_k": 0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"temperature": "hot"}', "temperature is 'hot': give a finite number from 0 to 100"),
        ('{"top_p": 7}', "top_p is 7: give"),
        ('{"top_k": 1.5}', "top_k is 1.5: give"),
        ('{"repetition_penalty": 0}', "repetition_penalty is 0: give"),
        ('{"min_p": [0.1]}', "min_p is"),
        ('{"temperature": 1', "generation_config.json"),
        ("[]", "generation_config.json"),
    ],
)
def test_a_damaged_generation_config_is_told_of(folder: Path, text: str, words: str) -> None:
    (folder / "model" / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config") as caught:
        pipeline(folder, device="cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)

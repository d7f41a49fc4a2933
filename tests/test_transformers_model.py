"""Our models behind transformers' interface: the same logits, tokens, losses and files as without it."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_rms, greedy
from runs import build, sequence, small_model
from torch import Tensor

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.presets import gpt_350m_mos, tiny_pr_moe
from coterie.models.tokenizer import train_bpe
from coterie.models.weights import config_to_dict, load_model, read_config, save_model
from coterie.moe.config import GateConfig, MoEConfig

pytest.importorskip("transformers", reason="needs the extra hf")
import transformers

from coterie.models.transformers_model import CoterieConfig, CoterieForCausalLM

SMALL: dict[str, Any] = {"vocab_size": 61, "max_positions": 40, "dim": 24, "heads": 3, "hidden": 40}
CONFIGS = {
    "pr-moe": replace(tiny_pr_moe(), **(SMALL | {"heads": 4, "kv_heads": 2})),
    "mos": replace(gpt_350m_mos(), layers=4, experts=(0, 3, 0, 5), **SMALL),
    "pyramid, biased router, untied": replace(small_model(bias_update=0.01), tied_head=False, **SMALL),
    "shared expert": ModelConfig(
        **SMALL, layers=2, experts=(4, 4), moe=MoEConfig(top_k=2, hidden=8, shared_hidden=12, shared_gate=True)
    ),
    "dense": ModelConfig(**SMALL, layers=2),
}
# Capacities let batch mates push each other out, which is not what these tests are about.
CONFIGS["mos"] = replace(CONFIGS["mos"], moe=replace(CONFIGS["mos"].moe, gate=GateConfig(aux_weight=0.01)))


def made(config: ModelConfig, scale: float = 10.0) -> GPT:
    """Weights large enough for attention and routers to prefer something, beside a word's own embedding."""
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(scale if name.startswith("blocks") and "norm" not in name else 1)
        for i, (_, buffer) in enumerate(model.named_buffers()):
            buffer.copy_(torch.arange(buffer.numel()) * 0.1 + i)
    return model.eval()


def wrapped(model: GPT) -> Any:
    wrapper = CoterieForCausalLM(CoterieConfig(**config_to_dict(model.config)))
    wrapper.load_state_dict(model.state_dict())
    return wrapper.eval()


def tokens(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(61, (n,), generator=generator) for n in lengths]


def pad(rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask); padding is a word like any other, so that seeing it would change something."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> GPT:
    return made(CONFIGS[request.param])


@torch.no_grad()
def test_one_directory_for_both(model: GPT, tmp_path: Path) -> None:
    save_model(tmp_path / "ours", model, file_bytes=30_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(theirs, CoterieForCausalLM)
    ids = torch.stack(tokens(9, 9))
    assert_close_rms(theirs(ids).logits, model(ids).logits_BSV, 1e-6)
    assert torch.equal(theirs(ids, logits_to_keep=2).logits, theirs(ids).logits[:, -2:])
    assert torch.equal(theirs(ids, logits_to_keep=torch.tensor([0, 3])).logits, theirs(ids).logits[:, [0, 3]])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert written[0] == written[1]
    back = load_model(tmp_path / "theirs")
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@torch.no_grad()
def test_generate_gives_our_tokens(model: GPT) -> None:
    theirs, ids = wrapped(model), torch.stack(tokens(7, 7))
    expected = torch.tensor(greedy(model, ids, 6))
    assert torch.equal(theirs.generate(ids, max_new_tokens=6, do_sample=False)[:, 7:], expected)
    assert len(expected.unique()) > 1, "tokens that never change would hide a wrong cache"


@torch.no_grad()
def test_beams_do_not_depend_on_the_cache() -> None:
    theirs, ids = wrapped(made(CONFIGS["mos"])), torch.stack(tokens(7, 7))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    assert torch.equal(*(theirs.generate(ids, use_cache=cached, **options) for cached in (True, False)))


@torch.no_grad()
def test_prompts_of_several_lengths_generate_what_each_does_alone(model: GPT) -> None:
    theirs, rows = wrapped(model), tokens(9, 4, 6)
    ids, mask = pad(rows, left=True)
    found = theirs.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 9:]
    assert found.tolist() == greedy(model, rows, 6)


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_changes_nothing(left: bool, use_cache: bool, model: GPT) -> None:
    """Neither logits nor losses; two sequences of other lengths are what they are one by one."""
    theirs, rows = wrapped(model), tokens(9, 4)
    ids, mask = pad(rows, left)
    out = theirs(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=use_cache)
    for row, logits, seen in zip(rows, out.logits, mask, strict=True):
        assert_close_rms(logits[seen.bool()], model(row[None]).logits_BSV[0], 1e-5)
    targets = torch.full(ids.shape, -100)
    targets[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    first = theirs(ids, attention_mask=mask).logits[targets != -100]
    assert_close_rms(out.loss - _router(theirs, out), F.cross_entropy(first, targets[targets != -100]), 1e-5)
    if model.moe_layers:
        plain = pad(rows, left=False)
        routed = model(plain[0], valid_BS=plain[1].bool())
        assert_close_rms(out.aux_loss, routed.aux / 13)


def _router(theirs: Any, out: Any) -> Tensor | float:
    return theirs.gpt.config.moe.gate.aux_weight * out.aux_loss if "aux_loss" in out else 0.0


def test_a_prompt_in_pieces(model: GPT) -> None:
    """Several new tokens after earlier ones, with padding and without."""
    theirs = wrapped(model)
    ids, mask = pad(tokens(9, 6), left=True)
    for seen in (None, mask):
        whole = theirs(ids, attention_mask=seen).logits
        past = theirs(ids[:, :5], attention_mask=None if seen is None else seen[:, :5]).past_key_values
        rest = theirs(ids[:, 5:], attention_mask=seen, past_key_values=past).logits
        assert_close_rms(rest, whole[:, 5:])


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_our_training(recompute: bool) -> None:
    model = made(replace(small_model(aux_weight=0.1, z_weight=0.01), **SMALL), 4.0).train()
    theirs, ids = wrapped(model).train(), torch.stack(tokens(9, 9))
    if recompute:
        theirs.activation_checkpointing_enable()
    labels = ids.clone()
    labels[0, :4] = -100
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    out = model(ids, targets_BS=targets)
    loss = out.lm / (targets != -100).sum() + (0.1 * out.aux + 0.01 * out.z) / ids.numel()
    loss.backward()
    got = theirs(ids, labels=labels)
    got.loss.backward()
    assert_close_rms(got.loss, loss)
    assert theirs.gpt.recompute == ("full" if recompute else "none")
    for name, parameter in theirs.named_parameters():
        assert_close_rms(parameter.grad, model.get_parameter(name).grad, 1e-5, name)


def test_micro_batches_add_up_to_the_batch() -> None:
    theirs = wrapped(made(replace(small_model(aux_scope="sequence"), **SMALL)))
    ids = torch.stack(tokens(9, 9))
    labels = ids.clone()
    labels[0, 3:] = -100
    items = (labels[:, 1:] != -100).sum()
    parts = [theirs(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items) for i in (0, 1)]
    whole = theirs(ids, labels=labels)
    shares = [(labels[i, 1:] != -100).sum() / items for i in (0, 1)]
    router = sum(s * _router(theirs, p) for s, p in zip(shares, parts, strict=True))
    assert_close_rms(sum(p.loss for p in parts) - router, whole.loss - _router(theirs, whole))


@torch.no_grad()
def test_router_logits_choose_the_routes() -> None:
    model = made(CONFIGS["shared expert"])
    theirs, ids = wrapped(model), torch.stack(tokens(9, 9))
    out = theirs(ids, output_router_logits=True)
    routes = model(ids).routes
    assert len(out.router_logits) == len(routes) == 2
    for logits, chosen in zip(out.router_logits, routes, strict=True):
        assert torch.equal(logits.topk(2).indices, chosen)
    assert theirs(ids).router_logits is None
    assert theirs(ids, return_dict=False)[1].shape == (2, 9, 61)


def test_routers_stay_in_fp32(tmp_path: Path) -> None:
    model = made(CONFIGS["pyramid, biased router, untied"])
    save_model(tmp_path / "wide", model)
    save_model(tmp_path / "narrow", model, dtype=torch.bfloat16)
    auto = transformers.AutoModelForCausalLM
    for theirs in (
        auto.from_pretrained(tmp_path / "narrow"),
        auto.from_pretrained(tmp_path / "wide", dtype="bfloat16"),
    ):
        kinds = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
        assert {name for name, kind in kinds.items() if kind == torch.float32} == {n for n in kinds if ".gate." in n}
        assert kinds["embed.weight"] == torch.bfloat16
        assert theirs(torch.stack(tokens(9, 9))).logits.isfinite().all()


def test_a_new_model_is_drawn_by_our_rule() -> None:
    config = CoterieConfig(**config_to_dict(replace(small_model(bias_update=0.1), dim=48, hidden=99, init_std=0.05)))
    torch.manual_seed(0)
    new = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    again = transformers.AutoModelForCausalLM.from_config(config)
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert new.blocks[0].mlp.w_in.std().item() == pytest.approx(0.05, rel=0.1)
    assert new.blocks[0].mlp.w_out.std().item() == pytest.approx(0.05 / 6**0.5, rel=0.1)
    assert new.blocks[0].attention.out.weight.std().item() == pytest.approx(0.05 / 6**0.5, rel=0.1)
    assert (new.final_norm.weight == 1).all()
    assert (new.blocks[1].moe.gate.bias_E == 0).all()


def test_what_is_replaced_in_the_wrapper_is_replaced_in_the_model() -> None:
    theirs = copy.deepcopy(wrapped(made(CONFIGS["pyramid, biased router, untied"])))
    theirs.resize_token_embeddings(64, mean_resizing=False)
    assert theirs.gpt.embed.weight.shape[0] == theirs.gpt.head.weight.shape[0] == theirs.config.vocab_size == 64
    assert theirs(torch.tensor([[63, 1]])).logits.shape == (1, 2, 64)
    assert theirs.config.own().vocab_size == 64


def test_what_it_does_not_know_is_refused() -> None:
    theirs, ids = wrapped(made(CONFIGS["mos"])), torch.stack(tokens(9, 9))
    with pytest.raises(ValueError, match="not inputs_embeds"):
        theirs(inputs_embeds=torch.zeros(1, 2, 24))
    with pytest.raises(ValueError, match="neither attentions nor hidden states"):
        theirs(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 3\], expected \[2, 9\]"):
        theirs(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="position 40 passes the model's 40 positions"):
        theirs(torch.zeros(1, 41, dtype=torch.long), position_ids=torch.arange(41)[None])
    with pytest.raises(ValueError, match="StaticCache does not fit"):
        theirs.generate(ids, max_new_tokens=3, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match=r"norm(=| is )'batchnorm'"):
        CoterieConfig(norm="batchnorm")


def test_the_trainer_learns_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    rows = [sequence(i % 4, 9, 61) for i in range(48)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1}
    options |= {"learning_rate": 1e-2, "gradient_accumulation_steps": 2, "activation_checkpointing": True}
    options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path)}

    def train(**resume: Any) -> tuple[Any, list[float]]:
        trainer = transformers.Trainer(
            model=wrapped(made(replace(small_model(), **SMALL), 1.0)),
            args=transformers.TrainingArguments(**options),
            train_dataset=data,
        )
        trainer.train(**resume)
        return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, losses = train()
    assert max(losses[-2:]) < losses[0] - 0.1
    again, _ = train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert read_config(tmp_path / "checkpoint-6") == model.gpt.config
    assert torch.equal(load_model(tmp_path / "checkpoint-6").embed.weight, model.embed.weight)


# Low-rank updates of parameters with two or three axes; `kv.weight` and the experts' `w_in` have four.
LORA = ["attention.q.weight", "attention.out.weight", "mlp.w_in", "mlp.w_out", "experts.w_out"]


def test_lora_of_parameters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.17", reason="low-rank updates need it")
    base = wrapped(made(CONFIGS["pyramid, biased router, untied"]))
    ids = torch.stack(tokens(9, 9))
    before = base(ids).logits
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=[], target_parameters=LORA)
    tuned = peft.get_peft_model(copy.deepcopy(base), config)
    trained = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    assert torch.equal(tuned(ids).logits, before)
    for _ in range(2):  # the first step moves B alone, which begins as zeros
        tuned(ids, labels=ids).loss.backward()
        for parameter in trained.values():
            parameter.data -= 0.1 * parameter.grad
    assert all(parameter.grad.any() for parameter in trained.values())
    after = tuned.eval()(ids).logits
    assert not torch.allclose(after, before)
    tuned.save_pretrained(tmp_path)
    assert_close_rms(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(ids).logits, after)
    assert_close_rms(tuned.merge_and_unload()(ids).logits, after)


def test_a_tokenizer_comes_with_it(tmp_path: Path) -> None:
    save_model(tmp_path, made(CONFIGS["dense"]), train_bpe(["some text"], 300))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("some text").input_ids) == "some text"

"""Our decoder as a transformers model: importing this module registers `coterie` with AutoConfig and
AutoModelForCausalLM, so that what transformers' Trainer, `generate`, PEFT and lm-evaluation-harness take, takes it.

B batch, S sequence, L keys, H query heads, G key-value heads, d head width, T = B * S, E experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import initialization as fill
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .config import ModelConfig
from .config_file import MODEL_TYPE, config_from_dict, config_to_dict
from .gpt import GPT, Output
from .init import std_of
from .layers import Linear, Norm

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class CoterieConfig(PreTrainedConfig):
    """The fields of `ModelConfig` under their own names; what is saved is exactly our config.json.

    Raises:
        ValueError: a field of ours with a value that it cannot have.
    """

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "hidden",
        "max_position_embeddings": "max_positions",
        "tie_word_embeddings": "tied_head",
    }
    rope_scaling = None  # type: ignore[assignment]  # transformers' property of this name means something else
    use_cache = True

    def __post_init__(self, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in [*kwargs] if self.attribute_map.get(name, name) in _FIELDS}
        own = {self.attribute_map.get(name, name): value for name, value in given.items()}
        self.__dict__.update(_plain(config_from_dict({"model_type": MODEL_TYPE, **own})))
        super().__post_init__(**kwargs)

    def own(self) -> ModelConfig:
        """The config that `GPT` is built from."""
        return config_from_dict({"model_type": MODEL_TYPE, **{name: getattr(self, name) for name in _FIELDS}})

    @property
    def num_key_value_heads(self) -> int:
        return self.own().num_kv_heads

    def to_diff_dict(self) -> dict[str, Any]:
        return config_to_dict(self.own())


def _plain(config: ModelConfig) -> dict[str, Any]:
    return {name: value for name, value in config_to_dict(config).items() if name in _FIELDS}


class _Attending:
    """transformers' cache as the one that `Attention` asks; without a cache, attention under a mask of padding."""

    losses = True  # they are in the answer, with a cache too

    def __init__(self, cache: Cache | None, length: int, mask_BS1L: Tensor | None) -> None:
        self.length = length
        self._cache, self._mask = cache, mask_BS1L

    def attend(self, layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
        """See `models.attention.Cache`."""
        keys_BGLd, values_BGLd = k_BSGd.transpose(1, 2), v_BSGd.transpose(1, 2)
        if self._cache is not None:
            keys_BGLd, values_BGLd = self._cache.update(keys_BGLd, values_BGLd, layer)
        o_BHSd = F.scaled_dot_product_attention(
            q_BSHd.transpose(1, 2),
            keys_BGLd,
            values_BGLd,
            attn_mask=self._mask,
            is_causal=self._mask is None and q_BSHd.shape[1] > 1,
            enable_gqa=q_BSHd.shape[2] != k_BSGd.shape[2],
        )
        return o_BHSd.transpose(1, 2)


def _mask(seen_BL: Tensor | None, new: int, length: int, device: torch.device) -> Tensor | None:
    """What each of `new` queries may see, (B or 1, 1, S, L); None: all up to itself, and torch knows how."""
    if seen_BL is None and (not length or new == 1):
        return None
    causal_SL = torch.ones(new, length + new, dtype=torch.bool, device=device).tril(length)
    if seen_BL is None:
        return causal_SL[None, None]
    # Padding sees itself, because a softmax over nothing is NaN.
    itself_SL = causal_SL & ~causal_SL.tril(-1 + length)
    return ((causal_SL & seen_BL[:, None]) | itself_SL)[:, None]


class CoterieForCausalLM(PreTrainedModel, GenerationMixin):
    """`GPT` with transformers' interface: nothing of the model is written a second time.

    Its submodules and tensor names are those of `GPT`, so both read the same directory.
    """

    config_class = CoterieConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (declared above us as an instance's)
    _keep_in_fp32_modules_strict = [r"\.gate\."]  # noqa: RUF012
    gpt: GPT

    def __init__(self, config: CoterieConfig) -> None:
        super().__init__(config)
        gpt = GPT(config.own())
        # Both hold the same dict of submodules, so what replaces a module of one replaces it in the other.
        self._modules = gpt._modules
        self.__dict__["gpt"] = gpt  # past nn.Module, which would list every tensor twice
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.gpt.head  # None where it is the input's

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The rule of `init_weights`, drawn from torch's own generator as transformers does."""
        owner = "norm." if isinstance(module, Norm) else "attention.out." if isinstance(module, Linear) else ""
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            std = std_of(owner + name, self.gpt.config)
            if std is None:
                fill.ones_(tensor)
            elif std:
                fill.normal_(tensor, std=std)
            else:
                fill.zeros_(tensor)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: (B, S).
            attention_mask: (B, L), 0 for padding on either side, with a column for every key in the cache too.
            position_ids: (B, S); None: counted over what is no padding.
            past_key_values: a DynamicCache.
            labels: (B, S) ids, shifted here; -100 is not counted. The loss is that of our own training: mean
                cross-entropy plus aux_weight and z_weight times the router's means over tokens.
            use_cache: None: yes, except in training and where labels are given.
            output_router_logits: also give the router's logits, one (T, E) for each MoE layer, before any noise.
            logits_to_keep: only the last so many positions get logits, or these positions; 0: all.
            num_items_in_batch: labels of all micro-batches, over which a micro-batch's loss is then a share.

        Raises ValueError for an argument that coterie's models do not know, or shapes that do not fit.
        """
        _check(input_ids, inputs_embeds, bool(output_attentions or output_hidden_states))
        assert input_ids is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        padding = _Padding(attention_mask, input_ids, past_key_values)
        # All positions have a part in a loss, and one that is chosen by a tensor may be any.
        last = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        with _Gates(self.gpt, watched=bool(output_router_logits)) as gates:
            out = self._run(input_ids, position_ids, past_key_values, padding, last)
        assert out.logits_BSV is not None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None if labels is None else self._loss(out, labels, padding.tokens, num_items_in_batch)
        answer: dict[str, Any] = {"loss": loss, "logits": out.logits_BSV[:, kept], "past_key_values": past_key_values}
        if not out.stats:
            return CausalLMOutputWithPast(**answer)
        router_logits: Any = gates.logits() if output_router_logits else None
        return MoeCausalLMOutputWithPast(**answer, aux_loss=out.aux / padding.tokens, router_logits=router_logits)

    def _run(
        self, input_ids: Tensor, positions: Tensor | None, keys: Cache | None, padding: _Padding, last: int
    ) -> Output:
        self.gpt.recompute = "full" if self.gradient_checkpointing and self.training else "none"
        return self.gpt(
            input_ids,
            padding.positions(positions, self.gpt.config.max_positions),
            valid_BS=padding.valid_BS,
            cache=padding.cache(keys),
            logits_to_keep=last,
        )

    def _loss(self, out: Output, labels_BS: Tensor, tokens: Tensor | int, items: int | Tensor | None) -> Tensor:
        assert out.logits_BSV is not None
        targets_T = labels_BS[:, 1:].flatten().to(out.logits_BSV.device)
        lm = F.cross_entropy(out.logits_BSV[:, :-1].flatten(0, 1).float(), targets_T, reduction="sum")
        gate, count = self.gpt.config.moe.gate, (targets_T != -100).sum().clamp(min=1)
        router = (gate.aux_weight * out.aux + gate.z_weight * out.z) / tokens
        return lm / count + router if items is None else (lm + router * count) / items


def _check(input_ids: Tensor | None, inputs_embeds: Tensor | None, inner: bool) -> None:
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("coterie's models take input_ids, not inputs_embeds")
    if inner:
        raise ValueError("coterie's models give neither attentions nor hidden states")


class _Padding:
    """What an attention mask says of one pass; without padding it says nothing.

    Attributes:
        valid_BS: False for padding among the new tokens, None where there is none.
        tokens: how many of the new tokens are none.
    """

    def __init__(self, mask: Tensor | None, input_ids: Tensor, cache: Cache | None) -> None:
        if getattr(cache, "is_compileable", False):  # its keys have places that are not filled yet
            raise ValueError(f"a {type(cache).__name__} does not fit coterie's models: give a DynamicCache")
        batch, self._new = input_ids.shape
        self._device, self._past = input_ids.device, 0 if cache is None else int(cache.get_seq_length())
        expected = (batch, self._past + self._new)
        if mask is not None and tuple(mask.shape) != expected:
            raise ValueError(f"attention_mask has shape {list(mask.shape)}, expected {list(expected)}: batch, keys")
        seen = None if mask is None else mask.to(self._device).bool()
        self._seen_BL = None if seen is None or bool(seen.all()) else seen
        valid = None if self._seen_BL is None else self._seen_BL[:, self._past :]
        self.valid_BS = None if valid is None or bool(valid.all()) else valid
        self.tokens = input_ids.numel() if self.valid_BS is None else self.valid_BS.sum().clamp(min=1)

    def positions(self, given: Tensor | None, most: int) -> Tensor | None:
        """(B, S) of the new tokens; None: counted from the cache's length."""
        if given is None and self._seen_BL is None:
            return None
        if given is None and self._seen_BL is not None:
            given = (self._seen_BL.cumsum(-1) - 1).clamp(min=0)[:, self._past :]
        assert given is not None
        if self._past + self._new > most and int(given.max()) >= most:
            raise ValueError(f"position {int(given.max())} passes the model's {most} positions")
        return given

    def cache(self, keys: Cache | None) -> _Attending | None:
        """None: causal attention to the new tokens is all, as behind padding at the end alone."""
        seen = self._seen_BL
        if keys is None and (seen is None or not bool((seen[:, 1:] & ~seen[:, :-1]).any())):
            return None
        return _Attending(keys, self._past, _mask(seen, self._new, self._past, self._device))


class _Gates:
    """Router logits of the pass inside this context, from what the gates are given."""

    def __init__(self, gpt: GPT, watched: bool) -> None:
        self._gates = [moe.gate for moe in gpt.moe_layers] if watched else []
        self._found: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Gates:
        for i, gate in enumerate(self._gates):
            self._hooks.append(gate.register_forward_pre_hook(partial(self._see, i)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, layer: int, gate: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._found[layer] = F.linear(given[0].float(), gate.get_parameter("weight").float())

    def logits(self) -> tuple[Tensor, ...]:
        """One (T, E) for each MoE layer."""
        return tuple(self._found[layer] for layer in sorted(self._found))


AutoConfig.register(MODEL_TYPE, CoterieConfig, exist_ok=True)
AutoModelForCausalLM.register(CoterieConfig, CoterieForCausalLM, exist_ok=True)
AutoTokenizer.register(CoterieConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)

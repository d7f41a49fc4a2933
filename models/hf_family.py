"""What the tables of other projects' architectures are written with: a config's fields, and one architecture.

A field is asked for by name, so that what nobody asked for is known at the end and can be refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from .config import ModelConfig, RopeScaling
from .parts import Table

LAYERS = 2**14
"""More layers than any model has; a damaged file must not make us list 10**12 of them."""

_NEEDED: Any = object()

# Names of things, defaults of `generate`, and what training or a program's own speed alone looks at.
_HARMLESS = re.compile(
    r"architectures|model_type|(transformers|unsloth)_version|(torch_)?dtype|_name_or_path|tokenizer_class|_commit_hash"
    r"|(bos|eos|pad|sep|unk|mask|cls|decoder_start)_token_id|(forced|suppress)_.*|begin_suppress_tokens|bad_words_ids"
    r"|use_cache|return_dict\w*|output_(router_logits|attentions|hidden_states|scores)|torchscript|use_bfloat16"
    r"|_?attn_implementation\w*|_experts_implementation\w*|_flash_attn_2_enabled|pretraining_tp|.*dropout.*|.*pdrop"
    r"|id2label|label2id|_?num_labels|problem_type|finetuning_task|task_specific_params|prefix|gradient_checkpointing"
    r"|max_length|min_length|max_new_tokens|do_sample|early_stopping|num_(beams|beam_groups|return_sequences)"
    r"|temperature|top_[kp]|typical_p|(repetition|length|diversity|encoder_repetition)_penalty|remove_invalid_values"
    r"|(encoder_)?no_repeat_ngram_size|exponential_decay_length_penalty|chunk_size_feed_forward|tf_legacy_loss"
)

_LACKING = {
    "quantization_config": "its weights are quantized",
    "compression_config": "its weights are quantized",
    "auto_map": "it brings code of its own, which is never run",
}


class Fields:
    """A config.json of another project, asked key by key; `problems` holds all that is wrong with it."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        self._asked: set[str] = set()
        self.problems: list[str] = []

    def value(self, *names: str, absent: Any = _NEEDED) -> Any:
        """The value under one of these names, as it stands; null is as good as absent.

        `absent`: what the published format means by that; not given: it is a problem.
        """
        self._asked.update(names)
        found = {name: self._data[name] for name in names if self._data.get(name) is not None}
        if len(found) > 1 and len({repr(value) for value in found.values()}) > 1:
            self.problems.append(" but ".join(f"{name} is {value!r}" for name, value in found.items()))
        if found:
            return next(iter(found.values()))
        if absent is _NEEDED:
            self.problems.append(f"{' or '.join(names)} is missing")
            return None
        return absent

    def _typed(self, names: tuple[str, ...], absent: Any, good: Callable[[Any], bool], what: str, other: Any) -> Any:
        missing = object()
        value = self.value(*names, absent=_NEEDED if absent is _NEEDED else missing)
        if value is missing:
            return absent
        if value is None or not good(value):
            if value is not None:
                self.problems.append(f"{names[0]} is {_short(value)}, expected {what}")
            return other
        return value

    def whole(self, *names: str, absent: Any = _NEEDED, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number in a range."""
        what = f"a whole number from {least} to {most}"
        return self._typed(names, absent, lambda v: type(v) is int and least <= v <= most, what, least)

    def number(self, *names: str, absent: Any = _NEEDED) -> float:
        """A finite number, 0 or more."""

        def good(value: Any) -> bool:
            return type(value) in (int, float) and 0 <= value < math.inf

        return float(self._typed(names, absent, good, "a number, 0 or more", 1.0))

    def flag(self, name: str, absent: Any = _NEEDED) -> bool:
        return self._typed((name,), absent, lambda v: type(v) is bool, "true or false", False)

    def wholes(self, name: str) -> list[int]:
        """A list of whole numbers; absent: empty."""

        def good(value: Any) -> bool:
            return isinstance(value, list) and all(type(item) is int for item in value)

        return self._typed((name,), [], good, "a list of whole numbers", [])

    def only(self, name: str, *known: Any, absent: Any = _NEEDED) -> None:
        """Refuses a value that coterie has no computation for."""
        value = self.value(name, absent=known[0] if absent is _NEEDED and None in known else absent)
        if value is not None and value not in known:
            has = " or ".join(repr(one) for one in known if one is not None)
            self.problems.append(
                f"{name} is {_short(value)}, which coterie lacks" + (f" (it has {has})" if has else "")
            )

    def rope(self, absent: float = _NEEDED) -> dict[str, Any]:
        """rope_theta and rope_scaling of `ModelConfig`, from rope_parameters or from the older two keys."""
        said = [self.value(name, absent={}) for name in ("rope_parameters", "rope_scaling")]
        flat: dict[str, Any] = {}
        for one in said:
            if not isinstance(one, dict) or any(isinstance(value, dict) for value in one.values()):
                self.problems.append(f"rope_parameters is {_short(one)}, expected one set of numbers for all layers")
                continue
            for key, value in one.items():
                key = "rope_type" if key == "type" else key
                if flat.setdefault(key, value) != value:
                    self.problems.append(f"rope_parameters and rope_scaling say {key} {flat[key]!r} and {value!r}")
        for name in ("rope_theta", "partial_rotary_factor"):
            outer = self.value(name, absent=None)
            if outer is not None and flat.setdefault(name, outer) != outer:
                self.problems.append(f"{name} is {outer!r}, but rope_parameters say {flat[name]!r}")
        inner = Fields(flat)
        theta = inner.number("rope_theta", absent=absent)
        inner.only("partial_rotary_factor", 1, None)
        scaling = inner._scaling()
        inner.leftover()
        self.problems += [f"rope: {problem}" for problem in inner.problems]
        return {"rope_theta": theta, "rope_scaling": scaling}

    def _scaling(self) -> RopeScaling | None:
        kind = self.value("rope_type", absent="default")
        if kind == "default":
            return None
        if kind not in ("linear", "llama3"):
            self.problems.append(f"rope_type is {_short(kind)}, which coterie lacks (it has default, linear, llama3)")
            self._asked.update(self._data)  # whatever else belongs to that kind
            return None
        values: dict[str, Any] = {"factor": self.number("factor")}
        if kind == "llama3":
            values |= {name: self.number(name) for name in ("low_freq_factor", "high_freq_factor")}
            values["original_max_positions"] = self.whole("original_max_position_embeddings")
        try:
            return None if self.problems else RopeScaling(kind, **values)
        except ValueError as error:
            self.problems.append(str(error))
            return None

    def leftover(self) -> None:
        """Refuses what nobody asked for, unless it is known to change nothing or says nothing."""
        for name, value in self._data.items():
            if name in self._asked or (not value and type(value) not in (int, float)):
                continue
            if name in _LACKING:
                self.problems.append(f"{name}: {_LACKING[name]}")
            elif not _HARMLESS.fullmatch(name):
                self.problems.append(f"{name} is {_short(value)}, and coterie does not know what that changes")


class Family(NamedTuple):
    """One upstream architecture."""

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    """Their config.json -> ours."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Ours -> their config.json. What that cannot say is lost, or a ValueError: ask `hf.upstream` first."""
    table: Callable[[ModelConfig, bool], Table]
    """Where our tensors are. True: all experts of a layer in one tensor; False: one by one."""
    ignored: str
    """Stored names without weights: a pattern of the whole name."""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

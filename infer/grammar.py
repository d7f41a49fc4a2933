"""Structured output: which tokens a JSON schema, a regular expression or a grammar allows next (library llguidance).

What a client sends is text from outside. It is measured before the library sees it, compiled off the caller's thread
under a limit of time, and whatever goes wrong is a RequestError: of this request, and of no other.

V vocabulary.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..models.tokenizer import Tokenizer
from .grammar_size import check_lark, check_regex, check_schema, load_json
from .request import QueueFull, RequestError

Kind = Literal["json_object", "json_schema", "regex", "grammar", "choice", "tools"]
MOST_BYTES = 1 << 16
MOST_KEPT = 64  # compiled grammars of one tokenizer
MOST_COMPILING = 4
SLOWEST_MASK = 2.0  # seconds; what takes longer holds up everybody's step, so it ends
# A model may go on with white space for ever: one space will do, or a line break and an indentation.
_OPTIONS: Any = {"whitespace_pattern": r"( |\r?\n[ \t]{0,32})", "lenient": False}


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the text must be. RequestError for a kind that is none, or a text that is empty or too long."""

    kind: Kind
    text: str = ""
    """json_object: nothing. json_schema: the schema. regex: what the whole text must match (Rust's syntax, without
    look-around and back-references). grammar: in llguidance's form of Lark. choice: a JSON list of strings. tools:
    JSON with `rules`, Lark of our own, and `arguments`, a list of schemas that the rules know as arguments_0, ..."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RequestError(f"a grammar of kind {str(self.kind)[:40]!r} is not one of {', '.join(get_args(Kind))}")
        if not isinstance(self.text, str) or (not self.text and self.kind != "json_object"):
            raise RequestError(f"the {self.kind} is empty: give its text")
        size = len(self.text.encode(errors="surrogatepass"))
        if size > MOST_BYTES:
            raise RequestError(f"the {self.kind} has {size} bytes, but at most {MOST_BYTES} are taken")


class Matcher:
    """Where one sequence is in its grammar."""

    def __init__(self, inner: Any, home: _Home) -> None:
        self._inner, self._home = inner, home
        self._ended = False

    @property
    def done(self) -> bool:
        """The text is whole and nothing can follow but its end."""
        return self._ended or (self._inner.is_stopped() and not self._inner.is_error())

    def mask(self) -> Tensor:
        """The tokens allowed next, int32 (ceil(V / 32),), a bit a token, as `penalties.mask_` reads them.

        Raises:
            RequestError: the grammar has become too big, or took too long.
        """
        if self.done:
            return self._home.ends.clone()
        start = time.perf_counter()
        bits = self._inner.compute_bitmask()
        seconds = time.perf_counter() - start
        if self._inner.is_error():
            raise RequestError(f"the grammar cannot go on here: {_brief(self._inner.get_error())}")
        if seconds > SLOWEST_MASK:
            raise RequestError(f"the grammar took {seconds:.1f} s for one token: make it simpler")
        mask = torch.frombuffer(bytearray(bits), dtype=torch.int32)
        home = self._home
        # A token that ends texts may have a text too: it is never part of one.
        return mask[: len(home.real)] & (home.real if self._inner.is_accepting() else home.real & ~home.ends)

    def accept(self, token: int) -> None:
        """Goes on by one token. RequestError for one that the mask does not allow."""
        if token in self._home.eos_ids and (self._ended or self._inner.is_accepting()):
            self._ended = True
            return
        if self._ended or not self._inner.consume_token(token):
            raise RequestError(f"token {token} does not fit the grammar")


@dataclass(eq=False)
class CompiledGrammar:
    """A grammar in its first state; any number of sequences may start from it, on any thread."""

    spec: GrammarSpec
    _inner: Any
    _home: _Home
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> Matcher:
        """For one sequence."""
        with self._lock:
            return Matcher(self._inner.deep_copy(), self._home)


class _Home:
    """What the grammars of one tokenizer share: its tokens as the library wants them, and those compiled lately."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: tuple[int, ...], vocabulary: int) -> None:
        from llguidance import LLTokenizer

        if any(not 0 <= token < vocabulary for token in eos_ids):
            raise RequestError(f"end-of-text tokens {list(eos_ids)} are not below the vocabulary of {vocabulary}")
        self.eos_ids = frozenset(eos_ids)
        size = max(vocabulary, tokenizer.vocab_size)
        text = tokenizer.files()["tokenizer.json"]
        try:
            self.tokenizer = LLTokenizer(text, n_vocab=size, eos_token=list(eos_ids))
        except Exception as error:
            raise RequestError(f"this model's tokenizer takes no grammars: {_brief(str(error))}") from None
        # Models are often wider than their tokenizer: what lies beyond has no text.
        real_V = torch.arange(vocabulary) < tokenizer.vocab_size
        ends_V = torch.zeros(vocabulary, dtype=torch.bool)
        ends_V[list(eos_ids)] = True
        self.ends, self.real = _packed(ends_V), _packed(real_V | ends_V)
        self._kept: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, spec: GrammarSpec) -> CompiledGrammar | None:
        with self._lock:
            if (found := self._kept.get(spec)) is not None:
                self._kept.move_to_end(spec)
            return found

    def keep(self, made: CompiledGrammar) -> None:
        with self._lock:
            self._kept[made.spec] = made
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=500_000, step_lexer_fuel=100_000, max_lexer_states=20_000, verbose_errors=False
        )
        inner = LLMatcher(self.tokenizer, _grammar(spec), log_level=0, limits=limits)
        if not inner.is_error():
            inner.compute_bitmask()  # the first is the slowest, and some errors show only here
        if inner.is_error():
            raise RequestError(f"the {spec.kind} cannot be used: {_brief(inner.get_error())}")
        made = CompiledGrammar(spec, inner, self)
        self.keep(made)
        return made


def _packed(allowed_V: Tensor) -> Tensor:
    words = -(-len(allowed_V) // 32)
    bits = torch.zeros(words * 32, dtype=torch.int64)
    bits[: len(allowed_V)] = allowed_V
    return (bits.view(words, 32) << torch.arange(32)).sum(dim=1).to(torch.int32)


def _grammar(spec: GrammarSpec) -> str:
    """The library's form of a text that has been checked."""
    from llguidance import LLMatcher

    if spec.kind == "regex":
        check_regex(spec.text)
        return LLMatcher.grammar_from_regex(spec.text)
    if spec.kind == "grammar":
        check_lark(spec.text)
        return LLMatcher.grammar_from_lark(spec.text)
    if spec.kind == "choice":
        return LLMatcher.grammar_from_lark(_choices(spec.text))
    if spec.kind == "tools":
        return LLMatcher.grammar_from_lark(_tools(spec.text))
    if spec.kind == "json_schema":
        check_schema(spec.text)
    schema = spec.text if spec.kind == "json_schema" else '{"type": "object"}'
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
    except ValueError as error:
        raise RequestError(f"the JSON schema cannot be used: {_brief(str(error))}") from None


def _choices(text: str) -> str:
    choices = load_json(text, "choice")
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise RequestError("choice must be a list of strings that are not empty")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _tools(text: str) -> str:
    told = load_json(text, "tools")
    rules = [told["rules"]]
    for number, schema in enumerate(told["arguments"]):
        check_schema(json.dumps(schema))
        rules.append(f"arguments_{number}: %json {json.dumps({**schema, 'x-guidance': _OPTIONS})}")
    return "\n".join(rules) + "\n"


def _brief(error: str) -> str:
    """One line of the library's message, which quotes the text at length."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no reason given"]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return told if len(told) <= 160 else f"{told[:157]}..."


_homes: WeakKeyDictionary[Tokenizer, dict[tuple[tuple[int, ...], int], _Home]] = WeakKeyDictionary()
_homes_lock = threading.Lock()
_places = threading.BoundedSemaphore(MOST_COMPILING)


def _home(tokenizer: Tokenizer, eos_ids: tuple[int, ...], vocabulary: int) -> _Home:
    with _homes_lock:
        mine = _homes.setdefault(tokenizer, {})
        if (eos_ids, vocabulary) not in mine:
            mine[eos_ids, vocabulary] = _Home(tokenizer, eos_ids, vocabulary)
        return mine[eos_ids, vocabulary]


def compile_grammar(
    spec: GrammarSpec,
    tokenizer: Tokenizer,
    *,
    eos_ids: Sequence[int],
    vocabulary: int,
    timeout_s: float = 5.0,
) -> CompiledGrammar:
    """A grammar ready for use; the same one is compiled once. Waits: keep it off the engine's thread.

    Args:
        tokenizer: the model's.
        eos_ids: the tokens that may end the text.
        vocabulary: of the model's logits; tokens that the tokenizer lacks are never allowed.
        timeout_s: how long to wait. A compilation given up goes on by itself until the library's limits end it.

    Raises:
        RequestError: it is not valid, not supported, too big or too slow; or llguidance is not installed.
        QueueFull: too many are being compiled.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise RequestError("structured output needs llguidance: install coterie[serve]") from None
    home = _home(tokenizer, tuple(dict.fromkeys(eos_ids)) or (tokenizer.eos_id,), vocabulary)
    if (found := home.find(spec)) is not None:
        return found
    if not _places.acquire(blocking=False):
        raise QueueFull(f"{MOST_COMPILING} grammars are being compiled, and at most that many may: try again later")
    future: Future[CompiledGrammar] = Future()
    threading.Thread(target=_work, args=(future, home, spec), name="coterie-grammar", daemon=True).start()
    try:
        return future.result(timeout_s)
    except Late:
        raise RequestError(f"the {spec.kind} took over {timeout_s:g} s to compile: make it simpler") from None


def _work(future: Future[CompiledGrammar], home: _Home, spec: GrammarSpec) -> None:
    try:
        future.set_result(home.compile(spec))
    except RequestError as error:
        future.set_exception(error)
    except BaseException as error:  # a panic in Rust is an exception that is no Exception
        future.set_exception(RequestError(f"the {spec.kind} cannot be compiled: {_brief(str(error))}"))
    finally:
        _places.release()

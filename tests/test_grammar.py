"""Structured output: what a grammar allows parses, and no text from outside costs much."""

import gc
import json
import random
import re
import threading
import time

import pytest
import torch
from engines import ask, drain, engine, prompt, recomputed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coterie.infer import grammar
from coterie.infer.grammar import CompiledGrammar, GrammarSpec, Matcher, compile_grammar
from coterie.infer.grammar_size import MOST_STATES, check_lark, check_regex
from coterie.infer.penalties import mask_
from coterie.infer.request import QueueFull, RequestError
from coterie.models.tokenizer import Tokenizer, train_bpe

WIDE = 700  # the model's vocabulary, wider than the tokenizer's
EOS = (0, 300)  # the second is a merge of the tokenizer's: what it spells can be spelt with others


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [json.dumps({"name": "Ann", "tags": ["a", "b"], "n": [1, 2.5, -3], "on": True, "off": None}, indent=i % 3)
             for i in range(9)]  # fmt: skip
    return train_bpe([*texts, "the quick brown fox jumps over the lazy dog"], 600)


def compiled(tokenizer: Tokenizer, kind, text="") -> CompiledGrammar:
    return compile_grammar(GrammarSpec(kind, text), tokenizer, eos_ids=EOS, vocabulary=WIDE)


def allowed(matcher: Matcher) -> list[int]:
    scores_BV = torch.zeros(1, WIDE)
    mask_(scores_BV, [(0, matcher.mask())])
    return scores_BV[0].isfinite().nonzero()[:, 0].tolist()


def sampled(made: CompiledGrammar, tokenizer: Tokenizer, seed: int, most: int = 400) -> str:
    """A random text; it ends as soon as it may once it is long, and closes what it has opened."""
    dice, matcher, ids = random.Random(seed), made.start(), []
    closing = {i for i in range(tokenizer.vocab_size) if re.fullmatch(r'[\]}"]+', tokenizer.decode([i]))}
    for step in range(most):
        may = allowed(matcher)
        assert may, "a dead end"
        ends = [token for token in may if token in EOS]
        if ends and (step > 20 or len(ends) == len(may) or dice.random() < 0.2):
            matcher.accept(dice.choice(ends))
            assert matcher.done
            assert allowed(matcher) == list(EOS)
            return tokenizer.decode(ids, skip_special=False)
        short = [token for token in may if token in closing] if step > 20 else []
        token = dice.choice(short or [token for token in may if token not in EOS])
        ids.append(token)
        matcher.accept(token)
    return ""


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["a", "bc", 3, None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(6))
def test_a_sampled_text_follows_its_grammar(tokenizer: Tokenizer, seed: int) -> None:
    told = json.loads(sampled(compiled(tokenizer, "json_schema", json.dumps(SCHEMA)), tokenizer, seed))
    assert set(told) == set(SCHEMA["properties"])
    assert len(told["name"]) <= 12
    assert told["kind"] in ("a", "bc", 3, None)
    assert all(-5 <= size <= 99 for size in told["sizes"])
    assert isinstance(json.loads(sampled(compiled(tokenizer, "json_object"), tokenizer, seed)), dict)
    assert re.fullmatch(
        r"(ab|[0-9]{2,4})+c?", sampled(compiled(tokenizer, "regex", "^(ab|[0-9]{2,4})+c?$"), tokenizer, seed)
    )
    choices = ["yes", "no", 'a "quoted"\none', "né\\"]
    assert sampled(compiled(tokenizer, "choice", json.dumps(choices)), tokenizer, seed) in choices
    sum_ = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]{1,3}/\n'
    text = sampled(compiled(tokenizer, "grammar", sum_), tokenizer, seed)
    assert re.fullmatch(r"[0-9+()]+", text)
    assert text.count("(") == text.count(")")


def test_a_grammar_that_ends_allows_only_the_end(tokenizer: Tokenizer) -> None:
    matcher = compiled(tokenizer, "choice", '["yes"]').start()
    for token in tokenizer.encode("yes"):
        assert not matcher.done
        matcher.accept(token)
    assert matcher.done
    assert allowed(matcher) == list(EOS)
    with pytest.raises(RequestError, match="does not fit"):
        matcher.accept(tokenizer.encode("s")[0])


def test_a_text_that_may_end_may_also_go_on(tokenizer: Tokenizer) -> None:
    matcher = compiled(tokenizer, "regex", "ab*").start()
    with pytest.raises(RequestError, match="does not fit"):  # it may not end before it has begun
        compiled(tokenizer, "regex", "ab*").start().accept(EOS[0])
    matcher.accept(tokenizer.encode("a")[0])
    assert not matcher.done
    assert {*EOS, tokenizer.encode("b")[0]} <= set(allowed(matcher))
    matcher.accept(EOS[1])
    assert matcher.done


def test_tokens_without_a_text_are_never_allowed(tokenizer: Tokenizer) -> None:
    assert max(allowed(compiled(tokenizer, "regex", "(?s:.)*").start())) < tokenizer.vocab_size
    beyond = tokenizer.vocab_size + 5
    assert allowed(compiled(tokenizer, "grammar", f'start: "a" | <[{beyond}]>').start()) != []
    assert beyond not in allowed(compiled(tokenizer, "grammar", f'start: "a" | <[{beyond}]>').start())


def test_sequences_of_one_grammar_do_not_know_each_other(tokenizer: Tokenizer) -> None:
    made = compiled(tokenizer, "choice", '["ab", "cd"]')
    first, second = made.start(), made.start()
    before = allowed(second)
    first.accept(tokenizer.encode("a")[0])
    assert allowed(second) == before != allowed(first)


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("regex", "a(b", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(?x) a {9}", "flag x"),
        ("regex", "(" * 20000 + ")" * 20000, "characters is over"),
        ("regex", "(" * 200 + ")" * 200, "open groups"),
        ("regex", "((((((a{100}){100}){100}){100}){100}){100})", "repetitions written out"),
        ("regex", "((a{1000,}){1000}){1000}", "repetitions written out"),
        ("regex", r"([\]a\\]{999}\p{L}{999}){999}", "repetitions written out"),
        ("regex", "a?" * 20000 + "a" * 10000, "characters is over"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[]", "no object"),
        ("json_schema", '{"maximum": NaN}', "not JSON"),
        ("json_schema", '{"type": "foo"}', "foo"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "example.com"),
        ("json_schema", '{"a":' * 900 + "1" + "}" * 900, "900 levels"),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "x-guidance"),
        ("json_schema", json.dumps({"items": {"pattern": "(a{1000}){1000}"}}), "repetitions written out"),
        ("json_schema", json.dumps({"patternProperties": {"(a{1000}){1000}": {}}}), "repetitions written out"),
        ("json_schema", '{"$ref": "#"}', "cannot be used"),
        ("json_schema", '{"enum": ["' + "x" * 70000 + '"]}', "at most 65536"),
        ("grammar", "start: foo", "foo"),
        ("grammar", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ("grammar", 'start: A\nA: B{1000}\nB: C{1000}\nC: "c"', "repetitions written out"),
        ("grammar", "start: /(a{1000}){1000}/", "repetitions written out"),
        ("grammar", 'start: %json {"pattern": "(a{1000}){1000}"}', "repetitions written out"),
        ("grammar", 'start: %lark {start: "a"}', "%lark"),
        ("choice", "[]", "list of strings"),
        ("choice", "[3]", "list of strings"),
        ("choice", "", "empty"),
        ("nonsense", "x", "nonsense"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_sentence(tokenizer: Tokenizer, kind, text: str, why: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RequestError) as told:
        compiled(tokenizer, kind, text)
    assert why in str(told.value)
    assert len(str(told.value)) < 300
    assert "\n" not in str(told.value)
    assert time.perf_counter() - start < 2


def test_the_engine_writes_what_the_grammar_allows() -> None:
    served = engine(text=True)
    kind = {"eos_ids": served.eos_ids, "vocabulary": served.vocabulary}
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 7]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    made = compile_grammar(GrammarSpec("json_schema", json.dumps(schema)), served.tokenizer, **kind)
    asked = {"n": 3, "temperature": 1.0, "seed": 1, "ignore_eos": False}
    client = ask(served, prompt(9), 150, grammar=made, **asked)
    short = ask(served, prompt(9), 2, grammar=made, **asked)
    plain = ask(served, prompt(9), 12)
    drain(served)
    assert [client.finish(i) for i in range(3)] == ["stop"] * 3
    assert all(json.loads(client.text(i))["a"] in ("x", 7) for i in range(3))
    assert short.finish() == "length"
    assert plain.tokens() == recomputed(prompt(9))


@pytest.mark.parametrize("where", ["mask", "accept"])
def test_a_grammar_that_fails_ends_its_own_sequence(where: str) -> None:
    class Failing:
        def start(self):
            matcher = self.made.start()
            setattr(matcher, where, self.fail)
            return matcher

        def fail(self, token: int = 0):
            raise RequestError("the grammar cannot go on here")

    served = engine(text=True)
    failing = Failing()
    failing.made = compile_grammar(
        GrammarSpec("regex", "[a-z]*"), served.tokenizer, eos_ids=served.eos_ids, vocabulary=served.vocabulary
    )
    bad = ask(served, prompt(5), 8, grammar=failing)
    good = ask(served, prompt(5), 8, grammar=failing.made)
    drain(served)
    assert bad.finish() == "error"
    assert good.finish() == "length"
    assert re.fullmatch("[a-z]+", good.text())


HOSTILE = [
    ("regex", "(a{250}){250}"),
    ("regex", "(.{250}){250}"),
    ("regex", "(a|a)*(a|aa)+(.*.*)*b"),
    ("regex", "(.*a.{300})*|(.*b.{301})*"),
    ("regex", "(a|b)*a(a|b){20}"),
    ("regex", r"(\w{1,200}|\W{1,200}){1,50}"),
    ("regex", "a?" * 5000 + "a" * 5000),
    ("regex", "|".join(f"{i:x}.*" for i in range(2700))),
    ("json_schema", json.dumps({"enum": [f"v{i}" for i in range(6000)]})),
    ("json_schema", json.dumps({"type": "string", "maxLength": 10**9})),
    ("json_schema", json.dumps({"type": "array", "minItems": 10**9})),
    ("json_schema", json.dumps({"properties": {f"k{i}": {"type": "string"} for i in range(1500)}})),
    ("json_schema", json.dumps({"allOf": [{"anyOf": [{"required": [i + j] * 2} for j in "abcde"]} for i in "abc"]})),
    ("json_schema", json.dumps({"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(12)], "type": "string"})),
    ("grammar", 'start: s\ns: s s s | s s | X s | Y | X | \nX: /.+/\nY: /[^b]+/\n'),
    ("grammar", 'start: (("a" | "b"){1,1000} "c"){1,1000}'),
    ("grammar", "start: T0\n" + "".join(f"T{i}: T{i + 1} | /.*{i}/\n" for i in range(50)) + 'T50: "a"'),
    ("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1} | r{i + 1} r{i + 1}\n" for i in range(900)) + 'r900: "a"'),
    ("grammar", "start: " + '"a" ' * 15000),
    ("grammar", r"start: T" + "\n" + r"T: ~/.*(a.{20}|b.{21}).*/ & /.*c.{18}/"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), HOSTILE, ids=[f"{k}-{t[:16]}" for k, t in HOSTILE])
def test_hostile_grammars_cost_little(tokenizer: Tokenizer, kind, text: str) -> None:
    """Some are refused at once, some fail on the way, some work: none takes long for a token."""
    start, told = time.perf_counter(), ""
    try:
        matcher, dice = compiled(tokenizer, kind, text).start(), random.Random(0)
        for _ in range(20):
            before = time.perf_counter()
            may = allowed(matcher)
            assert time.perf_counter() - before < 1
            matcher.accept(dice.choice(may))
            if matcher.done:
                break
    except RequestError as error:
        told = str(error)
    assert len(told) < 300
    assert time.perf_counter() - start < 5


def test_a_slow_compilation_is_given_up(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, spec = threading.Event(), GrammarSpec("regex", "slow")
    home = grammar._home(tokenizer, EOS, WIDE)
    monkeypatch.setattr(home, "compile", lambda spec: go_on.wait(20))

    def ask():
        return compile_grammar(spec, tokenizer, eos_ids=EOS, vocabulary=WIDE, timeout_s=0.05)

    try:
        for _ in range(grammar.MOST_COMPILING):
            with pytest.raises(RequestError, match="make it simpler"):
                ask()
        with pytest.raises(QueueFull, match="being compiled"):
            ask()
    finally:
        go_on.set()
    monkeypatch.undo()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            assert compiled(tokenizer, "regex", "slow").start()
            break
        except QueueFull:
            time.sleep(0.01)
    else:
        pytest.fail("the places of those given up are lost")


def test_a_panic_is_an_error_of_one_request(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def panics(spec):
        raise Panic("index out of bounds")

    monkeypatch.setattr(grammar._home(tokenizer, EOS, WIDE), "compile", panics)
    with pytest.raises(RequestError, match="cannot be compiled: index out of bounds"):
        compiled(tokenizer, "regex", "panics")


def test_a_slow_mask_ends_its_sequence(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = compiled(tokenizer, "regex", "a*").start()
    monkeypatch.setattr(grammar, "SLOWEST_MASK", 0.0)
    with pytest.raises(RequestError, match="for one token"):
        matcher.mask()


def test_compiled_grammars_are_kept_and_forgotten(tokenizer: Tokenizer) -> None:
    first = compiled(tokenizer, "regex", "x0")
    assert compiled(tokenizer, "regex", "x0") is first
    for i in range(1, grammar.MOST_KEPT + 1):
        compiled(tokenizer, "regex", f"x{i}")
    assert compiled(tokenizer, "regex", "x0") is not first
    assert len(grammar._home(tokenizer, EOS, WIDE)._kept) == grammar.MOST_KEPT


def test_a_tokenizer_that_is_gone_takes_its_grammars_along() -> None:
    own = train_bpe(["some text"], 300)
    compile_grammar(GrammarSpec("regex", "a"), own, eos_ids=(0,), vocabulary=300)
    count = len(grammar._homes)
    del own
    gc.collect()
    assert len(grammar._homes) == count - 1


SIMPLE = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
              st.integers(-50, 50), st.integers(0, 60)),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
    st.builds(lambda xs: {"enum": xs}, st.lists(st.integers() | st.text(max_size=4), min_size=1, max_size=4)),
)  # fmt: skip
SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds(lambda one, n: {"type": "array", "items": one, "maxItems": n}, inner, st.integers(0, 2)),
        st.dictionaries(st.text("abé\"\\ ", min_size=1, max_size=4), inner, max_size=3).map(
            lambda of: {
                "type": "object", "properties": of, "required": sorted(of), "additionalProperties": False,
            }
        ),
    ),
    max_leaves=5,
)  # fmt: skip


def valid(value, schema) -> bool:
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        of = schema["properties"]
        return isinstance(value, dict) and set(value) == set(of) and all(valid(value[k], of[k]) for k in of)
    if kind == "array":
        return (
            isinstance(value, list)
            and len(value) <= schema["maxItems"]
            and all(valid(one, schema["items"]) for one in value)
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return value is None if kind == "null" else isinstance(value, bool)


@settings(max_examples=40, deadline=None)
@example(schema={"enum": ["'"]}, seed=0)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_a_text_sampled_under_any_schema_is_valid(tokenizer: Tokenizer, schema, seed: int) -> None:
    text = sampled(compiled(tokenizer, "json_schema", json.dumps(schema)), tokenizer, seed, most=1500)
    assert valid(json.loads(text), schema), text


@settings(max_examples=200, deadline=None)
@given(st.text('a.b|*+?()[]{}^\\,19xp-"/ ', max_size=60))
def test_any_text_is_measured(text: str) -> None:
    for check in (check_regex, check_lark):
        try:
            size = check(text)
        except RequestError:
            continue
        assert size is None or size <= MOST_STATES


SIZES = {"abc": 3, "a{3}b": 4, "(ab){2,5}": 15, "[a-z]{4}": 4, "[]a]{4}": 4, r"\{9\}": 3, "a{2}{3}": 6, "x{0}": 1}


@pytest.mark.parametrize(("pattern", "size"), SIZES.items())
def test_the_size_counts_what_is_repeated(pattern: str, size: int) -> None:
    assert check_regex(pattern) == size

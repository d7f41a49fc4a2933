"""Byte-level BPE: train one, or load any `tokenizer.json` (library `tokenizers`)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import tokenizers

from .files import TOKENIZER_BYTES, checked_size, is_there, read_json

EOS = "<|endoftext|>"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What published tokenizers call the end of a document, likeliest first.
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")

_UNKNOWN = "\ufffd"
_OPEN = 3  # characters: some decoders give one for each byte that waits
_CONTEXT = 8  # ids


def _byte_characters() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: itself where it can be seen, else one from 256 on
    (GPT-2's encoder.py, `bytes_to_unicode`)."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_characters()


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: ids run from 0 to vocab_size - 1.
        eos_id: the id that ends a document.
        eos_ids: all that end a generated text: that one, and those of generation_config.json or config.json.
    """

    def __init__(self, path: str | Path | tokenizers.Tokenizer, eos: str | None = None) -> None:
        """Loads a tokenizer.json, or the one in a directory.

        Args:
            path: the file or its directory.
            eos: the token that ends a document; None: what tokenizer_config.json says, or eos_token_id of
                generation_config.json or config.json, or a usual name.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is not a tokenizer, or no token ends a document.
        """
        config: Path | None = None
        told: tuple[int, ...] = ()
        if isinstance(path, tokenizers.Tokenizer):
            self._inner = path
        else:
            file = Path(path)
            file = file / "tokenizer.json" if file.is_dir() else file
            self._inner, config = _load(file), _config_beside(file)
            told = _told_ids(file.parent) if file.name == "tokenizer.json" else ()
        self.vocab_size: int = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id: int = self._find_eos(eos, config, told)
        self.eos_ids: tuple[int, ...] = (self.eos_id, *(i for i in told if i != self.eos_id))

    def _find_eos(self, eos: str | None, config: Path | None, told: tuple[int, ...]) -> int:
        if eos is None and config is not None and is_there(config):
            eos = _told_eos(config)
        if eos is None and told and told[0] < self.vocab_size:
            return told[0]
        for name in _EOS_NAMES if eos is None else (eos,):
            found = self._inner.token_to_id(name)
            if found is not None:
                return found
        wanted = "none of the usual end-of-document tokens" if eos is None else f"no token {eos!r}"
        raise ValueError(f"the tokenizer has {wanted}: name one that it has with eos=...")

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no token is added at either end."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def vocabulary(self) -> dict[str, int]:
        """Every token, as the tokenizer.json writes it, and its id."""
        return self._inner.get_vocab(with_added_tokens=True)

    def encode_parts(self, parts: Sequence[str]) -> list[int]:
        """Ids of texts that follow each other; no token, and no special one, reaches from one into the next."""
        eos, behind = self._inner.id_to_token(self.eos_id) or "", self._inner.get_added_tokens_decoder()
        ids = self.encode(parts[0])
        for part in parts[1:]:
            # Some tokenizers put a space before what begins a text, but not behind a special token.
            found = self.encode(eos + part)
            led = found[:1] == [self.eos_id] and self.eos_id in behind and not behind[self.eos_id].rstrip
            ids += found[1:] if led else self.encode(part)
        return ids

    @property
    def special_texts(self) -> list[str]:
        """Texts that `encode` takes for special tokens."""
        return [one.content for one in self._inner.get_added_tokens_decoder().values() if one.special]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model goes on with: those of `encode` after the tokens that the tokenizer's own
        template begins every text with, such as Llama's <s>."""
        whole = self._inner.encode(text or "a", add_special_tokens=True)  # of nothing, both ends look alike
        added = itertools.takewhile(lambda one: one[1], zip(whole.ids, whole.special_tokens_mask, strict=True))
        return [i for i, _ in added] + self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, in the library's threads."""
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes | None:
        """What a token by itself stands for, which may be a part of a character; None: no id of this vocabulary, or
        not known."""
        piece = self._inner.id_to_token(token)
        if piece is None:
            return None
        text = self.decode([token], skip_special=False)
        if "\ufffd" not in text:
            return text.encode()
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        codes = [_BYTES.get(char) for char in piece]
        return None if None in codes else bytes(code for code in codes if code is not None)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json at `path`, and beside it what else `files` has."""
        path = Path(path)
        for name, text in self.files().items():
            file = path if name == "tokenizer.json" else _config_beside(path)
            file.write_text(text, encoding="utf-8")

    def files(self) -> dict[str, str]:
        """What a directory must hold for `Tokenizer(directory)` to be this one: names and texts. A
        tokenizer_config.json is among them only where the usual names would give another end of a document."""
        files = {"tokenizer.json": self._inner.to_str(pretty=True)}
        usual = [i for name in _EOS_NAMES if (i := self._inner.token_to_id(name)) is not None]
        if usual[:1] != [self.eos_id]:
            eos = {"eos_token": self._inner.id_to_token(self.eos_id)}
            files[TOKENIZER_CONFIG] = json.dumps(eos, indent=2) + "\n"
        return files


class TextStream:
    """Pieces of text from ids that come one by one: a character whose bytes are not all there waits.

    Bytes that are no UTF-8 do not wait for ever: three more can complete a character, so that of U+FFFD at the end
    three are held back and no more. However long the text, a push decodes a few ids.

    `before`: ids of the text that they go on with: some tokenizers leave out a space where a text begins.
    """

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = (), *, skip_special: bool = True) -> None:
        self._decode = partial(tokenizer.decode, skip_special=skip_special)
        # The last ids, which decide how the next piece begins, and how many characters of their text were told.
        self._ids = list(before)[-_CONTEXT:]
        self._told = len(self._decode(self._ids)) if self._ids else 0

    def push(self, token: int) -> str:
        """The text that is certain with this id, often "" in the middle of a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        open_ = 0
        while open_ < _OPEN and text.endswith(_UNKNOWN, 0, len(text) - open_):
            open_ += 1
        certain = len(text) - open_
        piece = text[self._told : certain]
        self._told = max(self._told, certain)
        if len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            left = len(text) - self._told
            self._told = max(0, len(self._decode(self._ids)) - left)
        return piece

    def finish(self) -> str:
        """What is left, with U+FFFD for bytes that never made a character."""
        text = self._decode(self._ids)
        piece, self._told = text[self._told :], len(text)
        return piece


def _config_beside(file: Path) -> Path:
    """tokenizer_config.json, and for NAME.tokenizer.json NAME.tokenizer_config.json."""
    return file.with_name(file.name.removesuffix(".json").removesuffix("tokenizer") + TOKENIZER_CONFIG)


def _told_eos(config: Path) -> str | None:
    told = read_json(config).get("eos_token")
    told = told.get("content") if isinstance(told, dict) else told
    if told is not None and not isinstance(told, str):
        raise ValueError(f"{config} has eos_token {told!r}, expected the text of a token")
    return told


def _told_ids(folder: Path) -> tuple[int, ...]:
    """eos_token_id, one or a list, of generation_config.json, else of config.json; (): neither says one."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        told = read_json(file).get("eos_token_id") if is_there(file) else None
        ids = told if isinstance(told, list) else [] if told is None else [told]
        if any(type(one) is not int or not 0 <= one < 2**31 for one in ids):
            raise ValueError(f"{file} has eos_token_id {told!r}, expected an id or a list of ids")
        if ids:
            return tuple(ids)
    return ()


def _load(file: Path) -> tokenizers.Tokenizer:
    if not is_there(file):
        raise FileNotFoundError(f"no tokenizer at {file}: give a tokenizer.json or its directory")
    checked_size(file, TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # plain Exception, and of a panic in Rust an exception that is none
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(f"{file} is not a tokenizer.json: {' '.join(str(error).split())}") from None


def vocabulary(path: str | Path) -> dict[str, int]:
    """Every token of a tokenizer.json and its id.

    Raises:
        FileNotFoundError, ValueError: there is none.
    """
    return _load(Path(path)).get_vocab(with_added_tokens=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE: GPT-2's splitting of words, all 256 bytes, and `<|endoftext|>` as id 0.

    Args:
        texts: documents.
        vocab_size: tokens, at least 257.

    Raises:
        ValueError: too small a vocabulary, or no text.
    """
    if vocab_size < 257:
        raise ValueError(f"a byte-level vocabulary of {vocab_size} is too small: 256 bytes and {EOS} need 257")
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(counted(), trainer)
    if not seen:
        raise ValueError("there is no text to train a tokenizer on")
    return Tokenizer(inner)

"""Text from ids that come one by one, up to the first stop string.

A stop string may begin and end anywhere in tokens. What could still become one is held back, and nothing else; where
the text stops does not depend on how it was cut into tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..models.tokenizer import TextStream, Tokenizer


class StopMatcher:
    """Passes pieces of text on until one of several strings is complete.

    The first string to be complete counts, and the longest of those that are complete at the same character. Time is
    linear in the text, whatever the strings (Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977).

    Attributes:
        stopped: the string that was found, None before.
    """

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        """Args:
            stops: strings, none of them empty.
            include: whether the string that was found is part of the text.

        Raises:
            ValueError: a string is empty.
        """
        self._stops = sorted(set(stops), key=len, reverse=True)
        if "" in self._stops:
            raise ValueError("a stop string is empty: it would stop every text at its beginning")
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # how many characters of each the text ends with
        self._include = include
        self._held = ""
        self.stopped: str | None = None

    def push(self, piece: str, *, watch: bool = True) -> str:
        """What of the text is certain now; "" once stopped.

        Args:
            piece: what follows.
            watch: false: strings that are complete in this piece do not count; those that begin in it may later.
        """
        if self.stopped is not None:
            return ""
        text = self._held + piece
        if not self._stops:
            return text
        for place in range(len(self._held), len(text)):
            found = self._step(text[place], watch)
            if found is not None:
                self.stopped, self._held = found, ""
                return text[: place + 1 - (0 if self._include else len(found))]
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return text[:certain]

    def _step(self, char: str, watch: bool) -> str | None:
        for index, stop in enumerate(self._stops):
            matched, borders = self._matched[index], self._borders[index]
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                if watch:
                    return stop  # the longest come first
                matched = borders[-1]
            self._matched[index] = matched
        return None

    def finish(self) -> str:
        """What was held back, as nothing follows; "" once stopped."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest proper beginning that is its end too."""
    borders, length = [0] * len(stop), 0
    for place in range(1, len(stop)):
        while length and stop[place] != stop[length]:
            length = borders[length - 1]
        length += stop[place] == stop[length]
        borders[place] = length
    return borders


class StoppingText:
    """The text of one request, token by token.

    A character whose bytes are not all there waits (see `TextStream`).

    Attributes:
        stopped: the stop string that was found; None: none was.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        before: Iterable[int] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special: bool = True,
    ) -> None:
        """Args:
            tokenizer: of the model.
            stops: strings that end the text; see `stop_ids` for those that are special tokens.
            before: ids of the prompt.
            include_stop: whether the text ends with the stop string or before it.
            min_tokens: a stop string that is complete with fewer tokens than this does not count.
            skip_special: whether special tokens have no text.

        Raises:
            ValueError: a stop string is empty.
        """
        self._stream = TextStream(tokenizer, before, skip_special=skip_special)
        self._matcher = StopMatcher(stops, include=include_stop)
        self._unwatched = max(0, min_tokens - 1)  # the token that makes up the minimum may end the text

    @property
    def stopped(self) -> str | None:
        return self._matcher.stopped

    def push(self, token: int) -> str:
        """The text that is certain with this token, often ""; always "" once stopped."""
        if self.stopped is not None:
            return ""
        watch = self._unwatched == 0
        self._unwatched -= not watch
        return self._matcher.push(self._stream.push(token), watch=watch)

    def finish(self) -> str:
        """The rest of a text that ended otherwise: what was held back, and U+FFFD for bytes without a character."""
        if self.stopped is not None:
            return ""
        return self._matcher.push(self._stream.finish(), watch=self._unwatched == 0) + self._matcher.finish()


def stop_ids(tokenizer: Tokenizer, stops: Iterable[str]) -> dict[int, str]:
    """Those stop strings that are special tokens, such as <|im_end|>: these have no text, so their ids stop it."""
    found = {}
    for stop in stops:
        ids = tokenizer.encode(stop)
        if len(ids) == 1 and not tokenizer.decode(ids):
            found[ids[0]] = stop
    return found

"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopMatcher:
    """Finds the first of several strings in a growing text, however it is cut into pieces.

    The match that ends first wins; of those ending at the same character, the longest. (The end is
    when a reader of the stream can know of it, so the answer does not depend on the pieces.)
    What could still become a match is held back, and nothing more. Knuth-Morris-Pratt, so work per
    character does not depend on the length of the strings.
    """

    def __init__(self, strings: Sequence[str], include_stop: bool = False) -> None:
        """`strings` are not empty. `include_stop` leaves the match in the emitted text."""
        self._include_stop = include_stop
        # Longest first, so that the first to complete at a character is the one that wins.
        self._strings = sorted(dict.fromkeys(strings), key=len, reverse=True)
        self._borders = [_borders(string) for string in self._strings]
        self._matched = [0] * len(self._strings)  # characters of each that the text ends with
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """The text that can be let go, and the string that matched, if one did.

        After a match nothing more may be pushed. While not `armed`, strings that complete in this
        piece are passed over; one that only begins in it can complete later.
        """
        text = self._held + text
        for end in range(len(self._held) + 1, len(text) + 1):
            string = self._advance(text[end - 1])
            if string is not None and armed:
                self._held = ""
                return text[: end if self._include_stop else end - len(string)], string
        keep = len(text) - max(self._matched, default=0)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """What is held back, when no more text will come."""
        rest, self._held = self._held, ""
        self._matched = [0] * len(self._strings)
        return rest

    def _advance(self, character: str) -> str | None:
        """Take one character; the longest string that it completes."""
        completed: str | None = None
        for i, string in enumerate(self._strings):
            borders = self._borders[i]
            length = self._matched[i]
            while length and string[length] != character:
                length = borders[length]
            if string[length] == character:
                length += 1
            if length == len(string):
                completed = completed or string
                length = borders[length]
            self._matched[i] = length
        return completed


@lru_cache(maxsize=256)
def _borders(string: str) -> tuple[int, ...]:
    """For each length, the longest proper prefix of string[:length] that is also its suffix."""
    borders = [0] * (len(string) + 1)
    length = 0
    for end in range(1, len(string)):
        while length and string[end] != string[length]:
            length = borders[length]
        if string[end] == string[length]:
            length += 1
        borders[end + 1] = length
    return tuple(borders)

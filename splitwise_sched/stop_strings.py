"""Stop strings in streamed text: what may be shown, and where the text ends."""

from __future__ import annotations

from collections.abc import Iterable


class StopMatcher:
    """Watches one stream of text for the first of several stop strings.

    The first is the one that is complete first (of two that end together, the longer), so that the result does not
    depend on how the text is cut into pieces. Work is O(stop strings) a character.

    Attributes:
        matched: the stop string that ended the text, or None so far.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """The text that can be shown now: never a stop string, nor what may become one. Empty after a match."""
        if self.matched is not None or not self._stops:
            return "" if self.matched is not None else piece
        text = self._held + piece
        for position, character in enumerate(piece, start=len(self._held) + 1):
            self._advance(character)
            for stop, state in zip(self._stops, self._states, strict=True):
                if state == len(stop):
                    self.matched, self._held = stop, ""
                    return text[: position - len(stop)]
        safe = len(text) - max(self._states)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back, when the stream has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> None:
        """Knuth-Morris-Pratt: a state is how many characters of its stop string the text now ends with."""
        for i, stop in enumerate(self._stops):
            state, borders = self._states[i], self._borders[i]
            while state and stop[state] != character:
                state = borders[state - 1]
            self._states[i] = state + 1 if stop[state] == character else 0


def _borders(stop: str) -> list[int]:
    """For each prefix of ``stop``: the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = borders[length - 1]
        if stop[i] == stop[length]:
            length += 1
        borders[i] = length
    return borders

"""Beam search: which continuations of a prompt to follow, and when to stop.

Pure logic. The definition is that of `transformers` 5 (`GenerationMixin._beam_search`): every step
ranks all continuations of all live hypotheses by the sum of their log probabilities. The best
`width` that do not end live on; one that ends is kept if it ranks among the best `width` of the
step. What is kept is compared by score, sum / length ** length_penalty.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

from cluster.request import BeamParams
from cluster.sequence import Sequence
from shards.contract import Logprobs


class Child(NamedTuple):
    """A hypothesis of the next step: the live hypothesis it continues, by index, and its token."""

    parent: int
    token: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A hypothesis that has ended. `tokens` follow the prompt and include the end token, if that is
    what ended it (`stopped`) rather than the length."""

    tokens: tuple[int, ...]
    score: float
    stopped: bool


@dataclass(frozen=True, slots=True)
class _Live:
    tokens: tuple[int, ...]
    logprob: float


class BeamSearch:
    """The search over one prompt; it begins with one live hypothesis, which has no tokens.

    `advance` it with the likeliest tokens of every live hypothesis until it is `over`. Not before
    `min_tokens` can an end token be taken; at `max_tokens` everything ends.
    """

    def __init__(
        self,
        params: BeamParams,
        end_tokens: Collection[int],
        *,
        max_tokens: int,
        min_tokens: int = 0,
    ) -> None:
        self._params = params
        self._end_tokens = frozenset(end_tokens)
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._live = [_Live((), 0.0)]
        self._finished: list[Finished] = []
        self._over = False

    @property
    def candidates(self) -> int:
        """How many of a hypothesis' likeliest tokens `advance` needs: enough that `width` of them
        end nothing. `transformers` ranks more, none of which can be chosen."""
        return self._params.width + len(self._end_tokens)

    @property
    def over(self) -> bool:
        return self._over

    @property
    def finished(self) -> tuple[Finished, ...]:
        """The best hypotheses that have ended, at most `width` of them, the best first."""
        return tuple(self._finished)

    def advance(self, candidates: Many[Iterable[tuple[int, float]]]) -> tuple[Child, ...]:
        """The hypotheses of the next step, the likeliest first; none once the search is over.

        `candidates[i]` are (token, log probability) of the likeliest tokens of live hypothesis i,
        in the order that the step before gave them. Ties go to the earlier hypothesis, then to the
        lower token.
        """
        assert len(candidates) == len(self._live)
        assert not self._over
        length = len(self._live[0].tokens) + 1
        barred = self._end_tokens if length <= self._min_tokens else frozenset()
        ranked = sorted(
            (-(self._live[parent].logprob + logprob), Child(parent, token))
            for parent, likeliest in enumerate(candidates)
            for token, logprob in likeliest
            if token not in barred
        )
        children: list[Child] = []
        live: list[_Live] = []
        for rank, (cost, child) in enumerate(ranked):
            tokens = (*self._live[child.parent].tokens, child.token)
            stops = child.token in self._end_tokens
            if not stops and length < self._max_tokens:
                children.append(child)
                live.append(_Live(tokens, -cost))
                if len(live) == self._params.width:
                    break
            elif rank < self._params.width:
                self._finished.append(Finished(tokens, self._score(-cost, length), stops))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self._params.width :]
        self._live = live
        self._over = not live or self._settled(length)
        return () if self._over else tuple(children)

    def _settled(self, length: int) -> bool:
        """Whether nothing live is worth following, judged by its score as it stands."""
        if len(self._finished) < self._params.width:
            return False
        best = self._score(self._live[0].logprob, length)
        return self._params.early_stopping or best <= self._finished[-1].score

    def _score(self, logprob: float, length: int) -> float:
        return logprob / math.pow(length, self._params.length_penalty)


class Beam:
    """The hypotheses of a search as sequences of the scheduler, which compute what follows them.

    `sequences` are as many as the search is wide. The first is the one to begin with; `live` are,
    in the order of the search's hypotheses, those that stand for one.
    """

    def __init__(self, search: BeamSearch, sequences: Many[Sequence]) -> None:
        self.search = search
        self.sequences = list(sequences)
        self.live = self.sequences[:1]
        self._found: dict[Sequence, Logprobs] = {}

    def take(self, sequence: Sequence, found: Logprobs) -> list[tuple[Sequence, int]]:
        """What is likely to follow a live hypothesis. With the last one's, the next children, each
        as its parent and its token, for `Scheduler.fork`; it returns what `live` is from then on.
        """
        self._found[sequence] = found
        if len(self._found) < len(self.live):
            return []
        likeliest = [self._found[parent] for parent in self.live]
        self._found = {}
        children = self.search.advance(
            [zip(each.top_tokens, each.top_logprobs, strict=True) for each in likeliest]
        )
        return [(self.live[child.parent], child.token) for child in children]

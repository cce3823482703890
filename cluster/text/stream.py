"""A driver's token events as text, ended by stop strings."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from cluster.request import FinishReason, Request, Timing, TokenEvent, TokenStream, Usage
from cluster.text.detokenizer import Decoder, Detokenizer
from cluster.text.stops import StopMatcher
from shards.contract import Logprobs

# Tokens replayed on resume: those that the longest stop string can span, where a character is up to
# 4 tokens, and some more for tokens without text and for bytes that are no text, of which the
# detokenizer holds back as many as it would have.
_TOKENS_PER_CHARACTER = 4
_REPLAY_MARGIN = 32


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What is new of one sample. As `TokenEvent`, with text; `matched` is the stop string, or the
    stop or end token, that ended the sample. Text may lag behind the tokens, never lead."""

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    finish: FinishReason | None = None
    matched: str | int | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    seed: int | None = None
    score: float | None = None
    queued: float | None = None


class TextStream:
    """The deltas of one request, for one reader: iterate it with `async for` or `for`.

    Iteration ends after the last sample's finish. A stop string ends its sample here, where the
    text is, and the driver is told; that delta's timing counts from the construction of this
    object, unless the driver ended the sample too.

    With `request.generated`, text goes on where those tokens leave it: a character or a possible
    stop string that they leave incomplete is part of the new text, as if nothing had happened.

    Without a codec `text` stays empty and stop strings have no effect (validation refuses them).
    """

    def __init__(
        self,
        codec: Decoder | None,
        request: Request,
        stream: TokenStream,
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._request = request
        self._stream = stream
        self._arrival = time.monotonic()
        self._samples = {
            index: _Sample(codec, request, skip_special_tokens) for index in range(request.n)
        }

    @property
    def finished(self) -> bool:
        """Whether every sample has finished."""
        return not self._samples

    def feed(self, event: TokenEvent) -> TextDelta | None:
        """Take one event of the stream; None for a sample that has already finished."""
        sample = self._samples.get(event.index)
        if sample is None:
            return None
        if sample.first_token is None and event.tokens:
            sample.first_token = time.monotonic() - self._arrival
        if event.seed is not None:
            sample.seed = event.seed
        if event.queued is not None:
            sample.queued = event.queued
        used, text, matched = sample.advance(event.tokens, last=event.finish is not None)
        if matched is not None or event.finish is not None:
            del self._samples[event.index]
        if matched is None:
            return TextDelta(
                event.index,
                text,
                event.tokens,
                event.logprobs,
                event.prompt_logprobs,
                event.finish,
                event.stop_token,
                event.usage,
                event.timing,
                event.seed,
                event.score,
                event.queued,
            )
        if event.finish is None:
            self._stream.finish_sample(event.index)
        return TextDelta(
            event.index,
            text,
            event.tokens[:used],
            event.logprobs[:used],
            event.prompt_logprobs,
            FinishReason.STOP,
            matched,
            Usage(
                prompt_tokens=len(self._request.prompt),
                completion_tokens=sample.count,
                cached_tokens=event.usage.cached_tokens if event.usage else 0,
            ),
            event.timing or self._timing(sample),
            sample.seed,
            queued=event.queued,
        )

    def close(self) -> None:
        """Abort whatever is unfinished. Idempotent."""
        self._stream.close()

    async def __aiter__(self) -> AsyncIterator[TextDelta]:
        async for event in self._stream:
            delta = self.feed(event)
            if delta is not None:
                yield delta
            if self.finished:
                return

    def __iter__(self) -> Iterator[TextDelta]:
        for event in self._stream:
            delta = self.feed(event)
            if delta is not None:
                yield delta
            if self.finished:
                return

    def _timing(self, sample: _Sample) -> Timing:
        total = time.monotonic() - self._arrival
        first_token = total if sample.first_token is None else sample.first_token
        return Timing(queue=sample.queued, first_token=first_token, total=total)


class _Sample:
    """The text of one sample and where its stop strings stand."""

    def __init__(self, codec: Decoder | None, request: Request, skip_special_tokens: bool) -> None:
        self.count = len(request.generated)  # tokens so far, an earlier attempt's included
        self.first_token: float | None = None  # seconds after arrival
        self.queued = 0.0
        self.seed = request.sampling.seed if request.n == 1 else None
        self._min_tokens = request.stopping.min_tokens
        self._detokenizer: Detokenizer | None = None
        self._matcher: StopMatcher | None = None
        if codec is None:
            return
        strings = request.stopping.strings
        longest = max(map(len, strings), default=0)
        replayed = longest * _TOKENS_PER_CHARACTER + _REPLAY_MARGIN
        split = max(0, len(request.generated) - replayed)
        context = request.prompt + request.generated[:split]
        self._detokenizer = Detokenizer(codec, context, skip_special_tokens)
        delivered = self._detokenizer.push(request.generated[split:])
        if strings:
            self._matcher = StopMatcher(strings, request.stopping.include_stop)
            self._matcher.push(delivered, armed=False)

    def advance(self, tokens: tuple[int, ...], last: bool) -> tuple[int, str, str | None]:
        """Take tokens; `last`: no more will come. How many were used, up to and including the one
        that completed a stop string, the text to let go, and that string."""
        if self._detokenizer is None:
            self.count += len(tokens)
            return len(tokens), "", None
        if self._matcher is None:
            self.count += len(tokens)
            text = self._detokenizer.push(tokens)
            return len(tokens), text + self._detokenizer.flush() if last else text, None

        pieces: list[str] = []
        for used, token in enumerate(tokens, start=1):
            self.count += 1
            piece, matched = self._match(self._matcher, self._detokenizer.push((token,)))
            pieces.append(piece)
            if matched is not None:
                return used, "".join(pieces), matched
        matched = None
        if last:
            piece, matched = self._match(self._matcher, self._detokenizer.flush())
            pieces.append(piece)
            if matched is None:
                pieces.append(self._matcher.flush())
        return len(tokens), "".join(pieces), matched

    def _match(self, matcher: StopMatcher, text: str) -> tuple[str, str | None]:
        return matcher.push(text, armed=self.count >= self._min_tokens)

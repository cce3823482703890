"""TextStream: text, stop strings and counts, the same for a thread and for a coroutine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Unavailable
from cluster.request import (
    FinishReason,
    Request,
    SamplingParams,
    Stopping,
    Timing,
    TokenEvent,
    Usage,
)
from cluster.text import TextCodec, TextDelta, TextStream
from shards.contract import Logprobs
from tests.unit.tiny_tokenizers import byte_level

CODEC = TextCodec(byte_level())
PROMPT = tuple(CODEC.encode("a prompt"))


@dataclass
class Events:
    """A `TokenStream` that plays a list, then raises `error` if there is one."""

    events: list[TokenEvent]
    error: Exception | None = None
    finished: list[int] = field(default_factory=list)
    closed: int = 0

    def __iter__(self) -> Iterator[TokenEvent]:
        yield from self.events
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        for event in self:
            yield event

    def finish_sample(self, index: int) -> None:
        self.finished.append(index)

    def close(self) -> None:
        self.closed += 1


def ids(text: str) -> tuple[int, ...]:
    return tuple(CODEC.encode(text, add_special_tokens=False))


def request(stopping: Stopping | None = None, **fields: object) -> Request:
    return Request("r", PROMPT, stopping=stopping or Stopping(), **fields)


def scored(tokens: tuple[int, ...], index: int = 0, **fields: object) -> TokenEvent:
    logprobs = tuple(Logprobs(token, -1.0, 1) for token in tokens)
    return TokenEvent(index, tokens, logprobs, **fields)


def last(index: int = 0, tokens: tuple[int, ...] = (), count: int = 0, **fields) -> TokenEvent:
    return TokenEvent(
        index,
        tokens,
        finish=fields.pop("finish", FinishReason.LENGTH),
        usage=Usage(len(PROMPT), count, cached_tokens=3),
        timing=Timing(0.5, 1.0, 2.0),
        seed=7,
        **fields,
    )


def read(events: Events, request: Request, codec: TextCodec | None = CODEC) -> list[TextDelta]:
    return list(TextStream(codec, request, events))


def text_of(deltas: list[TextDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def test_text_and_everything_else_pass_through() -> None:
    tokens = ids("he é")
    first = scored(tokens[:2], prompt_logprobs=(None,))
    deltas = read(Events([first, last(tokens=tokens[2:], count=4, stop_token=9)]), request())
    assert text_of(deltas) == "he é"
    assert [delta.tokens for delta in deltas] == [tokens[:2], tokens[2:]]
    assert deltas[0].logprobs == first.logprobs
    assert deltas[0].prompt_logprobs == (None,)
    end = deltas[-1]
    assert (end.finish, end.matched, end.seed) == (FinishReason.LENGTH, 9, 7)
    assert end.usage == Usage(len(PROMPT), 4, 3)
    assert end.timing == Timing(0.5, 1.0, 2.0)


def test_tokens_are_not_withheld_while_text_is() -> None:
    tokens = ids("🙂")
    deltas = read(
        Events([*(TokenEvent(0, (token,)) for token in tokens), last(count=4)]), request()
    )
    assert [delta.text for delta in deltas] == ["", "", "", "🙂", ""]
    assert [delta.tokens for delta in deltas[:4]] == [(token,) for token in tokens]


def test_an_incomplete_character_comes_with_the_finish() -> None:
    deltas = read(Events([TokenEvent(0, ids("a🙂")[:2]), last()]), request())
    assert [delta.text for delta in deltas] == ["a", "\ufffd"]


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one \n\n")])
def test_a_stop_string_ends_the_sample_at_its_token(include: bool, text: str) -> None:
    tokens = ids("one \n\ntwo")
    used = len(ids("one \n\n"))
    events = Events([scored(tokens[:5]), scored(tokens[5:], seed=11), last()])
    stopping = Stopping(strings=("\n\n",), include_stop=include)
    deltas = read(events, request(stopping))
    assert text_of(deltas) == text
    assert tuple(t for delta in deltas for t in delta.tokens) == tokens[:used]
    assert sum(len(delta.logprobs) for delta in deltas) == used
    end = deltas[-1]
    assert (end.finish, end.matched, end.seed) == (FinishReason.STOP, "\n\n", 11)
    assert end.usage == Usage(len(PROMPT), used)
    assert end.timing is not None
    assert 0 <= end.timing.first_token <= end.timing.total
    assert events.finished == [0]


def test_a_match_in_the_drivers_last_event_keeps_its_timing() -> None:
    events = Events([last(tokens=ids("a.b"), count=3)])
    (delta,) = read(events, request(Stopping(strings=(".",))))
    assert (delta.text, delta.tokens, delta.finish) == ("a", ids("a."), FinishReason.STOP)
    assert delta.usage == Usage(len(PROMPT), 2, cached_tokens=3)
    assert delta.timing == Timing(0.5, 1.0, 2.0)
    assert events.finished == []


def test_what_could_have_become_a_stop_string_comes_with_the_finish() -> None:
    events = Events([TokenEvent(0, ids("ab")), last(finish=FinishReason.ABORTED)])
    deltas = read(events, request(Stopping(strings=("bc",))))
    assert [delta.text for delta in deltas] == ["a", "b"]
    assert deltas[-1].finish is FinishReason.ABORTED
    assert deltas[-1].matched is None


def test_no_stop_string_before_min_tokens() -> None:
    tokens = ids("a.b.c.")
    deltas = read(Events([TokenEvent(0, tokens)]), request(Stopping(strings=(".",), min_tokens=3)))
    assert text_of(deltas) == "a.b"
    assert deltas[-1].usage == Usage(len(PROMPT), 4)


def test_samples_stand_alone_and_late_events_are_ignored() -> None:
    events = Events(
        [
            TokenEvent(0, ids("ab")),
            TokenEvent(1, ids("c")),
            TokenEvent(0, ids("xx")),
            last(0, finish=FinishReason.ABORTED),
            last(1, tokens=ids("d"), count=2),
            TokenEvent(1, ids("never read")),
        ]
    )
    deltas = read(events, request(Stopping(strings=("b",)), n=2))
    assert [(delta.index, delta.text) for delta in deltas] == [(0, "a"), (1, "c"), (1, "d")]
    assert events.finished == [0]


def test_special_tokens_are_skipped_or_spelled() -> None:
    tokens = ids("a<|end|>")
    for skip, text in ((True, "a"), (False, "a<|end|>")):
        stream = TextStream(
            CODEC, request(), Events([last(tokens=tokens)]), skip_special_tokens=skip
        )
        assert text_of(list(stream)) == text


def test_without_a_codec_tokens_come_alone() -> None:
    deltas = read(Events([TokenEvent(0, (1, 2)), last(count=2)]), request(), codec=None)
    assert [(delta.text, delta.tokens) for delta in deltas] == [("", (1, 2)), ("", ())]


def test_an_error_of_the_stream_reaches_the_reader() -> None:
    stream = TextStream(CODEC, request(), Events([TokenEvent(0, ids("a"))], Unavailable("rank 1")))
    deltas = iter(stream)
    assert next(deltas).text == "a"
    with pytest.raises(Unavailable, match="rank 1"):
        next(deltas)


def test_close_closes_the_stream() -> None:
    events = Events([])
    TextStream(CODEC, request(), events).close()
    assert events.closed == 1


TEXT = st.text("ab.🙂é ", max_size=30)
STRINGS = st.lists(st.text("ab.🙂", min_size=1, max_size=4), max_size=3)


def split(tokens: tuple[int, ...], cuts: list[int]) -> list[TokenEvent]:
    bounds = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    return [TokenEvent(0, tokens[start:stop]) for start, stop in itertools.pairwise(bounds)]


@given(TEXT, STRINGS, st.lists(st.integers(0, 99), max_size=5), st.integers(0, 8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_pieces_sync_and_async_give_the_same(
    text: str, strings: list[str], cuts: list[int], min_tokens: int, include: bool
) -> None:
    stopping = Stopping(strings=tuple(strings), min_tokens=min_tokens, include_stop=include)
    tokens = ids(text)

    def summary(deltas: list[TextDelta]) -> tuple[object, ...]:
        end = deltas[-1]
        assert end.usage is not None
        used = tuple(token for delta in deltas for token in delta.tokens)
        return text_of(deltas), used, end.finish, end.matched, end.usage.completion_tokens

    async def read_async() -> list[TextDelta]:
        events = Events([*split(tokens, cuts), last(count=len(tokens))])
        return [delta async for delta in TextStream(CODEC, request(stopping), events)]

    whole = summary(read(Events([last(tokens=tokens, count=len(tokens))]), request(stopping)))
    events = Events([*split(tokens, cuts), last(count=len(tokens))])
    assert summary(read(events, request(stopping))) == whole
    assert summary(asyncio.run(read_async())) == whole


@given(TEXT, STRINGS, st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_a_resumed_request_goes_on_as_if_uninterrupted(
    text: str, strings: list[str], cut: int
) -> None:
    stopping = Stopping(strings=tuple(strings))
    tokens = ids(text)
    whole = read(Events([last(tokens=tokens, count=len(tokens))]), request(stopping))

    given_up = cut % (len(tokens) + 1)
    stream = iter(TextStream(CODEC, request(stopping), Events([TokenEvent(0, tokens[:given_up])])))
    before = list(stream)
    if before[-1].finish is not None:
        assert text_of(before) == text_of(whole)
        return
    rest = Events([last(tokens=tokens[given_up:], count=len(tokens))])
    after = read(rest, request(stopping, generated=tokens[:given_up]))
    assert text_of(before) + text_of(after) == text_of(whole)
    assert after[-1].matched == whole[-1].matched
    assert after[-1].usage == whole[-1].usage


def test_the_seed_of_a_single_sample_is_the_requests_own() -> None:
    for n, seed in ((1, 5), (2, None)):
        asked = request(Stopping(strings=("a",)), n=n, sampling=SamplingParams(seed=5))
        assert read(Events([TokenEvent(0, ids("a"))]), asked)[0].seed == seed

"""Perplexity: every token is scored once, behind enough context."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.bench.suite.errors import BenchmarkError
from deploy.bench.suite.perplexity import perplexity
from shards.contract import Logprobs

WINDOW = 16


class Spelled:
    """An engine whose tokens are numbers in the text; token t has the log probability -t / 100."""

    def __init__(self, context: int = 64, codec: bool = True) -> None:
        self.model = SimpleNamespace(context=context)
        self.driver = SimpleNamespace(codec=self if codec else None)
        self.asked: list[list[int]] = []

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def generate(self, prompts: list[list[int]], **options: Any) -> list[Any]:
        assert options["prompt_logprobs"] == 0
        self.asked = prompts
        return [
            SimpleNamespace(prompt_logprobs=(None, *(Logprobs(t, -t / 100, 1) for t in prompt[1:])))
            for prompt in prompts
        ]


def text_of(count: int) -> str:
    return " ".join(map(str, range(count)))


@pytest.mark.parametrize("count", [2, 3, 15, 16, 17, 24, 25, 100])
@pytest.mark.parametrize("window", [WINDOW, 15])
def test_every_token_but_the_first_is_scored_once(count: int, window: int) -> None:
    engine: Any = Spelled()
    expected = math.exp(sum(range(1, count)) / 100 / (count - 1))
    assert perplexity(engine, text_of(count), window=window) == pytest.approx(expected)
    assert max(map(len, engine.asked)) <= window


def test_windows_overlap_by_half() -> None:
    engine: Any = Spelled()
    perplexity(engine, text_of(30), window=WINDOW)
    assert [(prompt[0], prompt[-1]) for prompt in engine.asked] == [(0, 15), (8, 23), (16, 29)]


def test_windows_leave_room_in_the_context() -> None:
    engine: Any = Spelled(context=9)
    perplexity(engine, text_of(30), window=WINDOW)
    assert max(map(len, engine.asked)) == 8


def test_what_cannot_be_scored_is_refused() -> None:
    wordless: Any = Spelled(codec=False)
    with pytest.raises(BenchmarkError, match="needs a tokenizer"):
        perplexity(wordless, "1 2 3")
    engine: Any = Spelled()
    with pytest.raises(BenchmarkError, match="needs 2 tokens, and the text has 1"):
        perplexity(engine, "1")

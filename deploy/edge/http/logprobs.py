"""Log probabilities in the forms of completions, chats and vLLM's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deploy.edge.http.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from shards.contract import Logprobs

TokenText = Callable[[int], str]

# OpenAI's word for a token that cannot be; JSON has no infinity.
_LEAST = -9999.0
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def by_id(token: int) -> str:
    """A token's name where texts could be those of several: vLLM's `return_tokens_as_token_ids`."""
    return f"token_id:{token}"


def completion_logprobs(
    tokens: Sequence[int], entries: Sequence[Logprobs | None], text: TokenText, offset: int
) -> CompletionLogprobs:
    """`entries` are the tokens', None for one with nothing before it; `offset` is the first one's
    place in the choice's text. A token is among its own alternatives also where it is unlikely."""
    words = [text(token) for token in tokens]
    offsets = []
    for word in words:
        offsets.append(offset)
        offset += len(word)
    return CompletionLogprobs(
        text_offset=offsets,
        token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
        tokens=words,
        top_logprobs=[
            None if entry is None else _alternatives(entry, word, text)
            for entry, word in zip(entries, words, strict=True)
        ],
    )


def chat_logprobs(entries: Sequence[Logprobs], text: TokenText) -> ChatLogprobs:
    """Of an answer's tokens."""
    return ChatLogprobs(
        [
            TokenLogprob(
                token=(word := text(entry.token)),
                logprob=_finite(entry.logprob),
                bytes=_bytes(word),
                top_logprobs=[
                    TopLogprob((top := text(token)), _finite(logprob), _bytes(top))
                    for token, logprob in zip(entry.top_tokens, entry.top_logprobs, strict=True)
                ],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(entries: Sequence[Logprobs | None], text: TokenText) -> PromptLogprobs:
    """One per prompt token, None for the first: by id, the token itself and its alternatives."""
    found: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            found.append(None)
            continue
        tops = zip(entry.top_tokens, entry.top_logprobs, strict=True)
        position = {
            str(token): PromptLogprob(_finite(logprob), rank, text(token))
            for rank, (token, logprob) in enumerate(tops, 1)
        }
        own = PromptLogprob(_finite(entry.logprob), entry.rank, text(entry.token))
        found.append(position | {str(entry.token): own})
    return found


def _alternatives(entry: Logprobs, word: str, text: TokenText) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in zip(entry.top_tokens, entry.top_logprobs, strict=True):
        # Of tokens with the same text, the likeliest stands for all.
        found.setdefault(text(token), _finite(logprob))
    found.setdefault(word, _finite(entry.logprob))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _bytes(word: str) -> list[int] | None:
    return None if _REPLACEMENT in word else list(word.encode())

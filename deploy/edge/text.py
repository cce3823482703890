"""Text to token ids without holding up the event loop, and without work for hopeless texts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from cluster.constraints import ConstraintChecker
from cluster.errors import InvalidRequest, Overloaded, Violation
from cluster.request import ModelInfo, Request
from cluster.text import TextCodec, TextDelta
from cluster.validation import BeyondContext, max_prompt_bytes
from deploy.conversation import Conversation

T = TypeVar("T")

# Some milliseconds of work: as long as the loop may stand still.
_INLINE_BYTES = 4096
_INLINE_TOKENS = 512
# What a chat template spends on a message besides its words, in bytes of text to tokenize.
_MESSAGE_BYTES = 16
_MOST_MESSAGES = 4096
_MOST_ROLE_BYTES = 64
_THREADS = 2
_MOST_WAITING = 64


class _Threads:
    """Some threads, and a bound on what waits for them."""

    def __init__(self, count: int, what: str) -> None:
        """`what` they do, for the error where there is too much of it."""
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=what.replace(" ", "_"))
        self._room = threading.BoundedSemaphore(_MOST_WAITING)
        self._what = what

    async def run(self, work: Callable[[], T]) -> T:
        """Raises `Overloaded` without room."""
        if not self._room.acquire(blocking=False):
            raise Overloaded(
                f"{_MOST_WAITING} {self._what} are waiting already: try again later", 1.0
            )
        job = self._threads.submit(work)
        # The thread's own end, not the caller's: after a cancellation the thread is still at work.
        job.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(job)

    async def run_at_any_rate(self, work: Callable[[], T]) -> T:
        """Also without room."""
        return await asyncio.wrap_future(self._threads.submit(work))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Texts:
    """A model's codec behind bounded pools of threads.

    The codec is None for a model without a tokenizer: text is then an `InvalidRequest`.
    """

    def __init__(self, tokenizer: TextCodec | None, model: ModelInfo) -> None:
        self.codec = tokenizer
        self._model = model
        self._threads = _Threads(_THREADS, "long texts")
        # They are tried one after another; texts do not wait for those that take long.
        self._trials = _Threads(1, "constraints")
        self._constraints = (
            None if tokenizer is None else ConstraintChecker(tokenizer, model.eos_token_ids)
        )
        self._most_bytes = 0 if tokenizer is None else max_prompt_bytes(tokenizer, model)

    @property
    def has_chat_template(self) -> bool:
        return self.codec is not None and self.codec.has_chat_template

    async def encode(self, text: str, *, add_special_tokens: bool, field: str) -> tuple[int, ...]:
        tokenizer = self._require(field, "send token ids instead")
        size = self._check_size(len(text.encode()), field)
        return tuple(await self._run(size, lambda: tokenizer.encode(text, add_special_tokens)))

    async def render(
        self, conversation: Conversation, *, field: str = "messages"
    ) -> tuple[int, ...]:
        """The prompt that a conversation is; `field` is where its messages came from."""
        tokenizer = self._require(field, "render the conversation yourself and send token ids")
        if not tokenizer.has_chat_template:
            raise InvalidRequest(
                Violation(field, f"{self._model.name} has no chat template: send a prompt instead")
            )
        messages = conversation.messages
        _check_messages(messages, field)
        size = self._check_size(_text_bytes((messages, conversation.tools)), field)
        render = partial(
            tokenizer.render_chat,
            messages,
            tools=conversation.tools or None,
            add_generation_prompt=conversation.begins_answer and not conversation.continues,
            continue_final_message=conversation.continues,
            template_arguments=conversation.template_arguments,
        )
        return tuple(await self._run(size + len(messages) * _MESSAGE_BYTES, render))

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, field: str) -> str:
        tokenizer = self._require(field, "turn the ids into text yourself")
        if len(ids) > self._model.context:
            raise InvalidRequest(
                Violation(
                    field,
                    f"{len(ids)} tokens are more than the context of {self._model.context}: send "
                    "them in parts",
                )
            )
        ids = tuple(ids)
        wrong = next((i for i, token in enumerate(ids) if token >= self._model.vocabulary), None)
        if wrong is not None:
            raise InvalidRequest(
                Violation(
                    f"{field}[{wrong}]",
                    f"{ids[wrong]} is not in the vocabulary: ids go from 0 to "
                    f"{self._model.vocabulary - 1}",
                )
            )
        return await self._run(len(ids), lambda: tokenizer.decode(ids, skip_special_tokens))

    async def check(self, request: Request) -> None:
        """Raise `InvalidRequest` if the request has a constraint that cannot be held to."""
        checker = self._constraints
        if request.constraint is not None and checker is not None:
            await self._trials.run(lambda: checker.check(request))

    async def build(self, tokens: int, work: Callable[[], T]) -> T:
        """What `work` makes, which spells out that many tokens. Never refused for want of room:
        only a running request builds answers, and of those there is a limit."""
        if tokens <= _INLINE_TOKENS:
            return work()
        return await self._threads.run_at_any_rate(work)

    def token_text(self, token: int) -> str:
        return self.codec.token_text(token) if self.codec is not None else ""

    def close(self) -> None:
        self._threads.close()
        self._trials.close()
        if self._constraints is not None:
            self._constraints.close()

    def _require(self, field: str, remedy: str) -> TextCodec:
        if self.codec is None:
            raise InvalidRequest(Violation(field, f"{self._model.name} has no tokenizer: {remedy}"))
        return self.codec

    def _check_size(self, size: int, field: str) -> int:
        """No token stands for more bytes than the longest: beyond that, counting is enough."""
        if size > self._most_bytes:
            raise InvalidRequest(
                BeyondContext(
                    field,
                    f"{size} bytes of text cannot fit into a context of {self._model.context} "
                    "tokens: send a shorter text",
                )
            )
        return size

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        return work() if size <= _INLINE_BYTES else await self._threads.run(work)


def spelled_tokens(delta: TextDelta) -> int:
    """How many tokens its log probabilities name, each with its text."""
    entries = (*delta.logprobs, *(delta.prompt_logprobs or ()))
    return sum(1 + (0 if entry is None else len(entry.top_tokens)) for entry in entries)


def _text_bytes(value: object) -> int:
    """UTF-8 bytes of all the text inside a value of JSON's kinds."""
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))
    if isinstance(value, Mapping):
        return sum(_text_bytes(key) + _text_bytes(inner) for key, inner in value.items())
    if isinstance(value, Sequence):
        return sum(map(_text_bytes, value))
    return 0


def _check_messages(messages: Sequence[Mapping[str, Any]], field: str) -> None:
    """Before anything is done with each: a message costs time also where it has no text."""
    if not messages:
        raise InvalidRequest(Violation(field, "no messages: send at least one"))
    if len(messages) > _MOST_MESSAGES:
        raise InvalidRequest(
            Violation(
                field,
                f"{len(messages)} messages are more than {_MOST_MESSAGES}: leave out or join the "
                "oldest ones",
            )
        )
    for position, message in enumerate(messages):
        size = _text_bytes(message["role"])
        if size > _MOST_ROLE_BYTES:
            raise InvalidRequest(
                Violation(
                    f"{field}[{position}].role",
                    f"{size} bytes are more than {_MOST_ROLE_BYTES}: use a role that the model's "
                    'chat template knows, such as "user"',
                )
            )

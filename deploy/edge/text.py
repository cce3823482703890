"""Text to token ids without holding up the event loop, and without work for hopeless texts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.errors import InvalidRequest, Overloaded, Violation
from cluster.request import ModelInfo
from cluster.text import TextCodec
from cluster.validation import max_prompt_bytes

T = TypeVar("T")

# Some milliseconds of tokenising: as long as the loop may stand still.
_INLINE_BYTES = 4096
_THREADS = 2
_MOST_WAITING = 64


class Texts:
    """A model's codec behind a bounded pool of threads.

    `codec` is None for a model without a tokenizer: text is then an `InvalidRequest`.
    """

    def __init__(self, codec: TextCodec | None, model: ModelInfo) -> None:
        self.codec = codec
        self._model = model
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")
        self._room = threading.BoundedSemaphore(_MOST_WAITING)
        self._most_bytes = 0 if codec is None else max_prompt_bytes(codec, model)

    @property
    def has_chat_template(self) -> bool:
        return self.codec is not None and self.codec.has_chat_template

    async def encode(self, text: str, *, add_special_tokens: bool, field: str) -> tuple[int, ...]:
        codec = self._require(field, "send token ids instead")
        size = self._check_size(len(text.encode()), field)
        return tuple(await self._run(size, lambda: codec.encode(text, add_special_tokens)))

    async def render(self, messages: Sequence[Mapping[str, str]], *, field: str) -> tuple[int, ...]:
        codec = self._require(field, "render the conversation yourself and send token ids")
        if not codec.has_chat_template:
            raise InvalidRequest(
                Violation(field, f"{self._model.name} has no chat template: use Generate")
            )
        if not messages:
            raise InvalidRequest(Violation(field, "no messages: send at least one"))
        size = self._check_size(sum(len(m["content"].encode()) for m in messages), field)
        return tuple(await self._run(size, lambda: codec.render_chat(messages)))

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool, field: str) -> str:
        codec = self._require(field, "turn the ids into text yourself")
        wrong = next((i for i, token in enumerate(ids) if token >= self._model.vocabulary), None)
        if wrong is not None:
            raise InvalidRequest(
                Violation(
                    f"{field}[{wrong}]",
                    f"{ids[wrong]} is not in the vocabulary: ids go from 0 to "
                    f"{self._model.vocabulary - 1}",
                )
            )
        return await self._run(len(ids), lambda: codec.decode(ids, skip_special_tokens))

    def token_text(self, token: int) -> str:
        return self.codec.token_text(token) if self.codec is not None else ""

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _require(self, field: str, remedy: str) -> TextCodec:
        if self.codec is None:
            raise InvalidRequest(Violation(field, f"{self._model.name} has no tokenizer: {remedy}"))
        return self.codec

    def _check_size(self, size: int, field: str) -> int:
        """No token stands for more bytes than the longest: beyond that, counting is enough."""
        if size > self._most_bytes:
            raise InvalidRequest(
                Violation(
                    field,
                    f"{size} bytes of text cannot fit into a context of {self._model.context} "
                    "tokens: send a shorter text",
                )
            )
        return size

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        if size <= _INLINE_BYTES:
            return work()
        if not self._room.acquire(blocking=False):
            raise Overloaded(
                f"{_MOST_WAITING} long texts are waiting for the tokenizer: try again later", 1.0
            )
        job = self._threads.submit(work)
        # The thread's own end, not the caller's: after a cancellation the thread is still at work.
        job.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(job)

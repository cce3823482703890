"""From protobuf messages to what the client returns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel

from headwise import types
from headwise.errors import HeadwiseError
from headwise.v1 import control_pb2, inference_pb2

_FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: types.FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: types.FinishReason.LENGTH,
    inference_pb2.FINISH_REASON_ABORTED: types.FinishReason.ABORTED,
}
_HEALTH_STATES = {
    control_pb2.HEALTH_STATE_STARTING: types.HealthState.STARTING,
    control_pb2.HEALTH_STATE_READY: types.HealthState.READY,
    control_pb2.HEALTH_STATE_DEGRADED: types.HealthState.DEGRADED,
    control_pb2.HEALTH_STATE_NOT_READY: types.HealthState.NOT_READY,
}

StreamMessage = inference_pb2.GenerateResponse | inference_pb2.ChatResponse


class Gathering:
    """Puts the messages of one request together: `add` each, then `completion()`."""

    def __init__(self, request_id: str, samples: int) -> None:
        self.request_id = request_id
        self.samples = samples
        self.model: type[BaseModel] | None = None
        """What the text is JSON of, for `Choice.parsed`."""
        self._samples: defaultdict[int, _Sample] = defaultdict(_Sample)
        self._prompt_logprobs: tuple[types.TokenLogprob, ...] = ()

    def add(self, message: StreamMessage, samples: range) -> types.Delta:
        """The message as a delta. `samples` are those that its call was to bring; raises
        HeadwiseError for another one."""
        if message.index >= min(len(samples), self.samples):
            raise HeadwiseError(
                f"the server sent sample {message.index}; {self.samples} were asked for",
                request_id=self.request_id,
            )
        delta = read_delta(message, samples[message.index])
        sample = self._samples[delta.index]
        sample.add(delta)
        if isinstance(message, inference_pb2.GenerateResponse):
            sample.echoed += message.echoed_tokens
        if delta.prompt_logprobs:
            self._prompt_logprobs = delta.prompt_logprobs
        return delta

    @property
    def complete(self) -> bool:
        """Whether every sample has finished."""
        return all(map(self.finished, range(self.samples)))

    def begun(self, index: int) -> bool:
        """Whether something of a sample has arrived."""
        return index in self._samples

    def finished(self, index: int) -> bool:
        """Whether all of a sample has arrived."""
        return self.begun(index) and self._samples[index].finish is not None

    def text(self, index: int) -> str:
        """What a sample has said so far."""
        return "".join(self._samples[index].text) if self.begun(index) else ""

    def token_ids(self, index: int) -> tuple[int, ...]:
        """The tokens that a sample has so far, an echo of the prompt's included."""
        return tuple(self._samples[index].token_ids) if self.begun(index) else ()

    def generated(self, index: int) -> list[int]:
        """The tokens that were generated for a sample."""
        if not self.begun(index):
            return []
        sample = self._samples[index]
        return sample.token_ids[sample.echoed :]

    def completion(self) -> types.Completion:
        """Everything; raises HeadwiseError if a sample has not finished."""
        return types.Completion(
            request_id=self.request_id,
            choices=tuple(map(self._choice, range(self.samples))),
            prompt_logprobs=self._prompt_logprobs,
        )

    def _choice(self, index: int) -> types.Choice:
        sample = self._samples[index]
        if sample.finish is None:
            raise HeadwiseError(
                f"the stream ended before sample {index} finished", request_id=self.request_id
            )
        choice = types.Choice(
            index=index,
            text="".join(sample.text),
            token_ids=tuple(sample.token_ids),
            logprobs=tuple(sample.logprobs),
            finish_reason=sample.finish.reason,
            matched=sample.finish.matched,
            usage=sample.finish.usage,
            seed=sample.finish.seed,
            score=sample.finish.score,
        )
        return choice if self.model is None else choice.parsed_as(self.model)


class _Sample:
    """What one sample has so far, in the pieces it came in; `echoed` of its tokens, the first
    ones, are the prompt's."""

    __slots__ = ("echoed", "finish", "logprobs", "text", "token_ids")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[types.TokenLogprob] = []
        self.echoed = 0
        self.finish: types.Finish | None = None

    def add(self, delta: types.Delta) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        if delta.finish is not None:
            self.finish = delta.finish


def read_delta(message: StreamMessage, index: int) -> types.Delta:
    """One message of a stream, about the sample `index`."""
    prompt_logprobs: tuple[types.TokenLogprob, ...] = ()
    if isinstance(message, inference_pb2.GenerateResponse):
        prompt_logprobs = _token_logprobs(message.prompt_logprobs)
    return types.Delta(
        index=index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_token_logprobs(message.logprobs),
        prompt_logprobs=prompt_logprobs,
        finish=_finish(message.finish) if message.HasField("finish") else None,
    )


def read_tokenization(message: inference_pb2.TokenizeResponse) -> types.Tokenization:
    """Token ids of a text."""
    return types.Tokenization(token_ids=tuple(message.token_ids), context=message.context)


def read_text(message: inference_pb2.DetokenizeResponse) -> str:
    """The text of token ids."""
    return message.text


def read_found(message: control_pb2.AbortResponse) -> bool:
    """Whether there was such a request."""
    return message.found


def read_models(message: control_pb2.ListModelsResponse) -> tuple[str, ...]:
    """The names of the models that are served."""
    return tuple(message.names)


def read_server_info(message: control_pb2.GetServerInfoResponse) -> types.ServerInfo:
    """The server and its ranks."""
    return types.ServerInfo(
        version=message.version,
        libraries=dict(message.libraries),
        tensor_parallel=message.tensor_parallel,
        device=message.device,
        collective=message.collective,
        ranks=tuple(map(_rank, message.ranks)),
        started_at=_time(message.started_at) if message.HasField("started_at") else None,
        max_sequences=message.max_sequences,
        max_step_tokens=message.max_step_tokens,
        kv_blocks=message.kv_blocks,
        block_size=message.block_size,
    )


def read_model_info(message: control_pb2.GetModelInfoResponse) -> types.ModelInfo:
    """The model that is served."""
    return types.ModelInfo(
        name=message.name,
        architecture=message.architecture,
        vocabulary=message.vocabulary,
        context=message.context,
        layers=message.layers,
        heads=message.heads,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        width=message.width,
        parameters=message.parameters,
        dtype=message.dtype,
        eos_token_ids=tuple(message.eos_token_ids),
        has_tokenizer=message.has_tokenizer,
        has_chat_template=message.has_chat_template,
    )


def read_load(message: control_pb2.GetLoadResponse) -> types.Load:
    """How much work there is."""
    return types.Load(
        running=message.running,
        waiting=message.waiting,
        kv_blocks=message.kv_blocks,
        kv_blocks_used=message.kv_blocks_used,
        block_size=message.block_size,
        steps=message.steps,
        preemptions=message.preemptions,
        generated_tokens=message.generated_tokens,
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
    )


def read_health(message: control_pb2.GetHealthResponse) -> types.Health:
    """The state of the whole and of every rank."""
    return types.Health(
        state=_HEALTH_STATES.get(message.state, types.HealthState.UNKNOWN),
        cause=message.cause,
        since=_time(message.since) if message.HasField("since") else None,
        epoch=message.epoch,
        ranks=tuple(map(_rank_health, message.ranks)),
    )


def _rank(message: control_pb2.Rank) -> types.Rank:
    return types.Rank(
        rank=message.rank,
        host=message.host,
        pid=message.pid,
        heads=_range(message.heads),
        kv_heads=_range(message.kv_heads),
        channels=_range(message.channels),
        vocabulary=_range(message.vocabulary),
        weight_bytes=message.weight_bytes,
        kv_bytes=message.kv_bytes,
        replica=message.replica,
    )


def _rank_health(message: control_pb2.RankHealth) -> types.RankHealth:
    return types.RankHealth(
        rank=message.rank,
        host=message.host,
        pid=message.pid,
        state=_HEALTH_STATES.get(message.state, types.HealthState.UNKNOWN),
        cause=message.cause,
        since=_time(message.since) if message.HasField("since") else None,
        replica=message.replica,
    )


def _range(message: control_pb2.Range) -> types.Range:
    return types.Range(start=message.start, stop=message.stop)


def _time(message: Timestamp) -> datetime:
    return message.ToDatetime(tzinfo=UTC)


def _finish(message: inference_pb2.Finish) -> types.Finish:
    # WhichOneof names the field of the StopCondition that is set: text or token_id.
    matched = message.matched.WhichOneof("condition")
    usage = message.usage
    return types.Finish(
        reason=_FINISH_REASONS.get(message.reason, types.FinishReason.UNKNOWN),
        matched=getattr(message.matched, matched) if matched else None,
        usage=types.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            queue_seconds=usage.queue_seconds,
            first_token_seconds=usage.first_token_seconds,
            total_seconds=usage.total_seconds,
        ),
        seed=message.seed,
        score=message.score if message.HasField("score") else None,
    )


def _token_logprobs(
    messages: Iterable[inference_pb2.TokenLogprob],
) -> tuple[types.TokenLogprob, ...]:
    return tuple(
        types.TokenLogprob(
            token_id=message.token_id,
            text=message.text,
            logprob=message.logprob if message.HasField("logprob") else None,
            rank=message.rank,
            top=tuple(
                types.TopToken(token_id=top.token_id, text=top.text, logprob=top.logprob)
                for top in message.top
            ),
        )
        for message in messages
    )

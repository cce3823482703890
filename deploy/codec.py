"""Between the wire's messages and the plain dataclasses of `cluster.request`: pure functions.

An unset optional field takes the dataclass's default. A field that is set is handed over as it is,
however wrong: judging values is the job of `cluster.validation`. Only what the dataclasses cannot
express is refused here (a stop condition without a condition), as violations for the caller to
report together with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from cluster.errors import InvalidRequest, Violation
from cluster.request import (
    BeamParams,
    Constraint,
    FinishReason,
    Health,
    HealthState,
    Language,
    Load,
    ModelInfo,
    RankInfo,
    SamplingParams,
    Stopping,
    Timing,
    Usage,
)
from deploy.conversation import Conversation
from headwise.v1 import control_pb2, inference_pb2
from shards.contract import Logprobs

TokenText = Callable[[int], str]

_MAX_JSON_DEPTH = 64

_FINISH = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: inference_pb2.FINISH_REASON_ABORTED,
}
_HEALTH = {
    HealthState.STARTING: control_pb2.HEALTH_STATE_STARTING,
    HealthState.READY: control_pb2.HEALTH_STATE_READY,
    HealthState.DEGRADED: control_pb2.HEALTH_STATE_DEGRADED,
    HealthState.NOT_READY: control_pb2.HEALTH_STATE_NOT_READY,
}
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def sampling_params(
    sampling: inference_pb2.Sampling, output: inference_pb2.OutputOptions
) -> SamplingParams:
    """How tokens are drawn; log probabilities live with the output options on the wire."""
    given: dict[str, Any] = {
        name: shortest(getattr(sampling, name)) for name in _FLOATS if sampling.HasField(name)
    }
    given |= _present(sampling, ("top_k", "seed"))
    given |= _present(output, ("logprobs", "prompt_logprobs"))
    bias = {token: shortest(value) for token, value in sampling.logit_bias.items()}
    return SamplingParams(**given, logit_bias=bias)


def stopping(message: inference_pb2.Stopping) -> tuple[Stopping, list[Violation]]:
    """When a sample ends, and what could not be understood."""
    strings: list[str] = []
    token_ids: list[int] = []
    faults: list[Violation] = []
    for position, condition in enumerate(message.conditions):
        kind = condition.WhichOneof("condition")
        if kind == "text":
            strings.append(condition.text)
        elif kind == "token_id":
            token_ids.append(condition.token_id)
        else:
            faults.append(
                Violation(
                    f"stopping.conditions[{position}]",
                    "neither text nor token_id is set, or it is of a type that this server does "
                    "not know: set one of the two",
                )
            )
    given = _present(message, ("max_tokens", "min_tokens", "ignore_eos", "include_stop"))
    return Stopping(strings=tuple(strings), token_ids=tuple(token_ids), **given), faults


def beam_params(message: inference_pb2.GenerateRequest) -> BeamParams | None:
    """The search that is asked for, if one is."""
    if not message.HasField("beam_search"):
        return None
    beams = message.beam_search
    given: dict[str, Any] = _present(beams, ("early_stopping",))
    if beams.HasField("length_penalty"):
        given["length_penalty"] = shortest(beams.length_penalty)
    return BeamParams(beams.width, **given)


def constraint(
    message: inference_pb2.GenerateRequest,
) -> tuple[Constraint | None, list[Violation]]:
    """What the text has to be, if anything, and what could not be understood."""
    if not message.HasField("constraint"):
        return None, []
    kind = message.constraint.WhichOneof("language")
    if kind is None:
        return None, [
            Violation(
                "constraint",
                "no language is set, or it is of a type that this server does not know: set "
                "json_schema, regex, lark or choices",
            )
        ]
    language = Language(kind)
    if language is Language.CHOICES:
        return Constraint(language, tuple(message.constraint.choices.texts)), []
    return Constraint(language, (getattr(message.constraint, kind),)), []


def conversation(
    message: inference_pb2.ChatRequest | inference_pb2.Conversation,
) -> Conversation:
    """What a chat template renders. Raises `InvalidRequest` for JSON that is none."""
    faults: list[Violation] = []

    def parsed(text: str, field: str) -> Any:
        try:
            value = msgspec.json.decode(text or "{}")
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            faults.append(Violation(field, f"{text[:64]!r} is not JSON ({error}): mend it"))
            return {}
        if not isinstance(value, dict):
            faults.append(Violation(field, f"{text[:64]!r} is not a JSON object: give one"))
        elif _is_deep(value):
            faults.append(
                Violation(field, f"it is nested deeper than {_MAX_JSON_DEPTH}: make it flatter")
            )
        return value

    messages = tuple(
        _chat_message(entry, parsed, f"messages[{position}]")
        for position, entry in enumerate(message.messages)
    )
    tools = tuple(
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": parsed(tool.parameters, f"tools[{position}].parameters"),
            },
        }
        for position, tool in enumerate(message.tools)
    )
    arguments: dict[str, Any] = {}
    try:
        arguments = json_format.MessageToDict(message.template_arguments)
    except (json_format.Error, ValueError) as error:
        faults.append(Violation("template_arguments", f"{error}: JSON has no such value"))
    if faults:
        raise InvalidRequest(*faults)
    return Conversation(
        messages,
        tools,
        arguments,
        continues=message.turn == inference_pb2.TURN_CONTINUE,
    )


def _chat_message(
    message: inference_pb2.ChatMessage, parsed: Callable[[str, str], Any], field: str
) -> Mapping[str, Any]:
    """A message as chat templates take it, which is OpenAI's way with arguments parsed."""
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    result |= _present(message, ("name", "tool_call_id"))
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": parsed(call.arguments, f"{field}.tool_calls[{i}].arguments"),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return result


def generate_request(chat: inference_pb2.ChatRequest) -> inference_pb2.GenerateRequest:
    """A chat request's common part; the prompt is for the caller to render."""
    request = inference_pb2.GenerateRequest(
        request_id=chat.request_id,
        model=chat.model,
        sampling=chat.sampling,
        stopping=chat.stopping,
        output=chat.output,
        generated=chat.generated,
    )
    if chat.HasField("prefix_cache"):
        request.prefix_cache.CopyFrom(chat.prefix_cache)
    if chat.HasField("constraint"):
        request.constraint.CopyFrom(chat.constraint)
    if chat.HasField("n"):
        request.n = chat.n
    if chat.HasField("priority"):
        request.priority = chat.priority
    return request


def chat_response(message: inference_pb2.GenerateResponse) -> inference_pb2.ChatResponse:
    """The same delta, as an answer's."""
    response = inference_pb2.ChatResponse(
        index=message.index,
        text=message.text,
        token_ids=message.token_ids,
        logprobs=message.logprobs,
    )
    if message.HasField("request_id"):
        response.request_id = message.request_id
    if message.HasField("finish"):
        response.finish.CopyFrom(message.finish)
    return response


def token_logprob(logprobs: Logprobs, text: TokenText) -> inference_pb2.TokenLogprob:
    """One token's log probability; `text` turns an id into its text, or into ""."""
    return inference_pb2.TokenLogprob(
        token_id=logprobs.token,
        text=text(logprobs.token),
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top=[
            inference_pb2.TopToken(token_id=token, text=text(token), logprob=value)
            for token, value in zip(logprobs.top_tokens, logprobs.top_logprobs, strict=True)
        ],
    )


def prompt_logprobs(
    logprobs: Iterable[Logprobs | None], prompt: tuple[int, ...], text: TokenText
) -> list[inference_pb2.TokenLogprob]:
    """One per prompt token. The first has nothing before it: its `logprob` stays unset."""
    return [
        token_logprob(entry, text)
        if entry is not None
        else inference_pb2.TokenLogprob(token_id=token, text=text(token))
        for token, entry in zip(prompt, logprobs, strict=True)
    ]


def finish(
    reason: FinishReason,
    matched: str | int | None,
    usage: Usage | None,
    timing: Timing | None,
    seed: int | None,
    score: float | None = None,
) -> inference_pb2.Finish:
    """How a sample ended. DEADLINE has no place here: it is a status, not a finish."""
    message = inference_pb2.Finish(reason=_FINISH[reason], seed=seed or 0, score=score)
    if isinstance(matched, str):
        message.matched.text = matched
    elif matched is not None:
        message.matched.token_id = matched
    if usage is not None:
        message.usage.prompt_tokens = usage.prompt_tokens
        message.usage.completion_tokens = usage.completion_tokens
        message.usage.cached_tokens = usage.cached_tokens
    if timing is not None:
        message.usage.queue_seconds = timing.queue
        message.usage.first_token_seconds = timing.first_token
        message.usage.total_seconds = timing.total
    return message


def model_info(
    model: ModelInfo, *, has_tokenizer: bool, has_chat_template: bool
) -> control_pb2.GetModelInfoResponse:
    return control_pb2.GetModelInfoResponse(
        name=model.name,
        architecture=model.architecture,
        vocabulary=model.vocabulary,
        context=model.context,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        width=model.width,
        parameters=model.parameters,
        dtype=model.dtype,
        eos_token_ids=model.eos_token_ids,
        has_tokenizer=has_tokenizer,
        has_chat_template=has_chat_template,
    )


def rank(info: RankInfo) -> control_pb2.Rank:
    """What one rank holds."""
    return control_pb2.Rank(
        rank=info.rank,
        host=info.host,
        pid=info.pid,
        heads=_range(info.heads),
        kv_heads=_range(info.kv_heads),
        channels=_range(info.channels),
        vocabulary=_range(info.vocabulary),
        weight_bytes=info.weight_bytes,
        kv_bytes=info.kv_bytes,
        replica=info.replica,
    )


def load(value: Load) -> control_pb2.GetLoadResponse:
    return control_pb2.GetLoadResponse(
        running=value.running,
        waiting=value.waiting,
        kv_blocks=value.kv_blocks,
        kv_blocks_used=value.kv_blocks_used,
        block_size=value.block_size,
        steps=value.steps,
        preemptions=value.preemptions,
        generated_tokens=value.generated_tokens,
        prompt_tokens=value.prompt_tokens,
        cached_tokens=value.cached_tokens,
    )


def health(value: Health) -> control_pb2.GetHealthResponse:
    return control_pb2.GetHealthResponse(
        state=_HEALTH[value.state],
        cause=value.cause,
        since=timestamp(value.since),
        epoch=value.epoch,
        ranks=[
            control_pb2.RankHealth(
                rank=entry.rank,
                host=entry.host,
                pid=entry.pid,
                state=_HEALTH[entry.state],
                cause=entry.cause,
                since=timestamp(entry.since),
                replica=entry.replica,
            )
            for entry in value.ranks
        ],
    )


def timestamp(unix_seconds: float) -> Timestamp:
    """Unix time, to the microsecond."""
    whole, micros = divmod(round(unix_seconds * 1_000_000), 1_000_000)
    return Timestamp(seconds=whole, nanos=micros * 1000)


def _is_deep(value: object) -> bool:
    """Too deep for what walks it later on, each level a call of its own."""
    level: list[object] = [value]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return any(isinstance(value, dict | list) for value in level)


def _range(bounds: tuple[int, int]) -> control_pb2.Range:
    return control_pb2.Range(start=bounds[0], stop=bounds[1])


def _present(message: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def shortest(value: float) -> float:
    """The decimal that the client wrote: the wire's float32 0.7 arrives as 0.699999988..., which
    would sample differently from the same call made in Python."""
    return float(str(np.float32(value)))

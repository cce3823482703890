"""Messages of `headwise.v1` become an `Intake`, or an `InvalidRequest` that names every fault."""

from __future__ import annotations

from cluster.errors import InvalidRequest, Violation
from cluster.request import Request
from deploy import codec
from deploy.edge.extent import check_request
from deploy.edge.intake import Intake, Output, Prompt, take
from deploy.edge.models import Served
from headwise.v1 import inference_pb2


async def take_generate(
    message: inference_pb2.GenerateRequest, served: Served, deadline: float | None
) -> Intake:
    """`deadline` is `time.monotonic()` seconds. Raises `InvalidRequest`, or `Overloaded` by the
    tokenizer."""
    check_request(message, served.generator.model)
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return await _take(message, Prompt(message.text), served, deadline)
    if kind == "token_ids":
        return await _take(message, Prompt(tuple(message.token_ids.ids)), served, deadline)
    unset = Violation("prompt", "not set: set text or token_ids")
    return await _take(message, Prompt(None), served, deadline, unset)


async def take_chat(
    message: inference_pb2.ChatRequest, served: Served, deadline: float | None
) -> Intake:
    """As `take_generate`, the prompt being the rendered conversation."""
    check_request(message, served.generator.model)
    faults: list[Violation] = []
    conversation = None
    try:
        conversation = codec.conversation(message)
    except InvalidRequest as error:
        faults.extend(error.violations)
    if message.output.echo:
        faults.append(Violation("output.echo", "true: a chat has no echo; use Generate"))
    if message.output.HasField("prompt_logprobs"):
        faults.append(
            Violation("output.prompt_logprobs", "set: a chat does not return them; use Generate")
        )
    prompt = Prompt(conversation, field="messages")
    return await _take(codec.generate_request(message), prompt, served, deadline, *faults)


async def _take(
    message: inference_pb2.GenerateRequest,
    prompt: Prompt,
    served: Served,
    deadline: float | None,
    *faults: Violation,
) -> Intake:
    stopping, misread_stopping = codec.stopping(message.stopping)
    constraint, misread_constraint = codec.constraint(message)
    request = Request(
        id=message.request_id,
        prompt=(),
        sampling=codec.sampling_params(message.sampling, message.output),
        stopping=stopping,
        n=message.n if message.HasField("n") else 1,
        generated=tuple(message.generated.ids),
        deadline=deadline,
        priority=message.priority,
        cache=not message.prefix_cache.disabled,
        cache_salt=message.prefix_cache.salt,
        beams=codec.beam_params(message),
        constraint=constraint,
    )
    output = message.output
    skip = output.skip_special_tokens if output.HasField("skip_special_tokens") else True
    return await take(
        prompt,
        request,
        Output(with_text=not output.skip_text, skip_special_tokens=skip, echo=output.echo),
        served,
        (*faults, *misread_stopping, *misread_constraint),
    )

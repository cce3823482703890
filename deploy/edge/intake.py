"""A message becomes a `cluster.request.Request`, or an `InvalidRequest` that names every fault."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import InvalidRequest, Violation
from cluster.request import Request
from cluster.validation import validate
from deploy import codec
from deploy.edge.models import Served
from headwise.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class Intake:
    """A request to submit, and how its answer is to look.

    `echo_text` and `echo_ids` begin each sample's first message.
    """

    request: Request
    with_text: bool
    skip_special_tokens: bool
    echo_text: str = ""
    echo_ids: tuple[int, ...] = ()


async def take_generate(
    message: inference_pb2.GenerateRequest, served: Served, deadline: float | None
) -> Intake:
    """`deadline` is `time.monotonic()` seconds. Raises `InvalidRequest`, or `Overloaded` by the
    tokenizer."""
    texts = served.texts
    faults: list[Violation] = []
    prompt: tuple[int, ...] | None = None
    kind = message.WhichOneof("prompt")
    try:
        if kind == "text":
            prompt = (
                await texts.encode(message.text, add_special_tokens=True, field="prompt")
                if message.text
                else ()
            )
        elif kind == "token_ids":
            prompt = tuple(message.token_ids.ids)
        else:
            faults.append(Violation("prompt", "not set: set text or token_ids"))
    except InvalidRequest as error:
        faults.extend(error.violations)
    intake = _intake(message, prompt, served, deadline, faults)
    # An earlier attempt has already delivered the echo together with its tokens.
    if not message.output.echo or intake.request.generated:
        return intake
    echo_text = message.text
    if kind == "token_ids" and intake.with_text and texts.codec is not None:
        echo_text = await texts.decode(
            intake.request.prompt,
            skip_special_tokens=intake.skip_special_tokens,
            field="token_ids",
        )
    return Intake(
        intake.request,
        intake.with_text,
        intake.skip_special_tokens,
        echo_text if intake.with_text else "",
        intake.request.prompt,
    )


async def take_chat(
    message: inference_pb2.ChatRequest, served: Served, deadline: float | None
) -> Intake:
    """As `take_generate`, the prompt being the rendered conversation."""
    faults: list[Violation] = []
    prompt: tuple[int, ...] | None = None
    try:
        prompt = await served.texts.render(codec.conversation(message))
    except InvalidRequest as error:
        faults.extend(error.violations)
    if message.output.echo:
        faults.append(Violation("output.echo", "true: a chat has no echo; use Generate"))
    if message.output.HasField("prompt_logprobs"):
        faults.append(
            Violation("output.prompt_logprobs", "set: a chat does not return them; use Generate")
        )
    return _intake(codec.generate_request(message), prompt, served, deadline, faults, "messages")


def _intake(
    message: inference_pb2.GenerateRequest,
    prompt: tuple[int, ...] | None,
    served: Served,
    deadline: float | None,
    faults: list[Violation],
    prompt_field: str = "prompt",
) -> Intake:
    output = message.output
    stopping, misunderstood = codec.stopping(message.stopping)
    faults.extend(misunderstood)
    constraint, misunderstood = codec.constraint(message)
    faults.extend(misunderstood)
    request = Request(
        id=message.request_id,
        # Where there is no prompt to judge, a harmless one lets the other faults be named as well.
        prompt=(0,) if prompt is None else prompt,
        sampling=codec.sampling_params(message.sampling, output),
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
    has_tokenizer = served.texts.codec is not None
    try:
        validate(
            request, served.generator.model, has_tokenizer=has_tokenizer, prompt_field=prompt_field
        )
    except InvalidRequest as error:
        faults.extend(error.violations)
    if faults:
        raise InvalidRequest(*faults)
    return Intake(
        request,
        with_text=has_tokenizer and not output.skip_text,
        skip_special_tokens=(
            output.skip_special_tokens if output.HasField("skip_special_tokens") else True
        ),
    )

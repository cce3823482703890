"""A prompt and what is asked of it become an `Intake`, whichever API they came in by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.errors import InvalidRequest, Violation
from cluster.request import Request
from cluster.validation import validate
from deploy.conversation import Conversation
from deploy.edge.models import Served


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a client gave: a text, token ids, a conversation, or None where that was no use.

    `field` is where, for errors. `add_special_tokens` concerns texts alone: templates write theirs.
    """

    content: str | tuple[int, ...] | Conversation | None
    field: str = "prompt"
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Output:
    """How an answer is to look. `echo`: it begins with the prompt."""

    with_text: bool = True
    skip_special_tokens: bool = True
    echo: bool = False


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


async def take(
    prompt: Prompt,
    request: Request,
    output: Output,
    served: Served,
    faults: tuple[Violation, ...] = (),
) -> Intake:
    """`request` with its prompt in token ids, validated.

    `faults` are those that the API itself found. Raises `InvalidRequest` that names them and every
    other one, or `Overloaded` by the tokenizer.
    """
    found = list(faults)
    # Where there is no prompt to judge, a harmless one lets the other faults be named as well.
    ids: tuple[int, ...] = (0,)
    try:
        ids = await _token_ids(prompt, served, ids)
    except InvalidRequest as error:
        found.extend(error.violations)
    request = replace(request, prompt=ids)
    texts = served.texts
    try:
        validate(
            request,
            served.generator.model,
            has_tokenizer=texts.codec is not None,
            prompt_field=prompt.field,
        )
    except InvalidRequest as error:
        found.extend(error.violations)
    if found:
        raise InvalidRequest(*found)
    await texts.check(request)
    intake = Intake(
        request,
        with_text=texts.codec is not None and output.with_text,
        skip_special_tokens=output.skip_special_tokens,
    )
    # An earlier attempt has already delivered the echo together with its tokens.
    if not output.echo or request.generated:
        return intake
    return replace(intake, echo_ids=ids, echo_text=await _echo_text(prompt, intake, served))


async def _token_ids(prompt: Prompt, served: Served, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    content = prompt.content
    if content is None:
        return otherwise
    if isinstance(content, Conversation):
        return await served.texts.render(content, field=prompt.field)
    if isinstance(content, str):
        if not content:
            return ()
        return await served.texts.encode(
            content, add_special_tokens=prompt.add_special_tokens, field=prompt.field
        )
    return content


async def _echo_text(prompt: Prompt, intake: Intake, served: Served) -> str:
    if not intake.with_text:
        return ""
    if isinstance(prompt.content, str):
        return prompt.content
    return await served.texts.decode(
        intake.request.prompt,
        skip_special_tokens=intake.skip_special_tokens,
        field=prompt.field,
    )

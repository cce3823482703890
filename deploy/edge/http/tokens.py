"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from deploy.conversation import Conversation
from deploy.edge.extent import MAX_TOOLS
from deploy.edge.http.chat_body import Messages, Tool
from deploy.edge.http.fields import Entries, TokenId
from deploy.edge.http.openapi import answers_with
from deploy.edge.http.replies import Detokenized, Tokens
from deploy.edge.http.route import JsonRoute
from deploy.edge.http.service import Service

_MOST_TOKENS = 1 << 20


class TextTokens(BaseModel):
    """Of a text."""

    model_config = ConfigDict(strict=True)

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class ChatTokens(BaseModel):
    """Of a conversation, as its chat template renders it."""

    model_config = ConfigDict(strict=True)

    messages: Messages
    model: str | None = None
    tools: Annotated[Entries[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    """Special tokens are spelled out."""

    model_config = ConfigDict(strict=True)

    tokens: Annotated[Entries[TokenId], Field(max_length=_MOST_TOKENS)]
    model: str | None = None


def tokens(service: Service) -> APIRouter:
    """Both endpoints."""
    router = APIRouter(route_class=JsonRoute)

    @router.post("/tokenize", responses=answers_with(Tokens))
    async def tokenize(body: TextTokens | ChatTokens) -> Response:
        """Token ids of a text or a conversation."""
        served = service.models.get(body.model or "")
        texts = served.texts
        if isinstance(body, TextTokens):
            ids = await texts.encode(
                body.prompt, add_special_tokens=body.add_special_tokens, field="prompt"
            )
        else:
            ids = await texts.render(
                Conversation(
                    tuple(message.plain() for message in body.messages),
                    tuple(tool.model_dump(exclude_none=True) for tool in body.tools or ()),
                    body.chat_template_kwargs or {},
                    continues=body.continue_final_message,
                    begins_answer=body.add_generation_prompt,
                )
            )
        reply = Tokens(len(ids), served.generator.model.context, list(ids))
        if body.return_token_strs:
            reply.token_strs = await texts.build(
                len(ids), lambda: [texts.token_text(token) for token in ids]
            )
        return Response(msgspec.json.encode(reply), media_type="application/json")

    @router.post("/detokenize", responses=answers_with(Detokenized))
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids."""
        served = service.models.get(body.model or "")
        text = await served.texts.decode(body.tokens, skip_special_tokens=False, field="tokens")
        return Response(msgspec.json.encode(Detokenized(text)), media_type="application/json")

    return router

"""`headwise chat`: a conversation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands import connection
from deploy.commands.generate import MaxTokens, Seed, Temperature, TopK, TopP

if TYPE_CHECKING:
    from headwise import ChatMessage, ChatOptions, Client

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends; Ctrl-C interrupts an answer."


def chat(
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    address: connection.Address = connection.DEFAULT_ADDRESS,
    token_file: connection.TokenFile = None,
    tls_ca: connection.TlsCa = None,
    tls_certificate: connection.TlsCertificate = None,
    tls_key: connection.TlsKey = None,
    timeout: connection.Timeout = None,
) -> None:
    """Talk with the model; the conversation so far goes along with every message."""
    import headwise

    options = headwise.ChatOptions(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    beginning = [] if system is None else [headwise.ChatMessage(role="system", content=system)]
    with connection.connect(
        address, token_file, tls_ca, tls_certificate, tls_key, timeout
    ) as client:
        model = client.model_info()
        typer.echo(f"{model.name} at {address}. {_HELP}", err=True)
        messages = list(beginning)
        while True:
            try:
                # The prompt goes to stderr, so that stdout holds the answers alone.
                sys.stderr.write("> ")
                sys.stderr.flush()
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                break
            if not line or line.strip() == "/exit":
                break
            if line.strip() == "/reset":
                messages = list(beginning)
            elif line.strip():
                messages.append(headwise.ChatMessage(role="user", content=line.strip()))
                messages.append(_answer(client, messages, options))
    sys.stderr.write("\n")


def _answer(client: Client, messages: list[ChatMessage], options: ChatOptions) -> ChatMessage:
    """Print the answer as it comes; what was said before an interruption stays said."""
    from headwise import ChatMessage

    with client.stream_chat(messages, **options) as stream:
        try:
            for delta in stream:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            stream.cancel()
        sys.stdout.write("\n")
        return ChatMessage(role="assistant", content=stream.text())

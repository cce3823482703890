"""`headwise generate`: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from deploy.commands import connection

MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this sum.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: this many alternatives to each token.")
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Begin with the prompt.")] = False,
    address: connection.Address = connection.DEFAULT_ADDRESS,
    token_file: connection.TokenFile = None,
    tls_ca: connection.TlsCa = None,
    tls_certificate: connection.TlsCertificate = None,
    tls_key: connection.TlsKey = None,
    timeout: connection.Timeout = None,
    as_json: connection.AsJson = False,
) -> None:
    """Continue PROMPT, printing text as it comes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with (
        connection.connect(
            address, token_file, tls_ca, tls_certificate, tls_key, timeout
        ) as client,
        client.stream(
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
            echo=echo or None,
        ) as stream,
    ):
        if as_json:
            typer.echo(stream.result().model_dump_json())
            return
        for delta in stream:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
        sys.stdout.write("\n")

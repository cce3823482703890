"""`headwise status`: how a server is doing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from deploy.commands import connection

if TYPE_CHECKING:
    from headwise import Health, Load, ModelInfo, ServerInfo


def status(
    address: connection.Address = connection.DEFAULT_ADDRESS,
    token_file: connection.TokenFile = None,
    tls_ca: connection.TlsCa = None,
    tls_certificate: connection.TlsCertificate = None,
    tls_key: connection.TlsKey = None,
    timeout: connection.Timeout = 10,
    as_json: connection.AsJson = False,
) -> None:
    """Show the health of every rank, what it holds, and the load. Exits with 1 if not computing."""
    from headwise import HealthState

    with connection.connect(
        address, token_file, tls_ca, tls_certificate, tls_key, timeout
    ) as client:
        health, load = client.health(), client.load()
        server, model = client.server_info(), client.model_info()
    if as_json:
        parts = {"health": health, "load": load, "server": server, "model": model}
        typer.echo(json.dumps({name: part.model_dump(mode="json") for name, part in parts.items()}))
    else:
        _show(address, health, load, server, model)
    if health.state not in (HealthState.READY, HealthState.DEGRADED):
        raise typer.Exit(1)


def _show(address: str, health: Health, load: Load, server: ServerInfo, model: ModelInfo) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{model.name}[/] ({model.architecture}, {model.dtype}) at {address}")
    cause = f": {health.cause}" if health.cause else ""
    console.print(f"{health.state.value}{cause} since {health.since:%Y-%m-%d %H:%M:%S %Z}")
    console.print(
        f"{load.running} running, {load.waiting} waiting, KV blocks {load.kv_blocks_used} of "
        f"{load.kv_blocks}, {load.generated_tokens} tokens in {load.steps} steps"
    )
    cached = f", {load.cached_tokens / load.prompt_tokens:.0%} cached" if load.prompt_tokens else ""
    console.print(f"{load.prompt_tokens} prompt tokens{cached}, {load.preemptions} preemptions")
    table = Table("rank", "state", "host", "pid", "heads", "KV heads", "weights", "KV cache")
    states = {rank.rank: rank for rank in health.ranks}
    for rank in server.ranks:
        state = states.get(rank.rank)
        table.add_row(
            str(rank.rank),
            "unknown" if state is None else f"{state.state.value} {state.cause}".strip(),
            rank.host,
            str(rank.pid),
            f"{rank.heads.start}-{rank.heads.stop - 1}",
            f"{rank.kv_heads.start}-{rank.kv_heads.stop - 1}",
            decimal(rank.weight_bytes),
            decimal(rank.kv_bytes),
        )
    console.print(table)

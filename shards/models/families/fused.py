"""Checkpoints that hold a layer's q, k and v in one tensor, or its gate and up: where each lies."""

from __future__ import annotations

from shards.models.family import Source
from shards.models.spec import FeedForward, ModelSpec


def qkv_by_kv_head(spec: ModelSpec, tensor: str) -> dict[str, str | Source]:
    """For each KV head in turn: the query heads that read it, its key, its value.

    With as many KV heads as query heads that is q, k, v head by head; with one it is all of q, then
    k and v.
    """
    attention = spec.layers[0].attention
    head_dim = attention.head_dim
    queries = attention.heads // attention.kv_heads * head_dim
    rows = {"q": (0, queries), "k": (queries, head_dim), "v": (queries + head_dim, head_dim)}
    return {
        f"layers.{{i}}.attention.{part}": Source(
            tensor, offset=first, block=count, stride=queries + 2 * head_dim
        )
        for part, (first, count) in rows.items()
    }


def qkv_in_turn(spec: ModelSpec, tensor: str) -> dict[str, str | Source]:
    """All of q, then all of k, then all of v."""
    attention = spec.layers[0].attention
    k = attention.heads * attention.head_dim
    v = k + attention.kv_heads * attention.head_dim
    return {
        f"layers.{{i}}.attention.{part}": Source(tensor, offset=first)
        for part, first in (("q", 0), ("k", k), ("v", v))
    }


def gate_up_in_turn(spec: ModelSpec, tensor: str) -> dict[str, str | Source]:
    """All of gate, then all of up."""
    ffn = spec.layers[0].ffn
    assert isinstance(ffn, FeedForward)
    return {
        "layers.{i}.ffn.gate": Source(tensor),
        "layers.{i}.ffn.up": Source(tensor, offset=ffn.width),
    }

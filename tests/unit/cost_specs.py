"""Llama-shaped specs for the cost model's tests."""

from __future__ import annotations

from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm, Rotary


def llama(
    width: int = 576,
    layers: int = 4,
    heads: int = 9,
    kv_heads: int = 3,
    channels: int = 1536,
    vocabulary: int = 49152,
    *,
    window: int | None = None,
    tied: bool = False,
) -> ModelSpec:
    attention = Attention(
        heads,
        kv_heads,
        width // heads,
        scale=0.125,
        window=window,
        rotary=Rotary(1e4, width // heads),
    )
    return ModelSpec(
        architecture="LlamaForCausalLM",
        width=width,
        vocabulary=vocabulary,
        context=8192,
        layers=(Layer(attention, FeedForward(channels, "silu", gated=True)),) * layers,
        norm=Norm("rms", 1e-5),
        tied_embeddings=tied,
        dtype="bfloat16",
    )

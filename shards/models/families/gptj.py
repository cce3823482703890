"""GPT-J 6B: GPT-2's shape with rotary positions and parallel halves behind one norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families.fields import Fields
from shards.models.families.gpt2 import ALIASES, ffn_width
from shards.models.families.names import sources
from shards.models.family import Family
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm, Rotary

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
# An absent field is the default, a null one would mean all channels of all heads together.
_ABSENT = {"rotary_dim": 64}

_NAMES = {
    "embedding": "transformer.wte",
    "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
    "layers.{i}.attention.q": "transformer.h.{i}.attn.q_proj",
    "layers.{i}.attention.k": "transformer.h.{i}.attn.k_proj",
    "layers.{i}.attention.v": "transformer.h.{i}.attn.v_proj",
    "layers.{i}.attention.out": "transformer.h.{i}.attn.out_proj",
    "layers.{i}.ffn.up": "transformer.h.{i}.mlp.fc_in",
    "layers.{i}.ffn.down": "transformer.h.{i}.mlp.fc_out",
    "norm": "transformer.ln_f",
    "output": "lm_head",
}


def _rotary(fields: Fields, head_dim: int) -> Rotary:
    dim = fields.integer("rotary_dim")
    if dim % 2 or dim > head_dim:
        raise UnsupportedModel(
            f"config field rotary_dim is {dim}: an even number up to the head_dim of {head_dim} "
            "is needed"
        )
    return Rotary(theta=10_000.0, dim=dim, interleaved=True)


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    absent = {name: value for name, value in _ABSENT.items() if name not in config}
    fields = Fields(config, _DEFAULTS | absent, ALIASES)
    heads, head_dim = fields.heads("n_head"), fields.even_share("n_embd", "n_head")
    layer = Layer(
        Attention(heads, heads, head_dim, scale=head_dim**-0.5, rotary=_rotary(fields, head_dim)),
        FeedForward(ffn_width(fields), fields.activation("activation_function"), False, bias=True),
        parallel=True,
        shared_norm=True,
    )
    return ModelSpec(
        architecture="gptj",
        width=fields.integer("n_embd"),
        vocabulary=fields.integer("vocab_size"),
        context=fields.integer("n_positions"),
        layers=(layer,) * fields.layers("n_layer"),
        norm=Norm("layer", fields.number("layer_norm_epsilon"), bias=True),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        output_bias=True,
    )


FAMILY = Family(
    name="GPT-J",
    architectures=("GPTJForCausalLM",),
    model_type="gptj",
    spec=_spec,
    sources=lambda spec: sources(spec, _NAMES),
    prefix="transformer.",
    # The causal mask, which old checkpoints save, and a tied second copy of the embedding.
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
)

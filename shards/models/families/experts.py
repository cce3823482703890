"""Experts as configs and checkpoints name them, shared by the families that have them."""

from __future__ import annotations

from shards.errors import UnsupportedModel
from shards.models.families.fields import Fields
from shards.models.family import Source

# Several times the most of any model, as in fields.py.
_MOST_EXPERTS = 4096

# Qwen's and DeepSeek's spelling: every expert's matrices by themselves.
NAMES = {
    "layers.{i}.router": "model.layers.{i}.mlp.gate",
    "layers.{i}.experts.{e}.gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "layers.{i}.experts.{e}.up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "layers.{i}.experts.{e}.down": "model.layers.{i}.mlp.experts.{e}.down_proj",
}

GGUF_NAMES: dict[str, str | Source] = {
    "layers.{i}.router": "blk.{i}.ffn_gate_inp",
    "layers.{i}.experts.{e}.gate": Source("blk.{i}.ffn_gate_exps", stacked=True),
    "layers.{i}.experts.{e}.up": Source("blk.{i}.ffn_up_exps", stacked=True),
    "layers.{i}.experts.{e}.down": Source("blk.{i}.ffn_down_exps", stacked=True),
    "layers.{i}.shared.gate": "blk.{i}.ffn_gate_shexp",
    "layers.{i}.shared.up": "blk.{i}.ffn_up_shexp",
    "layers.{i}.shared.down": "blk.{i}.ffn_down_shexp",
}


def expert_count(fields: Fields, name: str, *, least: int = 1) -> int:
    """How many experts a layer has."""
    return fields.integer(name, _MOST_EXPERTS, least=least)


def top_k(fields: Fields, name: str, among: int) -> int:
    """How many experts a token goes to, of those `among` which they are chosen."""
    chosen = fields.integer(name)
    if chosen > among:
        raise UnsupportedModel(
            f"config field {name} is {chosen}: a token has {among} experts to choose from"
        )
    return chosen

"""GPT-2 and GPT-BigCode: learned positions, LayerNorm, MHA and MQA."""

from __future__ import annotations

from tests.parity.case import Case

CASES = [
    Case("gpt2-7", "gpt2", {"n_head": 7, "n_embd": 56}),
    Case(
        "gpt2-scaled-by-layer",
        "gpt2",
        {"n_head": 4, "n_embd": 32, "n_inner": 70, "scale_attn_by_inverse_layer_idx": True},
        (1, 2, 3, 4),
    ),
    Case("bigcode-mqa-7", "gpt_bigcode", {"n_head": 7, "n_embd": 56, "multi_query": True}),
    Case(
        "bigcode-mha-5",
        "gpt_bigcode",
        {"n_head": 5, "n_embd": 40, "multi_query": False},
    ),
]

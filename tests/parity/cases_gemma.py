"""Gemma: unit-offset norms at both ends of a half, caps, windows, few KV heads of many channels."""

from __future__ import annotations

from tests.parity.case import Case

WORLDS = (1, 2, 3, 4)
WIDE_MQA = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "hidden_size": 64}
CASES = [
    Case("gemma2-9-3", "gemma2", {}, WORLDS),
    Case("gemma2-4-1-wide", "gemma2", WIDE_MQA, WORLDS),
    Case(
        "gemma2-uncapped-biased",
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        (1, 2),
    ),
    Case("gemma3-9-3", "gemma3", {}, WORLDS),
    Case("gemma3-4-1-wide", "gemma3", WIDE_MQA, WORLDS),
    Case(
        "gemma3-scaled-global-rope",
        "gemma3",
        {
            "final_logit_softcapping": 7.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        (1, 3),
    ),
    Case("gemma3-multimodal", "gemma3_multimodal", {}, (1, 4)),
]

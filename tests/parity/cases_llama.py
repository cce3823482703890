"""Llama and the dense families after it."""

from __future__ import annotations

from typing import Any

from tests.parity.case import Case

WORLDS = (1, 2, 3, 4)
QUERIES_7 = {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}


def _longrope(original: int) -> dict[str, Any]:
    """Phi-4-mini's: six divisors for the 12 of 16 channels that are rotated."""
    return {
        "hidden_size": 9 * 16,
        "original_max_position_embeddings": original,
        "partial_rotary_factor": 0.75,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
            "long_factor": [1.0, 1.5, 2.5, 4.0, 7.0, 9.0],
        },
    }


CASES = [
    Case("llama-9-3", "llama", {"num_attention_heads": 9, "num_key_value_heads": 3}),
    Case(
        "llama-7-1-untied-biased",
        "llama",
        {
            "hidden_size": 56,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    Case(
        "llama-rope-llama3",
        "llama",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Case(
        "llama-rope-linear",
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        },
        (1, 2, 3, 4),
    ),
    Case(
        "llama-rope-yarn",
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        (1, 3),
    ),
    Case(
        "qwen2-14-2",
        "qwen2",
        {"hidden_size": 84, "num_attention_heads": 14, "num_key_value_heads": 2},
    ),
    Case(
        "qwen2-9-3-untied",
        "qwen2",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False},
    ),
    Case("mistral-window", "mistral", {}),
    Case(
        "qwen2-some-windows",
        "qwen2",
        {
            "hidden_size": 84,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
        },
    ),
    Case("qwen3-9-3", "qwen3", {}, WORLDS),
    Case("qwen3-7-1-biased", "qwen3", QUERIES_7 | {"attention_bias": True}, WORLDS),
    Case(
        "qwen3-some-windows",
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        WORLDS,
    ),
    Case("phi3-9-3", "phi3", {}, WORLDS),
    Case("phi3-window", "phi3", {"sliding_window": 13}, (1, 3)),
    # transformers goes by a sequence's length, which here is above 32 and below 256.
    Case("phi3-longrope-long", "phi3", _longrope(32), WORLDS),
    Case("phi3-longrope-short", "phi3", _longrope(256) | {"tie_word_embeddings": True}, (1, 2)),
    Case("glm-9-3", "glm", {}, WORLDS),
    Case("glm-7-1", "glm", QUERIES_7 | {"attention_bias": False}, (1, 4)),
    Case("glm4-9-3", "glm4", {}, WORLDS),
    Case("olmo2-9-3", "olmo2", {}, WORLDS),
    Case("olmo2-7-1-biased", "olmo2", QUERIES_7 | {"attention_bias": True}, WORLDS),
    Case("granite-9-3", "granite", {}, WORLDS),
    Case("granite-7-1", "granite", QUERIES_7 | {"attention_bias": True, "mlp_bias": True}, (1, 3)),
    Case("cohere-9-3", "cohere", {"attention_bias": True}, WORLDS),
    Case("cohere-own-qk-norms", "cohere", {"use_qk_norm": True}, WORLDS),
    Case("cohere2-9-3", "cohere2", {}, WORLDS),
    Case("starcoder2-window", "starcoder2", {}, WORLDS),
    Case("starcoder2-7-1", "starcoder2", QUERIES_7 | {"sliding_window": None}, (1, 4)),
]

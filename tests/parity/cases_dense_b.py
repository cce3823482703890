"""GPT-J, GPT-NeoX, Falcon, OPT, BLOOM and StableLM."""

from __future__ import annotations

from tests.parity.case import Case

CASES = [
    Case("falcon-7b-mqa-7", "falcon", {}),
    Case(
        "falcon-40b-6-2-biased",
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "bias": True,
            "tie_word_embeddings": False,
        },
    ),
    Case(
        "falcon-11b-9-3-one-norm",
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_attention_heads": 9,
            "num_kv_heads": 3,
            "num_ln_in_parallel_attn": 1,
            "rope_theta": 500.0,
        },
        (1, 2, 3, 4),
    ),
    # Up to 8 heads and 256 positions, where the bfloat16 that transformers rounds Falcon's ALiBi to
    # is exact.
    Case(
        "falcon-rw-alibi-7",
        "falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        (1, 2, 3, 4),
    ),
    Case("falcon-alibi-mqa-5", "falcon", {"alibi": True, "num_attention_heads": 5}, (1, 2, 3, 4)),
    Case("neox-7", "gpt_neox", {}),
    Case(
        "neox-in-turn-5-unbiased-tied",
        "gpt_neox",
        {
            "num_attention_heads": 5,
            "hidden_size": 60,
            "rotary_pct": 0.5,
            "rotary_emb_base": 500.0,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_fast",
        },
        (1, 2, 3, 4),
    ),
    Case("gptj-7", "gptj", {}),
    Case(
        "gptj-5-whole-heads", "gptj", {"n_head": 5, "rotary_dim": 8, "n_inner": None}, (1, 2, 3, 4)
    ),
    Case("opt-7", "opt", {}),
    Case(
        "opt-5-unbiased-untied",
        "opt",
        {
            "num_attention_heads": 5,
            "enable_bias": False,
            "tie_word_embeddings": False,
            "activation_function": "gelu",
        },
        (1, 2, 3, 4),
    ),
    # The 350M model's parts: a normed residual stream, none at the end, narrow embeddings.
    Case("opt-7-stream-norm", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    Case("opt-7-wide-embeddings", "opt", {"word_embed_proj_dim": 68}, (1, 2, 3, 4)),
    Case(
        "opt-5-stream-norm-untied",
        "opt",
        {
            "num_attention_heads": 5,
            "do_layer_norm_before": False,
            "tie_word_embeddings": False,
            "enable_bias": False,
        },
        (1, 2, 3, 4),
    ),
    Case("bloom-7", "bloom", {}),
    # Beyond a power of two, the later heads' slopes lie between those of the first.
    Case(
        "bloom-12-untied", "bloom", {"n_head": 12, "hidden_size": 96, "tie_word_embeddings": False}
    ),
    Case("stablelm-9-3", "stablelm", {"use_qkv_bias": True}),
    Case(
        "stablelm-12b-6-2-parallel-normed",
        "stablelm",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "hidden_size": 6 * 16,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "tie_word_embeddings": True,
        },
        (1, 2, 3, 4),
    ),
]

"""Tiny models with experts as llama.cpp's converter writes them, with the gguf package's tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel

_ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    experts: str = "F32",
    kv_b_parted: bool = True,
    apart: Callable[[int, str, int], str] | None = None,
) -> Path:
    """`model` (a key of `_ARCHITECTURES`) without tokenizer: its experts in a GGUF type, all else
    in float32; with other `weights` than its own where some are given.

    Without `kv_b_parted`, latent attention is as the converter wrote it before April 2025. With
    `apart`, experts are as it wrote them before April 2024, a tensor each: in the type of this
    layer, of this part ("gate", "up" or "down") and of this expert.
    """
    architecture = _ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, model, kv_b_parted)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for name, tensor in (weights or model.state_dict()).items():
        for part, values in _converted(model, name, tensor, kv_b_parted):
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if apart is not None and values.ndim == 3:
                _write_apart(writer, stored, values, apart)
                continue
            kind = gguf.GGMLQuantizationType[experts if values.ndim == 3 else "F32"]
            encoded = gguf.quants.quantize(values.contiguous().numpy(), kind)
            writer.add_tensor(stored, encoded, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_apart(
    writer: gguf.GGUFWriter,
    stored: str,
    values: torch.Tensor,
    type_of: Callable[[int, str, int], str],
) -> None:
    """`stored` is blk.N.ffn_PART_exps.weight."""
    _, layer, module, _ = stored.split(".")
    part = module.split("_")[1]
    for e, expert in enumerate(values):
        kind = gguf.GGMLQuantizationType[type_of(int(layer), part, e)]
        encoded = gguf.quants.quantize(expert.contiguous().numpy(), kind)
        writer.add_tensor(f"blk.{layer}.ffn_{part}.{e}.weight", encoded, raw_dtype=kind)


def _write_sizes(writer: gguf.GGUFWriter, model: PreTrainedModel, kv_b_parted: bool) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_used_count(config.num_experts_per_tok)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.model_type.startswith("deepseek"):
        _write_deepseek_sizes(writer, model, kv_b_parted)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    if config.model_type == "mixtral":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        return
    if config.model_type != "qwen2_moe":
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        writer.add_key_length(head_dim)
    if config.model_type == "gpt_oss":
        writer.add_sliding_window(config.sliding_window)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    else:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _write_deepseek_sizes(
    writer: gguf.GGUFWriter, model: PreTrainedModel, kv_b_parted: bool
) -> None:
    config = model.config
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    per_head = config.qk_nope_head_dim + config.qk_rope_head_dim
    if kv_b_parted:
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(per_head)
        writer.add_value_length_mla(config.v_head_dim)
    else:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(per_head)
        writer.add_value_length(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    if config.n_group is not None:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    kinds = gguf.ExpertGatingFuncType
    is_v3 = config.model_type == "deepseek_v3"
    writer.add_expert_gating_func(kinds.SIGMOID if is_v3 else kinds.SOFTMAX)
    if (all_dim := config.rope_parameters.get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * all_dim)


def _converted(
    model: PreTrainedModel, name: str, tensor: torch.Tensor, kv_b_parted: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    if "mlp.experts." in name:
        if config.model_type == "gpt_oss":
            yield from _gpt_oss_experts(name, tensor)
        elif name.endswith("gate_up_proj"):
            module = name.removesuffix("gate_up_proj")
            for part, values in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                yield f"{module}{part}_proj.weight", values
        else:
            yield f"{name}.weight", tensor
    elif config.model_type == "mixtral" and (".q_proj." in name or ".k_proj." in name):
        head_dim = config.hidden_size // config.num_attention_heads
        paired = tensor.reshape(-1, 2, head_dim // 2, tensor.shape[1])
        yield name, paired.swapaxes(1, 2).reshape(tensor.shape)
    elif name.endswith("kv_b_proj.weight") and kv_b_parted:
        by_head = tensor.unflatten(0, (config.num_attention_heads, -1))
        k, v = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), k.transpose(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), v
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("_bias", ".bias"), tensor
    elif name.endswith("sinks"):
        yield f"{name}.weight", tensor
    else:
        yield name, tensor


def _gpt_oss_experts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """[E, inputs, outputs] the other way round, and the columns of gate and up, in turn, apart."""
    is_bias = name.endswith("_bias")
    name = name.removesuffix("_bias") + (".bias" if is_bias else ".weight")
    rows = tensor if is_bias else tensor.transpose(1, 2)
    if "gate_up_proj" in name:
        for nth, part in enumerate(("gate", "up")):
            yield name.replace("gate_up", part), rows[:, nth::2]
    else:
        yield name, rows

"""GPT-NeoX, BLOOM, Falcon and StableLM as llama.cpp's converter writes them: one model in both
formats has one spec and one set of weights, at every rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

from shards.checkpoint.loader import load_shard
from shards.layout import make_layout
from shards.models.source import open_model
from tests.models import save, tiny_model

_ARCHITECTURES = {"gpt_neox": "gptneox"}
_EPS = 2.0**-17  # survives the float32 of the file's metadata


def write(model: PreTrainedModel, path: Path) -> Path:
    config = model.config
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(_EPS)
    _write_sizes(writer, config)
    number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in _converted(model):
        writer.add_tensor(table.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = config.hidden_size // config.num_attention_heads
    match config.model_type:
        case "gpt_neox" | "stablelm":
            rotated = config.rope_parameters["partial_rotary_factor"] * head_dim
            writer.add_context_length(config.max_position_embeddings)
            writer.add_feed_forward_length(config.intermediate_size)
            writer.add_rope_dimension_count(int(rotated))
            writer.add_parallel_residual(config.use_parallel_residual)
            if config.model_type == "stablelm":
                writer.add_head_count_kv(config.num_key_value_heads)
        case "bloom":
            writer.add_context_length(config.seq_length)
            writer.add_feed_forward_length(4 * config.hidden_size)
            writer.add_head_count_kv(config.n_head)
        case "falcon":
            writer.add_context_length(config.max_position_embeddings)
            writer.add_tensor_data_layout("jploski")
            writer.add_feed_forward_length(config.ffn_hidden_size)
            writer.add_head_count_kv(_kv_heads(config))


def _converted(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type == "bloom":
            name = name.removeprefix("transformer.")  # it converts bare BloomModels too
        if "query_key_value" in name:
            kv_heads = _kv_heads(config)
            head_dim = config.hidden_size // config.num_attention_heads
            by_kv_head = tensor.view(kv_heads, -1, head_dim, *tensor.shape[1:])
            q, k, v = by_kv_head[:, :-2], by_kv_head[:, -2], by_kv_head[:, -1]
            tensor = torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in (q, k, v)])
        if "layernorm.norms." in name:
            name, _, head = name.removesuffix(".weight").rpartition(".norms.")
            if head != "0":
                continue
            name += ".weight"
            norms = model.get_submodule(name.removesuffix(".weight")).norms
            tensor = torch.stack([norm.weight.detach() for norm in norms])
        yield name, tensor.contiguous()


def _kv_heads(config: Any) -> int:
    if config.model_type != "falcon":
        return int(config.num_attention_heads)
    return int(config.num_kv_heads) if config.new_decoder_architecture else 1


CASES: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {"layer_norm_eps": _EPS}),
    ("gpt_neox", {"layer_norm_eps": _EPS, "hidden_size": 7 * 44, "rotary_pct": 30 / 44 + 1e-9}),
    (
        "gpt_neox",
        {"layer_norm_eps": _EPS, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
    ("bloom", {"layer_norm_epsilon": _EPS}),
    ("bloom", {"layer_norm_epsilon": _EPS, "tie_word_embeddings": False}),
    ("falcon", {"layer_norm_epsilon": _EPS, "max_position_embeddings": 256}),
    (
        "falcon",
        {"layer_norm_epsilon": _EPS, "num_attention_heads": 6, "num_kv_heads": 2}
        | {"new_decoder_architecture": True},
    ),
    (
        "falcon",
        {"layer_norm_epsilon": _EPS, "num_attention_heads": 9, "num_kv_heads": 3}
        | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}
        | {"tie_word_embeddings": False},
    ),
    ("stablelm", {"layer_norm_eps": _EPS}),
    (
        "stablelm",
        {"layer_norm_eps": _EPS, "use_qkv_bias": True, "qk_layernorm": True}
        | {"use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
]


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_file_and_folder_are_one_model(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(family, **fields)
    folder = open_model(str(save(model, tmp_path / "folder")))
    file = open_model(str(write(model, tmp_path / "model.gguf")))
    assert file.spec == folder.spec
    layout = make_layout(folder.spec, 3)
    for rank in range(3):
        expected, loaded = (
            load_shard(source, layout, rank, torch.float32, torch.device("cpu"))
            for source in (folder, file)
        )
        assert loaded.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), name

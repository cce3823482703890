"""Every quantised type, cut anywhere, equals the whole tensor dequantised and then cut."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from shards.checkpoint.checkpoint import BLOCKS
from shards.checkpoint.gguf_index import open_gguf
from shards.checkpoint.loader import load_shard
from shards.errors import UnsupportedModel
from shards.layout import Range, make_layout
from shards.models.parameters import parameters
from shards.models.source import open_model
from tests.models import quantised_blocks, tiny_model, write_gguf

ROWS, COLUMNS = 24, 768
# Those that GGUF has.
DTYPES = [dtype for dtype in BLOCKS if dtype in gguf.GGMLQuantizationType.__members__]


def encoded(dtype: str) -> npt.NDArray[np.uint8]:
    """Random values in that type: [ROWS, bytes]."""
    values = np.random.default_rng(5).standard_normal((ROWS, COLUMNS), np.float32)
    return quantised_blocks(values, dtype).view(np.uint8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor of each type, named after it."""
    path = tmp_path_factory.mktemp("quants") / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for dtype in DTYPES:
        kind = gguf.GGMLQuantizationType[dtype]
        tensor = encoded(dtype)
        if dtype in ("F32", "F16"):
            tensor = tensor.view(np.float32 if dtype == "F32" else np.float16)
            writer.add_tensor(dtype, tensor)
        else:
            writer.add_tensor(dtype, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (Range(0, ROWS), Range(0, COLUMNS)),
        (Range(7, 8), Range(0, COLUMNS)),
        (Range(5, 23), Range(0, COLUMNS)),
        (Range(0, ROWS), Range(256, 512)),
        (Range(0, ROWS), Range(13, 14)),
        (Range(3, 9), Range(31, 700)),
    ],
)
def test_window_equals_the_whole_cut(file: Path, dtype: str, rows: Range, columns: Range) -> None:
    checkpoint = open_gguf(file).checkpoint
    whole = gguf.quants.dequantize(encoded(dtype), gguf.GGMLQuantizationType[dtype])
    if dtype == "F32":
        whole = encoded(dtype).view(np.float32)
    cut = whole[rows.start : rows.stop, columns.start : columns.stop]
    read = checkpoint.read(dtype, (rows, columns))
    assert np.isfinite(cut).all()
    assert np.array_equal(read.float().numpy(), cut)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_model_quantised_and_cut(dtype: str, tmp_path: Path) -> None:
    """Columns of out and down are cut inside a block of 32 (head_dim 8, channels 64 over 3)."""
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
    source = open_model(str(write_gguf(model, tmp_path / "model.gguf", dtype)))
    assert source.checkpoint.tensors["blk.0.ffn_down.weight"].dtype == dtype
    layout, alone = make_layout(source.spec, 3), make_layout(source.spec, 1)
    cpu = torch.device("cpu")
    whole = load_shard(source, alone, 0, torch.float32, cpu)
    original = model.model.layers[0].mlp.down_proj.weight
    assert torch.allclose(whole["layers.0.ffn.down.weight"], original, atol=0.1)
    for rank in range(3):
        shard = load_shard(source, layout, rank, torch.float32, cpu)
        for p in parameters(source.spec):
            owned = layout.owned(p, rank)
            assert torch.equal(shard[p.name], whole[p.name].narrow(p.axis, owned.start, len(owned)))


def test_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model("llama", num_attention_heads=8, num_key_value_heads=4), path, "Q8_0")
    # In the header, a tensor's type follows its name, number of axes and two lengths.
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    data[at : at + 4] = int(gguf.GGMLQuantizationType.I8).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q\.weight is I8 .* Q4_K"):
        open_model(str(path))


@pytest.mark.model
def test_bundled_model_equals_transformers(bundled_model: Path) -> None:
    """Its q and k rows are permuted, its embedding Q8_0, the rest Q4_1."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        bundled_model.parent, gguf_file=bundled_model.name, dtype=torch.float32
    ).state_dict()
    source = open_model(str(bundled_model))
    layout = make_layout(source.spec, 2)
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "layers.3.attention.q.weight": "model.layers.3.self_attn.q_proj.weight",
        "layers.3.attention.k.weight": "model.layers.3.self_attn.k_proj.weight",
        "layers.29.attention.v.weight": "model.layers.29.self_attn.v_proj.weight",
        "layers.29.attention.out.weight": "model.layers.29.self_attn.o_proj.weight",
        "layers.0.ffn.down.weight": "model.layers.0.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
    }
    table = {p.name: p for p in parameters(source.spec)}
    for rank in range(2):
        shard = load_shard(source, layout, rank, torch.float32, torch.device("cpu"))
        assert len(shard) == len(table)
        for ours, theirs in names.items():
            owned = layout.owned(table[ours], rank)
            cut = reference[theirs].narrow(table[ours].axis, owned.start, len(owned))
            assert torch.equal(shard[ours], cut), ours

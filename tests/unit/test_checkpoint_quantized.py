"""Ranks keep weights quantised: GGUF's own blocks, or floats on their way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shards.checkpoint.loader import load_shard
from shards.checkpoint.storage import choose_storage
from shards.errors import CheckpointError, UnsupportedModel
from shards.footprint import rank_footprints
from shards.layout import make_layout
from shards.models.parameters import parameters
from shards.models.source import ModelSource, open_model
from shards.quantization.choice import Quantization, choose_schemes
from shards.quantization.quantize import quantize
from shards.quantization.scheme import GGUF_SCHEMES, INT4, INT8, Scheme
from shards.quantization.tensor import QuantizedTensor
from tests.models import save, tiny_model, write_gguf

CPU = torch.device("cpu")
# On 2 ranks every cut lies between blocks of 32; K-quants need rows of 256.
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
}
SCHEMES = {"int8": INT8, "int4": INT4}

Loaded = dict[str, torch.Tensor | QuantizedTensor]


def load(source: ModelSource, world: int, rank: int, quantization: Quantization) -> Loaded:
    layout = make_layout(source.spec, world)
    return load_shard(source, layout, rank, torch.float32, CPU, quantization=quantization)


def floats(loaded: Loaded) -> dict[str, torch.Tensor]:
    return {
        name: value if isinstance(value, torch.Tensor) else value.dequantize()
        for name, value in loaded.items()
    }


def schemes(loaded: Loaded) -> dict[str, Scheme]:
    return {name: v.scheme for name, v in loaded.items() if isinstance(v, QuantizedTensor)}


@pytest.fixture(scope="module", params=GGUF_SCHEMES)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(GGUF type, a model whose matrices are all of that type)"""
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    return request.param, open_model(
        str(write_gguf(tiny_model("llama", **SIZES), path, request.param))
    )


@pytest.mark.parametrize("world", [1, 2])
def test_gguf_blocks_are_kept_as_they_are(quantised: Any, world: int) -> None:
    """q and k rows are permuted, out and down cut along their inputs: as for floats."""
    dtype, source = quantised
    for rank in range(world):
        kept, widened = load(source, world, rank, "auto"), load(source, world, rank, "none")
        linear = {p.name for p in parameters(source.spec) if p.is_linear}
        assert schemes(kept) == dict.fromkeys(linear, GGUF_SCHEMES[dtype])
        assert not schemes(widened)
        for name, value in floats(kept).items():
            expected = widened[name]
            if dtype.endswith("_K"):
                assert torch.allclose(value, expected, rtol=2e-3, atol=0.1), name
            else:
                assert torch.equal(value, expected), name


def test_a_weight_that_is_cut_inside_a_block_is_widened_everywhere(quantised: Any) -> None:
    """3 ranks: 3, 3 and 2 heads of 32 fit; channels in units of 32 would leave 96, 96 and 64."""
    _, source = quantised
    layout = make_layout(source.spec, 3)
    assert not choose_storage(source, layout, "auto").widened

    uneven = make_layout(source.spec, 2, (29, 3))
    assert [len(owned) for owned in uneven.layers[0].channels] == [240, 16]
    choice = choose_storage(source, uneven, "auto")
    assert choice.widened == ("layers.0.ffn.down.weight", "layers.1.ffn.down.weight")
    whole = load_shard(source, make_layout(source.spec, 1), 0, torch.float32, CPU)
    for rank in range(2):
        shard = load_shard(source, uneven, rank, torch.float32, CPU, quantization="auto")
        for p in parameters(source.spec):
            owned = uneven.owned(p, rank)
            if p.name in choice.widened:
                assert torch.equal(shard[p.name], whole[p.name].narrow(1, owned.start, len(owned)))
            else:
                assert isinstance(shard[p.name], QuantizedTensor) == p.is_linear


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_floats_are_quantised_on_their_way_in(
    family: str, quantization: Quantization, tmp_path: Path
) -> None:
    """GPT-2's tensors are transposed, both GPTs' q, k and v are fused."""
    gpt = {"n_embd": 256, "n_head": 8, "n_inner": 256}
    model = tiny_model(family, **(SIZES if family == "llama" else gpt))
    source = open_model(str(save(model, tmp_path)))
    for rank in range(2):
        original, found = load(source, 2, rank, "none"), load(source, 2, rank, quantization)
        for p in parameters(source.spec):
            value = found[p.name]
            if not p.is_linear:
                assert torch.equal(value, original[p.name])
                continue
            assert isinstance(value, QuantizedTensor)
            in_vocabulary = p.name in ("embedding.weight", "output.weight")
            assert value.scheme == (INT8 if in_vocabulary else SCHEMES[quantization])
            expected = quantize(original[p.name], value.scheme)
            assert torch.equal(value.dequantize(), expected.dequantize()), p.name


def test_weights_that_already_have_so_many_bits_stay_as_they_are(tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES)
    source = open_model(str(write_gguf(model, tmp_path / "model.gguf", "Q4_1")))
    as_stored, four = load(source, 1, 0, "auto"), load(source, 1, 0, "int4")
    name = "layers.0.ffn.up.weight"
    assert four[name].scheme == as_stored[name].scheme
    assert torch.equal(four[name].codes, as_stored[name].codes)
    assert four["embedding.weight"].scheme == INT8
    assert set(schemes(load(source, 1, 0, "int8")).values()) == {INT8}


@pytest.mark.parametrize("quantization", ["auto", "none", "int8", "int4"])
def test_footprint_and_progress_count_every_byte(
    quantised: Any, quantization: Quantization
) -> None:
    _, source = quantised
    layout = make_layout(source.spec, 2)
    chosen = choose_storage(source, layout, quantization).schemes
    planned = rank_footprints(source.spec, layout, "bfloat16", chosen)
    for rank in range(2):
        seen: list[tuple[int, int]] = []
        loaded = load_shard(
            *(source, layout, rank, torch.bfloat16, CPU),
            lambda done, total, seen=seen: seen.append((done, total)),
            quantization=quantization,
        )
        nbytes = sum(value.nbytes for value in loaded.values())
        assert planned[rank].weights == nbytes
        assert seen[-1] == (nbytes, nbytes)


def test_a_model_without_whole_blocks_is_refused(tmp_path: Path) -> None:
    source = open_model(str(save(tiny_model("llama"), tmp_path)))
    layout = make_layout(source.spec, 2)
    with pytest.raises(
        UnsupportedModel, match=r"quantization=int4: .* 32 .* 2 ranks .* width is 72"
    ):
        choose_schemes(source.spec, layout, "int4", {})
    assert not schemes(load(source, 2, 0, "auto"))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_values_beyond_the_scales_name_the_tensor_and_the_remedy(
    quantization: Quantization, tmp_path: Path
) -> None:
    model = tiny_model("llama", **SIZES)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e9
    source = open_model(str(save(model, tmp_path)))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*--quantization none"):
        load(source, 1, 0, quantization)

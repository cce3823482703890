"""What a user may call a model, and what is found there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import errors as hub_errors

from shards.errors import CheckpointError, UnsupportedModel
from shards.models.source import load_spec, open_model
from tests.models import save, tiny_model, write_gguf

NO_TORCH = """
import sys
from shards.models.source import load_spec
spec = load_spec(sys.argv[1])
heavy = [name for name in ("torch", "transformers", "ray") if name in sys.modules]
assert not heavy, heavy
print(spec.layers[0].attention.heads)
"""
QWEN2_72B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}


def test_spec_needs_a_config_only_and_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_72B))
    assert load_spec(str(tmp_path)) == load_spec(str(tmp_path / "config.json"))
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, tmp_path], check=True, capture_output=True, text=True
    )
    assert done.stdout == "64\n"


def test_spec_of_a_gguf_needs_no_torch(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    write_gguf(tiny_model("llama", rope_parameters=rope), tmp_path / "model.gguf")
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, tmp_path], check=True, capture_output=True, text=True
    )
    assert done.stdout == "9\n"


def test_folder_with_one_gguf_is_that_file(tmp_path: Path) -> None:
    path = write_gguf(tiny_model("qwen2"), tmp_path / "model.gguf")
    by_folder, by_file = open_model(str(tmp_path)), open_model(str(path))
    assert by_folder.path == by_file.path == str(path)
    assert by_folder.spec == by_file.spec
    assert (by_folder.tokenizer_path, by_folder.tokenizer_gguf) == (None, None)


def test_folder_with_several_gguf_files(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"several GGUF files, .*: a\.gguf, b\.gguf"):
        open_model(str(tmp_path))


def test_split_gguf_by_its_name(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / f"big-0000{n}-of-00002.gguf").touch()
    for model in (tmp_path, tmp_path / "big-00001-of-00002.gguf"):
        with pytest.raises(UnsupportedModel, match="split GGUF: merge them into one"):
            open_model(str(model))


def test_folder_with_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json nor a \.gguf file"):
        open_model(str(tmp_path))


def test_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="give the folder that holds"):
        open_model(str(path))


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "a/b/c", "", "what is this"])
def test_no_such_path(model: str) -> None:
    with pytest.raises(CheckpointError, match="not found: no such path, and not of the form"):
        open_model(model)


def test_path_longer_than_any() -> None:
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        open_model("x/" * 5000)


@pytest.mark.parametrize("read", [open_model, load_spec])
def test_hub_id_that_cannot_be_had(
    read: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is offline, with nothing in the cache."""

    def offline(*args: object, **kwargs: object) -> str:
        raise hub_errors.LocalEntryNotFoundError("cannot find it in the cache\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError) as caught:
        read("nobody/nothing")
    assert str(caught.value) == (
        "model 'nobody/nothing' not found: no such path, and the hub did not give it "
        "(LocalEntryNotFoundError: cannot find it in the cache); check the name, the revision and "
        "the network, or give the path of a downloaded folder"
    )


def test_hub_id_is_fetched_at_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(tiny_model("gpt2"), tmp_path)
    asked = []

    def download(model: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((model, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = open_model("someone/tiny", "v2")
    assert (source.name, source.path) == ("someone/tiny", str(tmp_path))
    assert load_spec("someone/tiny", "v2") == source.spec
    (_, _, whole), (_, _, config_only) = asked
    assert "*.safetensors" in whole
    assert not any("safetensors" in pattern or ".bin" in pattern for pattern in config_only)
    assert {(model, revision) for model, revision, _ in asked} == {("someone/tiny", "v2")}


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"temperature": 0.6}, (2,)),
        (None, None, ()),
        # The tiny model's vocabulary ends at 130.
        ([2, 131, 128009], None, (2,)),
        (2, {"eos_token_id": [130, 131]}, (130,)),
    ],
)
def test_eos(config: object, generation: object, expected: tuple[int, ...], tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert open_model(str(tmp_path)).eos_token_ids == expected


def test_eos_that_is_no_token(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match=r"eos_token_id is '</s>': a token id"):
        open_model(str(tmp_path))


def test_tokenizer_of_a_folder(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    assert open_model(str(tmp_path)).tokenizer_path is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_model(str(tmp_path)).tokenizer_path == str(tmp_path)


@pytest.mark.model
def test_bundled_model(bundled_model: Path) -> None:
    source = open_model(str(bundled_model.parent))
    assert source.eos_token_ids == (2,)
    assert (source.tokenizer_path, source.tokenizer_gguf) == (
        str(bundled_model.parent),
        bundled_model.name,
    )
    assert (source.spec.width, source.spec.vocabulary, len(source.spec.layers)) == (576, 49152, 30)
    assert source.spec.tied_embeddings
    rotary = source.spec.layers[0].attention.rotary
    assert rotary is not None
    assert rotary.theta == 100_000

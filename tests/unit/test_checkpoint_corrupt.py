"""Corrupt and truncated files are told apart from good ones, by file, what and where."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.errors import CheckpointError, HeadwiseError, UnsupportedModel
from shards.models.source import load_spec, open_model
from tests.models import save, tiny_model, write_gguf


@pytest.fixture(scope="module")
def safetensors_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = save(tiny_model("llama"), tmp_path_factory.mktemp("good"))
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tiny_model("llama"), tmp_path_factory.mktemp("good") / "m.gguf").read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config.json without weights."""
    tiny_model("llama").config.save_pretrained(tmp_path)
    return tmp_path


def refusal(model: Path, kind: type[HeadwiseError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_model(str(model))
    return str(caught.value)


def with_header(entries: object) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


SAFETENSORS = {
    "empty": (lambda good: b"", "not a safetensors file: it has 0 bytes only"),
    "a few bytes": (lambda good: good[:5], "not a safetensors file: it has 5 bytes only"),
    "text": (lambda good: b"version https: some pointer", "not a safetensors file: it begins with"),
    "header cut": (lambda good: good[:300], "truncated: its header ends at byte"),
    "data cut": (lambda good: good[:-1], "truncated: tensor model.norm.weight ends at byte"),
    "header garbage": (
        lambda good: good[:8] + b"\xff\xfe" * 50 + good[108:],
        "corrupt header of",
    ),
    "header no object": (lambda good: with_header([1, 2]), "a JSON object is needed"),
    "entry no object": (lambda good: with_header({"w": 3}), "corrupt header: tensor w is 3"),
    "negative shape": (
        lambda good: with_header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
        "corrupt header: tensor w is {",
    ),
    "wrong length": (
        lambda good: with_header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}),
        "tensor w, F32 [4], needs 16 bytes and is given 12",
    ),
    "nested beyond reason": (
        lambda good: struct.pack("<Q", 100_000) + b"[" * 100_000,
        "corrupt header",
    ),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case: str, folder: Path, safetensors_bytes: bytes) -> None:
    spoil, said = SAFETENSORS[case]
    path = folder / "model.safetensors"
    path.write_bytes(spoil(safetensors_bytes))
    text = refusal(folder)
    assert str(path) in text
    assert said in text


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pairs(*items: bytes) -> Callable[[bytes], bytes]:
    """A GGUF of these key/value pairs and no tensor."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, len(items))
    return lambda good: start + b"".join(items) + bytes(64)


def patched(at: int, form: str, value: int) -> Callable[[bytes], bytes]:
    def patch(good: bytes) -> bytes:
        data = bytearray(good)
        struct.pack_into(form, data, at, value)
        return bytes(data)

    return patch


LLAMA = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
GGUF = {
    "empty": (lambda good: b"", CheckpointError, "not a GGUF file: it is empty"),
    "a few bytes": (lambda good: good[:3], CheckpointError, "not a GGUF file"),
    "garbage": (lambda good: b"\xff" * 4096, CheckpointError, "not a GGUF file: it begins with"),
    "start only": (lambda good: good[:12], CheckpointError, "truncated: its header goes on"),
    "header cut": (lambda good: good[:500], CheckpointError, "truncated: its header goes on"),
    "data cut": (lambda good: good[:-64], CheckpointError, "truncated: tensor"),
    "version 1": (patched(4, "<I", 1), UnsupportedModel, "GGUF version 1: 2 and 3 are known"),
    "big-endian": (patched(4, ">I", 3), UnsupportedModel, "a big-endian GGUF"),
    "more tensors than bytes": (patched(8, "<Q", 2**60), CheckpointError, "header"),
    "more keys than bytes": (patched(16, "<Q", 2**60), CheckpointError, "header"),
    "huge string": (
        pairs(struct.pack("<Q", 2**63)),
        CheckpointError,
        "truncated: its header goes on at byte",
    ),
    "huge array": (
        pairs(string(b"a") + struct.pack("<IIQ", 9, 4, 2**61)),
        CheckpointError,
        "truncated: its header goes on at byte",
    ),
    "unknown value type": (
        pairs(string(b"a") + struct.pack("<I", 77)),
        CheckpointError,
        "value type 77 is unknown",
    ),
    "key not UTF-8": (
        pairs(string(b"\xff\xfe") + struct.pack("<II", 4, 1)),
        CheckpointError,
        "not UTF-8",
    ),
    "no architecture": (pairs(), CheckpointError, "no general.architecture"),
    "no sizes": (pairs(LLAMA), UnsupportedModel, "has no llama.context_length"),
    "split": (
        pairs(LLAMA, string(b"split.count") + struct.pack("<IH", 2, 3)),
        UnsupportedModel,
        "one of 3 files of a split GGUF: merge",
    ),
    "unknown architecture": (
        pairs(string(b"general.architecture") + struct.pack("<I", 8) + string(b"lama2")),
        UnsupportedModel,
        "the nearest is llama",
    ),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(case: str, tmp_path: Path, gguf_bytes: bytes) -> None:
    spoil, kind, said = GGUF[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(spoil(gguf_bytes))
    assert said in refusal(path, kind)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_to_a_header_is_refused_by_a_typed_error_or_harmless(
    data: st.DataObject, tmp_path: Path, folder: Path, safetensors_bytes: bytes, gguf_bytes: bytes
) -> None:
    """Whatever a bit error makes of a header, no other exception comes of it, and an end."""
    form = data.draw(st.sampled_from(["gguf", "safetensors"]))
    good = gguf_bytes if form == "gguf" else safetensors_bytes
    spoiled = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.gguf" if form == "gguf" else folder / "model.safetensors"
    path.write_bytes(spoiled)
    with contextlib.suppress(HeadwiseError):
        open_model(str(path if form == "gguf" else folder))


def test_index_that_names_a_missing_file(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path, max_shard_size="60KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"names {gone.name}, which is missing" in refusal(tmp_path)


def test_index_that_names_a_tensor_its_file_does_not_hold(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][moved] = files[1]
    path.write_text(json.dumps(index))
    assert f"says that {moved} is in {files[1]}, which does not hold it" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "corrupt: an object with weight_map is needed"),
        ("[]", "corrupt: an object with weight_map is needed"),
        ('{"weight_map": 3}', "corrupt: an object with weight_map is needed"),
        ('{"weight_map": {"w": "../x.safetensors"}}', "names '../x.safetensors': a file name of"),
    ],
)
def test_corrupt_index(index: str, said: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert said in refusal(folder)


def test_pickles_are_refused_with_the_remedy(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    text = refusal(folder)
    assert "pytorch_model.bin is a pickle" in text
    assert "save_pretrained" in text


def test_folder_without_weights(folder: Path) -> None:
    assert "holds no safetensors file" in refusal(folder)
    assert load_spec(str(folder)).vocabulary == 131


def test_several_files_without_an_index(folder: Path, safetensors_bytes: bytes) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_bytes(safetensors_bytes)
    assert "2 safetensors files and no model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        (b"{", CheckpointError, "config.json: not JSON"),
        (b"\xff\xfe\x00", CheckpointError, "config.json: not JSON"),
        (b"[1]", CheckpointError, "config.json: holds list: a JSON object is needed"),
        (b"{}", UnsupportedModel, "neither architectures nor model_type"),
    ],
)
def test_corrupt_config(config: bytes, kind: type[HeadwiseError], said: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(config)
    assert said in refusal(folder, kind)
    with pytest.raises(kind):
        load_spec(str(folder))

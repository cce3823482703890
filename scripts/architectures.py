"""Writes docs/architectures.md from the registry: `python -m scripts.architectures`."""

from __future__ import annotations

from pathlib import Path

from shards.models.registry import FAMILIES

TARGET = Path(__file__).parents[1] / "docs" / "architectures.md"

_HEAD = """# Supported architectures

Written by `python -m scripts.architectures`; a test holds it up to date. Every row is compared with
`transformers` at 1 to 4 ranks in float32, logits and greedy tokens (`tests/parity`).

| family | `architectures` in config.json | `general.architecture` in GGUF |
|---|---|---|
"""

_TAIL = """
Every row reads safetensors folders in float32, bfloat16 and float16, and in FP8 (E4M3 with a scale
for each block, row or tensor: `fp8`, `fbgemm_fp8`, `modelopt` and `compressed-tensors`), which is
widened as a rank reads its slice; GPT-OSS's MXFP4 likewise. Other methods, such as AWQ, GPTQ and
bitsandbytes, are refused by name: give the unquantised folder and `--quantization`, or a GGUF file.
GGUF files: F32, F16, BF16; Q8_0, Q6_K, Q4_K, Q4_1 and Q4_0 are used as they are; Q5_K, Q5_1, Q5_0
and MXFP4 are widened. Layers that draft further tokens (multi-token prediction) are left alone.

Where answers differ from `transformers` on purpose:

- LongRoPE (Phi-3 with a long context): which of its two sets of factors is used follows from the
  context that is served, not from the sequence, whose cached keys could not be rotated anew.
- ALiBi in Falcon: `transformers` rounds slopes and positions to bfloat16, which makes neighbours
  beyond position 256 equal; here they are exact.
- bfloat16 and float16 checkpoints are computed in their own type, with float32 sums: tokens may
  part where two are nearly as likely. `--dtype float32` computes as the parity tests do.
"""


def table() -> str:
    """The page."""
    rows = []
    for family in sorted(FAMILIES, key=lambda family: family.name.lower()):
        names = ", ".join(f"`{name}`" for name in family.architectures)
        gguf = "-" if family.gguf is None else f"`{family.gguf.architecture}`"
        rows.append(f"| {family.name} | {names} | {gguf} |\n")
    return _HEAD + "".join(rows) + _TAIL


if __name__ == "__main__":
    TARGET.write_text(table())

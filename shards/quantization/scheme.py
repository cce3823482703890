"""The schemes in which quantised weights lie in memory, and what they take. A leaf: no torch.

A weight [rows, inputs] is cut along its inputs into groups that share a float16 scale and, in some
schemes, a float16 minimum:

    w = (code - zero) * scale            symmetric: INT8, INT6, INT4
    w = code * scale + minimum           INT4_MINIMUM

GGUF's types lower to these. Q8_0, Q4_0 and Q4_1 do so exactly. A K-quant states the scale of a
group as the product of a float16 and a 6-bit or 8-bit number, which is rounded to the nearest
float16: by at most 2^-11 of itself, or 2^-25 where it is below 2^-14. Kept exactly, in float32,
these products would make Q4_K a fifth and Q6_K a seventh larger, to mend an error that is about a
hundredth of the distance between two codes.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 32
"""Weights along the inputs whose codes are packed together: slices are cut between blocks."""

_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Scheme:
    """`group` weights along the inputs share a scale, and a minimum where there is one."""

    name: str
    bits: int
    group: int
    has_minimum: bool

    @property
    def zero(self) -> int:
        """The code of 0.0 in a symmetric scheme; INT8 codes are signed."""
        return 0 if self.has_minimum or self.bits == 8 else 1 << (self.bits - 1)

    def code_bytes(self, inputs: int) -> int:
        """Of one row; `inputs` is a multiple of `BLOCK`."""
        return inputs * self.bits // 8

    def bytes_of(self, rows: int, inputs: int) -> int:
        """Codes, scales and minima of a weight [rows, inputs], `inputs` a multiple of `BLOCK`."""
        per_group = _SCALE_BYTES * (2 if self.has_minimum else 1)
        return rows * (self.code_bytes(inputs) + inputs // self.group * per_group)


INT8 = Scheme("int8", bits=8, group=32, has_minimum=False)
INT6 = Scheme("int6", bits=6, group=16, has_minimum=False)
INT4 = Scheme("int4", bits=4, group=32, has_minimum=False)
INT4_MINIMUM = Scheme("int4_minimum", bits=4, group=32, has_minimum=True)

GGUF_SCHEMES = {
    "Q8_0": INT8,
    "Q6_K": INT6,
    "Q4_0": INT4,
    "Q4_1": INT4_MINIMUM,
    "Q4_K": INT4_MINIMUM,
}
"""What a GGUF type is kept as; types that are not here are widened to floats."""

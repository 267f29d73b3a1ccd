"""Floating-point formats narrower than BF16, as plain facts.

A code of `exponent_bits + mantissa_bits + 1` bits is sign, exponent, fraction. Exponent 0 is subnormal. What
the formats differ in is the top: E4M3 (the "fn" variant of the OCP 8-bit specification) has no infinity and
spends only 0x7F and 0xFF on NaN, so its largest value is 448; E5M2 is IEEE-like. E5M6 is the 12-bit format the
DeepSeek-V3 report (section 3.2.1) stores the attention output in; its bias (15), its specials (exponent 31, as in
FP16, of which it is the first 12 bits) and its packing are ours.

Encoding and decoding are the business of `kernels/`; nothing here computes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One format. `largest` is the largest finite magnitude, `nan_code` the code non-finite input becomes."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float
    nan_code: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def minimum_exponent(self) -> int:
        """Exponent of the smallest normal value; subnormals share it."""
        return 1 - self.bias

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (self.minimum_exponent - self.mantissa_bits)

    def code_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` codes; 12-bit codes are packed two in three bytes."""
        return columns if self.bits == 8 else (columns + 1) // 2 * 3


E4M3 = Format("e4m3", 4, 3, 7, 448.0, 0x7F)
E5M2 = Format("e5m2", 5, 2, 15, 57344.0, 0x7F)
E5M6 = Format("e5m6", 5, 6, 15, 65024.0, 0x7FF)

FORMATS = {f.name: f for f in (E4M3, E5M2, E5M6)}

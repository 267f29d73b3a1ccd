"""The scalar rules of `docs/numerics.md` by definition: one code, one rounding, one tensor-core dot product.

Every step is exact or rounds exactly once:

- a code is the nearest entry of the table of all values of its format, ties to the even code;
- the fused multiply-add is a `Fraction`, rounded once to float32;
- the tensor core of Hopper (`hopper_dot`) is integer arithmetic. It is the rule MMA-Sim validated bit by bit
  against the chip's FP8 wgmma (arXiv 2511.10909): per instruction 32 products and the accumulator are cut
  toward zero to 13 bits below the largest exponent and added exactly; the sum is cut to 14 significant bits.

`reference` builds the quantiser and the GEMMs from these. Not modelled: infinite E5M2 operands in the tensor
core, which the quantiser never makes; they count as NaN.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np

from tessera.numerics.formats import E4M3, FORMATS, Format

INSTRUCTION = 32  # products in one wgmma instruction on 8-bit operands
FRACTION_BITS = 13  # of the terms below the largest exponent, and of the E8M13 accumulator
FLOAT32_OVERFLOW = 2.0**128 - 2.0**103  # from half a step above the largest float32 on, nearest is infinity


def format_of(name: str) -> Format:
    """The format called `name`; ValueError for any other name."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is none of {', '.join(FORMATS)}")
    return FORMATS[name]


def encode(value: float, format: str, rounding: str = "nearest") -> int:
    """Code of `value` (any float64): the nearest of all values of the format, ties to the even code.

    Beyond the largest value the nearest is the largest; NaN and infinity become the NaN code. "toward_zero"
    takes the neighbour nearer to zero instead. The sign survives, also on zero.
    """
    fmt = format_of(format)
    if rounding not in ("nearest", "toward_zero"):
        raise ValueError(f"rounding {rounding!r} is neither 'nearest' nor 'toward_zero'")
    if not math.isfinite(value):
        return fmt.nan_code
    magnitudes = _magnitudes(fmt)
    code = bisect_right(magnitudes, abs(value)) - 1
    if rounding == "nearest" and code + 1 < len(magnitudes):
        # Neighbouring values share all but a few bits, so their mean is exact in float64.
        middle = (magnitudes[code] + magnitudes[code + 1]) / 2
        code += abs(value) > middle or (abs(value) == middle and code % 2 == 1)
    negative = math.copysign(1.0, value) < 0
    return code | negative << (fmt.bits - 1)


def decode(code: int, format: str) -> float:
    """Value of a code, exactly; NaN and infinity where the format has them."""
    fmt = format_of(format)
    significand, exponent, finite = _parts(code, fmt)
    sign = -1.0 if code >> (fmt.bits - 1) else 1.0
    if finite:
        return math.copysign(math.ldexp(significand, exponent - fmt.mantissa_bits), sign)
    fraction = code % 2**fmt.mantissa_bits
    return math.nan if fmt == E4M3 or fraction else math.copysign(math.inf, sign)


def round_float32(value: float) -> float:
    """The float32 nearest to a float64, ties to even; beyond the largest, infinity."""
    if abs(value) >= FLOAT32_OVERFLOW:
        return math.copysign(math.inf, value)
    return float(np.float32(value))


def fma32(a: float, b: float, c: float) -> float:
    """a * b + c for float32 values, rounded once to float32 (nearest, ties to even), as IEEE 754 has it."""
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return round_float32(a * b + c)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c  # only zeros and exact cancellation: float64 gets the sign right
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    if abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(exact / step) * step  # `round` of a Fraction is exact, ties to even
    return math.copysign(float(rounded) if abs(rounded) < 2**128 else math.inf, exact)


def hopper_dot(a_codes: Sequence[int], b_codes: Sequence[int], a_format: str, b_format: str) -> float:
    """Sum of products of codes as Hopper's FP8 wgmma forms it: instructions of 32, chained from a zero sum.

    The accumulator is `total * 2^unit` with an integer total of at most 14 bits; its exponent is that of its
    leading bit. A product's exponent is the sum of its operands' (subnormals have the format's smallest), not
    corrected when the product of the significands reaches 2. Zeros take no part in the largest exponent. A
    last instruction of fewer than 32 is padded with zeros. NaN in, NaN out.
    """
    a_fmt, b_fmt = format_of(a_format), format_of(b_format)
    total, unit = 0, 0
    for start in range(0, len(a_codes), INSTRUCTION):
        terms = []  # (signed significand, exponent of its last bit, exponent the maximum is taken over)
        if total:
            terms.append((total, unit, abs(total).bit_length() - 1 + unit))
        last = start + INSTRUCTION
        for a, b in zip(a_codes[start:last], b_codes[start:last], strict=True):
            a_significand, a_exponent, a_finite = _parts(a, a_fmt)
            b_significand, b_exponent, b_finite = _parts(b, b_fmt)
            if not (a_finite and b_finite):
                return math.nan
            exponent = a_exponent + b_exponent
            if significand := a_significand * b_significand:
                terms.append((significand, exponent - a_fmt.mantissa_bits - b_fmt.mantissa_bits, exponent))
        if not terms:
            continue
        unit = max(exponent for _, _, exponent in terms) - FRACTION_BITS
        total = sum(_cut(significand, exponent - unit) for significand, exponent, _ in terms)
        surplus = max(abs(total).bit_length() - (FRACTION_BITS + 1), 0)
        total, unit = _cut(total, -surplus), unit + surplus
    return math.ldexp(total, unit)


def _cut(significand: int, shift: int) -> int:
    """significand * 2^shift, cut toward zero to an integer."""
    magnitude = abs(significand) << shift if shift >= 0 else abs(significand) >> -shift
    return magnitude if significand >= 0 else -magnitude


@cache
def _parts(code: int, fmt: Format) -> tuple[int, int, bool]:
    """Signed significand as an integer (with the fraction), exponent, and whether the code is a number."""
    fraction = code % 2**fmt.mantissa_bits
    exponent = code >> fmt.mantissa_bits & 2**fmt.exponent_bits - 1
    top = exponent == 2**fmt.exponent_bits - 1
    finite = not top or (fmt == E4M3 and fraction != 2**fmt.mantissa_bits - 1)
    significand = fraction if exponent == 0 else fraction + 2**fmt.mantissa_bits
    sign = -1 if code >> (fmt.bits - 1) else 1
    return sign * significand, max(exponent, 1) - fmt.bias, finite


@cache
def _magnitudes(fmt: Format) -> list[float]:
    """Values of all finite codes without sign; the index is the code."""
    codes = range(2 ** (fmt.bits - 1))
    return [decode(code, fmt.name) for code in codes if _parts(code, fmt)[2]]

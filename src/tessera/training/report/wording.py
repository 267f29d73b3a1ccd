"""Numbers as people read them: percentages, counts and times, with a real minus sign and narrow spaces."""

import re
from collections.abc import Sequence
from math import floor, isfinite, log10
from typing import Any

MISSING = "\N{EN DASH}"
_NARROW = "\N{NARROW NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"


def fixed(value: float, digits: int) -> str:
    """A number with `digits` decimals; a dash where it is missing."""
    if not isfinite(value):
        return MISSING
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", _MINUS)


def significant(value: float, digits: int = 2, decimals: int = 6) -> str:
    """A number with that many significant digits, and never more than `decimals` behind the point."""
    if not isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    return fixed(value, min(decimals, max(0, digits - 1 - floor(log10(abs(value))))))


def percent(value: float, digits: int = 2) -> str:
    """0.0283 -> 2.8 %."""
    return f"{significant(100 * value, digits)}{_NARROW}%" if isfinite(value) else MISSING


def bound(value: float) -> str:
    """A bar as it is stated: 0.0005 -> 0.05 %."""
    return f"{100 * value:g}{_NARROW}%"


def grouped(value: float) -> str:
    """1024000 -> 1 024 000."""
    return f"{round(value):,}".replace(",", _NARROW).replace("-", _MINUS) if isfinite(value) else MISSING


def short(value: float) -> str:
    """14213120 -> 14.2 M; whole up to 9999."""
    if not isfinite(value):
        return MISSING
    if abs(value) < 10_000:
        return grouped(value)
    power = min(4, floor(log10(abs(value))) // 3)
    return f"{significant(value / 1000**power, 3)}{_NARROW}{'kMBT'[power - 1]}"


def size(count: float) -> str:
    """Bytes: 28500000 -> 28.5 MB; whole up to 9999 B."""
    if not isfinite(count):
        return MISSING
    text = short(count).replace("B", "G")
    return f"{text}B" if text[-1].isalpha() else f"{text}{_NARROW}B"


def duration(seconds: float) -> str:
    """431 -> 7 min 11 s."""
    if not isfinite(seconds) or seconds < 0:
        return MISSING
    whole = round(seconds)
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    parts: list[str] = []
    for size, unit in units:
        if whole >= size or (not parts and unit == "s"):
            parts.append(f"{whole // size}{_NARROW}{unit}")
            whole %= size
    return " ".join(parts[:2])


def listed(items: Sequence[Any]) -> str:
    """a, b and c."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def arm_label(name: str) -> str:
    """An arm's name as a heading: fp8 -> FP8, control-1 -> Control 1."""
    label = name.replace("control-", "control ").replace("deepseek-v3", "DeepSeek-V3")
    label = re.sub(r"\b(fp8|bf16|fp32|e5m2)\b", lambda match: match[0].upper(), label)
    return label[:1].upper() + label[1:]

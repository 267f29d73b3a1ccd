"""What limited accumulation costs: the error of Hopper's FP8 tensor core as the contraction grows.

Hopper's FP8 wgmma keeps 13 fraction bits below the largest term and cuts toward zero (kernels/hopper.py), so every
step loses a little in the same direction: the error grows with K. Promotion, adding the partial sum to a float32
result every 128 products and starting again at zero, stops the growth. The DeepSeek-V3 report gives "nearly 2 %" at
K = 4096 (section 3.3.2) and its figure 7b the remedy; this module measures both, on operands whose scale is constant
along K, against the exact product of the same codes: nothing but accumulation differs.

Two kinds of data. Random signs (normal): errors are given relative to the mean magnitude of the outputs, since single
outputs cancel to nothing. Same sign (uniform in [0, 1)): relative to each output; the cuts all point the same way,
which is the worst case.
"""

from collections.abc import Callable
from math import log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.numerics import gemm
from tessera.numerics.formats import E4M3
from tessera.numerics.precision import Accumulation
from tessera.numerics.tiled_tensor import quantise
from tessera.numerics.tiles import TENSOR
from tessera.store import write_atomic

SMALLEST_K = 512
MODELS = {
    "unpromoted": Accumulation("hopper_unpromoted"),
    "promoted_128": Accumulation("hopper", 128),
    "promoted_64": Accumulation("hopper", 64),
    "promoted_32": Accumulation("hopper", 32),
}
RANDOM_SIGN, SAME_SIGN = "random sign", "same sign"

Row = dict[str, Any]


def measure(
    *,
    largest_k: int = 16384,
    size: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Errors of [size, K] x [K, size] products for K = 512, 1024, ... up to `largest_k`, for both kinds of data.

    Each row has `data`, `k`, and for each accumulation two fractions: `<name>`, the largest error (over the mean
    magnitude of the outputs for random signs, of each output for same sign), and `<name>_norm`, the error's Frobenius
    norm over that of the product. `progress(done, total)` counts products in units of size * size.
    """
    lengths = [SMALLEST_K]
    while lengths[-1] * 2 <= largest_k:
        lengths.append(lengths[-1] * 2)
    total, done = 2 * len(MODELS) * sum(lengths), 0
    rows = []
    for data in (RANDOM_SIGN, SAME_SIGN):
        generator = torch.Generator().manual_seed(seed)
        for k in lengths:
            a, b = (quantise(_draw(data, size, k, generator), E4M3, TENSOR) for _ in range(2))
            exact = a.decode(torch.float64) @ b.decode(torch.float64).t()
            largest, norm = {}, {}
            for name, accumulation in MODELS.items():
                error = gemm.fprop(a, b, accumulation, torch.float32) - exact
                scale = exact.abs().mean() if data == RANDOM_SIGN else exact.abs()
                largest[name] = float((error.abs() / scale).max())
                norm[f"{name}_norm"] = float(error.norm() / exact.norm())
                done += k
                if progress:
                    progress(done, total)
            rows.append({"data": data, "k": k, **largest, **norm})
    return rows


def plot(rows: list[Row], path: Path | str) -> None:
    """The largest errors over K as a standalone SVG with logarithmic axes. UserError where it cannot be written."""
    write_atomic(Path(path), _svg(rows))


def _draw(data: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    draw = torch.randn if data == RANDOM_SIGN else torch.rand
    return draw(rows, columns, generator=generator)


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 780, 440, 64, 230, 46, 48
CURVES = {  # what is drawn: colour, dash, words at its end
    (RANDOM_SIGN, "unpromoted"): ("#c2410c", "", "random sign, unpromoted"),
    (SAME_SIGN, "unpromoted"): ("#c2410c", "6 4", "same sign, unpromoted"),
    (RANDOM_SIGN, "promoted_128"): ("#1d4ed8", "", "random sign, promoted every 128"),
    (SAME_SIGN, "promoted_128"): ("#1d4ed8", "6 4", "same sign, promoted every 128"),
}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2937}.grid{stroke:#e5e7eb}.curve{fill:none;stroke-width:2.2}"
    ".title{font-size:15px;font-weight:600}"
)


def _svg(rows: list[Row]) -> str:
    ks = sorted({row["k"] for row in rows})
    values = {curve: [r[curve[1]] for r in rows if r["data"] == curve[0]] for curve in CURVES}
    finite = [v for series in values.values() for v in series if v > 0]
    low, high = int(log10(min(finite)) // 1), int(-(-log10(max(finite)) // 1))
    span = max(log10(ks[-1] / ks[0]), 1e-9)

    def x(k: int) -> float:
        return LEFT + log10(k / ks[0]) / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - log10(max(value, 10.0**low))) / max(high - low, 1) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="24">Largest error of Hopper\'s FP8 accumulation</text>']
    for decade in range(low, high + 1):
        at = y(10.0**decade)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        label = f"{10.0 ** (decade + 2):g} %"
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for k in ks:
        at = x(k)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{k}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">contraction K</text>')
    labels_from = float(TOP)
    for curve in sorted(CURVES, key=lambda curve: -values[curve][-1]):
        colour, dash, words = CURVES[curve]
        points = " ".join(f"{x(k):.1f},{y(v):.1f}" for k, v in zip(ks, values[curve], strict=True))
        parts.append(f'<polyline class="curve" stroke="{colour}" stroke-dasharray="{dash}" points="{points}"/>')
        at = max(y(values[curve][-1]) + 4, labels_from)  # labels of close curves are pushed apart
        labels_from = at + 16
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{at:.1f}" style="fill:{colour}">{words}</text>')
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">\n'
        f'<style>{STYLE}</style>\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )

"""Rotary frequencies and YaRN against plain loops."""

import math

import pytest
import torch

from tessera.model.rope import rotation, softmax_scale
from tessera.recipe import ModelSection
from tests.model import shapes, slow_model


def yarn(**changes: float) -> ModelSection:
    return shapes.section(qk_rope_head_dim=64, rope_scaling=shapes.YARN["rope_scaling"] | changes)


V3 = {
    "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
CASES = [
    shapes.section(),
    yarn(),
    yarn(**V3),
    yarn(factor=1.0),
    yarn(mscale=0.0, mscale_all_dim=0.5),
    yarn(mscale=2.0, mscale_all_dim=0.0),
    yarn(original_max_position_embeddings=1),  # every pair turns less than once
    yarn(original_max_position_embeddings=10**9),  # every pair turns often
]


@pytest.mark.parametrize("section", CASES)
def test_a_pair_turns_as_in_the_slow_loops(section: ModelSection) -> None:
    owed = slow_model.frequencies(section)
    turning = rotation(section)
    assert turning.frequencies == pytest.approx(owed, rel=1e-6)
    positions = torch.tensor([[0, 1, 5, 200], [7, 6, 5, 4]])
    table = turning.table(positions)
    assert table.dtype == torch.complex64 and table.shape == (2, 4, section.qk_rope_head_dim // 2)
    for b, l in ((0, 0), (0, 3), (1, 1)):
        x = torch.randn(section.qk_rope_head_dim, generator=torch.Generator().manual_seed(l), dtype=torch.float64)
        turned = torch.view_as_real(torch.view_as_complex(x.view(-1, 2)) * table[b, l]).flatten()
        slow = slow_model.turned(x, int(positions[b, l]), section)
        assert torch.allclose(turned, slow, rtol=0, atol=1e-4)


def test_v3_keeps_fast_pairs_divides_slow_ones_and_scales_the_softmax() -> None:
    section = yarn(**V3)
    kept = [f * 10000.0 ** (2 * i / 64) for i, f in enumerate(rotation(section).frequencies)]
    # 10 and 23: pairs that turn 32 times and once in 4096 positions, as the published code rounds them
    assert kept[:11] == pytest.approx([1.0] * 11) and kept[23:] == pytest.approx([1 / 40] * 9)
    assert all(1 / 40 < share < 1 for share in kept[11:23])
    assert rotation(section).amplitude == 1.0
    assert softmax_scale(section) == pytest.approx((12 + 64) ** -0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_scores_depend_on_the_distance_alone() -> None:
    from tessera.ops.attention_strips import rotate

    turning = rotation(shapes.section(qk_rope_head_dim=16))
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = [
        float(rotate(q, turning.table(torch.tensor([p + 9]))[0]) @ rotate(k, turning.table(torch.tensor([p]))[0]).T)
        for p in (0, 1, 50)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)

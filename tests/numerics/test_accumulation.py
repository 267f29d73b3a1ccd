"""The accumulation experiment: its figures, its metrics, its plot."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from tessera.numerics import E4M3, TENSOR, Accumulation, accumulation, gemm, quantise
from tessera.recipe import UserError

FIGURES = ("unpromoted", "promoted_128", "promoted_64", "promoted_32")


def test_rows_are_the_errors_of_the_products_they_name() -> None:
    (random, same) = accumulation.measure(largest_k=512, size=8, seed=3)
    assert (random["data"], random["k"], same["data"], same["k"]) == ("random sign", 512, "same sign", 512)
    generator = torch.Generator().manual_seed(3)
    a, b = (quantise(torch.randn(8, 512, generator=generator), E4M3, TENSOR) for _ in range(2))
    exact = a.decode().double() @ b.decode().double().T
    for name, model in (("unpromoted", Accumulation("hopper_unpromoted")), ("promoted_64", Accumulation("hopper", 64))):
        error = (gemm.fprop(a, b, model, torch.float32).double() - exact).abs()
        assert random[name] == pytest.approx(float(error.max() / exact.abs().mean()))
        assert random[f"{name}_norm"] == pytest.approx(float(error.norm() / exact.norm()))


def test_the_error_grows_without_promotion_and_stays_with_it() -> None:
    rows = accumulation.measure(largest_k=2048, size=24)
    assert [row["k"] for row in rows] == [512, 1024, 2048] * 2
    for data in ("random sign", "same sign"):
        first, *_, last = (row for row in rows if row["data"] == data)
        assert last["unpromoted_norm"] > 2 * first["unpromoted_norm"]
        for name in FIGURES[1:]:
            assert last[f"{name}_norm"] == pytest.approx(first[f"{name}_norm"], rel=0.1)  # flat
            assert last[name] < 1.5 * first[name]
        order = [last[f"{name}_norm"] for name in FIGURES]
        assert order == sorted(order, reverse=True)  # the oftener promoted, the smaller
    same_sign = rows[-1]
    assert 0.02 < same_sign["unpromoted"] < 0.05 and same_sign["promoted_128"] < 0.0015


def test_random_signs_at_4096_give_the_reports_nearly_two_percent() -> None:
    # The report's figure: the largest error over the mean magnitude of 256 x 256 outputs. This alone takes seconds.
    generator = torch.Generator().manual_seed(0)
    a, b = (quantise(torch.randn(256, 4096, generator=generator), E4M3, TENSOR) for _ in range(2))
    exact = a.decode(torch.float64) @ b.decode(torch.float64).t()

    def worst(model: Accumulation) -> float:
        return float((gemm.fprop(a, b, model, torch.float32) - exact).abs().max() / exact.abs().mean())

    assert 0.015 < worst(Accumulation("hopper_unpromoted")) < 0.025
    assert worst(Accumulation("hopper", 128)) < 0.0015


@pytest.mark.slow
def test_the_whole_table_shows_promoted_errors_flat_up_to_16384() -> None:
    rows = accumulation.measure()
    (at_4096,) = (row for row in rows if row["k"] == 4096 and row["data"] == "random sign")
    assert 0.015 < at_4096["unpromoted"] < 0.025 and at_4096["promoted_128"] < 0.0015
    for data in ("random sign", "same sign"):
        norms = [row["promoted_128_norm"] for row in rows if row["data"] == data]
        assert len(norms) == 6 and max(norms) < 1.05 * min(norms)
        assert max(row["promoted_128"] for row in rows if row["data"] == data) < 0.0015
    assert rows[-1]["unpromoted"] > 0.2


def test_a_longer_table_begins_with_the_shorter_one_and_seeds_differ() -> None:
    short, long = accumulation.measure(largest_k=512, size=4), accumulation.measure(largest_k=1024, size=4)
    assert short[0] == long[0] and short[1] == long[2]
    assert accumulation.measure(largest_k=512, size=4, seed=1) != short


def test_progress_rises_to_its_total() -> None:
    seen: list[tuple[int, int]] = []
    accumulation.measure(largest_k=1024, size=2, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 2 * 2 * 4
    assert {total for _, total in seen} == {seen[-1][0]}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_the_plot_is_a_standalone_svg_with_both_curves_inside_it(tmp_path: Path) -> None:
    rows = accumulation.measure(largest_k=1024, size=4)
    accumulation.plot(rows, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    root = ElementTree.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    lines = [element for element in root if element.tag.endswith("polyline")]
    assert len(lines) == 4
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        assert len(points) == 2 and all(0 <= x <= width and 0 <= y <= height for x, y in points)
    words = " ".join(element.text or "" for element in root.iter())
    assert "unpromoted" in words and "promoted every 128" in words and "1024" in words
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    accumulation.plot(accumulation.measure(largest_k=512, size=4), tmp_path / "one point.svg")


def test_a_plot_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        accumulation.plot(accumulation.measure(largest_k=512, size=2), tmp_path / "missing" / "x.svg")

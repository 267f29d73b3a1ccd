"""The section on memory says what `accounting` predicts of the run's own recipe, or nothing."""

from pathlib import Path

import pytest

from tessera.accounting import memory
from tessera.recipe import load_recipe
from tessera.training.report import write_report
from tessera.training.report.memory import memory_bars
from tessera.training.report.wording import size
from tests.training.report import example_runs

TINY = load_recipe(Path(__file__).parents[3] / "recipes" / "tiny.toml")


def test_bars_are_the_prediction_for_the_recipe() -> None:
    found, bars = memory(TINY), memory_bars(TINY.to_toml())
    assert bars is not None
    kept = {bar["label"]: bar for bar in bars["kept"]}
    assert {label: bar["value"] for label, bar in kept.items()} == {k: size(v) for k, v in found.kinds().items()}
    widths = [bar["width"] for bar in bars["kept"]]
    assert widths[0] == 100 and widths == sorted(widths, reverse=True)
    assert kept["routing"]["width"] == pytest.approx(
        100 * found.kinds()["routing"] / max(found.kinds().values()), abs=0.01
    )
    lives = {bar["label"]: bar["value"] for bar in bars["lives"]}
    assert lives["kept for backward"] == size(found.saved) and "moving average (CPU memory)" not in lives
    assert bars["total"] == size(found.total) and bars["off"] == []


def test_switches_that_are_off_are_named() -> None:
    off = TINY.memory.model_copy(update={"chunked_head": False})
    bars = memory_bars(TINY.model_copy(update={"memory": off}).to_toml())
    assert bars is not None and bars["off"] == ["chunked_head"]


@pytest.mark.parametrize("text", ["", "[model]\nvocab_size = 4096", "no = toml = at all", TINY.to_toml() + "\n[new]\n"])
def test_a_recipe_of_another_version_has_no_bars(text: str) -> None:
    assert memory_bars(text) is None


def test_the_page_has_the_section_where_the_recipe_is_known(tmp_path: Path) -> None:
    run = example_runs.run(tmp_path / "run")
    assert 'id="memory"' not in write_report(run).read_text()
    (run / "recipe.toml").write_text(TINY.to_toml())
    page = write_report(run).read_text()
    assert 'id="memory"' in page and 'href="#memory"' in page
    assert size(memory(TINY).saved_per_token) in page


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (28_500_000, "28.5 MB"), (681e9, "681 GB"), (9e12, "9.00 TB")]
)
def test_bytes_are_said_in_the_largest_unit(count: float, words: str) -> None:
    assert size(count).replace("\N{NARROW NO-BREAK SPACE}", " ") == words

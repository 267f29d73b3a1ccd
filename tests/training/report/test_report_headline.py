"""The verdict in words says what compare.json says, and nothing that it does not."""

from pathlib import Path
from typing import Any

import pytest

from tessera.training.report.folder import Arm, Source
from tessera.training.report.headline import Headline, headline
from tessera.training.report.history import read
from tessera.training.report.wording import arm_label, bound, duration, grouped, listed, percent, short, significant
from tests.training.report.example_runs import Shape, compare_json, event

NARROW = "\N{NARROW NO-BREAK SPACE}"


def of(**changes: Any) -> Headline:
    figures = compare_json(["fp8", "bf16"], Shape()) | changes
    return headline(Source(Path("runs/tiny"), "tiny", "", [], True, figures))


def states(found: Headline) -> list[str]:
    return [criterion.state for criterion in found.criteria]


def test_a_pass_names_every_figure_beside_its_bar() -> None:
    found = of()
    assert found.state == "passed" and states(found) == ["met"] * 4
    assert [criterion.figure.replace(NARROW, " ") for criterion in found.criteria] == [
        "0.012 %",
        "2.8 %",
        "\N{MINUS SIGN}0.12 %",
        "0.092 %",
    ]
    assert [criterion.bar.replace(NARROW, " ") for criterion in found.criteria] == ["0.05 %", "10 %", "±1 %", "0.25 %"]


def test_an_unresolved_curve_is_not_called_a_pass_of_the_curve() -> None:
    found = of(relative_loss_error="not resolved", relative_loss_error_reason="no controls", control_errors=[])
    assert found.state == "passed" and "not resolved" in found.title and "no controls" in found.lede
    assert states(found) == ["met", "met", "met", "unresolved"]
    assert found.criteria[3].figure.replace(NARROW, " ") == "0.092 %"


def test_a_failure_names_what_missed_its_bar() -> None:
    found = of(verdict="failed", same_weights_gradient_bias=-0.042, failures=["bias too large"])
    assert found.state == "failed" and "gradient bias" in found.lede and found.failures == ["bias too large"]
    assert states(found) == ["met", "met", "missed", "met"]


@pytest.mark.parametrize("figure", [0.0005, 0.1, None])
def test_a_figure_at_its_bar_or_missing_is_not_met(figure: float | None) -> None:
    found = of(same_weights_loss_error=figure, verdict="failed")
    assert found.criteria[0].state == ("unmeasured" if figure is None else "missed")


def test_an_unknown_verdict_is_no_pass() -> None:
    assert of(verdict=None).state == "unresolved"


def test_a_comparison_file_with_nothing_in_it_gives_dashes_and_no_error() -> None:
    found = headline(Source(Path("x"), "x", "", [], True, {"schema": 1}))
    assert states(found) == ["unmeasured"] * 4 and found.state == "unresolved"


def test_an_unfinished_comparison_says_how_far_its_arms_are() -> None:
    arms = [Arm("fp8", "finished", read([event("step", 9, lm_loss=1.0)])), Arm("bf16", "running", read([]))]
    found = headline(Source(Path("x"), "x", "", arms, True))
    assert (
        found.title == "No verdict yet"
        and "FP8 is finished after 10 steps and BF16 is running after 0 steps" in found.lede
    )


@pytest.mark.parametrize(
    ("state", "steps", "title"),
    [
        ("finished", 10, "Finished: 10 steps in FP8"),
        ("running", 4, "Running: 4 of 10 steps in FP8"),
        ("interrupted", 4, "Interrupted after 4 of 10 steps in FP8"),
        ("failed", 4, "Failed after 4 of 10 steps in FP8"),
        ("running", 0, "Running: no step yet"),
        ("failed", 0, "Failed before its first step"),
    ],
)
def test_a_single_run_says_how_it_stands(state: str, steps: int, title: str) -> None:
    events = [event("start", 0, precision="fp8", steps=10), *(event("step", i, lm_loss=2.0) for i in range(steps))]
    found = headline(Source(Path("x"), "x", "", [Arm("fp8", state, read(events))], False))
    assert found.title == title and found.state == "none" and "BF16 twin" in found.lede


def test_numbers_read_as_people_write_them() -> None:
    def plain(text: str) -> str:
        return text.replace(NARROW, " ")

    assert [plain(percent(x)) for x in (0.0283, 0.000121, 0.0, float("nan"), -0.5)] == [
        "2.8 %",
        "0.012 %",
        "0 %",
        "\N{EN DASH}",
        "\N{MINUS SIGN}50 %",
    ]
    assert [plain(bound(x)) for x in (0.0005, 0.1, 0.00125)] == ["0.05 %", "10 %", "0.125 %"]
    assert [plain(short(x)) for x in (9999, 14_213_120, 671e9)] == ["9 999", "14.2 M", "671 B"]
    assert [plain(duration(x)) for x in (0.2, 431, 7260, 90_000)] == ["0 s", "7 min 11 s", "2 h 1 min", "1 d 1 h"]
    assert plain(grouped(1_024_000)) == "1 024 000" and significant(-0.0) == "0"
    assert listed(["a", "b", "c"]) == "a, b and c" and listed([]) == ""
    assert [arm_label(x) for x in ("fp8", "control-2", "per-tensor, outlier")] == [
        "FP8",
        "Control 2",
        "Per-tensor, outlier",
    ]

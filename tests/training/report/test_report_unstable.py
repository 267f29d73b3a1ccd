"""Steps that were not finite, or spikes, are marked and listed; only evidence that lies where it must is linked."""

from pathlib import Path
from typing import Any

import pytest

from tessera.training.report import unstable, write_report
from tessera.training.report.folder import load
from tests.training.report.example_runs import Shape, comparison, event, events, run, write_events
from tests.training.report.test_report_page import Page

SMALL = Shape(steps=60, layers=2, experts=4)


def leap(step: int, **changes: Any) -> dict[str, Any]:
    facts = {"finding": "spike", "reason": "a spike, loss 9 above 5", "rule": 'stability.on_spike = "skip"'}
    facts |= {"decision": "skipped", "rate_scale": 0.25, "evidence": f"evidence/step-{step}.json"}
    return event("unstable", step, **(facts | changes))


def links(page: Page) -> list[str | None]:
    return [a.get("href") for tag, a in page.elements if tag == "a" and not (a.get("href") or "#").startswith("#")]


def test_a_run_lists_its_unstable_steps_with_links_and_marks(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL)
    write_events(folder, [*events(SMALL), leap(12), leap(40, decision="noted", rate_scale=1.0)])
    page = Page(write_report(folder))
    assert links(page) == ["evidence/step-12.json", "evidence/step-40.json"]
    assert "12 a spike, loss 9 above 5 skipped 0.250 evidence/step-12.json" in page.text
    assert page.data["arms"][0]["unstable"] == [12, 40]


def test_a_comparison_links_into_the_folders_of_its_arms(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "tiny", SMALL)
    write_events(folder / "arms" / "control-2", [*events(SMALL, "bf16", 3), leap(7)])
    page = Page(write_report(folder))
    assert links(page) == ["arms/control-2/evidence/step-7.json"]
    assert "Control 2 7 a spike" in page.text
    assert [arm["unstable"] for arm in page.data["arms"]] == [[], [], [], [7]]


def test_calm_runs_have_no_such_part(tmp_path: Path) -> None:
    page = Page(write_report(run(tmp_path / "mine", SMALL)))
    assert not any(attributes.get("id") == "unstable" for _, attributes in page.elements)


@pytest.mark.parametrize(
    "said",
    ["javascript:alert(1)", "https://example.org/step-3.json", "../evidence/step-3.json", "evidence/step-4.json"],
)
def test_an_address_is_never_an_events_own_text(said: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL)
    write_events(folder, [*events(SMALL), leap(3, evidence=said, evidence_error="<b>no room</b>", reason="<i>x</i>")])
    page = Page(write_report(folder))
    assert links(page) == []
    assert "<b>no room</b>" in page.text and "<i>x</i>" in page.text


def test_of_very_many_the_latest_are_shown_and_the_rest_is_counted(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL)
    write_events(folder, [*events(SMALL), *(leap(step) for step in range(2000))])
    source = load(folder)
    table = unstable.table(source)
    assert table is not None
    assert (len(table["rows"]), table["left_out"]) == (unstable.MAX_ROWS, 2000 - unstable.MAX_ROWS)
    assert table["rows"][-1]["link"] == "evidence/step-1999.json"
    assert unstable.marks(source.arms[0]) == list(range(2000 - unstable.MAX_MARKS, 2000))


def test_what_a_resumed_run_makes_again_is_forgotten(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL)
    write_events(folder, [*events(SMALL), leap(3), leap(12), event("start", 10, resumed=True)])
    assert list(load(folder).arms[0].history.unstable) == [3]

"""A schedule has the value of its plain formula in every step."""

from math import cos, isclose, pi
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tessera.recipe import Schedule

VALUES = st.floats(0, 1e6, allow_subnormal=False)
SEGMENTS = st.lists(
    st.fixed_dictionaries(
        {
            "shape": st.sampled_from(["constant", "linear", "cosine"]),
            "steps": st.integers(1, 30),
            "to": VALUES,
        },
        optional={"from": VALUES},
    ).map(lambda segment: segment if segment["shape"] != "constant" else segment | {"from": None}),
    min_size=1,
    max_size=5,
).map(lambda segments: [{k: v for k, v in segment.items() if v is not None} for segment in segments])


def plain(segments: list[dict[str, Any]], steps: int) -> list[float]:
    """The whole table, segment by segment."""
    table: list[float] = []
    before = 0.0
    for segment in segments:
        a, b, n = segment.get("from", before), segment["to"], segment["steps"]
        for i in range(n):
            match segment["shape"]:
                case "constant":
                    table.append(b)
                case "linear":
                    table.append((a * (n - i) + b * i) / n)
                case "cosine":
                    table.append(a + (b - a) * (1 - cos(pi * i / n)) / 2)
        before = b
    return (table + [before] * steps)[:steps]


@given(SEGMENTS)
def test_every_step_has_the_value_of_the_formula(segments: list[dict[str, Any]]) -> None:
    schedule = Schedule.model_validate(segments)
    expected = plain(segments, schedule.steps + 10)
    # Two orders of the same sum: a few roundings apart, at the size of the larger end.
    bound = 1e-14 * (1 + max(schedule.ends()))
    assert all(isclose(schedule.at(i), value, abs_tol=bound) for i, value in enumerate(expected))
    assert schedule.steps == sum(segment["steps"] for segment in segments)


@given(SEGMENTS)
def test_the_value_stays_between_the_ends_and_reaches_them_exactly(segments: list[dict[str, Any]]) -> None:
    schedule = Schedule.model_validate(segments)
    low, high = min(schedule.ends()), max(schedule.ends())
    bound = 1e-14 * (1 + high)
    assert all(low - bound <= schedule.at(i) <= high + bound for i in range(schedule.steps + 2))
    first = segments[0]
    assert schedule.at(0) == (first["to"] if first["shape"] == "constant" else first.get("from", 0.0))
    assert schedule.at(schedule.steps) == schedule.at(10**9) == segments[-1]["to"]


def test_the_warm_up_of_the_report_starts_at_zero_and_joins_its_plateau_without_a_repeated_value() -> None:
    schedule = Schedule.model_validate(
        [
            {"shape": "linear", "steps": 2000, "from": 0.0, "to": 2.2e-4},
            {"shape": "constant", "steps": 10, "to": 2.2e-4},
            {"shape": "cosine", "steps": 100, "to": 2.2e-5},
        ]
    )
    assert schedule.at(0) == 0.0
    assert isclose(schedule.at(1), 1.1e-7)
    assert schedule.at(1999) < schedule.at(2000) == schedule.at(2009) == schedule.at(2010) == 2.2e-4
    assert isclose(schedule.at(2060), (2.2e-4 + 2.2e-5) / 2)
    assert schedule.at(2110) == 2.2e-5


@pytest.mark.parametrize("number", [0, 3, 0.25])
def test_a_bare_number_holds_in_every_step(number: float) -> None:
    schedule = Schedule.model_validate(number)
    assert schedule.at(0) == schedule.at(10**9) == number
    assert schedule.steps == 0
    assert schedule.ends() == [number]


def test_a_step_before_the_first_is_a_mistake_of_the_caller() -> None:
    for schedule in (Schedule(1.0), Schedule.model_validate([{"shape": "constant", "steps": 1, "to": 1.0}])):
        with pytest.raises(ValueError, match="step -1: steps count from 0"):
            schedule.at(-1)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), True, None, "1", [], [1.0], {}, ()])
def test_what_is_no_schedule_is_refused(wrong: object) -> None:
    with pytest.raises(ValidationError):
        Schedule.model_validate(wrong)

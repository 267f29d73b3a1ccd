"""What a run's events amount to: resumed runs, missing parts, numbers that are none."""

from math import isnan
from typing import Any

import numpy as np

from tessera.training.report.history import read
from tests.training.report.example_runs import event


def step(number: int, **fields: Any) -> dict[str, Any]:
    return event("step", number, lm_loss=float(number), **fields)


def test_no_events_are_an_empty_run() -> None:
    history = read([])
    assert history.start is None and history.steps == {} and history.steps_done == 0
    assert isnan(history.final("lm_loss")) and isnan(history.seconds)


def test_a_resumed_run_forgets_the_branch_it_left() -> None:
    first = [
        event("start", 0, resumed=False),
        *(step(i, tokens=1) for i in range(8)),
        event("load", 7, layers=["a"], counts=[[1]]),
    ]
    again = [event("start", 5, resumed=True), step(5, tokens=2), step(6, tokens=2)]
    history = read([*first, *again])
    assert list(history.steps) == list(range(7))
    assert history.column("tokens").tolist() == [1, 1, 1, 1, 1, 2, 2]
    assert history.loads == {} and history.resumed_at == [5] and history.steps_done == 7


def test_a_resumed_run_stands_at_its_checkpoint_before_its_first_new_step() -> None:
    history = read([event("start", 0), *map(step, range(8)), event("start", 5, resumed=True)])
    assert history.steps_done == 5


def test_what_was_measured_at_the_checkpoint_stays() -> None:
    history = read(
        [
            event("start", 0),
            *map(step, range(4)),
            event("validation", 4, loss=1.0),
            event("start", 4, resumed=True),
            step(4),
        ]
    )
    assert list(history.validations) == [4]


def test_steps_written_twice_without_a_new_start_count_once_and_the_last_time() -> None:
    history = read([step(0), step(1), step(2), event("step", 1, lm_loss=9.0)])
    assert list(history.steps) == [0, 1] and history.column("lm_loss").tolist() == [0.0, 9.0]


def test_a_run_that_started_again_has_not_ended() -> None:
    ended = [event("start", 0), step(0), event("end", 1, reason="interrupted", seconds=3.0)]
    assert read(ended).seconds == 3.0
    assert read([*ended, event("start", 1, resumed=True)]).end is None


def test_null_and_missing_and_strings_are_no_numbers() -> None:
    history = read([event("step", 0, lm_loss=None, mfu="fast", tokens=True), event("step", 1, lm_loss=2.5)])
    assert np.isnan(history.column("lm_loss")[0]) and np.isnan(history.column("mfu")).all()
    assert np.isnan(history.column("tokens")).all() and history.final("lm_loss") == 2.5


def test_steps_done_counts_a_step_as_done_and_a_validation_as_it_says() -> None:
    assert read([step(9)]).steps_done == 10
    assert read([step(9), event("validation", 10, loss=1.0)]).steps_done == 10


def test_notes_of_a_resumed_run_are_told_once() -> None:
    notes = read([event("start", 0, notes=["a", "b"]), event("start", 3, resumed=True, notes=["b", "c"])]).notes
    assert notes == ["a", "b", "c"]


def test_unknown_kinds_and_fields_are_passed_over() -> None:
    history = read([event("telemetry", 3, x=1), step(0, unheard_of={"a": 1}), {"kind": None}, {}])
    assert list(history.steps) == [0]

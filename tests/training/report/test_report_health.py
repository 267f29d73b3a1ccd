"""The table of tensors: the last measurement, the course, and what stands out."""

from typing import Any

from tessera.training.report.health import table
from tessera.training.report.history import History, read
from tests.training.report.example_runs import event

CALM = {
    "relative_rms": 0.026, "saturated": 0.0004, "flushed": 0.001, "rounded_twice": None, "nonfinite": 0,
    "scale_min": 2.0**-12, "scale_max": 2.0**-9, "elements": 1000,
}  # fmt: skip


def measured(*records: dict[str, dict[str, Any]]) -> History:
    return read(event("health", 50 * i, tensors=tensors) for i, tensors in enumerate(records))


def rows(history: History, **budget: int) -> dict[str, Any]:
    found = table(history, **budget)
    assert found is not None
    return {f"{row['name']}.{row['operand']}": row for row in found["tensors"]}


def test_a_row_has_its_figures_over_time_and_scales_as_powers_of_two() -> None:
    row = rows(measured({"a.b.input": CALM}, {"a.b.input": CALM | {"relative_rms": 0.03, "scale_min": 2.0**-13}}))[
        "a.b.input"
    ]
    assert row["name"] == "a.b" and row["operand"] == "input" and row["elements"] == 1000
    assert row["relative_rms"] == [0.026, 0.03] and row["rounded_twice"] == [None, None]
    assert row["scale_min"] == [-12, -13] and row["scale_max"] == [-9, -9]


def test_only_what_is_far_above_its_own_kind_stands_out() -> None:
    calm = {f"layer.{i}.input": CALM for i in range(9)}
    odd = {"layer.9.input": CALM | {"relative_rms": 0.06, "flushed": 0.05}}
    # Every weight is worse than every input; that is its format, and none of them stands out.
    weights = {f"layer.{i}.weight": CALM | {"relative_rms": 0.06} for i in range(5)}
    found = rows(measured(calm | odd | weights))
    assert {name: row["flags"] for name, row in found.items() if row["flags"]} == {
        "layer.9.input": ["relative_rms", "flushed"]
    }


def test_operands_made_from_codes_are_no_yardstick_for_those_made_from_values() -> None:
    exact = {f"layer.{i}.input_columns": CALM | {"relative_rms": 0.0, "rounded_twice": 0.0} for i in range(9)}
    direct = {f"layer.{i}.o_proj.input_columns": CALM for i in range(3)}
    assert not any(row["flags"] for row in rows(measured(exact | direct)).values())
    rough = {"odd.input_columns": CALM | {"relative_rms": 0.02, "rounded_twice": 0.3}}
    assert rows(measured(exact | direct | rough))["odd.input_columns"]["flags"] == ["relative_rms", "rounded_twice"]


def test_small_figures_never_stand_out() -> None:
    calm = {f"layer.{i}.input": CALM | {"flushed": 0.0, "saturated": 0.0} for i in range(9)}
    found = rows(measured(calm | {"layer.9.input": CALM | {"flushed": 0.0009, "saturated": 0.0009}}))
    assert not any(row["flags"] for row in found.values())


def test_a_tensor_that_was_ever_not_finite_stands_out() -> None:
    row = rows(measured({"a.input": CALM | {"nonfinite": 3}}, {"a.input": CALM}))["a.input"]
    assert row["nonfinite"] == 3 and row["flags"] == ["nonfinite"]


def test_a_tensor_is_judged_by_its_own_last_measurement() -> None:
    calm = {f"layer.{i}.input": CALM for i in range(9)}
    found = rows(measured(calm | {"odd.input": CALM | {"relative_rms": 0.2}}, calm))
    assert found["odd.input"]["flags"] == ["relative_rms"] and found["odd.input"]["relative_rms"] == [0.2, None]


def test_grouped_measurements_keep_the_worst() -> None:
    history = measured(
        *({"a.input": CALM | {"relative_rms": 0.02 + 0.001 * i, "scale_min": 2.0 ** (-20 + i)}} for i in range(10))
    )
    row = rows(history, max_numbers=5 * 6)["a.input"]
    assert row["relative_rms"] == [0.021, 0.023, 0.025, 0.027, 0.029]
    assert row["scale_min"] == [-20, -18, -16, -14, -12]


def test_zero_scales_and_missing_figures_are_gaps() -> None:
    row = rows(measured({"a.input": {"relative_rms": 0.02, "scale_min": 0.0}}))["a.input"]
    assert row["scale_min"] == [None] and row["scale_max"] == [None] and row["elements"] is None


def test_a_run_without_fp8_has_no_table() -> None:
    assert table(measured({})) is None and table(read([])) is None

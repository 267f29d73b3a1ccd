"""The heat map's cells are the loads, also where records are added up to fit."""

import random
from typing import Any

from tessera.training.report.history import History, read
from tessera.training.report.loads import heat_map
from tests.training.report.example_runs import event


def loads_of(counts: list[list[list[int]]], layers: list[str]) -> History:
    zeros = [0.0] * len(layers)
    return read(
        event("load", 10 * i, layers=layers, counts=record, bias_min=[-0.001 * i] * len(layers), bias_max=zeros)
        for i, record in enumerate(counts)
    )


def random_counts(records: int, layers: int, experts: int, seed: int = 0) -> list[list[list[int]]]:
    draw = random.Random(seed)
    return [[[draw.randrange(200) for _ in range(experts)] for _ in range(layers)] for _ in range(records)]


def test_a_cell_is_the_load_against_the_layers_mean_in_percent() -> None:
    found: Any = heat_map(loads_of([[[10, 30, 0, 40]], [[5, 5, 5, 5]]], ["model.layers.1"]))
    assert found["steps"] == [0, 10] and found["grouped"] == 1
    assert found["layers"][0]["percent"] == [50, 150, 0, 200, 100, 100, 100, 100]
    assert found["layers"][0]["bias_min"] == [0, -0.001]


def test_grouped_records_add_their_tokens_up() -> None:
    counts = random_counts(records=23, layers=2, experts=3)
    found: Any = heat_map(loads_of(counts, ["a", "b"]), max_cells=3 * 2 * 5)
    assert len(found["steps"]) <= 5 and found["grouped"] == 5
    for layer in range(2):
        cells = found["layers"][layer]["percent"]
        for column, start in enumerate(range(0, 23, 5)):
            total = [sum(record[layer][expert] for record in counts[start : start + 5]) for expert in range(3)]
            expected = [100 * count * 3 / sum(total) for count in total]
            drawn = cells[3 * column : 3 * column + 3]
            assert all(abs(cell - value) <= 0.5 for cell, value in zip(drawn, expected, strict=True))


def test_a_layer_without_tokens_is_dark_and_no_error() -> None:
    found: Any = heat_map(loads_of([[[0, 0]]], ["a"]))
    assert found["layers"][0]["percent"] == [0, 0]


def test_the_violation_is_how_far_the_busiest_expert_is_above_the_mean() -> None:
    found: Any = heat_map(loads_of([[[0, 4]]] * 9 + [[[5, 3]]] * 3, ["a"]))
    assert found["layers"][0]["violation"] == 0.25


def test_records_of_another_layout_are_left_out() -> None:
    mixed = [event("load", 0, layers=["a"], counts=[[1, 2, 3]]), event("load", 1, layers=["a"], counts=[[1, 3]])]
    found: Any = heat_map(read(mixed))
    assert found["steps"] == [1] and found["layers"][0]["percent"] == [50, 150]


def test_a_run_without_loads_has_no_map() -> None:
    assert heat_map(read([])) is None

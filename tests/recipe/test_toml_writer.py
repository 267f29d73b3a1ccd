"""What is written reads back equal, in value and in type."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.recipe import DataSection, Recipe, Schedule, load_recipe, toml_writer
from tests.recipe.examples import MINIMAL

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # TOML holds Unicode without lone surrogates
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


def typed(value: Any) -> Any:
    """A form in which 1, 1.0 and true differ, and 0.0 differs from -0.0."""
    if isinstance(value, dict):
        return {name: typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return type(value), repr(value)


@given(st.dictionaries(TEXT, VALUES, max_size=6))
def test_any_table_reads_back_equal(table: dict[str, Any]) -> None:
    assert typed(tomllib.loads(toml_writer.dumps(table))) == typed(table)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_a_recipe_does_not_have_are_not_written(number: float) -> None:
    with pytest.raises(ValueError, match="finite numbers only"):
        toml_writer.dumps({"x": number})


def test_what_toml_has_no_place_for_is_not_written() -> None:
    with pytest.raises(TypeError, match="TOML has no place for None"):
        toml_writer.dumps({"x": None})


NUMBERS = st.floats(0, 1e9) | st.integers(0, 10**9)
SCHEDULES = NUMBERS | st.lists(
    st.fixed_dictionaries(
        {"shape": st.sampled_from(["linear", "cosine"]), "steps": st.integers(1, 10**6), "to": NUMBERS},
        optional={"from": NUMBERS},
    ),
    min_size=1,
    max_size=3,
)


@given(
    name=st.from_regex(r"\A\w[\w .-]*\Z"),
    source=TEXT.filter(bool) | st.lists(TEXT.filter(bool), min_size=1, max_size=3),
    tokenizer=st.none() | TEXT.filter(bool),
    learning_rate=SCHEDULES,
    epsilon=st.floats(0, 1, exclude_min=True),
    q_lora_rank=st.none() | st.integers(1, 10**6),
    rope_scaling=st.none()
    | st.fixed_dictionaries({"factor": st.floats(1, 1e9), "original_max_position_embeddings": st.integers(1, 10**9)}),
    tensorboard=st.booleans(),
)
def test_a_resolved_recipe_loads_as_the_same_recipe(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    raw = tomllib.loads(MINIMAL) | {"name": values["name"]}
    raw["data"] |= {"source": values["source"]}
    raw["optimizer"] |= {"learning_rate": values["learning_rate"], "epsilon": values["epsilon"]}
    raw["training"] |= {"tensorboard": values["tensorboard"]}
    for section, key in (("data", "tokenizer"), ("model", "q_lora_rank"), ("model", "rope_scaling")):
        if values[key] is not None:
            raw[section][key] = values[key]
    recipe = Recipe.model_validate(raw)
    path = tmp_path_factory.mktemp("recipe") / "other name.toml"
    path.write_bytes(recipe.to_toml().encode())
    assert load_recipe(path) == recipe


def test_a_resolved_recipe_does_not_depend_on_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tomllib.loads(Recipe.model_validate(tomllib.loads(MINIMAL) | {"name": "x"}).to_toml())
    for section, fields in [("data", DataSection.model_fields)]:
        optional = {key for key, field in fields.items() if field.default is None}
        assert set(written[section]) == set(fields) - optional
    assert written["training"]["bias_update_speed"] == Schedule(0.001).at(0)
    assert written["schema"] == 1

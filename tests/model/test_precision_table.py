"""The table of precisions is true: it is held against what the roles quantise."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera import accounting
from tessera.model import Transformer
from tessera.model.precision_table import parameter_precisions
from tessera.numerics import Policy, Recorder
from tessera.numerics.tiled_tensor import TiledTensor
from tessera.ops import dense_linear
from tessera.recipe import load_recipe
from tests.model import shapes

BATCH, LENGTH = 3, 14
TOKENS = BATCH * LENGTH
SECTION = shapes.section(**shapes.BEYOND_A_TILE)
POLICIES = {
    "fp8": Policy(),
    "bf16": Policy(precision="bf16"),
    "fp32": Policy(precision="fp32"),
    "deepseek-v3": Policy(scales="deepseek-v3"),
    "row": Policy(tiles="row"),
}
WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def spelled(name: str) -> Iterator[tuple[str, int]]:
    """ "model.layers.[1-2].mlp" -> ("model.layers.1.mlp", 1), ("model.layers.2.mlp", 2)."""
    match = re.fullmatch(r"(model\.layers\.)(?:\[(\d+)-(\d+)\]|(\d+))(.*)", name)
    assert match, name
    first, last = (int(match[2]), int(match[3])) if match[2] else (int(match[4]), int(match[4]))
    for layer in range(first, last + 1):
        yield f"{match[1]}{layer}{match[5]}", layer


class Watching(Recorder):
    """Remembers every operand that a role makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: dict[str, TiledTensor] = {}

    def count(self, name: str, quantised: TiledTensor) -> None:
        self.operands[name] = quantised


@pytest.mark.parametrize("name", ["fp8", "deepseek-v3", "row"])
def test_operands_are_those_that_the_roles_make(name: str) -> None:
    recorder = Watching()
    model = Transformer(SECTION, POLICIES[name], recorder=recorder)
    tokens = shapes.tokens(SECTION, BATCH, LENGTH)
    output = model(tokens)
    carry, loss = output.carry, output.hidden.float().square().sum()
    for depth in (1, 2):
        output = model.draft(depth, carry, tokens)
        carry, loss = output.carry, loss + output.hidden.float().square().sum()
    loss.backward()

    table: dict[str, dict[str, Any]] = {}
    for row in parameter_precisions(SECTION, POLICIES[name], "bf16"):
        for parameter, _ in spelled(row["name"]) if "layers" in row["name"] else [(row["name"], 0)]:
            table[parameter.removesuffix(".weight")] = row
    assert len(table) == len(model.state_dict())
    for operand_name, made in recorder.operands.items():
        parameter, _, operand = operand_name.rpartition(".")
        if operand.endswith("_cache"):
            continue
        format, tile, scale = table[parameter][operand].split()
        extents = "x".join("all" if extent == 0 else str(extent) for extent in (made.tile.rows, made.tile.columns))
        assert (made.format.name, extents) == (format, tile), operand_name
        mantissa, _ = made.scales.frexp()
        assert bool((mantissa == 0.5).all()) == (scale == "power_of_two"), operand_name
    quantised = {name for name, row in table.items() if row["weight"].startswith("e4m3")}
    for operand in ("weight", "gradient_rows", "gradient_columns"):
        assert {f"{name}.{operand}" for name in quantised} <= recorder.operands.keys()


def test_router_and_mtp_projection_multiply_in_the_precision_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(SECTION, Policy())
    shape_of = {tuple(p.shape): name for name, p in model.named_parameters() if "gate.weight" in name or "eh_" in name}
    seen: dict[str, set[str]] = {}

    def spy(a: Tensor, b: Tensor) -> Tensor:
        name = shape_of[tuple(b.t().shape)].rsplit(".", 2)[1]
        seen.setdefault(name, set()).update({WORDS[a.dtype], WORDS[b.dtype]})
        return a @ b

    monkeypatch.setattr(dense_linear, "matmul_rows", spy)
    tokens = shapes.tokens(SECTION, 1, 8)
    model.draft(1, model(tokens).carry, tokens)
    table = parameter_precisions(SECTION, Policy(), "bf16")
    rows = {row["name"].rsplit(".", 2)[1]: row for row in table if row["name"].endswith(".weight")}
    assert seen == {name: {rows[name]["input"], rows[name]["weight"]} for name in ("gate", "eh_proj")}
    assert seen == {"gate": {"fp32"}, "eh_proj": {"bf16"}}


def test_masters_gradients_and_moments_are_those_of_a_run() -> None:
    rows = {row["name"]: row for row in parameter_precisions(SECTION, Policy(), "bf16")}
    assert {row["master"] for row in rows.values()} == {"fp32"}
    trained = {name for name, row in rows.items() if row["moments"] == "bf16" and row["gradient"] == "fp32"}
    assert {name for name in rows if name not in trained} == {
        "model.layers.[1-2].mlp.gate.e_score_correction_bias",
        "model.layers.[3-4].mlp.gate.e_score_correction_bias",
    }


def test_the_671b_model_takes_a_readable_table_and_no_memory() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "deepseek-v3.toml")
    table = parameter_precisions(recipe.model, Policy(**recipe.numerics.model_dump()), recipe.optimizer.moments)
    assert len(table) < 50
    counts = accounting.parameters(recipe.model)
    trained = [row for row in table if row["gradient"] != "none"]
    assert sum(row["layers"] * math.prod(row["shape"]) for row in trained) == counts.total + counts.mtp_total
    experts = next(r for r in trained if r["name"] == "model.layers.[3-60].mlp.experts.down_proj")
    assert experts["shape"] == [256, 7168, 2048] and experts["layers"] == 58

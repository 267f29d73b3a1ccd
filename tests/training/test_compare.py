"""A whole comparison in small: arms in processes, the verdict's figures, going on after an end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.recipe import Recipe, UserError
from tessera.store import RunFolder
from tessera.training import compare
from tessera.training.arms import ARMS, arm_recipe


def run(comparison: compare.Comparison, **options: Any) -> dict[str, Any]:
    return compare.run(comparison, workers=2, observer=options.pop("observer", lambda *_: None), **options)


def test_arms_differ_from_the_recipe_in_their_numerics_only(recipe_with: Callable[..., Recipe]) -> None:
    recipe = recipe_with()
    for arm in (*ARMS, "control-3"):
        changed = arm_recipe(recipe, arm)
        assert changed.model_copy(update={"numerics": recipe.numerics}) == recipe
    assert arm_recipe(recipe, "control-3") == arm_recipe(recipe, "bf16")
    with pytest.raises(UserError, match="did you mean per-tensor"):
        arm_recipe(recipe, "per_tensor")


def test_a_comparison_gives_every_figure_of_the_verdict_and_is_done_once(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 8, "checkpoint_interval": 0, "keep_checkpoints": 1})
    comparison = compare.create(tmp_path / "out", recipe, ["fp8", "bf16"], 1, ["toward-zero"], False)
    comparison.dataset()
    heard: list[str] = []
    summary = run(
        comparison,
        observer=lambda job, event: heard.append(f"{job} {event['kind']}"),
        sampler=lambda path: {"prompt": "def ", "text": path.name},
    )
    assert summary["arms"] == ["bf16", "fp8", "control-1"]
    assert [p["step"] for p in summary["points"]] == [2, 4, 6, 8]
    assert summary["same_weights_loss_error"] == max(p["loss_error"] for p in summary["points"])
    assert 0 < summary["same_weights_gradient_error"] < 1
    assert summary["relative_loss_error"] == "not resolved"
    assert "8 steps" in summary["relative_loss_error_reason"]
    assert summary["sample"] == {"prompt": "def ", "text": "fp8"}
    assert set(summary["bits_per_byte"]) == {"bf16", "fp8", "control-1"}
    assert 0 < summary["bigram_bits_per_byte"] < 8
    assert set(summary["ablations"]) == {"toward-zero", "fp8, outlier", "per-tensor, outlier"}
    assert {"bf16 step", "fp8 step", "control-1 step", "evaluation progress"} <= set(heard)
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["points"] == summary["points"]

    heard.clear()
    again = run(compare.open_comparison(tmp_path / "out"), observer=lambda job, event: heard.append(job))
    assert heard == []  # nothing was trained or measured again
    assert again["points"] == summary["points"]


def test_a_control_differs_from_the_twin_by_its_perturbation_alone(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 2})
    comparison = compare.create(tmp_path / "out", recipe, ["fp8", "bf16"], 1, [], False)
    comparison.dataset()
    for arm in ("bf16", "control-1"):
        compare.train_arm(comparison, arm, 1, lambda event: None)
    losses = {
        arm: [e["loss"] for e in compare.read_events(comparison.run_path(arm) / "events.jsonl", "step")]
        for arm in ("bf16", "control-1")
    }
    assert losses["bf16"] != losses["control-1"]
    assert losses["control-1"] == pytest.approx(losses["bf16"], rel=2e-2)


def test_more_controls_and_ablations_can_be_asked_of_a_finished_comparison(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 4})
    first = compare.create(tmp_path / "out", recipe, ["fp8", "bf16"], 0, [], False)
    first.dataset()
    run(first)
    grown = compare.open_comparison(tmp_path / "out", controls=1, ablations=["per-tensor"])
    started = {path.name: (path / "events.jsonl").read_bytes() for path in (tmp_path / "out" / "arms").iterdir()}
    summary = run(grown)
    assert summary["arms"] == ["bf16", "fp8", "control-1"]
    assert "per-tensor" in summary["ablations"]
    for arm, events in started.items():
        assert (tmp_path / "out" / "arms" / arm / "events.jsonl").read_bytes() == events
    assert RunFolder.open(tmp_path / "out" / "arms" / "control-1").state()["state"] == "finished"


def test_a_folder_in_use_and_arms_without_a_twin_are_refused(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_with()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        compare.create(tmp_path / "used", recipe, ["fp8", "bf16"], 0, [], False)
    with pytest.raises(UserError, match="bf16 is missing"):
        compare.create(tmp_path / "new", recipe, ["fp8"], 0, [], False)
    with pytest.raises(UserError, match="no comparison to go on with"):
        compare.open_comparison(tmp_path / "used")
    assert not (tmp_path / "new").exists()

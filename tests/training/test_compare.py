"""A whole comparison in small: arms in processes, the verdict's figures, going on after an end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.recipe import Recipe, UserError
from tessera.store import EventWriter, RunFolder
from tessera.training import compare
from tessera.training.arms import ARMS, MEMORY_ARMS, arm_recipe
from tessera.training.nonfinite import NonFinite
from tessera.training.stability import Stopped
from tessera.training.trainer import Trainer


def run(comparison: compare.Comparison, **options: Any) -> dict[str, Any]:
    return compare.run(comparison, workers=2, observer=options.pop("observer", lambda *_: None), **options)


def test_arms_differ_from_the_recipe_in_their_numerics_only(recipe_with: Callable[..., Recipe]) -> None:
    recipe = recipe_with()
    for arm in (*ARMS, "control-3"):
        changed = arm_recipe(recipe, arm)
        assert changed.model_copy(update={"numerics": recipe.numerics}) == recipe
    assert arm_recipe(recipe, "control-3") == arm_recipe(recipe, "bf16")
    for arm, switch in zip(MEMORY_ARMS, ("e5m6_attention_output", "fp8_swiglu_inputs"), strict=True):
        changed = arm_recipe(recipe, arm)
        assert changed.memory == recipe.memory.model_copy(update={switch: False})
        assert changed.model_copy(update={"memory": recipe.memory}) == arm_recipe(recipe, "fp8")
    with pytest.raises(UserError, match="did you mean per-tensor"):
        arm_recipe(recipe, "per_tensor")


def test_a_comparison_gives_every_figure_of_the_verdict_and_is_done_once(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_with(training={"steps": 8}, checkpoint={"interval": 0, "keep_latest": 1})
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
    assert set(summary["ablations"]) == {"toward-zero"}
    assert (summary["diverged"], len(summary["notes"])) == ({}, summary["held_out_batches"] < 16)
    assert {"bf16 step", "fp8 step", "control-1 step", "evaluation progress"} <= set(heard)
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["points"] == summary["points"]

    heard.clear()
    again = run(compare.open_comparison(tmp_path / "out"), observer=lambda job, event: heard.append(job))
    assert heard == []  # nothing was trained or measured again
    assert {**again, "seconds": 0} == {**json.loads((tmp_path / "out" / "compare.json").read_text()), "seconds": 0}
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


def test_every_control_has_signs_of_its_own_and_the_bf16_arms_weights_otherwise(
    recipe_with: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compare.create(tmp_path / "out", recipe_with(training={"steps": 1}), ["fp8", "bf16"], 2, [], False)
    comparison.dataset()
    started: dict[str, torch.Tensor] = {}

    def watched(trainer: Trainer) -> str:
        started[trainer.arm] = trainer.model.lm_head.weight.detach().clone()
        return "finished"

    monkeypatch.setattr(Trainer, "run", watched)
    for arm in comparison.trained:
        compare.train_arm(comparison, arm, 1, lambda event: None)
    assert list(started) == ["bf16", "fp8", "control-1", "control-2"]
    assert torch.equal(started["bf16"], started["fp8"])
    for control in ("control-1", "control-2"):
        moved = started[control].double() / started["bf16"].double() - 1
        assert torch.allclose(moved.abs(), torch.full_like(moved, 2.0**-20), rtol=0.2)
    assert not torch.equal(started["control-1"], started["control-2"])


def diverges(step: int) -> Callable[[Trainer], None]:
    """A Trainer._step that meets NaN in one step of the FP8 arm."""
    real = Trainer._step

    def broken(trainer: Trainer) -> None:
        if trainer.arm == "fp8" and trainer.step == step:
            raise NonFinite(trainer.step, "the loss")
        real(trainer)

    return broken


def test_a_diverging_arm_is_shown_as_failed_and_the_others_are_finished(
    recipe_with: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(training={"steps": 4, "validation_interval": 2})
    comparison = compare.create(tmp_path / "out", recipe, ["fp8", "bf16"], 0, [], False)
    comparison.dataset()
    monkeypatch.setattr(Trainer, "_step", diverges(3))
    states = {arm: compare.train_arm(comparison, arm, 1, lambda event: None) for arm in comparison.trained}
    assert states == {"bf16": "finished", "fp8": "diverged"}
    summary = run(comparison)  # only what is missing: the diverged arm would diverge again
    assert summary["verdict"] == "failed"
    assert summary["diverged"] == {"fp8": "not finite in the loss"}
    assert any("fp8 arm diverged" in failure for failure in summary["failures"])
    assert set(summary["final_loss"]) == {"bf16"}  # the last validation of a run that broke is no result
    assert RunFolder.open(comparison.run_path("fp8")).state()["state"] == "failed"


def test_a_twin_that_diverges_leaves_nothing_to_compare_with(
    recipe_with: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compare.create(tmp_path / "out", recipe_with(), ["fp8", "bf16"], 0, [], False)
    comparison.dataset()

    def broken(trainer: Trainer) -> None:
        raise NonFinite(trainer.step, "the loss")

    monkeypatch.setattr(Trainer, "_step", broken)
    with pytest.raises(NonFinite):
        compare.train_arm(comparison, "bf16", 1, lambda event: None)
    assert compare._state(comparison, "bf16") == "open"


def test_an_arm_that_was_killed_while_its_folder_was_made_begins_again(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    comparison = compare.create(tmp_path / "out", recipe_with(training={"steps": 1}), ["fp8", "bf16"], 0, [], False)
    comparison.dataset()
    path = comparison.run_path("bf16")
    path.mkdir(parents=True)
    (path / "recipe.toml").write_text("half a rec")
    assert compare.train_arm(comparison, "bf16", 1, lambda event: None) == "finished"


def test_a_comparison_does_not_go_on_with_other_text(
    recipe_with: Callable[..., Recipe], corpus: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    shutil.copytree(corpus / "text", text)
    recipe = recipe_with(training={"steps": 1}, data={"source": str(text), "cache": str(tmp_path / "data")})
    comparison = compare.create(tmp_path / "out", recipe, ["fp8", "bf16"], 0, [], False)
    comparison.dataset()
    compare.open_comparison(tmp_path / "out", controls=2).dataset()  # asking for more keeps the digest
    (text / "another.txt").write_text("another expert " * 60)
    with pytest.raises(UserError, match="began with other text"):
        compare.open_comparison(tmp_path / "out").dataset()


def test_few_held_out_batches_are_said(recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_with(training={"steps": 1}, data={"batch_size": 10, "validation_fraction": 0.1})
    comparison = compare.create(tmp_path / "out", recipe, ["fp8", "bf16"], 0, [], False)
    comparison.dataset()
    summary = run(comparison)
    assert summary["held_out_batches"] < 16
    (note,) = summary["notes"]
    assert f"{summary['held_out_batches']} batches, fewer than the 16" in note
    assert summary["held_out_tokens"] == summary["held_out_batches"] * 10 * 16


@pytest.mark.parametrize(
    ("arms", "ablations", "numerics", "match"),
    [
        (["fp8", "bf16", "control-x"], [], {}, "no arm 'control-x'"),
        (["fp8", "bf16", "control-1"], [], {}, "made by --control"),
        (["fp8", "bf16", "hopper-row"], [], {}, "no backward"),
        (["fp8", "bf16", "fp8"], [], {}, "named twice"),
        (["fp8", "bf16", "e4m3"], [], {}, "no arm 'e4m3'"),
        (["fp8", "bf16"], ["block-gradients"], {"tiles": "tensor", "promotion_interval": 256}, "block-gradients of"),
    ],
)
def test_what_cannot_be_trained_or_measured_is_refused_before_the_folder_is_made(
    arms: list[str],
    ablations: list[str],
    numerics: dict[str, Any],
    match: str,
    recipe_with: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=match):
        compare.create(tmp_path / "out", recipe_with(numerics=numerics), arms, 0, ablations, False)
    assert not (tmp_path / "out").exists()


def test_thinned_losses_cannot_be_compared(recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"log_interval = 5.*every step"):
        compare.create(tmp_path / "out", recipe_with(training={"log_interval": 5}), ["fp8", "bf16"], 0, [], False)


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


def written_comparison(recipe: Recipe, folder: Path, drift: dict[str, float]) -> compare.Comparison:
    """A comparison of 500 steps whose runs were written, not trained; `drift`: relative difference to the twin."""
    comparison = compare.create(folder, recipe, ["fp8", "bf16"], len(drift) - 2, ["toward-zero"], False)
    for arm, offset in drift.items():
        run_folder = RunFolder.create(comparison.run_path(arm), arm_recipe(recipe, arm))
        with EventWriter(run_folder.events_path, arm) as events:
            for step in range(500):
                events.write("step", step, lm_loss=(4 - step / 400) * (1 + offset))
            events.write("validation", 500, loss=3.0, bits_per_byte=2.0, mtp_acceptance=[])
            events.write("end", 500, reason="finished", tokens_per_s=1.0)
        run_folder.set_state("finished", 500)
    return comparison


FIGURES: dict[str, Any] = {
    "held_out_batches": 16,
    "points": [
        {"step": 250, "loss_error": 0.0002, "loss_error_replayed": 0.0001, "rerouted_tokens": 0.1},
        {"step": 500, "loss_error": 0.0001, "loss_error_replayed": 0.0002, "rerouted_tokens": 0.2},
    ],
    "same_weights_gradient_error": 0.05,
    "same_weights_gradient_bias": -0.001,
    "ablations": {"toward-zero": {"loss_error": 0.0018, "verdict": "failed, as it must"}},
}


def test_each_criterion_alone_can_fail_the_verdict(recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = recipe_with(training={"steps": 500})
    drift = {"bf16": 0.0, "fp8": 0.001, "control-1": 0.0005, "control-2": -0.001}
    comparison = written_comparison(recipe, tmp_path / "out", drift)
    good = compare.summarise(comparison, FIGURES)
    assert (good["verdict"], good["failures"], good["notes"]) == ("passed", [], [])
    assert good["relative_loss_error"] == pytest.approx(0.001)
    assert good["control_errors"] == pytest.approx([0.0005, 0.001])
    assert (good["same_weights_loss_error"], good["rerouted_tokens"]) == (0.0002, 0.2)
    worse: dict[str, dict[str, Any]] = {
        "loss error": {"points": [FIGURES["points"][0], FIGURES["points"][1] | {"loss_error": 0.0006}]},
        "gradient error": {"same_weights_gradient_error": 0.11},
        "gradient bias": {"same_weights_gradient_bias": -0.011},
        "do not catch toward-zero": {"ablations": {"toward-zero": {"loss_error": 0.0001, "verdict": "not caught"}}},
    }
    for words, change in worse.items():
        bad = compare.summarise(comparison, FIGURES | change)
        assert bad["verdict"] == "failed"
        (failure,) = bad["failures"]
        assert words in failure
    far = written_comparison(recipe, tmp_path / "far", drift | {"fp8": 0.003})
    (failure,) = compare.summarise(far, FIGURES)["failures"]
    assert "curves" in failure


def test_a_control_that_diverged_is_no_control(recipe_with: Callable[..., Recipe], tmp_path: Path) -> None:
    drift = {"bf16": 0.0, "fp8": 0.003, "control-1": 0.0, "control-2": 0.0}
    comparison = written_comparison(recipe_with(training={"steps": 500}), tmp_path / "out", drift)
    RunFolder.open(comparison.run_path("control-2")).set_state("failed", 499, stopped="not finite in the loss")
    summary = compare.summarise(comparison, FIGURES)
    assert summary["relative_loss_error"] == "not resolved"
    assert "1 finished control run" in summary["relative_loss_error_reason"]
    assert (summary["verdict"], set(summary["diverged"])) == ("passed", {"control-2"})


def test_an_arm_that_left_out_updates_is_said_and_compared_all_the_same(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    drift = {"bf16": 0.0, "fp8": 0.001, "control-1": 0.0, "control-2": 0.0}
    comparison = written_comparison(recipe_with(training={"steps": 500}), tmp_path / "out", drift)
    told = {"fp8": {7: "noted"}, "bf16": {}, "control-1": dict.fromkeys(range(30, 37), "skipped")}
    told["control-2"] = {3: "lowered", 8: "noted"}
    for arm, decisions in told.items():
        with EventWriter(comparison.run_path(arm) / "events.jsonl", arm) as events:
            for step, decision in decisions.items():
                events.write("unstable", step, decision=decision)
    summary = compare.summarise(comparison, FIGURES)
    assert summary["refused_steps"] == {"control-1": 7, "control-2": 1}
    assert summary["notes"] == [
        "control-1 left out the update of 7 of its steps (30, 31, 32, 33, 34, ...), as [stability] says",
        "control-2 left out the update of 1 of its steps (3), as [stability] says",
    ]
    assert summary["verdict"] == "passed"


def test_a_loss_that_was_not_finite_in_the_judged_half_leaves_the_curves_unresolved(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    drift = {"bf16": 0.0, "fp8": 0.001, "control-1": 0.0, "control-2": 0.0}
    comparison = written_comparison(recipe_with(training={"steps": 500}), tmp_path / "out", drift)
    path = comparison.run_path("fp8") / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step" and line["step"] == 400:
            line["lm_loss"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = compare.summarise(comparison, FIGURES)
    assert (summary["relative_loss_error"], summary["verdict"]) == ("not resolved", "passed")
    assert "a step that is not finite" in summary["relative_loss_error_reason"]


def test_an_arm_that_a_spike_stopped_is_a_diverged_one(
    recipe_with: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compare.create(tmp_path / "out", recipe_with(training={"steps": 4}), ["fp8", "bf16"], 0, [], False)
    comparison.dataset()

    def broken(trainer: Trainer) -> None:
        raise Stopped("step 0: a spike", "a spike, loss 9 above 5")

    monkeypatch.setattr(Trainer, "_step", broken)
    assert compare.train_arm(comparison, "fp8", 1, lambda event: None) == "diverged"
    assert compare._state(comparison, "fp8") == "diverged"
    (end,) = compare.read_events(comparison.run_path("fp8") / "events.jsonl", "end")
    assert end["reason"] == "a spike, loss 9 above 5"
    with pytest.raises(Stopped):
        compare.train_arm(comparison, "bf16", 1, lambda event: None)

"""The kept same-weights figures: each against its definition in plain code, and measured once."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tessera.data import Batch, Dataset, WittenBellBigram, prepare
from tessera.model import Transformer
from tessera.model.weights import read_weights
from tessera.numerics import Policy
from tessera.ops.chunked_loss import IGNORED, chunked_loss
from tessera.recipe import Recipe, load_recipe
from tessera.store import RunFolder
from tessera.training import evaluation
from tessera.training.evaluation import Evaluation, judged, read_figures, uncaught
from tessera.training.trainer import Trainer
from tests.training.conftest import make_recipe

STEPS = 40
UP = "model.layers.0.mlp.gate_up_proj.weight"
Measured = tuple[dict[str, Any], Recipe, Dataset, RunFolder, Path]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Measured:
    """A BF16 run on masked documents with a growing batch, and its figures."""
    ramp = [{"shape": "linear", "steps": 20, "from": 2, "to": 4}, {"shape": "constant", "steps": 20, "to": 4}]
    changes: dict[str, dict[str, Any]] = {
        "numerics": {"precision": "bf16"},
        "data": {"cross_document_attention": False, "batch_size": ramp, "validation_fraction": 0.3},
        "training": {"steps": STEPS, "validation_interval": 0, "validation_batches": 3},
    }
    recipe = make_recipe(corpus, changes)
    folder = tmp_path_factory.mktemp("evaluation")
    dataset = prepare(recipe.data, recipe.model.vocab_size, folder / "data")
    run = RunFolder.create(folder / "bf16", recipe)
    Trainer(recipe, run, dataset, arm="bf16", milestones=evaluation.milestones(STEPS)).run()
    path = folder / "same_weights.json"
    figures = Evaluation(path, recipe, dataset, run, lambda event: None).run(("toward-zero", "fp8, outlier"))
    return figures, recipe, dataset, run, path


def held_out_batches(dataset: Dataset) -> list[Batch]:
    return [dataset.validation.batch(4 * i, 4) for i in range(16)]


def arm(recipe: Recipe, run: RunFolder, step: int, **policy: Any) -> Transformer:
    model = Transformer(recipe.model, Policy(**policy))
    read_weights(run.checkpoint_path(step), model)
    return model


def loss_of(model: Transformer, batch: Batch, routing: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    output = model(batch.tokens, document_ids=batch.document_ids, routing=routing)
    hidden, targets = output.hidden.flatten(0, 1), batch.targets.flatten()
    if torch.is_grad_enabled():  # autograd through plain logits would round the head's gradients elsewhere
        loss = chunked_loss(hidden, model.lm_head.weight, targets) / int((targets != IGNORED).sum())
    else:
        loss = cross_entropy(model.logits(hidden), targets)
    return loss, [r.experts for r in output.router]


def moved(one: list[Tensor], other: list[Tensor]) -> float:
    """Share of tokens whose set of experts differs in some layer, token by token."""
    tokens = range(len(one[0]))
    changed = [any(set(a[t].tolist()) != set(b[t].tolist()) for a, b in zip(one, other, strict=True)) for t in tokens]
    return fmean(changed)


@torch.no_grad()
def test_the_points_are_mean_magnitudes_of_relative_errors_over_sixteen_batches(measured: Measured) -> None:
    figures, recipe, dataset, run, _ = measured
    batches = held_out_batches(dataset)
    assert (figures["held_out_batches"], figures["held_out_tokens"]) == (16, 16 * 4 * 16)
    assert [point["step"] for point in figures["points"]] == [10, 20, 30, 40]
    signed = []
    for point in figures["points"]:
        exact, fp8, bf16 = (arm(recipe, run, point["step"], precision=p) for p in ("fp32", "fp8", "bf16"))
        free, replayed, twin, share = [], [], [], []
        for batch in batches:
            reference, experts = loss_of(exact, batch)
            loss, own = loss_of(fp8, batch)
            signed.append(float(loss - reference))
            free.append(abs(float(loss - reference)) / float(reference))
            replayed.append(abs(float(loss_of(fp8, batch, experts)[0] - reference)) / float(reference))
            twin.append(abs(float(loss_of(bf16, batch)[0] - reference)) / float(reference))
            share.append(moved(own, experts))
        # The losses are float32 sums in another order here: 1e-7 of a loss beside errors of 1e-4.
        assert point["loss_error"] == pytest.approx(fmean(free), rel=1e-2)
        assert point["loss_error_replayed"] == pytest.approx(fmean(replayed), rel=1e-2)
        assert point["bf16_loss_error"] == pytest.approx(fmean(twin), rel=5e-2)
        assert point["rerouted_tokens"] == pytest.approx(fmean(share), abs=1e-12)
    assert any(point["loss_error"] != point["loss_error_replayed"] for point in figures["points"])
    assert min(signed) < 0 < max(signed)  # or magnitudes and signed means would be the same thing


def test_the_gradient_is_that_of_two_batches_with_replayed_routing_on_the_final_weights(measured: Measured) -> None:
    figures, recipe, dataset, run, _ = measured
    batches = held_out_batches(dataset)[:2]
    exact, fp8 = arm(recipe, run, STEPS, precision="fp32"), arm(recipe, run, STEPS, precision="fp8")
    for batch in batches:
        loss, experts = loss_of(exact, batch)
        (loss / 2).backward()
        (loss_of(fp8, batch, experts)[0] / 2).backward()
    pairs = [
        (a.grad.double().flatten(), b.grad.double().flatten())
        for a, b in zip(fp8.parameters(), exact.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    ]
    g, e = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert figures["same_weights_gradient_error"] == pytest.approx(float((g - e).norm() / e.norm()), rel=1e-3)
    assert figures["same_weights_gradient_bias"] == pytest.approx(float(g @ e / (e @ e) - 1), rel=1e-2, abs=1e-5)
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs if b.any())
    assert figures["worst_tensor"]["error"] == pytest.approx(worst, rel=1e-3)
    assert figures["bf16_gradient_error"] < figures["same_weights_gradient_error"] / 2


def test_the_bar_is_for_replayed_routing_and_free_routing_stands_beside_it(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, recipe, dataset, run, _ = measured
    asked = Evaluation(tmp_path / "figures.json", recipe, dataset, run, lambda event: None)
    lengths = {("fp32", True): 1.0, ("fp8", True): 1.1, ("fp8", False): 1.3, ("bf16", True): 1.01}

    def gradient(arm: str, routing: object) -> dict[str, Tensor]:
        return {"w": torch.tensor([lengths[arm, routing is not None]])}

    monkeypatch.setattr(asked.judge, "gradient", gradient)
    figures = asked.run(())
    found = [figures[n] for n in ("same_weights_gradient_error", "gradient_error_free_routing", "bf16_gradient_error")]
    assert found == pytest.approx([0.1, 0.3, 0.01], rel=1e-5)


def test_rows_are_measured_on_the_final_weights_and_outliers_are_really_there(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, recipe, dataset, run, path = measured
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    asked = Evaluation(copy, recipe, dataset, run, lambda event: None)
    seen: dict[str, list[float]] = {}

    def forward(arm: str, batch: Batch, routing: object) -> tuple[Tensor, list[Tensor]]:
        parameters = dict(asked.judge.model(arm).named_parameters())
        sizes = [parameters[name].abs().max().item() for name in ("lm_head.weight", UP)]
        seen.setdefault(arm, sizes)
        return torch.tensor(2.0), []

    monkeypatch.setattr(asked.judge, "_forward", forward)
    monkeypatch.setattr(asked.judge, "gradient", lambda *_: {"w": torch.ones(1)})
    asked.run(("per-tensor, outlier", "per-row"))
    final = dict(arm(recipe, run, STEPS, precision="fp32").named_parameters())
    head, up = (final[name].abs().max().item() for name in ("lm_head.weight", UP))
    assert seen["per-row"] == [head, up]
    assert seen["per-tensor"][0] == head
    assert seen["per-tensor"][1] > 1e4 * up


def test_the_bigram_counts_each_sequence_of_the_ramp_once_and_scores_the_validation_batches(
    measured: Measured,
) -> None:
    figures, recipe, dataset, _, _ = measured
    consumed = sum(recipe.batch_size_at(step) for step in range(STEPS))
    assert consumed < STEPS * 4
    bigram = WittenBellBigram(recipe.model.vocab_size)
    for position in range(consumed):
        batch = dataset.train.batch(position, 1)
        bigram.count(batch.tokens.numpy(), batch.targets.numpy())
    scored = [dataset.validation.batch(4 * i, 4) for i in range(3)]
    bits = bigram.bits_per_byte([(b.tokens.numpy(), b.targets.numpy()) for b in scored], dataset.token_bytes)
    assert figures["bigram_bits_per_byte"] == pytest.approx(bits, rel=1e-12)


def test_what_is_measured_is_not_measured_again_and_a_new_row_measures_itself_alone(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, recipe, dataset, run, path = measured
    done: list[int] = []
    count: Callable[[dict[str, Any]], None] = lambda event: done.append(event["total"])  # noqa: E731
    again = Evaluation(path, recipe, dataset, run, count).run(("toward-zero", "fp8, outlier"))
    assert (again, done) == (json.loads(json.dumps(figures)), [])

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the criteria were measured again")

    monkeypatch.setattr(Evaluation, "_criteria", forbidden)
    copy = path.with_name("copy.json")
    copy.write_bytes(path.read_bytes())
    grown = Evaluation(copy, recipe, dataset, run, count).run(("toward-zero", "per-tensor"))
    assert done == [16] * 16
    assert set(grown["ablations"]) == {"toward-zero", "fp8, outlier", "per-tensor"}
    assert json.loads(copy.read_text()) == grown  # and it is kept


def test_fp32_is_asked_once_a_set_of_weights_and_its_answers_are_those_of_a_row_alone(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, recipe, dataset, run, path = measured
    rows = ("per-row", "per-tensor, outlier", "per-tensor", "block-gradients", "fp8, outlier")
    known = json.loads(path.read_text()) | {"ablations": {}}

    def measure(name: str, rows: tuple[str, ...], figures: dict[str, Any] | None) -> tuple[Evaluation, list[str]]:
        file = tmp_path / f"{name}.json"
        if figures:
            file.write_text(json.dumps(figures))
        asked, calls = Evaluation(file, recipe, dataset, run, lambda event: None), []
        yardstick, gradient, load = asked.judge.yardstick, asked.judge.gradient, asked.judge.load

        def loaded(folder: Path, *, outlier: bool) -> None:
            calls.append(f"{folder.name}{' with an outlier' if outlier else ''}")
            assert asked._yardstick is asked._reference is None  # let go of before other weights take memory
            load(folder, outlier=outlier)

        monkeypatch.setattr(asked.judge, "load", loaded)
        monkeypatch.setattr(asked.judge, "yardstick", lambda *a: calls.append("yardstick") or yardstick(*a))
        monkeypatch.setattr(
            asked.judge, "gradient", lambda arm, r: (arm == "fp32" and calls.append("gradient")) or gradient(arm, r)
        )
        asked.run(rows)
        return asked, calls

    together, calls = measure("together", rows, known)
    assert calls == ["step-40", "yardstick", "gradient", "step-40 with an outlier", "yardstick"]
    for row in rows:
        alone, _ = measure(row, (row,), known)
        assert alone.figures["ablations"][row] == together.figures["ablations"][row], row
    whole, calls = measure("whole", ("toward-zero",), None)
    points = [call for step in (10, 20, 30, 40) for call in (f"step-{step}", "yardstick")]
    assert calls == [*points, "gradient"]
    assert whole.figures["ablations"]["toward-zero"] == measured[0]["ablations"]["toward-zero"]


def test_a_figure_that_is_not_finite_is_measured_again(measured: Measured, tmp_path: Path) -> None:
    figures = measured[0]
    path = tmp_path / "figures.json"

    def kept(change: dict[str, Any]) -> dict[str, Any]:
        path.write_text(json.dumps(figures | change))
        return read_figures(path)

    assert kept({})["ablations"].keys() == {"toward-zero", "fp8, outlier"}
    assert kept({"same_weights_gradient_bias": None}) == {}
    assert kept({"points": [figures["points"][0] | {"loss_error": None}]}) == {}
    rows = figures["ablations"] | {"toward-zero": figures["ablations"]["toward-zero"] | {"loss_error": None}}
    assert kept({"ablations": rows})["ablations"].keys() == {"fp8, outlier"}


def test_unpromoted_accumulation_is_held_against_promoted_on_a_batch_of_256_tokens(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, recipe, dataset, run, path = measured
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    seen: list[tuple[str, int]] = []
    asked = Evaluation(copy, recipe, dataset, run, lambda event: None)

    def forward(name: str, batch: Batch, routing: object) -> tuple[Tensor, list[Tensor]]:
        seen.append((name, batch.tokens.numel()))
        return torch.tensor(2.0 if name == "hopper-row" else 2.1), []

    monkeypatch.setattr(asked.judge, "_forward", forward)
    long = asked.judge.batches[0]
    wide = Batch(*(torch.cat([part] * 40, dim=1) for part in (long.tokens, long.targets, long.document_ids)))
    asked.judge.batches[0] = wide  # sequences of 640 tokens, longer than the batch
    row = asked.run(("hopper-unpromoted",))["ablations"]["hopper-unpromoted"]
    assert seen == [("hopper-row", 256), ("hopper-unpromoted", 256)]
    assert row["loss_error"] == pytest.approx(0.05)
    assert row["verdict"] == "failed"


def test_rows_that_must_fail_and_do_not_take_the_verdict_with_them() -> None:
    good = (0.0001, 0.05, 0.001)
    words = {name: judged(name, *good, "note")["verdict"] for name in ("toward-zero", "per-row", "fp8, outlier")}
    assert words == {
        "toward-zero": "not caught",
        "per-row": "indistinguishable at this size",
        "fp8, outlier": "for reference",
    }
    bad = {"toward-zero": (0.0, 0.0, -0.011), "per-tensor, outlier": (0.1, None, None), "per-row": (0.001, 0.2, 0.0)}
    rows = {name: judged(name, *figures, "note") for name, figures in bad.items()}
    assert [row["verdict"] for row in rows.values()] == ["failed, as it must", "failed, as it must", "failed"]
    assert uncaught({"ablations": rows}) == []
    rows["toward-zero"] = judged("toward-zero", *good, "note")
    (sentence,) = uncaught({"ablations": rows})
    assert "toward-zero" in sentence
    nothing = judged("fp8, outlier", 0.9, None, None, "note")
    assert (nothing["verdict"], nothing["note"]) == ("for reference", "note")


@pytest.mark.slow  # five minutes of training, two of measuring: the bars are for trained weights
def test_on_the_tiny_recipe_fp8_passes_and_what_must_fail_fails(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / "tiny.toml"
    recipe = load_recipe(path, ["numerics.precision=bf16"])
    dataset = prepare(recipe.data, recipe.model.vocab_size, tmp_path / "data")
    run = RunFolder.create(tmp_path / "bf16", recipe)
    Trainer(recipe, run, dataset, arm="bf16", milestones=evaluation.milestones(recipe.training.steps)).run()
    figures = Evaluation(tmp_path / "figures.json", recipe, dataset, run, lambda event: None).run(
        (*evaluation.MUST_FAIL, "fp8, outlier")
    )
    assert max(point["loss_error"] for point in figures["points"]) < 0.0005
    assert figures["same_weights_gradient_error"] < 0.10
    assert abs(figures["same_weights_gradient_bias"]) < 0.01
    rows = figures["ablations"]
    assert {rows[row]["verdict"] for row in evaluation.MUST_FAIL} == {"failed, as it must"}
    # Blocks keep the damage of an outlier in its own tiles.
    assert rows["fp8, outlier"]["loss_error"] < rows["per-tensor, outlier"]["loss_error"] / 4

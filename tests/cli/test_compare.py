"""tessera compare: the verdict in words and in JSON, and a comparison that is stopped and gone on with."""

import json
from pathlib import Path

import pytest

from tessera.store import RunFolder
from tessera.training import compare
from tests.cli.conftest import Answer, tessera
from tests.cli.test_train import losses, press_ctrl_c, start, weights

LAST = 24  # steps; enough for a signal to arrive before the end
STEPS = ["--set", f"training.steps={LAST}"]


@pytest.fixture(scope="module")
def compared(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    folder = tmp_path_factory.mktemp("comparisons") / "whole"
    answer = tessera("compare", recipe, *STEPS, "--out", folder)
    return folder, answer


def test_the_end_tells_losses_verdict_sample_and_report(compared: tuple[Path, Answer]) -> None:
    folder, answer = compared
    assert answer.code == 0, answer.err
    for words in ("FP8 verdict: passed", "same-weights loss error", "bar 0.05%", "Witten-Bell bigram", "Sample:\ndef "):
        assert words in answer.out
    assert f"not resolved: the run has {LAST} steps" in answer.out
    assert f"Report: {folder}/report.html" in answer.out and (folder / "report.html").is_file()
    assert f"bf16: step {LAST}/{LAST}" in answer.err and f"fp8: step {LAST}/{LAST}" in answer.err


def test_json_of_a_finished_comparison_is_one_object_and_nothing_is_done_again(compared: tuple[Path, Answer]) -> None:
    folder, _ = compared
    before = (folder / "arms" / "fp8" / "events.jsonl").read_bytes()
    answer = tessera("compare", "--resume", folder, "--json")
    assert answer.code == 0 and answer.err == ""
    facts = answer.json
    assert facts["verdict"] == "passed" and facts["arms"] == ["bf16", "fp8"]
    assert facts["relative_loss_error"] == "not resolved" and facts["same_weights_loss_error"] < 0.0005
    assert facts["report"] == str(folder / "report.html")
    assert (folder / "arms" / "fp8" / "events.jsonl").read_bytes() == before


def test_a_verdict_that_failed_is_exit_code_1(compared: tuple[Path, Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    figures = json.loads((compared[0] / "compare.json").read_text())
    figures |= {"verdict": "failed", "failures": ["same-weights loss error 0.100% is not below 0.05%"]}
    monkeypatch.setattr(compare, "run", lambda *_, **__: figures)
    answer = tessera("compare", "--resume", compared[0])
    assert answer.code == 1
    assert "FP8 verdict: failed" in answer.out and "missed: same-weights loss error 0.100%" in answer.out
    assert tessera("compare", "--resume", compared[0], "--json").code == 1


def test_ctrl_c_keeps_every_arm_and_resuming_gives_the_unbroken_comparison(
    compared: tuple[Path, Answer], recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    process = start("compare", recipe, *STEPS, "--out", folder)
    answer = press_ctrl_c(process, after="validation at step 2")
    assert answer.code == 130 and answer.out == "" and "Traceback" not in answer.err
    assert "stopping after this step" in answer.err
    assert "checkpoints are kept" in answer.err and f"tessera compare --resume {folder}" in answer.err
    states = [RunFolder.open(path).state() for path in (folder / "arms").iterdir()]
    assert any(state["state"] == "interrupted" for state in states)
    assert not (folder / "compare.json").exists()
    assert tessera("report", folder).code == 0  # of what there is

    answer = tessera("compare", "--resume", folder)
    assert answer.code == 0 and "FP8 verdict: passed" in answer.out
    for arm in ("bf16", "fp8"):
        one, other = (path / "arms" / arm for path in (folder, compared[0]))
        assert losses(one) == losses(other)
        assert weights(one, LAST) == weights(other, LAST)


def test_an_arm_can_be_sampled_and_resumed_by_itself(compared: tuple[Path, Answer]) -> None:
    folder, _ = compared
    by_arm = [tessera("sample", folder / "arms" / arm, "--tokens", 4, "--json").json for arm in ("fp8", "bf16")]
    assert [sample["precision"] for sample in by_arm] == ["fp8", "bf16"]
    assert tessera("sample", folder, "--tokens", 4, "--json").json == by_arm[0]

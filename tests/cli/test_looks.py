"""The verbs that look at what is there: sample, report, doctor, inspect."""

import math
import re
import shutil
from pathlib import Path

import pytest

from tessera.cli import doctor
from tessera.native import library
from tests.cli.conftest import tessera

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("prompt", ["def ", "", "né 日本 🧩", "line\nbreak", "<｜end▁of▁sentence｜>"])  # noqa: RUF001
def test_any_prompt_is_continued_and_the_same_seed_gives_the_same_text(prompt: str, run: Path) -> None:
    words = ["sample", run, "--prompt", prompt, "--tokens", 8, "--seed", 3]
    first, second = tessera(*words, "--json"), tessera(*words, "--json")
    assert first.code == 0 and first.err == "" and first.out == second.out
    assert first.json["prompt"] == prompt and first.json["text"]
    shown = tessera(*words)
    assert shown.code == 0 and shown.out.startswith(prompt)
    assert len(shown.out) == len(prompt + first.json["text"]) + 1


def test_a_run_and_its_latest_checkpoint_give_the_same_sample(run: Path) -> None:
    words = ["--tokens", 6, "--temperature", 0, "--json"]
    of_run, of_checkpoint = (tessera("sample", path, *words).json for path in (run, run / "checkpoints" / "step-4"))
    assert of_run == of_checkpoint
    assert of_run["precision"] == "fp8" and of_run["checkpoint"] == str(run / "checkpoints" / "step-4")


@pytest.mark.parametrize(
    "option, value",
    [
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "nan"),
        ("--top-p", "1.1"),
        ("--top-p", "-1"),
    ],
)
def test_a_number_that_draws_nothing_sensible_is_refused_by_name(option: str, value: str, run: Path) -> None:
    answer = tessera("sample", run, option, value)
    assert answer.code == 2 and answer.out == ""
    assert option in answer.err and "Traceback" not in answer.err


def test_a_terminal_is_not_sent_control_characters(run: Path) -> None:
    answer = tessera("sample", run, "--prompt", "a\x1b[31mb\x07", "--tokens", 40, "--temperature", 5)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", answer.out)


def test_a_report_is_written_of_a_finished_run_and_of_one_that_is_not(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "report.html").unlink()
    assert tessera("report", copy).out == f"{copy}/report.html\n"
    assert (copy / "report.html").is_file()
    events = (copy / "events.jsonl").read_bytes()
    for length in (0, events.index(b"\n") + 1, len(events) // 2):  # nothing yet, the start alone, a torn line
        (copy / "events.jsonl").write_bytes(events[:length])
        answer = tessera("report", copy, "--json")
        assert answer.code == 0 and answer.json == {"report": f"{copy}/report.html"}


def test_doctor_finds_this_machine_sound_and_says_so_in_json() -> None:
    answer = tessera("doctor", "--json")
    assert answer.code == 0 and answer.err == ""
    assert answer.json["problems"] == [] and answer.json["kernels_equal_reference"] is True
    assert tessera("doctor").out.endswith("all is well\n")


def test_doctor_ends_with_1_where_the_kernels_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernels_agree", lambda: False)
    answer = tessera("doctor")
    assert answer.code == 1 and "the reference kernel does not" in answer.out and "all is well" not in answer.out


def test_doctor_says_where_native_kernels_are_missing_what_is_lost_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "library", lambda: library.opened(tmp_path / "kernels.so"))
    answer = tessera("doctor")
    assert answer.code == 0 and answer.out.endswith("all is well\n")  # slower, but sound
    assert "were not built" in answer.out and "several times as long" in answer.out
    assert "install a C++ compiler" in answer.out
    assert tessera("doctor", "--json").json["kernels"] == "torch"


def test_deepseek_v3_has_the_published_figures() -> None:
    facts = tessera("inspect", "model", RECIPES / "deepseek-v3.toml", "--json").json
    assert [f"{facts[key] / 1e9:.1f}" for key in ("total", "active", "active_without_embedding")] == [
        "671.0",
        "37.6",
        "36.6",
    ]
    assert facts["cache_bytes_per_token"] == 70_272
    assert sum(part["total"] for part in facts["parts"].values()) == facts["total"]
    shown = tessera("inspect", "model", RECIPES / "deepseek-v3.toml").out
    assert all(figure in shown for figure in ("671.0B", "37.6B", "36.6B", "70,272", "14.8T"))


@pytest.mark.parametrize("name", ["tiny", "small", "moonlight-16b", "deepseek-v3"])
def test_precision_of_every_shipped_recipe_counts_every_parameter_once(name: str) -> None:
    path = RECIPES / f"{name}.toml"
    rows = tessera("inspect", "precision", path, "--json").json["parameters"]
    counts = tessera("inspect", "model", path, "--json").json
    trained = [row for row in rows if row["gradient"] != "none"]
    assert sum(row["layers"] * math.prod(row["shape"]) for row in trained) == counts["total"] + counts["mtp_total"]


def test_precision_is_shown_as_tables_and_follows_the_recipe(recipe: Path) -> None:
    fp8 = tessera("inspect", "precision", recipe)
    assert fp8.code == 0 and fp8.err == ""
    assert re.search(r"^model\.layers\.\[0-1\] \(2 times\)$", fp8.out, re.MULTILINE)
    assert re.search(r"^  self_attn\.o_proj\.weight +32 x 16 +fp32, bf16 +fp8 \(a\)$", fp8.out, re.MULTILINE)
    assert "(a)  fprop  input e4m3 1x128 2^k, weight e4m3 128x128 2^k" in fp8.out
    assert re.search(r"^  input of o_proj +latent_attention +e5m6 1x128 2\^k +28$", fp8.out, re.MULTILINE)
    assert max(map(len, fp8.out.splitlines())) < 100
    bf16 = tessera("inspect", "precision", recipe, "--set", "numerics.precision=bf16").out
    assert "e4m3" not in bf16 and "fp8" not in bf16
    as_json = tessera("inspect", "precision", recipe, "--json").json
    assert as_json["cached_bytes_per_token"] == sum(r["layers"] * r["bytes_per_token"] for r in as_json["cached"])


def test_accumulation_gives_a_row_for_each_length_and_a_plot(tmp_path: Path) -> None:
    words = ["inspect", "accumulation", "--largest-k", 1024, "--size", 8, "--plot", tmp_path / "plot.svg"]
    facts = tessera(*words, "--json").json
    assert [(row["data"], row["k"]) for row in facts["rows"]] == [
        (data, k) for data in ("random sign", "same sign") for k in (512, 1024)
    ]
    assert all(row["promoted_128"] < row["unpromoted"] for row in facts["rows"])
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")
    shown = tessera(*words)
    assert shown.code == 0 and "promoted every 128" in shown.out and "plot.svg" in shown.err


def test_a_plot_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a regular file")
    words = ["--largest-k", 512, "--size", 2, "--plot", tmp_path / "file" / "plot.svg"]
    answer = tessera("inspect", "accumulation", *words)
    assert answer.code == 2 and "file/plot.svg" in answer.err


def test_the_moving_average_can_be_sampled_where_the_run_keeps_one(recipe: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "averaged"
    settings = ("--set", "training.ema_decay=0.5", "--set", "optimizer.learning_rate=0.05")
    answer = tessera("train", recipe, *settings, "--out", folder)
    assert answer.code == 0 and " averaged)" in answer.err
    plain, averaged = (tessera("sample", folder, *words, "--json").json for words in ((), ("--ema",)))
    assert (plain["ema"], averaged["ema"]) == (False, True)
    assert plain["text"] != averaged["text"]
    answer = tessera("sample", run, "--ema")
    assert answer.code == 2 and "holds no average of the weights" in answer.err and "training.ema_decay" in answer.err

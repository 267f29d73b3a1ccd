"""The page is one file that says everything, loads nothing, and takes no text of a run for markup."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from tessera.recipe import UserError
from tessera.training.report import write_report
from tessera.training.report.page import data_block
from tests.training.report.example_runs import RECIPE, Shape, comparison, event, run, write_events

SMALL = Shape(steps=60, layers=2, experts=4)
HOSTILE = """</script><script>document.documentElement.dataset.owned = "yes"</script>
<!-- <img src=x onerror="document.documentElement.dataset.owned = 'yes'"> -->
]]> {{ data }} {% raw %} & &amp; \u2028 \ud800 \x00 "'`"""


class Page(HTMLParser):
    """The elements of a page, the text between them, and the JSON of its data block."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\N{NARROW NO-BREAK SPACE}", " ").split())

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.elements if tag == "section"]


def test_a_comparison_has_every_part(tmp_path: Path) -> None:
    path = write_report(comparison(tmp_path / "tiny", SMALL))
    page = Page(path)
    assert path == tmp_path / "tiny" / "report.html"
    assert page.sections == [
        "verdict",
        "learning",
        "loss",
        "experts",
        "health",
        "progress",
        "ablations",
        "sample",
        "run",
    ]
    for words in (
        "Passed: FP8 trains like BF16",
        "0.012 %",
        "Witten-Bell bigram",
        "Toward-zero",
        "def read_header",
        "num_hidden_layers = 4",
    ):
        assert words in page.text
    assert [arm["name"] for arm in page.data["arms"]] == ["fp8", "bf16", "control-1", "control-2"]


def test_a_single_run_has_its_parts_and_no_verdict(tmp_path: Path) -> None:
    page = Page(write_report(run(tmp_path / "mine", SMALL)))
    assert page.sections == ["verdict", "learning", "loss", "experts", "health", "progress", "sample", "run"]
    assert "Finished: 60 steps in FP8" in page.text and page.data["differences"] is None


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    path = write_report(comparison(tmp_path / "tiny", SMALL))
    loading = {"src", "srcset", "data", "poster", "action", "formaction", "background", "ping", "manifest"}
    for tag, attributes in Page(path).elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "video", "audio"), tag
        assert not loading & attributes.keys(), (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
    html = path.read_text(encoding="utf-8")
    own = "".join(
        files("tessera.training.report").joinpath(name).read_text()
        for name in ("style.css", "page.js", "line_chart.js")
    )
    assert "@import" not in html and not re.search(r"url\s*\(", html)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts)\b|import\(", own)


def test_the_policy_allows_this_pages_script_and_style_alone(tmp_path: Path) -> None:
    html = write_report(run(tmp_path / "mine", SMALL)).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    directives = policy[1].replace("&#39;", "'")
    assert directives.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in directives
    assert not re.search(r"\s(style|on\w+)=", re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.S)), (
        "the policy would refuse it"
    )


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    ablations = {HOSTILE: {"loss_error": 1.0, "verdict": HOSTILE, "note": HOSTILE}}
    changes = {
        "sample": {"prompt": HOSTILE, "text": HOSTILE},
        "failures": [HOSTILE],
        "name": HOSTILE,
        "verdict": "failed",
    }
    more = {"relative_loss_error_reason": HOSTILE, "worst_tensor": {"name": HOSTILE, "error": 0.5}}
    folder = comparison(tmp_path / "tiny", SMALL, ablations=ablations, **changes, **more)
    (folder / "recipe.toml").write_text(
        RECIPE + "# " + HOSTILE.replace("\ud800", "").replace("\n", " "), encoding="utf-8"
    )
    arm = folder / "arms" / "fp8"
    lines = [json.loads(line) for line in (arm / "events.jsonl").read_text().splitlines()]
    lines[0] |= {"notes": [HOSTILE], "precision": HOSTILE, "device": HOSTILE}
    tensors = {HOSTILE: {"relative_rms": 0.02}}
    loads = event("load", 59, layers=[HOSTILE], counts=[[1, 2]], bias_min=[0], bias_max=[0])
    write_events(arm, [*lines, event("health", 59, tensors=tensors), loads])
    page = Page(write_report(folder))
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(tag == "img" for tag, _ in page.elements)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    fp8 = page.data["arms"][0]
    assert fp8["loads"]["layers"][0]["name"] == HOSTILE and fp8["health"]["tensors"][0]["name"]
    assert page.text.count("{{ data }}") >= 5, "the template was not run over a run's text"


def test_the_data_block_gives_back_what_went_in_and_cannot_end_its_element() -> None:
    value = {"text": HOSTILE, "numbers": [1, 2.5, None, True]}
    block = data_block(value)
    assert json.loads(block) == value and not set("<>&") & set(block)
    with pytest.raises(ValueError):
        data_block(float("nan"))


@pytest.mark.parametrize("missing", ["health", "load", "validation", "baseline", "sample", "end", "start", "step"])
def test_any_part_may_be_missing(tmp_path: Path, missing: str) -> None:
    folder = comparison(tmp_path / "tiny", SMALL)
    for arm in ("fp8", "bf16", "control-1"):
        lines = [json.loads(line) for line in (folder / "arms" / arm / "events.jsonl").read_text().splitlines()]
        write_events(folder / "arms" / arm, [line for line in lines if line["kind"] != missing])
    page = Page(write_report(folder))
    gone = {"health": "health", "load": "experts"}.get(missing)
    assert gone not in page.sections and "verdict" in page.sections


def test_fields_may_be_missing_or_null(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL)
    kinds = ("start", "step", "load", "health", "validation", "baseline", "sample", "end")
    write_events(folder, [event(kind, 0) for kind in kinds] + [event("step", 1, lm_loss=None)])
    assert "Finished" in Page(write_report(folder)).text


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_run_of_no_or_few_steps_gives_a_page(tmp_path: Path, kept: int) -> None:
    folder = run(tmp_path / "mine", Shape(steps=kept), state="running")
    page = Page(write_report(folder))
    assert page.data["steps"] == list(range(kept)) and ("progress" in page.sections) == bool(kept)


def test_a_run_that_has_written_no_events_yet_gives_a_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL, state="running")
    (folder / "events.jsonl").unlink()
    assert "Running: no step yet" in Page(write_report(folder)).text


def test_an_unfinished_comparison_gives_a_page(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "tiny", SMALL)
    (folder / "compare.json").unlink()
    rmtree(folder / "arms" / "control-2")
    (folder / "arms" / "control-1" / "run.json").unlink()  # its process has only made the folder
    page = Page(write_report(folder))
    assert "No verdict yet" in page.text and [arm["name"] for arm in page.data["arms"]] == ["fp8", "bf16"]


def test_a_comparison_of_which_no_arm_started_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    page = Page(write_report(tmp_path))
    assert "no arm has started" in page.text and page.data["arms"] == []


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    again = [line for line in lines if line["step"] >= 40 and line["kind"] != "start"]
    write_events(folder, [*lines[:-9], event("start", 40, resumed=True, steps=60, precision="fp8"), *again])
    page = Page(write_report(folder))
    assert page.data["steps"] == list(range(60)) and "at step 40" in page.text


def test_a_hundred_thousand_steps_fit_in_five_megabytes(tmp_path: Path) -> None:
    shape = Shape(
        steps=100_000, layers=16, experts=64, load_interval=100, health_interval=500, validation_interval=1000
    )
    path = write_report(run(tmp_path / "long", shape))
    page = Page(path)
    assert path.stat().st_size < 5_000_000
    assert len(page.data["steps"]) <= 1500 and page.data["grouped"] > 1
    assert page.data["steps"][-1] > 99_900


def test_the_report_of_a_report_folder_is_replaced(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL)
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_what_is_no_run_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not valid JSON"), ("[]", "JSON object"), ('{"schema": 99}', "upgrade tessera")]
)
def test_a_damaged_or_newer_comparison_file_is_named(tmp_path: Path, text: str, reason: str) -> None:
    folder = comparison(tmp_path / "tiny", SMALL)
    (folder / "compare.json").write_text(text)
    with pytest.raises(UserError, match=reason) as error:
        write_report(folder)
    assert "compare.json" in str(error.value)


def test_a_damaged_event_is_named_with_its_line(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SMALL)
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:]]))
    with pytest.raises(UserError, match=r"events\.jsonl: line 4"):
        write_report(folder)


def test_making_a_report_needs_no_torch() -> None:
    code = "import sys, tessera.training.report; sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_chart_librarys_licence_travels_with_it(tmp_path: Path) -> None:
    html = write_report(run(tmp_path / "mine", SMALL)).read_text(encoding="utf-8")
    assert "Copyright (c) 2022 Leon Sorokin" in html and "uPlot (v1.6.32)" in html


def variables(style: str, dark: bool) -> dict[str, str]:
    """The colours of one light: the first block of variables, and the second over it in the dark."""
    blocks = [
        dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})\b", block))
        for block in re.findall(r":root[^{]*\{([^}]*)\}", style)
    ]
    return blocks[0] | blocks[1] if dark else blocks[0]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_from_their_ground(dark: bool) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what a chart is made of."""
    colours = variables(files("tessera.training.report").joinpath("style.css").read_text(), dark)
    text, lines = ("ink", "soft", "good", "bad", "open"), ("control", *(f"arm-{i}" for i in range(1, 7)))
    for ground in ("paper", "card", "faint"):
        for name in (*text, *lines):
            pair = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
            assert (pair[0] + 0.05) / (pair[1] + 0.05) >= (4.5 if name in text else 3.0), (name, ground)

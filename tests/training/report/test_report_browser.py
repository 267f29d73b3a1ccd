"""In a real browser: no error, every chart drawn, nothing requested, and the controls do what they say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tessera.training.report import write_report
from tests.training.report.browser import needs_chromium, render
from tests.training.report.example_runs import Shape, comparison, event, events, run, write_events

pytestmark = needs_chromium
SHAPE = Shape(steps=200, layers=3, experts=8)
ALL_CHARTS = {
    "chart-bits", "chart-loss", "chart-difference", "chart-experts", "chart-bias", "chart-acceptance", "tensors",
    "chart-tokens_per_s", "chart-mfu", "chart-gradient_norm", "chart-learning_rate", "chart-mtp_loss",
    "chart-balance_loss",
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(comparison(tmp_path_factory.mktemp("runs") / "tiny", SHAPE))


def answers(page: Path, folder: Path, script: str, **options: Any) -> Any:
    """What a script in the page, the body of a function, returns."""
    wrapped = f"""setTimeout(async () => {{
      const answer = await (async () => {{ {script} }})();
      const box = document.createElement("pre"); box.id = "answer"; box.textContent = JSON.stringify(answer);
      document.body.append(box);
    }}, 300);"""
    rendered = render(page, folder, script=wrapped, **options)
    assert rendered.console == []
    found = re.search(r'<pre id="answer">(.*?)</pre>', rendered.dom, re.S)
    assert found, "the script did not come to its end"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (500, False)])
def test_every_chart_is_drawn_without_an_error(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    rendered = render(page, tmp_path, width=width, dark=dark)
    assert rendered.console == []
    assert 'data-drawn="yes"' in rendered.dom
    drawn = rendered.drawn()
    assert drawn.keys() >= ALL_CHARTS and all(drawn.values()), drawn


def test_canvases_hold_ink_in_the_arms_colours_and_fit_their_page(page: Path, tmp_path: Path) -> None:
    found = answers(page, tmp_path, """
      const wanted = getComputedStyle(document.documentElement).getPropertyValue("--arm-1").trim();
      const rgb = [1, 3, 5].map((i) => parseInt(wanted.slice(i, i + 2), 16));
      const canvases = [...document.querySelectorAll(".uplot canvas")].map((canvas) => {
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let inked = 0, coloured = 0;
        for (let i = 0; i < pixels.length; i += 4) {
          inked += pixels[i + 3] > 0;
          coloured += pixels[i + 3] > 200 && rgb.every((c, j) => Math.abs(c - pixels[i + j]) < 12);
        }
        return { id: canvas.closest(".chart").id, inked, coloured };
      });
      return { canvases, overflow: document.documentElement.scrollWidth - innerWidth };
    """, width=600)  # fmt: skip
    inked = {canvas["id"]: canvas["inked"] for canvas in found["canvases"]}
    coloured = {canvas["id"]: canvas["coloured"] for canvas in found["canvases"]}
    assert all(count > 200 for count in inked.values()), inked
    assert all(coloured[name] > 100 for name in ("chart-loss", "chart-difference", "chart-tokens_per_s")), coloured
    assert found["overflow"] <= 0


def test_the_browser_requests_nothing(page: Path, tmp_path: Path) -> None:
    assert answers(page, tmp_path, "return performance.getEntriesByType('resource').map((entry) => entry.name);") == []


def test_the_policy_refuses_a_foreign_script_and_a_foreign_image(page: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    foreign = (
        '<script>document.documentElement.dataset.owned = "yes"</script><img src="http://127.0.0.1:9/x.png"></body>'
    )
    changed.write_text(page.read_text(encoding="utf-8").replace("</body>", foreign), encoding="utf-8")
    rendered = render(changed, tmp_path)
    assert "data-owned" not in rendered.dom
    assert sum("Content Security Policy" in line for line in rendered.console) == 2


def test_hostile_text_does_nothing(tmp_path: Path) -> None:
    own = "document.documentElement.dataset.owned = 'yes'"
    hostile = f'</script></pre><script>{own}</script><img src=x onerror="{own}">'
    folder = run(tmp_path / "mine", SHAPE)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    extra = [
        event("load", 199, layers=[hostile], counts=[[1, 2]], bias_min=[0], bias_max=[0]),
        event("health", 199, tensors={f"{hostile}.{hostile}": {"relative_rms": 0.02}}),
        event("sample", 199, prompt=hostile, text=hostile),
    ]
    write_events(folder, [*lines, *extra])
    rendered = render(write_report(folder), tmp_path)
    assert rendered.console == [] and "data-owned" not in rendered.dom


def test_arrow_keys_move_the_crosshair_and_say_the_values(page: Path, tmp_path: Path) -> None:
    found = answers(page, tmp_path, """
      const chart = document.getElementById("chart-loss"), spoken = document.getElementById("spoken");
      const press = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const said = [];
      for (const key of ["Home", "ArrowRight", "End", "ArrowLeft"]) {
        press(key);
        await new Promise((done) => setTimeout(done, 100));
        said.push(spoken.textContent);
      }
      const place = (id) => document.querySelector(`#${id} .place`).textContent;
      return { said, step: place("chart-loss"), other: place("chart-difference") };
    """)  # fmt: skip
    assert [text.split(":")[0] for text in found["said"]] == ["Step 0", "Step 1", "Step 199", "Step 198"]
    assert "FP8 " in found["said"][0] and "BF16 " in found["said"][0]
    assert found["step"] == found["other"] == "step 198"


def test_the_controls_do_what_they_say(page: Path, tmp_path: Path) -> None:
    found = answers(page, tmp_path, """
      const rows = () => document.querySelectorAll("#tensors tbody tr").length;
      const $ = (selector) => document.querySelector(selector);
      const type = (id, value) => {
        document.getElementById(id).value = value;
        document.getElementById(id).dispatchEvent(new Event("input"));
      };
      const out = { first: rows() };
      $("#health-more").click(); out.all = rows();
      type("health-find", "layers.2 kv_b weight"); out.one = rows();
      type("health-find", "nothing of the kind"); out.none = $("#tensors tbody").textContent;
      type("health-find", ""); type("health-operand", "weight");
      const operands = [...document.querySelectorAll("#tensors td.operand")].map((cell) => cell.textContent);
      out.operands = [...new Set(operands)];
      type("health-operand", "");
      const heading = () => $("#tensors thead").querySelectorAll("button")[2];
      heading().click();
      out.sorted = $("#tensors th[aria-sort]").getAttribute("aria-sort");
      out.worst = $("#tensors tbody tr").textContent;
      $("#health-outliers").click(); out.outliers = rows();
      document.querySelectorAll("#layers button")[2].click();
      out.layer = [...document.querySelectorAll("#layers button")].map((button) => button.getAttribute("aria-pressed"));
      out.readout = $("#expert-readout").textContent;
      document.querySelectorAll("#smoothing input")[2].click();
      const legend = $("#chart-loss .legend button");
      legend.click(); out.hidden = legend.getAttribute("aria-pressed");
      document.querySelectorAll("#smoothing input")[0].click();
      out.stillHidden = $("#chart-loss .legend button").getAttribute("aria-pressed");
      document.querySelectorAll("#expert-arm input")[1].click();
      out.drawn = $("#chart-loss").dataset.drawn;
      return out;
    """)  # fmt: skip
    assert found["first"] == 40 and found["all"] == 3 * 5 * 5 + 5 * 2 + 5 * 3 * 2 and found["one"] == 1
    assert found["none"] == "No tensor fits." and found["operands"] == ["weight"]
    assert found["sorted"] == "descending" and "kv_b_proj" in found["worst"] and found["outliers"] == 2
    assert found["layer"] == ["false", "false", "true"] and found["readout"].startswith("Layer 3, 8 experts")
    assert found["hidden"] == found["stillHidden"] == "false" and int(found["drawn"]) > 0


def test_printing_shows_everything_in_light_colours_and_goes_back(page: Path, tmp_path: Path) -> None:
    found = answers(page, tmp_path, """
      const look = () => [document.querySelectorAll("details[open]").length,
        getComputedStyle(document.documentElement).getPropertyValue("--card").trim()];
      const before = look(); dispatchEvent(new Event("beforeprint"));
      const during = look(); dispatchEvent(new Event("afterprint"));
      return { before, during, after: look() };
    """, dark=True)  # fmt: skip
    assert found["before"] == found["after"] and found["before"][0] == 0
    assert found["during"][0] == 3 and found["during"][1] == "#ffffff"


@pytest.mark.parametrize("case", ["empty", "one step", "no twin", "nulls", "long", "many experts"])
def test_odd_runs_are_drawn_without_an_error(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "run"
    if case == "empty":
        write_events(run(folder, SHAPE, state="running"), [])
    elif case == "one step":
        run(folder, Shape(steps=1, validation_interval=1))
    elif case == "no twin":
        comparison(folder, SHAPE)
        for name in ("bf16", "control-1", "control-2"):
            (folder / "arms" / name / "run.json").unlink()
    elif case == "nulls":
        kinds = ("start", "step", "load", "health", "validation", "baseline", "sample", "end")
        odd = [event("load", 1, layers=["a"], counts=[[]]), event("health", 1, tensors={"a.b": {}, "c": {}})]
        write_events(run(folder, SHAPE), [*(event(kind, 0) for kind in kinds), event("step", 1, lm_loss=None), *odd])
    elif case == "long":
        run(folder, Shape(steps=4000, load_interval=5))
    else:
        run(folder, Shape(steps=30, layers=12, experts=256))
    rendered = render(write_report(folder), tmp_path)
    assert rendered.console == [] and 'data-drawn="yes"' in rendered.dom
    if case not in ("empty", "nulls"):
        assert rendered.drawn()["chart-loss"] > 0


def test_unstable_steps_are_marked_on_the_curve_and_in_its_legend(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SHAPE)
    calm = render(write_report(folder), tmp_path).drawn()["chart-loss"]
    lines = events(SHAPE)
    next(line for line in lines if line["kind"] == "step" and line["step"] == 90)["lm_loss"] = None
    marked = [event("unstable", step, reason="a spike", decision="skipped") for step in (40, 90)]
    write_events(folder, [*lines, *marked])
    rendered = render(write_report(folder), tmp_path)
    assert rendered.console == [] and "not finite or a spike" in rendered.dom
    # Two marks more, of which one stands on the step before; and one step less in each of the two lines of the loss.
    assert int(rendered.drawn()["chart-loss"]) == int(calm) + 2 - 2


def test_averaged_weights_have_a_line_and_a_bar_of_their_own(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", SHAPE)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "validation":
            line["ema_bits_per_byte"] = line["bits_per_byte"] - 0.1
    last = next(line for line in reversed(lines) if line["kind"] == "validation")
    write_events(folder, lines)
    found = answers(write_report(folder), tmp_path, """
      const words = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
      return { legend: words("#learning figure"), bars: words("#learning .bars tr") };
    """)  # fmt: skip
    assert any("FP8, averaged weights" in text for text in found["legend"][1:])
    assert any("averaged weights" in text and f"{last['ema_bits_per_byte']:.3f}" in text for text in found["bars"])

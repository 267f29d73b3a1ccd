"""benchmarks/gemm.py measures every product and quantiser, and its verdict on errors can fail."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemm
import gemm_systems
import paired
import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
M, N, K = 70, 48, 200
FP8_ROWS = {
    (kind, scales, includes)
    for kind, quantised in (("fprop", "x"), ("dgrad", "dy"), ("wgrad", "dy"), ("grouped", "x"))
    for scales in ("power_of_two", "float32")
    for includes in ("", f"quantise {quantised}")
}


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, BENCHMARKS / "gemm.py", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gemm") / "rows.json"
    words = ["--shapes", f"{M}x{N}x{K}", "--rounds", "1", "--quantisers", "l2"]
    done = run(*words, "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read == json.loads(out.read_text())
    return read


def test_json_has_a_row_for_every_product(found: dict[str, Any]) -> None:
    assert list(found) == ["rows", "quantisers", "machine"]
    ours = [row for row in found["rows"] if row["system"] == "tessera"]
    named = [(row["kind"], row["scales"], row["includes"]) for row in ours if row["precision"] == "fp8"]
    assert set(named) == FP8_ROWS and len(named) == len(FP8_ROWS)
    assert {row["kind"] for row in ours if row["precision"] == "bf16"} == {"fprop", "dgrad", "wgrad", "grouped"}
    theirs = [(row["kind"], row["precision"], row["scales"]) for row in found["rows"] if row["system"] == "torch"]
    assert theirs == [
        *((kind, "bf16", "") for kind in ("fprop", "dgrad", "wgrad")),
        ("fprop", "fp32", ""),
        ("fprop", "fp8", "tensor"),
        ("fprop", "fp8", "row"),
        *[("grouped", "bf16", "")] * 2,
    ]


def test_each_row_has_its_figures_or_says_why_not(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        assert (row["m"], row["n"], row["k"], row["threads"]) == (M, N, K, 1)
        assert bool(row["isa"]) == (row["system"] == "tessera")
        if not row["supported"]:
            assert row["system"] == "torch" and "not supported: " in row["note"]
            continue
        assert row["ratio_to_bf16_mm"] > 0 and row["wall_ratio_to_bf16_mm"] > 0
        assert row["quartiles"] == [row["median_ms"]] * 2 and row["median_wall_ms"] > 0
        assert row["gflops_per_cpu_s"] == pytest.approx(2 * M * N * K / (row["median_ms"] / 1e3) / 1e9)


def test_errors_of_tessera_are_there_and_under_the_bar(found: dict[str, Any]) -> None:
    for row in found["rows"]:
        if row["system"] == "tessera":
            assert 0 < row["relative_error"] <= 2e-6
        else:
            assert row["relative_error"] is None


def test_quantisers_are_held_against_a_copy_of_as_many_bytes(found: dict[str, Any]) -> None:
    rows = {(row["quantiser"], row["from"]): row for row in found["quantisers"]}
    tiles = [(tile, source) for source in ("bf16", "fp32") for tile in ("1x128", "128x1", "128x128")]
    assert list(rows) == [*tiles, ("requantise_columns", "1x128"), ("decode", "1x128")]
    elements = 256 * 896
    expected = {  # scales of four bytes: one for 128 elements, or for 128 x 128
        ("1x128", "bf16"): elements * 3 + elements // 32,
        ("128x1", "fp32"): elements * 5 + elements // 32,
        ("128x128", "fp32"): elements * 5 + elements // 4096,
        ("requantise_columns", "1x128"): elements * 2 + elements // 16,
        ("decode", "1x128"): elements * 5 + elements // 32,
    }
    assert {key: rows[key]["bytes"] for key in expected} == expected
    for row in rows.values():
        assert row["fraction_of_copy"] > 0 and row["copy_gb_per_s"] > 0 and row["call_ms"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)


def broken(name: str, change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    whole = getattr(gemm_systems.Arithmetic, name)
    monkeypatch.setattr(gemm_systems.Arithmetic, name, lambda self, *args: change(whole(self, *args)))
    made = gemm_systems.products(M, N, K, True, gemm_systems.Arithmetic(""), paired.Clock(1))
    facts = {"m": M, "n": N, "k": K}
    keys = ("kind", "system", "precision", "scales", "includes", "relative_error")
    return gemm.wrong([facts | {key: getattr(product, key) for key in keys} for product in made])


@pytest.mark.parametrize(("name", "rows"), [("fp8", 16), ("bf16", 4)])
@pytest.mark.parametrize("factor", [1 + 1e-5, float("nan")])
def test_a_product_that_is_off_fails(name: str, rows: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(broken(name, lambda y: y * factor, monkeypatch)) == rows


def test_rounding_the_result_to_bf16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(broken("fp8", lambda y: y.bfloat16().float(), monkeypatch)) == 16


@pytest.mark.parametrize(("kind", "shape"), [("fprop", (5, 7)), ("dgrad", (5, 6)), ("wgrad", (7, 6))])
def test_the_error_is_that_of_the_whole_product(kind: str, shape: tuple[int, int]) -> None:
    """M, N, K = 5, 7, 6; the sum of the error's squares by a loop over elements."""
    draw = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*size, generator=draw) for size in ((5, 6), (7, 6), (5, 7)))
    a, b = {"fprop": (x, w), "dgrad": (dy, w), "wgrad": (dy, x)}[kind]
    term = {
        "fprop": lambda i, j: sum(x[i, c].item() * w[j, c].item() for c in range(6)),
        "dgrad": lambda i, j: sum(dy[i, c].item() * w[c, j].item() for c in range(7)),
        "wgrad": lambda i, j: sum(dy[c, i].item() * x[c, j].item() for c in range(5)),
    }[kind]
    exact = torch.tensor([[term(i, j) for j in range(shape[1])] for i in range(shape[0])], dtype=torch.float64)
    y = (exact + 0.01).float()
    away = float((y.double() - exact).norm() / exact.norm())
    assert gemm_systems.relative_error(kind, y, a, b) == pytest.approx(away, rel=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 17, 512])
def test_groups_are_ragged_and_hold_every_row(rows: int) -> None:
    offsets = gemm_systems.ragged(rows)
    assert offsets.numel() == 17 and offsets[0] == 0 and offsets[-1] == rows
    sizes = offsets.diff()
    assert bool((sizes >= 0).all())
    assert rows < 512 or len(set(sizes.tolist())) > 10


def test_a_sample_is_divided_by_the_mean_of_its_neighbours() -> None:
    """The machine gets slower by 1 s a call, and the call takes twice what its peer would have taken then."""
    seconds = iter(range(1, 100))

    def clock(timed: paired.Timed) -> tuple[float, float]:
        now = float(next(seconds))
        return (2 * now if timed is call else now), now

    peer = paired.Timed(lambda: None)
    call = paired.Timed(lambda: None, peer)
    paired.measure([call], 4, clock)  # type: ignore[arg-type]
    figures = call.figures()
    assert figures["ratio"] == 2 and figures["ratio_quartiles"] == [2, 2] and figures["wall_ratio"] == 1
    assert call.own == [(2 * now, now) for now in (3.0, 6.0, 9.0, 12.0)]


def test_a_part_of_the_work_is_scaled_and_short_calls_are_repeated() -> None:
    calls: list[int] = []
    timed = paired.Timed(lambda: calls.append(0), scale=1e3)
    paired.measure([timed], 1, paired.Clock(1))
    assert timed.repeats > 1 and len(calls) == 2 + 4 * timed.repeats
    timed.scale, (cpu, wall) = 1.0, timed.own[0]
    unscaled = paired.Clock(1)(timed)
    assert wall > 50 * unscaled[1] and cpu > 50 * unscaled[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "large"], "--shapes large: neither small, deepseek-v3 nor all, nor MxNxK"),
        (["--shapes", "0x2x3"], "nor MxNxK"),
        (["--isa", "avx1024"], "--isa avx1024: this machine has "),
        (["--rounds", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(words: list[str], message: str) -> None:
    done = run(*words)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr and not done.stdout

"""benchmarks/attention.py times the same attention on both sides, and its verdict on errors can fail."""

import json
import sys
from pathlib import Path
from typing import Any

import attention
import pytest
import torch
from torch import Tensor

TINY = {"tiny": (2, 20, 3, 8, 4, 6)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(attention, "SHAPES", TINY)
    monkeypatch.setattr(attention, "keep_memory", lambda: False)  # a setting of the whole test process
    monkeypatch.setattr(sys, "argv", ["attention.py", "--rounds", "1", "--out", str(tmp_path / "rows.json")])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return tmp_path / "rows.json"


def test_every_system_has_its_figures_and_ours_its_error(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attention.main()
    rows = json.loads(tiny.read_text())["rows"]
    assert [row["system"].split()[0] for row in rows] == ["torch", "torch", "torch", "tessera"]
    assert all(row["median_ms"] > 0 and row["times_as_fast"] > 0 for row in rows)
    assert [row["relative_error"] is None for row in rows] == [True, True, True, False]
    assert 1e-4 < rows[-1]["relative_error"] < attention.ERROR_BAR
    assert capsys.readouterr().out.count("times as fast") == len(rows)


@pytest.mark.parametrize("which", range(4), ids=["out", "dq", "dkv", "dk_rope"])
def test_a_wrong_output_or_gradient_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    def wrong(results: tuple[Tensor, ...], first: int) -> tuple[Tensor, ...]:
        return tuple(x * 1.1 if first + i == which else x for i, x in enumerate(results))

    forward, backward = attention.attention, attention.attention_backward

    def changed_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, log_sum_exp = forward(*arguments)
        return wrong((out,), 0)[0], log_sum_exp

    def changed_backward(dout: Tensor, out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return wrong(backward(dout, out if which else out / 1.1, *arguments), 1)

    monkeypatch.setattr(attention, "attention", changed_forward)
    monkeypatch.setattr(attention, "attention_backward", changed_backward)
    with pytest.raises(SystemExit, match="tiny: relative error"):
        attention.main()

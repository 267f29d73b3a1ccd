"""Weights on disk: exactly the model's tensors, or an error that names the first that is not, and nothing copied."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tessera.model.weights import read_tensors, weights, write_tensors
from tessera.recipe import UserError
from tests.model import shapes

SECTION = shapes.section(num_nextn_predict_layers=1)
HEAD = "lm_head.weight"
Change = Callable[[dict[str, Tensor]], object]


def test_weights_come_back_bit_for_bit_and_what_is_shared_is_written_once(tmp_path: Path) -> None:
    model = shapes.with_biases(shapes.model(SECTION))
    path = tmp_path / "model.safetensors"
    write_tensors(path, weights(model))
    other = shapes.model(SECTION, seed=1)
    read_tensors(path, weights(other))
    before, after = weights(model), weights(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum("embed_tokens" in name for name in before) == 1
    assert sum(name.endswith("e_score_correction_bias") for name in before) == 3  # two MoE layers, the MTP block
    floats = sum(t.numel() for t in before.values())
    assert 4 * floats < path.stat().st_size < 4 * floats + 20_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(HEAD), f"has no tensor {HEAD}"),
        (lambda t: t.update(extra=torch.ones(1)), "has a tensor extra"),
        (lambda t: t.update({HEAD: t[HEAD][:-1].contiguous()}), rf"{HEAD} is .*\(96, 48\).*\(97, 48\)"),
        (lambda t: t.update({HEAD: t[HEAD].bfloat16()}), f"{HEAD} is torch.bfloat16"),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_a_file_with_other_tensors_is_refused_before_anything_is_copied(
    change: Change, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {name: t.clone() for name, t in weights(shapes.model(SECTION)).items()}
    change(tensors)
    save_file(tensors, path)
    model = shapes.model(SECTION, seed=1)
    before = {name: t.clone() for name, t in weights(model).items()}
    with pytest.raises(UserError, match=words):
        read_tensors(path, weights(model))
    assert all(torch.equal(before[name], t) for name, t in weights(model).items())


def test_a_file_that_is_none_and_a_folder_that_is_not_there_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        read_tensors(path, {})
    with pytest.raises(UserError, match=r"gone.*cannot be written"):
        write_tensors(tmp_path / "gone" / "model.safetensors", {"a": torch.ones(1)})

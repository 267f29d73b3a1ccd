"""Tensors in a folder: exactly those that are asked for, or an error naming the first that is not, and no copy."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessera.model.tensor_folder import check_tensors, read_tensors, write_tensors
from tessera.model.weights import require_bytes_of, weights
from tessera.recipe import UserError
from tessera.store.checkpoint_path import TENSORS
from tests.model import shapes

SECTION = shapes.section(num_nextn_predict_layers=1)
HEAD = "lm_head.weight"
Change = Callable[[dict[str, Tensor]], object]


def test_weights_come_back_bit_for_bit_and_what_is_shared_is_written_once(tmp_path: Path) -> None:
    model = shapes.with_biases(shapes.model(SECTION))
    folder = tmp_path / "model"
    write_tensors(folder, weights(model))
    other = shapes.model(SECTION, seed=1)
    read_tensors(folder, weights(other))
    before, after = weights(model), weights(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum("embed_tokens" in name for name in before) == 1
    assert sum(name.endswith("e_score_correction_bias") for name in before) == 3  # two MoE layers, the MTP block
    floats = sum(t.numel() for t in before.values())
    assert 4 * floats < (folder / TENSORS).stat().st_size < 4 * floats + 20_000
    assert sorted(path.name for path in folder.iterdir()) == [TENSORS, "model.safetensors.index.json"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalars_empty_tensors_and_views_come_back_too(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=dtype).reshape(4, 6)
    tensors = {"scalar": whole[1, 2].clone(), "empty": whole[:0], "column": whole[:, 3].clone(), "turned": whole.T}
    write_tensors(tmp_path / "some", tensors)
    found = {name: torch.full(t.shape, 7, dtype=dtype) for name, t in tensors.items()}
    read_tensors(tmp_path / "some", found)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


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
    tensors = {name: t.clone() for name, t in weights(shapes.model(SECTION)).items()}
    change(tensors)
    write_tensors(tmp_path / "model", tensors)
    model = shapes.model(SECTION, seed=1)
    before = {name: t.clone() for name, t in weights(model).items()}
    with pytest.raises(UserError, match=words) as error:
        read_tensors(tmp_path / "model", weights(model))
    assert str(tmp_path / "model" / TENSORS) in str(error.value)
    assert all(torch.equal(before[name], t) for name, t in weights(model).items())


def test_a_second_file_which_the_library_would_read_too_is_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3)}
    write_tensors(tmp_path / "model", tensors)
    (tmp_path / "model" / "model-00002-of-00002.safetensors").write_bytes((tmp_path / "model" / TENSORS).read_bytes())
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: does not belong there"):
        check_tensors(tmp_path / "model", tensors)


def test_a_file_that_is_none_and_a_folder_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot be read: No such file"):
        read_tensors(tmp_path / "absent", {})
    (tmp_path / TENSORS).write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=rf"{TENSORS}: cannot be read"):
        read_tensors(tmp_path, {})
    with pytest.raises(UserError, match=r"cannot be written: Not a directory"):
        write_tensors(tmp_path / TENSORS / "below", {"a": torch.ones(1)})


def test_a_checkpoint_too_small_for_its_own_recipe_is_refused_before_the_model_is_made(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model", weights(shapes.model(SECTION)))
    require_bytes_of(tmp_path, SECTION)
    with pytest.raises(UserError, match="the model of the recipe beside it needs"):
        require_bytes_of(tmp_path, SECTION.model_copy(update={"vocab_size": 2**40}))

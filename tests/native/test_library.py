"""The compiled library: built or not, found or refused, and the instruction set that is chosen."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tessera import native
from tessera.native import library

ROOT = Path(__file__).parents[2]


def test_a_missing_broken_or_older_library_is_a_reason_in_words_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    assert "were not built" in library.opened(path).problem
    path.write_bytes(b"no library")
    found = library.opened(path)
    assert found.handle is None and str(path) in found.problem and found.sets == ()


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="there is no C++ compiler to build a library of another version"
)
def test_a_library_of_another_interface_is_refused(tmp_path: Path) -> None:
    source, path = tmp_path / "old.cpp", tmp_path / "kernels.so"
    source.write_text(
        'extern "C" long tessera_version() { return 0; }\nextern "C" long tessera_features() { return 0; }\n'
    )
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    found = library.opened(path)
    assert found.handle is None and "interface 0" in found.problem and "install it again" in found.problem


def test_an_instruction_set_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    here = library.library()
    if here.handle is None:
        pytest.skip(here.problem)
    with pytest.raises(ValueError, match="no instruction set 'sse9'; there are amx"):
        native.require("sse9")
    monkeypatch.setattr(library, "library", lambda: library.Library(here.handle, "", ("portable",)))
    with pytest.raises(ValueError, match="this machine has no avx512; it has portable"):
        native.require("avx512")
    native.require("portable")


def _in_a_new_process(limit: str) -> subprocess.CompletedProcess[str]:
    """What `instruction_sets`, `available` and `problem` say where the variable has this value."""
    code = "from tessera import native; print(native.instruction_sets(), native.available(), native.problem())"
    environment = os.environ | {library.LIMIT: limit}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_a_variable_limits_the_instruction_set_or_turns_the_kernels_off() -> None:
    if native.problem():
        pytest.skip(native.problem())
    best = native.instruction_sets()
    for isa in best:
        expected = best[best.index(isa) :]
        assert _in_a_new_process(isa).stdout.strip() == f"{expected} True"
    assert "() False TESSERA_MAX_ISA is none" in _in_a_new_process("none").stdout
    wrong = _in_a_new_process("sse9")
    assert (
        wrong.returncode != 0 and f"TESSERA_MAX_ISA is 'sse9'; here it may be {', '.join(best)} or none" in wrong.stderr
    )


def test_the_portable_set_is_always_there_and_comes_last() -> None:
    if native.problem():
        pytest.skip(native.problem())
    assert native.instruction_sets()[-1] == "portable"


def test_without_a_compiler_the_build_goes_on_says_so_and_leaves_no_older_library(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    shutil.copytree(ROOT / "src" / "tessera" / "native", tmp_path / "src" / "tessera" / "native")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    older = tmp_path / "src" / "tessera" / "native" / "kernels.so"
    older.write_bytes(b"an older one")
    answer = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert "PyTorch kernels" in answer.stderr and not older.exists()


def test_every_instruction_set_of_this_machine_was_built() -> None:
    """A set that its compiler could not build would run as the next lower one, and nobody would notice."""
    handle = library.library().handle
    if handle is None:
        pytest.skip(native.problem())
    for isa in native.instruction_sets():
        assert hasattr(handle, f"tessera_{isa}_gemm"), isa

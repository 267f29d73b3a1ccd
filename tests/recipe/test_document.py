"""docs/recipe.md is what the sections say, and says something about every key."""

import subprocess
import sys

from tessera.recipe import Recipe
from tessera.recipe.document import document
from tessera.recipe.schedule import Segment
from tessera.recipe.vocabulary import keys, subtable
from tests.recipe.examples import ROOT


def test_the_page_is_the_one_that_the_command_writes() -> None:
    command = [sys.executable, "-W", "error", "-m", "tessera.recipe.document"]
    written = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == written, (
        "write it again: python -m tessera.recipe.document > docs/recipe.md"
    )


def test_every_key_of_every_section_has_a_row_with_a_meaning() -> None:
    tables = [Recipe, Segment]
    for table in tables:
        for name, field in keys(table).items():
            assert field.description, f"{table.__name__}.{name} says nothing about itself"
            inner = subtable(field)
            if inner is None:
                assert f"| `{name}` |" in document()
            elif inner is not Segment:
                tables.append(inner)
    assert len(tables) == 11


def test_every_row_of_the_page_has_its_four_cells() -> None:
    rows = [line for line in document().splitlines() if line.startswith("|")]
    assert len(rows) > 80
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)

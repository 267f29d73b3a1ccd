"""The light rooms stay light: what a command line imports before it knows what to do."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, time
before = time.process_time()
import {room}
print(json.dumps([time.process_time() - before, sorted(sys.modules)]))
"""
HEAVY = {"torch", "numpy", "tokenizers", "safetensors", "transformers", "rich", "typer"}


@pytest.mark.parametrize("room", ["tessera.recipe", "tessera.store", "tessera.accounting"])
def test_a_light_room_imports_no_heavy_library_and_no_higher_room(room: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(room=room)]
    output = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    seconds, modules = json.loads(output)
    assert not HEAVY & set(modules)
    rooms = {name.split(".")[1] for name in modules if name.startswith("tessera.")}
    assert rooms <= {"recipe", "store", "accounting"}
    assert seconds < 0.5  # of CPU; measured: 0.1

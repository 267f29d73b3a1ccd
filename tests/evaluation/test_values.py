"""What crosses from a program that is not trusted: plain data, exactly, and nothing else."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import pytest

from tessera.evaluation import values
from tessera.evaluation.values import BadValue, Opaque, dump, load

FILE = Path(values.__file__)


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, all the way down; NaN equals NaN and -0.0 does not equal 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    return bool(a == b)


SCALARS = [
    None, True, False, 0, -1, 2**63, -(10**5000), 0.0, -0.0, 0.1, 5e-324, -1.7e308, math.inf, -math.inf, math.nan,
    1 - 2j, complex(math.nan, -0.0), "", "é\n\0\"\\", "\ud800", "\U0001d518", b"", b"\x00\xff",
]  # fmt: skip


@pytest.mark.parametrize("value", SCALARS, ids=lambda v: repr(v)[:12] if not isinstance(v, int) else str(v % 1000))
def test_scalars_come_back_exactly(value: Any) -> None:
    line = dump(value)
    assert line.isascii() and "\n" not in line
    assert same(load(line), value)


def test_nested_values_come_back_with_their_types_and_order() -> None:
    draw = random.Random(0)
    hashable = [x for x in SCALARS if x == x and x != complex(math.nan, -0.0)]

    def some(depth: int) -> Any:
        if depth == 0 or draw.random() < 0.3:
            return draw.choice(SCALARS)
        parts = [some(depth - 1) for _ in range(draw.randrange(4))]
        keys = draw.sample(hashable, len(parts))
        kind = draw.randrange(5)
        return [parts, tuple(parts), dict(zip(keys, parts, strict=True)), set(keys), frozenset(keys)][kind]

    for _ in range(500):
        value = some(5)
        assert same(load(dump(value)), value)


def test_what_is_not_of_the_tags_becomes_the_nearest_of_them() -> None:
    pairs = {"a": 1, "b": 2}
    assert load(dump(deque([1, 2]))) == [1, 2]
    assert load(dump(range(3))) == [0, 1, 2] and load(dump(iter("ab"))) == ["a", "b"]
    assert load(dump(x * x for x in range(3))) == [0, 1, 4]
    assert load(dump(pairs.keys())) == ["a", "b"] and load(dump(pairs.items())) == [("a", 1), ("b", 2)]
    assert same(load(dump(OrderedDict(pairs))), pairs) and same(load(dump(Counter("aab"))), {"a": 2, "b": 1})
    assert same(load(dump(bytearray(b"ab"))), b"ab")
    found, missing = load(dump([re.match("a", "a"), object()])), load(dump(Ellipsis))
    assert isinstance(found[0], Opaque) and bool(found[0]) and "Match" in repr(found[0])
    assert isinstance(missing, Opaque) and missing != missing.truth


class Liar:
    """Says yes to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False


def lying(base: type) -> type:
    def lie(*_: Any) -> Any:
        raise AssertionError("a method of the program was asked")

    names = (
        "__eq__",
        "__index__",
        "__int__",
        "__str__",
        "__repr__",
        "__iter__",
        "__len__",
        "__reduce__",
        "hex",
        "items",
    )
    return type("Lying", (base,), {name: lie for name in names} | {"__hash__": base.__hash__})


@pytest.mark.parametrize(
    ("base", "value"),
    [
        *((int, 7), (float, 0.5), (complex, 1j), (str, "x"), (bytes, b"x"), (list, [1])),
        *((tuple, (1,)), (set, {1}), (frozenset, {1}), (dict, {1: 2})),
    ],
)
def test_a_subclass_arrives_as_the_value_of_its_base_and_is_asked_nothing(base: type, value: Any) -> None:
    arrived = load(dump(lying(base)(value)))
    assert type(arrived) is base and arrived == base(value)


def test_an_object_that_equals_everything_equals_nothing_when_it_arrives() -> None:
    arrived = load(dump(Liar()))
    assert type(arrived) is Opaque and not arrived and arrived != 1 and arrived != Liar.__name__


def test_depth_size_and_number_are_limited_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = []
    for _ in range(values.DEPTH - 1):
        deep = [deep]
    assert same(load(dump(deep)), deep)
    with pytest.raises(BadValue, match="more than 64 deep"):
        dump([deep])
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(BadValue, match="deep"):
        dump(endless)
    line = dump(deep).replace("[]", '[["list",[]]]')
    with pytest.raises(BadValue, match="more than 64 deep"):
        load(line)
    with pytest.raises(BadValue, match="nested too deeply"):
        load("[" * 100_000)
    monkeypatch.setattr(values, "MOST", 1000)
    with pytest.raises(BadValue, match="more than 1,000 parts"):
        dump(itertools.count())
    monkeypatch.setattr(values, "LONGEST", 100)
    with pytest.raises(BadValue, match="at most 100 are taken"):
        dump("x" * 99)
    with pytest.raises(BadValue, match="at most 100 are taken"):
        load(json.dumps(["str", "x" * 99]))


NO_MESSAGES = """
    x|1|null|[]|"str"|{}|["none",1]|["int",1]|["int","z"]|["int"]|["int","1","2"]|["float",0.5]|["float","x"]|["float",NaN]
    ["bool",1]|["bool","true"]|["str",["a"]]|["bytes","0"]|["list","ab"]|["list",[1]]|["list",{"a":1}]
    ["set",[["list",[]]]]|["dict",[["a","b"]]]|["dict",[[["list",[]],["none"]]]]|["dict",[[["none"]]]]
    ["complex",["0x1p0"]]|["complex",["1","1","1"]]|["complex",[1,2]]|["object",["x"]]|["object",["x",1]]
    ["object",[["str","x"],true]]|["pickle","gASV"]|["__class__","x"]|[["int"],"1"]|["int","1"] ["int","2"]
"""


@pytest.mark.parametrize(
    "line", ["", *(line for row in NO_MESSAGES.split("\n") for line in row.strip().split("|") if line)]
)
def test_anything_else_is_refused_in_words(line: str) -> None:
    with pytest.raises(BadValue, match="not a message"):
        load(line)


def test_the_file_runs_by_itself_without_tessera_or_site_packages() -> None:
    code = (
        f"exec(open({str(FILE)!r}).read()); import sys; print(load(dump([1, {{2}}]))); print('tessera' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["[1, {2}]", "False"], done.stderr

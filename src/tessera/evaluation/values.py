"""Plain data between a judge and a program it does not trust: tagged JSON, no pickle, no classes.

    none bool int float complex str bytes list tuple set frozenset dict, and "object": anything else, as its truth

A value is [tag, payload]; payloads hold values. The judge decodes what the program's process wrote: only these tags
give a value, and what they give is of these built-in types exactly, so that no method of it is the program's. Both
sides are limited in depth and size, and so is what an integer may cost.

This file also runs inside the sandbox, by itself and without tessera: it imports nothing but the standard library.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

DEPTH = 64  # values inside values
LONGEST = 16 << 20  # characters of a message
MOST = 1_000_000  # values in a message


class BadValue(Exception):
    """What cannot be sent, or is not a message; str() says why."""


class Opaque:
    """Something that is none of the tags, of which only its truth is known."""

    __slots__ = ("truth", "type_name")

    def __init__(self, type_name: str, truth: bool) -> None:
        self.type_name, self.truth = type_name, truth

    def __bool__(self) -> bool:
        return self.truth

    def __repr__(self) -> str:
        return f"<{self.type_name} object, {'true' if self.truth else 'false'}>"


def _parts(x: complex) -> tuple[float, float]:
    plain = complex.__complex__(x)
    return plain.real, plain.imag


# Subclasses are sent as the value of their base, by the base's own methods: nothing they override is asked.
_SCALARS: tuple[tuple[type, str, Callable[[Any], Any]], ...] = (
    (bool, "bool", bool),
    (int, "int", lambda x: format(int.__index__(x), "x")),  # decimal digits of long ones cost quadratic time
    (float, "float", float.hex),
    (complex, "complex", lambda x: [part.hex() for part in _parts(x)]),
    (str, "str", str.__str__),
    (bytes, "bytes", bytes.hex),
    (bytearray, "bytes", bytearray.hex),
)
_SEQUENCES: tuple[tuple[type, str, Callable[[Any], Iterator[Any]]], ...] = (
    (list, "list", list.__iter__),
    (tuple, "tuple", tuple.__iter__),
    (frozenset, "frozenset", frozenset.__iter__),
    (set, "set", set.__iter__),
    (deque, "list", deque.__iter__),
)


def dump(value: Any) -> str:
    """One line of ASCII without its end. Iterators, ranges, deques and views of dictionaries are sent as lists (an
    endless one up to the limit). Raises BadValue for what is nested too deeply or too large.
    """
    budget = [MOST]
    text = json.dumps(_tagged(value, DEPTH, budget), separators=(",", ":"))
    if len(text) > LONGEST:
        raise BadValue(f"a value of {len(text):,} characters: at most {LONGEST:,} are taken")
    return text


def load(line: str) -> Any:
    """The value of a line that `dump` could have made; sets and dictionaries of lists, and all else, raise BadValue."""
    if len(line) > LONGEST:
        raise BadValue(f"a message of {len(line):,} characters: at most {LONGEST:,} are taken")
    try:
        return _value(json.loads(line), DEPTH)
    except RecursionError:
        raise BadValue("a message that is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise BadValue(f"not a message: {error}") from None


def _tagged(value: Any, depth: int, budget: list[int]) -> list[Any]:
    budget[0] -= 1
    if depth == 0:
        raise BadValue(f"a value nested more than {DEPTH} deep")
    if budget[0] < 0:
        raise BadValue(f"a value of more than {MOST:,} parts")
    if value is None:
        return ["none"]
    kind = type(value)
    for base, tag, payload in _SCALARS:
        if issubclass(kind, base):
            return [tag, payload(value)]
    for base, tag, parts in _SEQUENCES:
        if issubclass(kind, base):
            return [tag, [_tagged(part, depth - 1, budget) for part in parts(value)]]
    if issubclass(kind, dict):
        return ["dict", [[_tagged(part, depth - 1, budget) for part in pair] for pair in dict.items(value)]]
    if hasattr(kind, "__next__") or kind in (range, *_VIEWS):
        return ["list", [_tagged(part, depth - 1, budget) for part in value]]
    return ["object", [kind.__name__[:100], bool(value)]]


_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


def _value(tagged: Any, depth: int) -> Any:
    if depth == 0:
        raise BadValue(f"a message nested more than {DEPTH} deep")
    if not isinstance(tagged, list) or not tagged or not isinstance(tagged[0], str):
        raise BadValue("not a message: a value is a list that begins with its tag")
    tag, *payload = tagged
    if tag == "none" and not payload:
        return None
    if tag not in _READERS or len(payload) != 1:
        raise BadValue(f"not a message: no value is tagged {tag[:20]!r} with {len(payload)} payloads")
    wanted, read = _READERS[tag]
    if type(payload[0]) is not wanted:
        raise BadValue(f"not a message: the payload of {tag} is no {wanted.__name__}")
    return read(payload[0], depth - 1)


def _all(parts: list[Any], depth: int) -> list[Any]:
    return [_value(part, depth) for part in parts]


def _dictionary(pairs: list[Any], depth: int) -> dict[Any, Any]:
    return {_value(key, depth): _value(value, depth) for key, value in pairs}


def _complex(parts: list[Any], depth: int) -> complex:
    real, imaginary = parts
    return complex(float.fromhex(real), float.fromhex(imaginary))


def _opaque(described: list[Any], depth: int) -> Opaque:
    name, truth = described
    if type(name) is not str or type(truth) is not bool:
        raise BadValue("not a message: an object is a name and its truth")
    return Opaque(name, truth)


# Of each tag: the type of its payload, and the value of it.
_READERS: dict[str, tuple[type, Callable[[Any, int], Any]]] = {
    "bool": (bool, lambda x, _: x),
    "int": (str, lambda x, _: int(x, 16)),
    "float": (str, lambda x, _: float.fromhex(x)),
    "complex": (list, _complex),
    "str": (str, lambda x, _: x),
    "bytes": (str, lambda x, _: bytes.fromhex(x)),
    "list": (list, _all),
    "tuple": (list, lambda x, depth: tuple(_all(x, depth))),
    "set": (list, lambda x, depth: set(_all(x, depth))),
    "frozenset": (list, lambda x, depth: frozenset(_all(x, depth))),
    "dict": (list, _dictionary),
    "object": (list, _opaque),
}

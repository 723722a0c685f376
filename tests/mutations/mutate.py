"""Ways to damage a ``kv.safetensors``, each with what its refusal has to name. Pure functions."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from memfs.cube.fingerprint import FIELDS
from memfs.cube.kvfile import ALIGNMENT


class Mutation(NamedTuple):
    """A damaged file."""

    data: bytes
    named: str
    """A regular expression that the reason for its refusal has to match."""


class Whole(NamedTuple):
    """A whole file, taken apart."""

    data: bytes
    header: dict[str, Any]
    start: int
    """Where its tensors begin."""

    @classmethod
    def of(cls, data: bytes) -> Whole:
        (length,) = struct.unpack("<Q", data[:8])
        return cls(data, json.loads(data[8 : 8 + length]), 8 + length)

    @property
    def tensors(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def span(self, name: str) -> tuple[int, int]:
        """Where a tensor begins and ends in the file."""
        first, last = self.header[name]["data_offsets"]
        return self.start + first, self.start + last

    def under(self, header: dict[str, Any], **style: Any) -> bytes:
        """The same data under another header, written as memfs writes it unless told otherwise."""
        text = json.dumps(header, **({"separators": (",", ":")} | style)).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return struct.pack("<Q", len(text)) + text + self.data[self.start :]

    def edited(self, edit: Callable[[dict[str, Any]], object]) -> bytes:
        header = json.loads(json.dumps(self.header))
        edit(header)
        return self.under(header)


def _field(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(FIELDS)
    old = whole.header["__metadata__"][name]
    at = chance.randrange(len(old))
    other = chance.choice(["", "0" * 64, "-1", "none", old + " ", old[:at] + "~" + old[at + 1 :]])
    data = whole.edited(lambda h: h["__metadata__"].update({name: other}))
    return Mutation(data, rf"\b{name}\b|checksum")


def _field_of_another_type(chance: random.Random, whole: Whole) -> Mutation:
    name, other = chance.choice(FIELDS), chance.choice([1, None, [], {}, True, 1e300])
    data = whole.edited(lambda h: h["__metadata__"].update({name: other}))
    return Mutation(data, "metadata of strings")


def _field_gone(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(FIELDS)
    return Mutation(whole.edited(lambda h: h["__metadata__"].pop(name)), rf"has no {name}\b")


def _field_more(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(["note", "\x1b[2J", "\ud800", "x" * 5000, "Format"])
    data = whole.edited(lambda h: h["__metadata__"].update({name: "x"}))
    return Mutation(data, "none of its fields")


def _fields_in_another_order(chance: random.Random, whole: Whole) -> Mutation:
    metadata = list(whole.header["__metadata__"].items())
    chance.shuffle(metadata)
    data = whole.under(whole.header | {"__metadata__": dict(metadata)})
    return Mutation(data, "header is not written as memfs writes it")


def _other_spelling(chance: random.Random, whole: Whole) -> Mutation:
    style = chance.choice([{"separators": (", ", ": ")}, {"indent": 1}, {"sort_keys": True}])
    data = whole.under(whole.header, **style)
    return Mutation(data, "header is not written as memfs writes it")


def _shape(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(whole.tensors)
    shape = list(whole.header[name]["shape"])
    at = chance.randrange(len(shape))
    other = chance.choice(
        [
            [1, *shape],
            [*shape[:at], shape[at] + 1, *shape[at + 1 :]],
            [*shape[:at], -shape[at], *shape[at + 1 :]],
            [*shape[:at], shape[at] + 0.5, *shape[at + 1 :]],
            [*shape[:at], 1 << 60, *shape[at + 1 :]],
            [*shape[:at], str(shape[at]), *shape[at + 1 :]],
            [],
            None,
        ]
    )
    data = whole.edited(lambda h: h[name].update(shape=other))
    return Mutation(data, name)


def _dtype(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(whole.tensors)
    old = whole.header[name]["dtype"]
    other = chance.choice(
        [d for d in ("F32", "F16", "BF16", "I32", "I8", "F64", "U8", "f32", "", None) if d != old]
    )
    return Mutation(whole.edited(lambda h: h[name].update(dtype=other)), name)


def _offsets(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(whole.tensors)
    first, last = whole.header[name]["data_offsets"]
    by = chance.choice([1, 4, 64, 1 << 20, 1 << 46])
    other = chance.choice(
        [[first + by, last + by], [first, last + by], [last, first], [-first - 1, last], [first]]
    )
    data = whole.edited(lambda h: h[name].update(data_offsets=other))
    return Mutation(data, rf"data_offsets of '({'|'.join(whole.tensors)})'")


def _tensor_gone(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(whole.tensors)
    return Mutation(whole.edited(lambda h: h.pop(name)), "data_offsets|tensors")


def _tensor_more(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(["layers.999", "note", "\x1b]0;x\x07", "layers.0"])
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return Mutation(whole.edited(lambda h: h.update({name: entry})), r"tensors|data_offsets of '")


def _tensor_renamed(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(whole.tensors)
    data = whole.edited(lambda h: h.update({f"{name}x": h.pop(name)}))
    return Mutation(data, f"no tensor {name}")


def _byte_of_the_data(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(whole.tensors)
    data = bytearray(whole.data)
    data[chance.randrange(*whole.span(name))] ^= 1 << chance.randrange(8)
    return Mutation(bytes(data), name)


def _block_of_zeros(chance: random.Random, whole: Whole) -> Mutation:
    name = chance.choice(whole.tensors)
    first, last = whole.span(name)
    at = chance.randrange(first, last)
    end = min(at + 4096, last)
    return Mutation(whole.data[:at] + bytes(end - at) + whole.data[end:], name)


def _tensors_exchanged(chance: random.Random, whole: Whole) -> Mutation:
    """The data of two layers, each where the other was."""
    one, other = chance.sample([name for name in whole.tensors if name.startswith("layers")], 2)
    data = bytearray(whole.data)
    (a, b), (c, d) = whole.span(one), whole.span(other)
    data[a:b], data[c:d] = whole.data[c:d], whole.data[a:b]
    return Mutation(bytes(data), f"{one}|{other}")


def _byte_of_the_header(chance: random.Random, whole: Whole) -> Mutation:
    """Any of them: what is named depends on which it is."""
    data = bytearray(whole.data)
    data[chance.randrange(whole.start)] ^= 1 << chance.randrange(8)
    return Mutation(bytes(data), r": \S+")


def _bytes_moved(chance: random.Random, whole: Whole) -> Mutation:
    """Some bytes more in the middle, or fewer: all that follows stands elsewhere."""
    at, count = chance.randrange(len(whole.data)), chance.randint(1, 100)
    if chance.random() < 0.5:
        return Mutation(whole.data[:at] + whole.data[at + count :], r": \S+")
    return Mutation(whole.data[:at] + chance.randbytes(count) + whole.data[at:], r": \S+")


def _length_of_the_header(chance: random.Random, whole: Whole) -> Mutation:
    said = chance.choice(
        [0, 1, whole.start - 7, whole.start - 9, 100 << 20, 1 << 31, 1 << 63, (1 << 64) - 1]
    )
    data = struct.pack("<Q", said) + whole.data[8:]
    return Mutation(data, r"header|its tensors end at|data_offsets")


def _header_of_100_mb(chance: random.Random, whole: Whole) -> Mutation:
    """One that has them, all of it well-formed JSON."""
    text = json.dumps(whole.header).encode()
    text += b" " * ((100 << 20) - len(text))
    return Mutation(struct.pack("<Q", len(text)) + text, "header says it is 104857600 bytes")


def _header_to_choke_on(chance: random.Random, whole: Whole) -> Mutation:
    """As long as a header may be, and made to be hard to read."""
    size = (1 << 20) - 64
    text = chance.choice(
        [
            b"[" * size,
            b'{"a":' * (size // 5),
            b"9" * size,
            b'{"__metadata__":{' + b",".join(b'"%d":"x"' % i for i in range(60_000)) + b"}}",
            b'{"' + b"\\u0000" * (size // 6 - 4) + b'":1}',
            b"\xff" * size,
            bytes(size),
        ]
    )
    return Mutation(
        struct.pack("<Q", len(text)) + text + whole.data[whole.start :], "header|fingerprint"
    )


def _cut(chance: random.Random, whole: Whole) -> Mutation:
    at = chance.choice(
        [0, 7, 8, whole.start, len(whole.data) - 1, chance.randrange(len(whole.data))]
    )
    return Mutation(whole.data[:at], "bytes long|ends within")


def _longer(chance: random.Random, whole: Whole) -> Mutation:
    more = chance.choice([b"\0", bytes(64), chance.randbytes(5000), whole.data])
    return Mutation(whole.data + more, "its tensors end at")


def _no_such_file(chance: random.Random, whole: Whole) -> Mutation:
    return Mutation(chance.randbytes(chance.randrange(5000)), r"header|bytes long")


KINDS: dict[str, Callable[[random.Random, Whole], Mutation]] = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        _field,
        _field_of_another_type,
        _field_gone,
        _field_more,
        _fields_in_another_order,
        _other_spelling,
        _shape,
        _dtype,
        _offsets,
        _tensor_gone,
        _tensor_more,
        _tensor_renamed,
        _byte_of_the_data,
        _block_of_zeros,
        _tensors_exchanged,
        _byte_of_the_header,
        _bytes_moved,
        _length_of_the_header,
        _header_of_100_mb,
        _header_to_choke_on,
        _cut,
        _longer,
        _no_such_file,
    )
}

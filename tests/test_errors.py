"""The tree of errors: every one survives the wire, and none is without a message or a status."""

from __future__ import annotations

import errno
import json

import pytest

from memfs import errors
from memfs.errors import KVStale, MemfsError, NotACube, Refused, from_wire

EVERY = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, MemfsError)
]


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_crosses_the_wire(kind: type[MemfsError]) -> None:
    for detail in ("", "work/alpha: it ends within layers.003"):
        error = kind(detail)
        back = from_wire(json.loads(json.dumps(error.to_wire())))
        assert (type(back), back.detail, str(back)) == (kind, detail, str(error))
        assert str(error)[:1].islower() or str(error).startswith("KV")
        assert kind.errno in errno.errorcode
        assert kind.exit_code != 0


def test_the_message_is_the_docstring_then_the_detail() -> None:
    assert str(KVStale("x")) == "the KV cache was made from another text: x"
    assert str(Refused()) == "refused: it does not fit the resident model"
    assert issubclass(NotACube, errors.NotFound)


@pytest.mark.parametrize("data", [None, [], {"type": "SystemExit"}, {"type": 3, "detail": 4}])
def test_an_unknown_error_is_still_one_of_ours(data: object) -> None:
    assert type(from_wire(data)) is MemfsError

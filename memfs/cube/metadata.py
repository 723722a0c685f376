"""meta.json: making, reading and checking the metadata header of a MemCube.

The published schema beside this module is the definition of every field. What is on disk is the
header as last written; what a mount shows is that with the live parts laid over (``show``). Used by
the vault, the index and the filesystem; pure functions, any thread.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import socket
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from memfs.errors import InvalidMetadata

Meta = dict[str, Any]

MAX_BYTES = 1 << 20
"""A larger meta.json is refused unread: it describes a memory, it does not hold one."""


MAX_DEPTH = 32
"""Objects and lists within each other: no walk over a header can then recurse too deep."""


LIVE = {
    "governance": ("owner", "group", "mode"),
    "behavioural": ("reads", "questions", "last_used", "versions", "fingerprint"),
    "state": ("payload", "kv", "adapter"),
}
"""What memfs finds or counts and shows in each group: a writer of a header does not set it."""


def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 7) of meta.json."""
    text = files("memfs.cube").joinpath("meta.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@functools.cache
def _validator() -> Callable[[object], object]:
    import fastjsonschema  # compiled at first use: a mount must be up before

    compiled: Callable[[object], object] = fastjsonschema.compile(schema(), use_default=False)
    return compiled


def rfc3339(seconds: float | None = None) -> str:
    """A time as meta.json writes it; now when no seconds since 1970 are given."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def new(*, title: str | None = None, copied_from: str | None = None) -> Meta:
    """The header of a cube that has none yet, with an id of its own."""
    return {
        "memfs": 1,
        "descriptive": {
            "id": str(uuid.uuid4()),
            "created": rfc3339(),
            "title": title,
            "type": None,
            "tags": [],
            "origin": {"host": socket.gethostname(), "source": None, "copied_from": copied_from},
        },
        "governance": {
            "owner": None,
            "group": None,
            "mode": None,
            "access": [],
            "expires": None,
            "priority": 0,
            "sensitivity": None,
            "licence": None,
            "watermark": None,
        },
        "behavioural": {
            "reads": 0,
            "questions": 0,
            "last_used": None,
            "versions": [],
            "fingerprint": None,
        },
        "state": {
            "lifecycle": "generated",
            "frozen": False,
            "pinned": False,
            "storage": "exact",
        },
    }


def parse(text: bytes) -> Meta:
    """The header in ``text``. Raises InvalidMetadata, naming the field that breaks the schema."""
    if len(text) > MAX_BYTES:
        raise InvalidMetadata(f"{len(text)} bytes; at most {MAX_BYTES}")
    try:
        data = json.loads(text.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as e:
        raise InvalidMetadata(f"it is not UTF-8 at byte {e.start}") from e
    except json.JSONDecodeError as e:
        raise InvalidMetadata(f"line {e.lineno}, column {e.colno}: {e.msg}") from e
    except (RecursionError, ValueError) as e:
        raise InvalidMetadata(str(e) or "nested too deep") from e
    _require_shallow(data)
    check(data)
    meta: Meta = data
    return meta


def check(data: object) -> None:
    """Raises InvalidMetadata, naming the field, where ``data`` breaks the schema."""
    import fastjsonschema

    try:
        _validator()(data)
    except fastjsonschema.JsonSchemaValueException as e:
        raise InvalidMetadata(e.message.removeprefix("data.").removeprefix("data ")) from e


def render(meta: Meta) -> bytes:
    """The header as the file's bytes: indented JSON, UTF-8, a final newline."""
    try:
        return (json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can only write it escaped
        return (json.dumps(meta, indent=2) + "\n").encode("ascii")


def cube_id(meta: Meta) -> str:
    """The id in a checked header."""
    return str(meta["descriptive"]["id"])


def storage(meta: Meta) -> str:
    """How a checked header wants the KV cache to be stored."""
    return str(meta.get("state", {}).get("storage", "exact"))


def show(stored: Meta, live: Meta) -> Meta:
    """``stored`` with the groups in ``live`` laid over it, key by key; neither is changed."""
    shown = copy.deepcopy(stored)
    _lay_over(shown, live)
    return shown


def user_set(meta: Meta) -> Meta:
    """What people have set in a header: it without the live parts."""
    return {
        name: {key: value for key, value in group.items() if key not in LIVE[name]}
        if name in LIVE and isinstance(group, dict)
        else group
        for name, group in meta.items()
    }


def as_copy(meta: Meta) -> Meta:
    """The header of a copy made inside one store: an id of its own, and where it came from.

    A copy of a frozen cube is not frozen.
    """
    copied = copy.deepcopy(meta)
    descriptive = copied["descriptive"]
    origin = descriptive.setdefault("origin", {})
    origin["copied_from"] = descriptive["id"]
    descriptive["id"] = str(uuid.uuid4())
    descriptive["created"] = rfc3339()
    copied.get("behavioural", {}).update(reads=0, questions=0, last_used=None)
    copied.get("state", {}).update(frozen=False)
    return copied


def _lay_over(base: Meta, over: Meta) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _lay_over(base[key], value)
        else:
            base[key] = value


def _require_shallow(data: object) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise InvalidMetadata(f"objects or lists within each other more than {MAX_DEPTH} deep")


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number

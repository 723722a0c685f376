"""What of a cube's header travels to another machine, and what does not. Pure functions.

Used by the archive.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from memfs.cube.access_list import BITS
from memfs.cube.metadata import Meta, new

TOO_SENSITIVE = frozenset({"confidential", "secret"})
"""A redacted cube is for others, and its text is never redacted."""

_KEPT = {
    "descriptive": ("id", "created", "title", "type", "tags"),
    "governance": ("expires", "priority", "sensitivity", "licence", "watermark"),
    "state": ("lifecycle", "frozen", "storage"),
}
_SHOWN = {"governance": ("owner", "group", "mode"), "behavioural": ("fingerprint",)}


def carried(meta: Meta) -> Meta:
    """A header as an archive has it: without what is only found where the cube is.

    The states of the memories depend on the model that is there; owner, group, mode, and who may
    read and write are the files' own; the contextual fingerprint is the KV cache's; versions stay
    in their store.
    """
    found = copy.deepcopy(meta)
    for name in ("payload", "kv", "adapter"):
        found.get("state", {}).pop(name, None)
    for group, names in _SHOWN.items():
        given = found.get(group, {})
        given.update({name: None for name in names if name in given})
    if "versions" in found.get("behavioural", {}):
        found["behavioural"]["versions"] = []
    if "access" in found.get("governance", {}):
        found["governance"]["access"] = [
            {**entry, "rights": rights}
            for entry in found["governance"]["access"]
            if (rights := [right for right in entry["rights"] if right not in BITS])
        ]
    return found


def redacted(meta: Meta) -> Meta:
    """A header for others to have: what the cube is and what they may do with it, nothing more.

    Left out are the access list, the machine it was made on, what it was copied from, how often and
    when it was used, its earlier texts, whether it is pinned, and every key that the schema does
    not know. Identity, the source in its maker's words, licence and watermark stay.
    """
    kept = new()
    for group, names in _KEPT.items():
        given: dict[str, Any] = meta.get(group, {})
        kept[group] |= {name: given[name] for name in names if name in given}
    if "created" not in meta["descriptive"]:
        del kept["descriptive"]["created"]  # and not the moment of the dump
    source = meta["descriptive"].get("origin", {}).get("source")
    kept["descriptive"]["origin"] = {"host": None, "source": source, "copied_from": None}
    return kept


def adapter_config(data: bytes) -> bytes:
    """An adapter's configuration without the directory that its base model lies in here."""
    try:
        config = json.loads(data)
        base = config["base_model_name_or_path"]
        if not os.path.isabs(base):
            return data
    except (ValueError, RecursionError, KeyError, TypeError):
        return data  # it names none
    config["base_model_name_or_path"] = os.path.basename(base.rstrip("/"))
    return (json.dumps(config, indent=2) + "\n").encode("ascii")

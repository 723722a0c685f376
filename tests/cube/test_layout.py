"""What a path means by its name alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.cube import layout
from memfs.cube.layout import Role

NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1)


@pytest.mark.parametrize(
    ("path", "role", "cube"),
    [
        ("law/payload.md", Role.PAYLOAD, "law"),
        ("a/b/law/kv.safetensors", Role.KV, "a/b/law"),
        ("law/meta.json", Role.META, "law"),
        ("law/adapter/adapter_model.safetensors", Role.ADAPTER_WEIGHTS, "law"),
        ("law/adapter/adapter_config.json", Role.ADAPTER_CONFIG, "law"),
        ("law/adapter/README.md", Role.OTHER, ""),
        ("law/adapter_model.safetensors", Role.OTHER, ""),
        ("adapter/adapter_model.safetensors", Role.OTHER, ""),
        ("law/meta.json.rejected", Role.OTHER, ""),
        ("law/notes.md", Role.OTHER, ""),
        ("payload.md", Role.OTHER, ""),
        ("kv.safetensors", Role.OTHER, ""),
        ("", Role.OTHER, ""),
        (".memfs", Role.CONTROL, ""),
        (".memfs/mounted/law/payload.md", Role.CONTROL, ""),
        (".memfs2/payload.md", Role.PAYLOAD, ".memfs2"),
        ("law/.memfs/payload.md", Role.PAYLOAD, "law/.memfs"),
        (".memfs/at", Role.PAST, ""),
        (".memfs/at/2026/law/payload.md", Role.PAST, ""),
        (".memfs/attic", Role.CONTROL, ""),
        ("law/.versions", Role.PAST, "law"),
        ("work/law/.versions/2026/payload.md", Role.PAST, "work/law"),
        ("law/.versions.d/x/.versions", Role.PAST, "law/.versions.d/x"),
        ("law/.versions.d/payload.md", Role.PAYLOAD, "law/.versions.d"),
        (".versions", Role.OTHER, ""),
    ],
)
def test_roles(path: str, role: Role, cube: str) -> None:
    assert layout.classify(path) == (role, cube)


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_split_and_join_are_inverse(names: list[str]) -> None:
    path = ""
    for name in names:
        path = layout.join(path, name)
    assert path == "/".join(names)
    assert layout.join(*layout.split(path)) == path


@pytest.mark.parametrize("mark", ["payload.md", "kv.safetensors", "adapter", "meta.json"])
def test_each_mark_makes_a_cube(mark: str) -> None:
    assert layout.is_cube(["x", mark])
    assert not layout.is_cube(["x", mark + "~", mark.upper()])

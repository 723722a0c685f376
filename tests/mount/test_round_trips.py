"""Files and cubes that are copied onto a mount, within it and out again lose nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from ..conftest import needs
from .conftest import Mount
from .kvmaker import kv_file
from .shell import shell
from .snapshot import differences, make_socket, make_zoo

TEXT = "The text of a cube.\n"

COPIES = {
    "cp": ('cp -a "$FROM/." "$TO/"', ("cp",)),
    "rsync": ('rsync -aHAXS "$FROM/" "$TO/"', ("rsync",)),
    "tar": (
        """
        tar -C "$FROM" --posix -S --acls --xattrs --xattrs-include='*' -cf - . |
            tar -C "$TO" --acls --xattrs --xattrs-include='*' -xpf -
        """,
        ("tar",),
    ),
}


@needs("setfacl")
@pytest.mark.parametrize("way", COPIES)
def test_everything_survives_a_round_trip(place: Path, tmp_path: Path, way: str) -> None:
    script, programs = COPIES[way]
    if any(shutil.which(program) is None for program in programs):
        pytest.skip(f"needs {programs}")
    trees = [tmp_path / "zoo", place / "in", place / "within", tmp_path / "out"]
    for tree in trees:
        tree.mkdir()
    make_zoo(trees[0])
    if way != "tar":  # which has no sockets
        make_socket(trees[0] / "socket")
        os.utime(trees[0] / "socket", (10**9, 10**9))
        os.utime(trees[0], (10**9, 10**9))
    for source, target in itertools.pairwise(trees):
        shell(script, place, FROM=source, TO=target)
        assert differences(source, target) == {}
        assert (target / "sparse").stat().st_blocks < 1000
    if way == "rsync":
        for source, target in zip(trees, [*trees[1:], trees[0]], strict=True):
            finds = 'rsync -aHAX --checksum --delete --dry-run -i "$FROM/" "$TO/"'
            assert shell(finds, place, FROM=source, TO=target) == ""


@pytest.mark.parametrize("way", COPIES)
def test_a_cube_goes_out_and_back(
    shared_mount: Mount, place: Path, tmp_path: Path, way: str
) -> None:
    script, programs = COPIES[way]
    if any(shutil.which(program) is None for program in programs):
        pytest.skip(f"needs {programs}")
    name = f"{place.name}/law"
    cube = shared_mount.cube(name, TEXT)
    (cube / "notes.txt").write_text("more")
    (cube / "kv.safetensors").write_bytes(kv_file(TEXT.encode()))
    meta = shared_mount.meta(name)
    out = tmp_path / "out"
    out.mkdir()
    shell(script, place, FROM=cube, TO=out)
    taken = json.loads((out / "meta.json").read_text())
    assert taken["descriptive"] == meta["descriptive"]
    # Within the store it is another cube, and all else of it is the same.
    (place / "copy").mkdir()
    shell(script, place, FROM=cube, TO=place / "copy")
    copied = shared_mount.meta(f"{place.name}/copy")["descriptive"]
    assert copied["origin"]["copied_from"] == meta["descriptive"]["id"]
    assert copied["id"] != meta["descriptive"]["id"]
    assert set(differences(cube, place / "copy")) <= {".", "meta.json"}
    # Back over the one that is there, and back where it was deleted, it is the same cube.
    shell(script, place, FROM=out, TO=cube)
    assert shared_mount.meta(name)["descriptive"] == meta["descriptive"]
    shutil.rmtree(cube)
    cube.mkdir()
    shell(script, place, FROM=out, TO=cube)
    assert shared_mount.meta(name)["descriptive"] == meta["descriptive"]
    assert shared_mount.meta(name)["state"]["kv"] == meta["state"]["kv"]
    assert set(differences(out, cube)) <= {".", "meta.json"}

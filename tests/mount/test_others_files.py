"""In a directory that is everybody's, no name that a file is given opens it to anybody, now or in
the past: what a disk would let no other user read, root's mount reads for nobody.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.mount.conftest import Mount, mounted_at, until
from tests.users import as_user, needs_root, open_way

pytestmark = needs_root

ANN, BEN, CAT = 70001, 70002, 70003
SECRET = "Ben's secret.\n"


@pytest.fixture(scope="module")
def open_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount that every user may enter."""
    root = tmp_path_factory.mktemp("everybodys")
    open_way(root)
    with mounted_at(root) as mount:
        until(mount.has_index)
        mount.dir.chmod(0o777)
        yield mount


@pytest.fixture
def shared(open_mount: Mount, request: pytest.FixtureRequest) -> Path:
    """A directory in which everybody may rename everything, as it is not sticky."""
    directory = open_mount.dir / request.node.name.replace("/", "-")
    directory.mkdir()
    directory.chmod(0o777)
    return directory


def own(uid: int, path: Path, text: str = "Some text.\n", mode: int = 0o600) -> Path:
    """A user's own file, and its directories."""

    def make() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    as_user(uid, make)
    return path


def reads(uid: int, path: Path) -> str | None:
    """What a user reads there; None where he may not, or there is nothing."""
    try:
        return as_user(uid, path.read_text)
    except (PermissionError, FileNotFoundError):
        return None


def attributes(uid: int, path: Path) -> list[str]:
    found: list[str] = as_user(uid, lambda: os.listxattr(path))
    return found


PLACES = ["meta.json.rejected", "kv.safetensors", "adapter/adapter_config.json"]


@pytest.mark.parametrize("place", [*PLACES, "adapter/adapter_model.safetensors", "payload.md"])
def test_anothers_file_stays_his_whatever_it_is_called(shared: Path, place: str) -> None:
    secret = own(BEN, shared / "secret.txt", SECRET)
    text = own(ANN, shared / "hers/payload.md", mode=0o644)
    target = shared / "hers" / place

    def steal() -> None:
        target.parent.mkdir(exist_ok=True)
        secret.rename(target)
        for mode in (0o600, 0o666):
            with contextlib.suppress(PermissionError):  # it is Ben's, where it is the text
                text.chmod(mode)

    as_user(ANN, steal)
    assert reads(ANN, target) is None
    assert reads(CAT, target) is None
    found = target.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (BEN, 0o600)
    assert reads(BEN, target) == SECRET


def test_nor_where_the_directory_becomes_a_cube_later(shared: Path) -> None:
    secret = own(BEN, shared / "secret.txt", SECRET)
    target = shared / "later/meta.json.rejected"

    def steal() -> None:
        target.parent.mkdir()
        secret.rename(target)
        (target.parent / "payload.md").write_text("Hers.\n")
        (target.parent / "payload.md").chmod(0o644)

    as_user(ANN, steal)
    assert reads(ANN, target) is None


def test_nor_in_his_own_cube(shared: Path) -> None:
    """The text is Ben's and public; his other file is not, though somebody calls it a cube's."""
    secret = own(BEN, shared / "secret.txt", SECRET)
    own(BEN, shared / "his/payload.md", mode=0o644)
    as_user(BEN, lambda: (shared / "his").chmod(0o777))
    target = shared / "his/kv.safetensors"
    as_user(ANN, lambda: secret.rename(target))
    assert reads(ANN, target) is None


@pytest.mark.parametrize("text", [SECRET, json.dumps({"memfs_version": 1})])
def test_anothers_file_becomes_no_header(shared: Path, text: str) -> None:
    """Not even a refused one, whose text would be kept for who wrote it."""
    secret = own(BEN, shared / "secret.txt", text)
    own(ANN, shared / "hers/payload.md")
    before = reads(ANN, shared / "hers/meta.json")
    with pytest.raises(PermissionError) as caught:
        as_user(ANN, lambda: secret.rename(shared / "hers/meta.json"))
    assert caught.value.errno == errno.EACCES
    assert not (shared / "hers/meta.json.rejected").exists()
    assert reads(ANN, shared / "hers/meta.json") == before
    assert reads(BEN, secret) == text


def test_ones_own_files_follow_as_before(shared: Path) -> None:
    cube = own(ANN, shared / "hers/payload.md", mode=0o600).parent
    own(ANN, shared / "cache", "her kv", mode=0o644)
    as_user(ANN, lambda: (shared / "cache").rename(cube / "kv.safetensors"))
    assert reads(CAT, cube / "kv.safetensors") is None
    as_user(ANN, lambda: (cube / "payload.md").chmod(0o644))
    assert reads(CAT, cube / "kv.safetensors") == "her kv"
    os.chown(cube / "payload.md", BEN, -1)
    assert (cube / "kv.safetensors").stat().st_uid == BEN
    assert (cube / "meta.json").stat().st_uid == BEN


def test_attributes_tell_of_the_text_to_who_may_read_it(shared: Path) -> None:
    cube = own(ANN, shared / "hers/payload.md", mode=0o600).parent
    told = {f"user.memfs.{name}" for name in ("id", "title", "payload_sha256")}
    for path in (cube, cube / "payload.md", cube / "meta.json"):
        assert told <= set(attributes(ANN, path))
        assert told <= set(os.listxattr(path))
        assert not [name for name in attributes(BEN, path) if "memfs" in name]
    for name in (*told, "user.memfs.reads", "user.memfs.mounted"):
        assert as_user(ANN, lambda name=name: os.getxattr(cube, name))
        with pytest.raises(OSError, match="No data") as caught:
            as_user(BEN, lambda name=name: os.getxattr(cube, name))
        assert caught.value.errno == errno.ENODATA
    as_user(ANN, lambda: (cube / "payload.md").chmod(0o644))
    assert told <= set(attributes(BEN, cube))


def test_trusted_attributes_are_listed_to_root_alone(shared: Path) -> None:
    file = own(ANN, shared / "file", mode=0o644)
    beside = shared.parents[1] / "store" / shared.name / "file"
    os.setxattr(beside, "trusted.secret", b"x")
    assert "trusted.secret" in os.listxattr(file)
    assert "trusted.secret" not in attributes(ANN, file)
    assert "trusted.secret" not in as_user(ANN, lambda: os.listxattr(beside)), "as on the disk"


def stamps(cube: Path) -> list[str]:
    return sorted(os.listdir(cube / ".versions"))


def past(uid: int, cube: Path, name: str) -> list[str]:
    """Everything that a user reads under a name in a cube's versions."""
    files = [cube / ".versions" / stamp / name for stamp in stamps(cube)]
    return [text for file in files if (text := reads(uid, file)) is not None]


def id_of(cube: Path) -> str:
    return os.getxattr(cube, "user.memfs.id").decode()


def deleted(mount: Mount, cube_id: str) -> bool:
    lines = (mount.dir / ".memfs/deleted").read_text().splitlines()
    return any(json.loads(line)["id"] == cube_id for line in lines)


def moment() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@pytest.mark.parametrize("name", ["adapter/notes.json", "payload.md"])
def test_nor_does_the_past_open_anothers_file(shared: Path, name: str) -> None:
    secret = own(BEN, shared / "secret.txt", SECRET)
    cube = own(ANN, shared / "hers/payload.md", "one\n").parent
    target = cube / name

    def steal() -> None:
        target.parent.mkdir(exist_ok=True)
        (cube / "payload.md").replace(shared / "aside")
        secret.rename(target)
        if name != "payload.md":
            (shared / "aside").rename(cube / "payload.md")

    as_user(ANN, steal)
    kept = until(lambda: [s for s in stamps(cube) if (cube / ".versions" / s / name).exists()])
    newest = [(cube / ".versions" / s / name) for s in kept if SECRET in os_text(cube, s, name)]
    assert newest, "it is in a version, and root reads it"

    def away() -> None:
        target.unlink()
        (cube / "payload.md").write_text("two\n")

    as_user(ANN, away)
    assert SECRET not in past(ANN, cube, name)
    until(lambda: "two\n" in past(ANN, cube, "payload.md"))
    for version in (file.parents[len(Path(name).parts) - 1] for file in newest):
        assert name != "payload.md" or reads(ANN, version / "version.json") is None


def os_text(cube: Path, stamp: str, name: str) -> str:
    return (cube / ".versions" / stamp / name).read_text()


@pytest.mark.parametrize("way", ["header", "aside"])
def test_an_id_brings_nobody_anothers_past(open_mount: Mount, shared: Path, way: str) -> None:
    cube = own(BEN, shared / "his/payload.md", SECRET).parent
    his = id_of(cube)
    header = json.loads((cube / "meta.json").read_text())
    header["behavioural"] = {}  # whoever knows the id alone
    as_user(BEN, lambda: shutil.rmtree(cube))
    until(lambda: deleted(open_mount, his))
    hers = shared / "hers"

    def arrive() -> None:
        place = shared / ".memfs-tmp-load-hers" if way == "aside" else hers
        place.mkdir()
        (place / "payload.md").write_text("Hers.\n")
        (place / "meta.json").write_text(json.dumps(header))
        if way == "aside":
            place.rename(hers)

    as_user(ANN, arrive)
    assert id_of(hers) != his
    assert past(ANN, hers, "payload.md") == ["Hers.\n"]
    said = json.loads((hers / "meta.json").read_text())
    assert said["descriptive"]["origin"]["copied_from"] == his
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    assert digest not in (hers / "meta.json").read_text()
    # His own cube has its past again.
    as_user(BEN, lambda: shutil.copytree(cube_before(open_mount, cube), cube))
    assert id_of(cube) == his
    assert SECRET in past(BEN, cube, "payload.md")


def cube_before(mount: Mount, cube: Path) -> Path:
    """Where a deleted cube is as it was at its last version."""
    lines = map(json.loads, (mount.dir / ".memfs/deleted").read_text().splitlines())
    path = str(cube.relative_to(mount.dir))
    (stamp, _) = next(line for line in lines if line["path"] == path)["versions"][-1]
    return mount.dir / ".memfs/at" / stamp / path


def test_a_chown_gives_the_cube_and_not_its_past(shared: Path) -> None:
    cube = own(ANN, shared / "hers/payload.md", "hers alone\n").parent
    for path in (cube, *cube.iterdir()):
        os.chown(path, BEN, BEN)
    as_user(BEN, lambda: (cube / "payload.md").write_text("his\n"))
    assert past(BEN, cube, "payload.md") == ["his\n"]
    assert past(ANN, cube, "payload.md") == []
    assert past(0, cube, "payload.md") == ["hers alone\n", "his\n"]


def test_several_who_write_one_cube_keep_its_past(shared: Path) -> None:
    """By their group; whoever saves as an editor does becomes the text's owner."""
    team = {"gid": 70010}
    cube = shared / "ours"

    def save(text: str) -> None:
        (cube / "new").write_text(text)
        (cube / "new").chmod(0o660)
        (cube / "new").rename(cube / "payload.md")

    as_user(ANN, lambda: (cube.mkdir(), cube.chmod(0o770), save("one\n")), **team)
    as_user(BEN, lambda: save("two\n"), **team)
    for uid in (ANN, BEN):
        files = [cube / ".versions" / stamp / "payload.md" for stamp in stamps(cube)]
        texts = [as_user(uid, file.read_text, **team) for file in files if file.exists()]
        assert texts == ["one\n", "two\n"]


def test_a_deletion_opens_nothing(open_mount: Mount, shared: Path) -> None:
    """A change of rights makes no version, and is remembered by the deletion all the same."""
    cube = own(ANN, shared / "private/payload.md", SECRET, 0o644).parent
    public = own(ANN, shared / "public/payload.md", "Public.\n", 0o644).parent
    closed = own(ANN, shared / "closed/payload.md", "Behind a door.\n", 0o644).parent
    at = open_mount.dir / ".memfs/at" / moment()
    there = {c: at / c.relative_to(open_mount.dir) / "payload.md" for c in (cube, public, closed)}
    assert reads(BEN, there[cube]) == SECRET
    ids = {c: id_of(c) for c in there}

    def end() -> None:
        (cube / "payload.md").chmod(0o600)
        closed.chmod(0o700)
        for directory in there:
            shutil.rmtree(directory)

    as_user(ANN, end)
    until(lambda: all(deleted(open_mount, cube_id) for cube_id in ids.values()))
    assert reads(BEN, there[cube]) is None
    assert reads(BEN, there[closed]) is None
    assert reads(BEN, there[public]) == "Public.\n"
    for place in there.values():
        assert reads(ANN, place) is not None
    known = as_user(BEN, (open_mount.dir / ".memfs/deleted").read_text)
    assert [ids[c] in known for c in (cube, public, closed)] == [False, True, False]


def test_nor_does_a_text_that_goes(shared: Path) -> None:
    cube = own(ANN, shared / "hers/payload.md", SECRET, 0o644).parent
    assert past(BEN, cube, "payload.md") == [SECRET]

    def end() -> None:
        (cube / "payload.md").chmod(0o600)
        (cube / "payload.md").unlink()

    as_user(ANN, end)
    assert past(BEN, cube, "payload.md") == []
    assert past(ANN, cube, "payload.md") == [SECRET]


def test_an_end_that_nobody_saw_leaves_the_past_to_the_owner(tmp_path: Path) -> None:
    open_way(tmp_path)
    with mounted_at(tmp_path) as mount:
        until(mount.has_index)
        mount.dir.chmod(0o777)
        cube = own(ANN, mount.dir / "gone/payload.md", SECRET, 0o644).parent
        cube_id, then = id_of(cube), moment()
        mount.stop()
        (mount.store / "gone/payload.md").chmod(0o600)
        shutil.rmtree(mount.store / "gone")
        mount.start()
        until(lambda: deleted(mount, cube_id))
        file = mount.dir / ".memfs/at" / then / "gone/payload.md"
        assert reads(ANN, file) == SECRET
        assert reads(BEN, file) is None

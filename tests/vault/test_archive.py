"""Archives of cubes: the same cubes give the same file, all that is hostile is refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfs.cube import metadata
from memfs.errors import BadArchive, InvalidRequest, MemfsError, NotACube, NotAllowed, NotFound
from memfs.vault.archive import contents
from memfs.vault.archive.check import Checked, check
from memfs.vault.archive.contents import MANIFEST, SIGNATURE, SUMS
from memfs.vault.archive.dump import Choice, Dump, Source
from memfs.vault.archive.load import load, plan
from memfs.vault.store import Store
from tests.users import as_user, needs_root

WHEN = 1_700_000_000_123_456_789


def make_cube(store: Path, path: str, text: str = "Some text.\n", **governance: Any) -> Path:
    """A cube as a store has it, with files of all kinds in it."""
    cube = store / path
    (cube / "adapter").mkdir(parents=True)
    meta = metadata.new(title=path)
    meta["governance"] |= governance
    contents = {
        "payload.md": text.encode(),
        "kv.safetensors": random.Random(path).randbytes(5000),
        "adapter/adapter_config.json": b'{"base_model_name_or_path": "/home/ann/models/tiny"}',
        "adapter/adapter_model.safetensors": b"weights",
        "adapter/README.md": b"by ann",
        "meta.json": metadata.render(meta),
        "meta.json.rejected": b"{",
        "notes.txt": b"",
    }
    for number, (name, content) in enumerate(contents.items()):
        (cube / name).write_bytes(content)
        os.utime(cube / name, ns=(WHEN + number, WHEN + number))
    (cube / "payload.md").chmod(0o640)
    cube.chmod(0o750)
    return cube


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    root = tmp_path / "store"
    make_cube(root, "law")
    make_cube(root, "work/alpha/notes", "Others.\n")
    with Store.open(root) as opened:
        yield opened


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "empty").mkdir()
    with Store.open(tmp_path / "empty") as opened:
        yield opened


def dumped(store: Store, *paths: str, choice: Choice = Choice(), **options: Any) -> bytes:  # noqa: B008
    out = io.BytesIO()
    sources = [Source(store, path) for path in paths]
    size = Dump(sources, choice, lambda done: None).write(out, options.get("sign"))
    assert size == len(out.getvalue())
    return out.getvalue()


def checked(data: bytes, where: Path) -> Checked:
    with open(where / "archive.tar", "wb+") as file:
        file.write(data)
        file.flush()
        return check(file.fileno())


def loaded(
    data: bytes, store: Store, below: str = "", archive: Path | None = None, **options: Any
) -> None:
    """Checks and loads an archive."""
    with open(archive or store.root.parent / "archive.tar", "wb+") as file:
        file.write(data)
        file.flush()
        found = check(file.fileno())
        choice: dict[str, Any] = {"name": None, "force": False} | options
        places = plan(store, below, found.cubes, **choice)
        load(file.fileno(), found, store, below, places, lambda done: None)


def tree(root: Path) -> dict[str, Any]:
    """Everything below a directory: kind and mode, time of files, content."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        if ".memfs" in path.parts:
            continue
        status = path.lstat()
        is_file = stat.S_ISREG(status.st_mode)
        found[str(path.relative_to(root))] = (
            stat.filemode(status.st_mode),
            status.st_mtime_ns if is_file else None,
            path.read_bytes() if is_file else None,
        )
    return found


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return opened.getnames()


# What travels


def test_the_same_cubes_are_the_same_file(store: Store, empty: Store) -> None:
    first = dumped(store, "law", "work/alpha/notes")
    assert dumped(store, "work/alpha/notes", "law", "law") == first
    subprocess.run(["cp", "-a", store.root / "law", store.root / "work", empty.root], check=True)
    assert dumped(empty, "law", "work/alpha/notes") == first


def test_a_loaded_cube_is_dumped_as_it_was(store: Store, empty: Store) -> None:
    data = dumped(store, "law", "work/alpha/notes")
    loaded(data, empty)
    assert dumped(empty, "law", "work/alpha/notes") == data


def test_tar_and_sha256sum_are_all_it_takes(store: Store, tmp_path: Path) -> None:
    strange = "a name \udcff of ünusual bytes " + "and length" * 12
    (store.root / "law" / strange).write_bytes(b"x")
    target = tmp_path / "unpacked"
    target.mkdir()
    data = dumped(store, "law", "work/alpha/notes")
    subprocess.run(
        ["tar", "xpf", "-", "-C", target], input=data, check=True, stderr=subprocess.PIPE
    )
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=target, check=True, capture_output=True)
    assert done.stdout.count(b": OK\n") == 1 + 8 + 7  # the manifest, and what is in the two cubes
    listed = {line[66:] for line in (target / SUMS).read_bytes().splitlines()}
    there = {os.fsencode(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert listed == there - {SUMS.encode()}
    assert (target / "law/payload.md").stat().st_mtime_ns == WHEN
    assert stat.S_IMODE((target / "law").stat().st_mode) == 0o750
    (target / "law/payload.md").write_text("changed")
    assert subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=target, check=False).returncode


def test_nothing_of_the_moment_and_no_owner_travels(store: Store) -> None:
    with tarfile.open(fileobj=io.BytesIO(dumped(store, "law"))) as opened:
        for member in opened:
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            assert member.mtime == 0 or abs(member.mtime - WHEN / 1e9) < 1
        assert opened.getmember("law/payload.md").pax_headers == {"mtime": "1700000000.123456789"}


def test_everything_arrives(store: Store, empty: Store) -> None:
    loaded(dumped(store, "law", "work/alpha/notes"), empty)
    wanted = tree(store.root)
    gone = {name for name in wanted if name.endswith("meta.json.rejected")}
    assert tree(empty.root) == {n: v for n, v in wanted.items() if n not in gone}


def test_what_no_archive_has_is_named(store: Store) -> None:
    os.symlink("/etc/passwd", store.root / "law/link")
    os.mkfifo(store.root / "law/adapter/fifo")
    (store.root / "law/inside").mkdir()
    (store.root / "law/inside/payload.md").write_text("another cube")
    dump = Dump([Source(store, "law")], Choice(), lambda done: None)
    assert sorted(dump.left_out) == ["law/adapter/fifo", "law/link"]
    assert not any("inside" in name for name in names(dumped(store, "law")))
    both = names(dumped(store, "law", "law/inside"))
    assert both.index("law/inside") > both.index("law/payload.md")


def test_text_only(store: Store) -> None:
    found = names(dumped(store, "law", choice=Choice(text_only=True)))
    assert found == [SUMS, MANIFEST, "law", "law/meta.json", "law/notes.txt", "law/payload.md"]


def test_redacted(store: Store, tmp_path: Path) -> None:
    header = store.root / "law/meta.json"
    meta = metadata.parse(header.read_bytes())
    meta["governance"] |= {
        "owner": "ann",
        "group": "staff",
        "mode": "600",
        "access": [{"who": "user:bob", "rights": ["read"]}],
        "watermark": "mark-7",
        "x-note": "private",
    }
    meta["behavioural"] |= {"reads": 7, "last_used": "2026-01-02T03:04:05Z", "versions": ["0" * 64]}
    meta["descriptive"]["origin"] |= {"host": "annsbox", "source": "a book", "copied_from": "id"}
    meta["state"]["pinned"] = True
    header.write_bytes(metadata.render(meta))
    data = dumped(store, "law", choice=Choice(redacted=True))
    assert names(data)[2:] == [
        "law",
        "law/adapter",
        "law/adapter/adapter_config.json",
        "law/adapter/adapter_model.safetensors",
        "law/kv.safetensors",
        "law/meta.json",
        "law/payload.md",
    ]
    for secret in (b"ann", b"bob", b"staff", b"private", b"2026-01-02"):
        assert secret not in data
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        file = opened.extractfile("law/meta.json")
        assert file is not None
        found = metadata.parse(file.read())
    assert found["descriptive"] == meta["descriptive"] | {
        "origin": {"host": None, "source": "a book", "copied_from": None}
    }
    assert found["governance"]["watermark"] == "mark-7"
    assert found["behavioural"] == metadata.new()["behavioural"]
    assert checked(data, tmp_path).cubes[0].id == metadata.cube_id(meta)


@pytest.mark.parametrize("sensitivity", ["confidential", "secret"])
def test_a_sensitive_cube_is_not_redacted(store: Store, sensitivity: str) -> None:
    make_cube(store.root, "mine", sensitivity=sensitivity)
    with pytest.raises(NotAllowed, match=f"mine is {sensitivity}"):
        dumped(store, "mine", choice=Choice(redacted=True))
    assert "mine/payload.md" in names(dumped(store, "mine"))


def test_what_cannot_be_dumped(store: Store, empty: Store) -> None:
    with pytest.raises(NotACube, match="a collection"):
        dumped(store, "work")
    with pytest.raises(NotACube):
        dumped(store, "nothing")
    make_cube(empty.root, "law")
    with pytest.raises(InvalidRequest, match="two cubes are called 'law'"):
        Dump([Source(store, "law"), Source(empty, "law")], Choice(), lambda done: None)
    make_cube(empty.root, SUMS)
    with pytest.raises(InvalidRequest, match="a list of the archive"):
        dumped(empty, SUMS)
    (store.root / "law/two\nlines").write_text("")
    with pytest.raises(InvalidRequest, match="control character"):
        dumped(store, "law")


def test_who_may_read_is_the_files_own(store: Store) -> None:
    header = store.root / "law/meta.json"
    meta = metadata.parse(header.read_bytes())
    entry = {"who": "user:bob", "rights": ["read", "write"]}
    both = {"who": "group:staff", "rights": ["read", "mount"], "x-why": "kept"}
    meta["governance"]["access"] = [entry, both]
    header.write_bytes(metadata.render(meta))
    with tarfile.open(fileobj=io.BytesIO(dumped(store, "law"))) as opened:
        file = opened.extractfile("law/meta.json")
        assert file is not None
        found = metadata.parse(file.read())
    assert found["governance"]["access"] == [both | {"rights": ["mount"]}]


def test_a_file_that_changes_meanwhile_fails_the_dump(store: Store) -> None:
    for change in (b"Some tixt.\n", b"Some", b"Some text, and more of it.\n"):
        (store.root / "law/payload.md").write_bytes(b"Some text.\n")
        dump = Dump([Source(store, "law")], Choice(), lambda done: None)
        (store.root / "law/payload.md").write_bytes(change)
        with pytest.raises(MemfsError, match=r"law/payload\.md was changed"):
            dump.write(io.BytesIO(), None)


# What is refused


class Forged:
    """An archive made by hand: its lists follow from what it holds, whatever that is."""

    def __init__(self, good: bytes) -> None:
        self.members: list[tuple[tarfile.TarInfo, bytes]] = []
        with tarfile.open(fileobj=io.BytesIO(good)) as opened:
            for member in opened:
                file = opened.extractfile(member)
                data = file.read() if file else b""
                if member.name == MANIFEST:
                    self.manifest = json.loads(data)
                elif member.name != SUMS:
                    member.pax_headers, member.mtime = {}, 0
                    self.members.append((member, data))
        for cube in self.manifest["cubes"]:
            for entry in cube["entries"]:
                entry["mtime_ns"] = 0
        self.extra_sums: list[tuple[str, str]] = []

    def member(self, name: str) -> tarfile.TarInfo:
        return next(member for member, _ in self.members if member.name == name)

    def rename(self, old: str, new: str) -> Forged:
        """Renames a cube, in the lists too."""
        for cube in self.manifest["cubes"]:
            if cube["path"] == old:
                cube["path"] = new
        for member, _ in self.members:
            if member.name == old or member.name.startswith(old + "/"):
                member.name = new + member.name[len(old) :]
        return self

    def add(self, name: str, data: bytes = b"x", **entry: Any) -> Forged:
        """One more file in the first cube, in the lists too."""
        cube = self.manifest["cubes"][0]
        cube["entries"].append({"name": name, "bytes": len(data), "mode": "0644", "mtime_ns": 0})
        cube["entries"][-1] |= entry
        cube["entries"].sort(key=lambda e: contents.order(e["name"]))
        member = tarfile.TarInfo(f"{cube['path']}/{name}")
        member.size = len(data)
        member.mode = 0o644
        self.members.append((member, data))
        self.members.sort(key=lambda item: contents.order(item[0].name))
        return self

    def lists(self) -> list[tuple[str, bytes]]:
        manifest = (json.dumps(self.manifest, indent=1) + "\n").encode()
        files = [(MANIFEST, manifest)]
        files += [(m.name, data) for m, data in self.members if not m.isdir()]
        digests = [(name, hashlib.sha256(data).hexdigest()) for name, data in files]
        return [(SUMS, contents.sums_bytes(digests + self.extra_sums)), (MANIFEST, manifest)]

    def bytes(self) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as opened:
            for name, data in self.lists():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                opened.addfile(member, io.BytesIO(data))
            for member, data in self.members:
                opened.addfile(member, io.BytesIO(data) if member.isreg() else None)
        return out.getvalue()


def spliced(good: bytes, at: str, raw: bytes, *, instead: int = 0) -> bytes:
    """``raw`` put where the header of a member begins, over so many bytes."""
    with tarfile.open(fileobj=io.BytesIO(good)) as opened:
        offset = opened.getmember(at).offset
    found = good[:offset] + raw + good[offset + instead :]
    return found + contents.padding(len(found), contents.RECORD)


def header(name: str, kind: bytes, *, size: int = 0, link: str = "", **pax: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.pax_headers = kind, size, link, pax
    return info.tobuf(tarfile.PAX_FORMAT)


def of_kind(kind: bytes, link: str = "") -> Callable[[bytes], bytes]:
    def forge(good: bytes) -> bytes:
        forged = Forged(good)
        member = forged.member("law/notes.txt")
        member.type, member.linkname = kind, link
        return forged.bytes()

    return forge


def recoded(change: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    """The manifest changed, and SHA256SUMS with it."""

    def forge(good: bytes) -> bytes:
        forged = Forged(good)
        change(forged.manifest)
        return forged.bytes()

    return forge


def with_field(good: bytes, offset: int, value: bytes) -> bytes:
    """A field of the header of law/payload.md overwritten, its checksum made right again."""
    forged = Forged(good).bytes()
    with tarfile.open(fileobj=io.BytesIO(forged)) as opened:
        start = opened.getmember("law/payload.md").offset
    return (
        forged[:start]
        + overwritten(forged[start : start + 512], offset, value)
        + forged[start + 512 :]
    )


def overwritten(header: bytes, offset: int, value: bytes) -> bytes:
    """A field of a header overwritten, the checksum made right again."""
    block = bytearray(header)
    block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def overflowing(headers: bytes) -> bytes:
    """The first of some headers says a size that is no offset in any file."""
    return overwritten(headers[:512], 124, b"\x80" + (1 << 80).to_bytes(11, "big")) + headers[512:]


def dropped(good: bytes) -> bytes:
    forged = Forged(good)
    forged.members = [m for m in forged.members if m[0].name != "law/notes.txt"]
    return forged.bytes()


def doubled(good: bytes) -> bytes:
    member = contents.member_header("law/payload.md", size=1)
    return spliced(good, "work/alpha/notes", member + b"x" + bytes(511))


def without_sums(good: bytes) -> bytes:
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(good)) as opened,
        tarfile.open(fileobj=out, mode="w") as new,
    ):
        for member in opened:
            if member.name != SUMS:
                new.addfile(member, opened.extractfile(member))
    return out.getvalue()


def wrong_digest(good: bytes) -> bytes:
    return good.replace(b"Some text.\n", b"Same text.\n")


def bomb(good: bytes) -> bytes:
    size = 8 * 1024**4
    forged = Forged(good)
    entry = next(e for e in forged.manifest["cubes"][0]["entries"] if e["name"] == "payload.md")
    entry["bytes"] = size
    data = forged.bytes()
    old = contents.member_header("law/payload.md", size=11, mode=0o640)
    data = data.replace(old, contents.member_header("law/payload.md", size=size, mode=0o640))
    return data + contents.padding(len(data), contents.RECORD)


def sparse(good: bytes) -> bytes:
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(1 << 50),
    }
    raw = header("law/payload.md", tarfile.REGTYPE, size=11, **records)
    return spliced(Forged(good).bytes(), "law/payload.md", raw, instead=512)


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "absolute path": (lambda g: Forged(g).rename("law", "/law").bytes(), "absolute path"),
    "absolute path, unlisted": (
        lambda g: spliced(g, "law", header("/etc/cron.d/x", tarfile.REGTYPE)),
        "'/etc/cron.d/x' is an absolute path",
    ),
    "dot dot": (lambda g: Forged(g).rename("law", "../law").bytes(), r"by '\.\.'"),
    "dot dot within": (lambda g: Forged(g).rename("law", "a/../../law").bytes(), r"by '\.\.'"),
    "dot dot, unlisted": (
        lambda g: spliced(g, "law", header("law/../../x", tarfile.REGTYPE)),
        r"leads out of its directory by '\.\.'",
    ),
    "dot": (lambda g: Forged(g).rename("law", "./law").bytes(), "empty name or '.'"),
    "empty name": (lambda g: Forged(g).rename("law", "law//x").bytes(), "empty name or '.'"),
    "symlink out": (of_kind(tarfile.SYMTYPE, "/etc"), r"'law/notes\.txt' is a symlink"),
    "hard link out": (of_kind(tarfile.LNKTYPE, "/etc/passwd"), "is a hard link"),
    "hard link within": (of_kind(tarfile.LNKTYPE, "law/payload.md"), "is a hard link"),
    "character device": (of_kind(tarfile.CHRTYPE), "is a character device"),
    "block device": (of_kind(tarfile.BLKTYPE), "is a block device"),
    "fifo": (of_kind(tarfile.FIFOTYPE), "is a fifo"),
    "contiguous file": (of_kind(tarfile.CONTTYPE), "is a contiguous file"),
    "old sparse file": (of_kind(tarfile.GNUTYPE_SPARSE), "is a sparse file"),
    "pax sparse file": (sparse, r"law/payload\.md' has pax records of its own: .*GNU\.sparse"),
    "symlink before its target": (
        lambda g: spliced(g, "law", header("law", tarfile.SYMTYPE, link="/tmp")),
        "'law' is a symlink",
    ),
    "size beyond the file": (bomb, r"'law/payload\.md' ends behind the end"),
    "size unlike the manifest": (
        lambda g: with_field(g, 124, b"%011o" % 12),
        "12 bytes in its header, 11 in the manifest",
    ),
    "size overflows": (
        lambda g: with_field(g, 124, b"\x80" + b"\x7f" * 11),
        r"law/payload\.md' has \d{20,} bytes in its header",
    ),
    "negative size": (lambda g: with_field(g, 124, b"\xff" * 12), "has -1 bytes in its header"),
    "mode unlike the manifest": (lambda g: with_field(g, 100, b"0004755"), "not as memfs dump"),
    "owner": (lambda g: with_field(g, 108, b"0001750"), "not as memfs dump"),
    "time unlike the manifest": (lambda g: with_field(g, 136, b"7" * 11), "not as memfs dump"),
    "something in unused bytes": (lambda g: with_field(g, 500, b"hidden"), "not as memfs dump"),
    "wrong header checksum": (
        lambda g: spliced(g, "law", contents.member_header("lax", size=0).replace(b"x", b"w", 1)),
        "is damaged or no tar header",
    ),
    "pax path": (
        lambda g: spliced(g, "law", header("x", tarfile.REGTYPE, path="/etc/passwd")),
        "absolute path|pax records",
    ),
    "pax size": (
        lambda g: spliced(
            Forged(g).bytes(),
            "law/payload.md",
            header("law/payload.md", tarfile.REGTYPE, size=11, size_="9"),
            instead=512,
        ),
        "pax records of its own",
    ),
    "pax records without end": (
        lambda g: spliced(g, "law", overflowing(header("x", tarfile.REGTYPE, path="law"))),
        "is damaged or no tar header",
    ),
    "global pax header": (
        lambda g: spliced(g, "law", header("x", tarfile.XGLTYPE)),
        "is a global pax header",
    ),
    "GNU long name": (
        lambda g: spliced(g, "law", header("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=5)),
        "is a GNU long name",
    ),
    "GNU long link": (
        lambda g: spliced(g, "law", header("././@LongLink", tarfile.GNUTYPE_LONGLINK, size=5)),
        "is a GNU long link",
    ),
    "unknown kind": (lambda g: spliced(g, "law", header("law", b"Z")), "not as memfs dump"),
    "twice": (doubled, r"'law/payload\.md' is in it twice"),
    "unlisted": (
        lambda g: spliced(g, "law", contents.member_header("a", size=0)),
        "'a' stands where 'law' must",
    ),
    "missing": (dropped, r"'law/notes\.txt' is not in SHA256SUMS"),
    "missing in the tar": (
        lambda g: spliced(g, "law/notes.txt", b"", instead=1536),
        r"'law/payload\.md' stands where 'law/notes\.txt' must",
    ),
    "no SHA256SUMS": (without_sums, "'memfs-archive.json' stands where 'SHA256SUMS' must"),
    "more in SHA256SUMS": (
        lambda g: [f := Forged(g), f.extra_sums.append(("law/more", "0" * 64))][0].bytes(),
        "'law/more' is in SHA256SUMS and not in",
    ),
    "absolute in SHA256SUMS": (
        lambda g: [f := Forged(g), f.extra_sums.append(("/etc/shadow", "0" * 64))][0].bytes(),
        "'/etc/shadow' is an absolute path",
    ),
    "twice in SHA256SUMS": (
        lambda g: [f := Forged(g), f.extra_sums.append(("law/payload.md", "0" * 64))][0].bytes(),
        "SHA256SUMS has 'law/payload.md' twice",
    ),
    "other content": (wrong_digest, r"'law/payload\.md' is not what SHA256SUMS says"),
    "other manifest": (lambda g: g.replace(b'"0640"', b'"0646"'), "is not the one in SHA256SUMS"),
    "memfs's own": (lambda g: Forged(g).rename("law", ".memfs/law").bytes(), "memfs's own"),
    "memfs's own, shouted": (lambda g: Forged(g).rename("law", ".MemFS").bytes(), "memfs's own"),
    "memfs's own, deep": (lambda g: Forged(g).add(".memfs-tmp-1").bytes(), "memfs's own"),
    "versions": (lambda g: Forged(g).rename("law", "a/.versions").bytes(), "memfs's own"),
    "long name": (lambda g: Forged(g).rename("law", "a" * 256).bytes(), "more than 255 bytes"),
    "long path": (lambda g: Forged(g).rename("law", "a/" * 1100 + "b").bytes(), "longer than"),
    "deep path": (lambda g: Forged(g).rename("law", "a/" * 200 + "b").bytes(), "names deep"),
    "line end in a name": (
        lambda g: Forged(g).rename("law", "a\nb").bytes(),
        "control character|not a digest",
    ),
    "NUL in a name": (
        recoded(lambda m: m["cubes"][0].update(path="a\0b")),
        "is not in SHA256SUMS|control character",
    ),
    "a name of the lists": (lambda g: Forged(g).rename("law", SUMS).bytes(), "one of the archive"),
    "no cube": (recoded(lambda m: m.update(cubes=[])), "no cube|not in memfs-archive"),
    "not a cube": (
        recoded(
            lambda m: m["cubes"].append(
                {"path": "z", "id": None, "entries": [{"name": "", "mode": "0755", "mtime_ns": 0}]}
            )
        ),
        "'z' is not a cube",
    ),
    "a cube that is not named": (
        recoded(
            lambda m: m["cubes"][0]["entries"].extend(
                [
                    {"name": "z", "mode": "0755", "mtime_ns": 0},
                    {"name": "z/payload.md", "bytes": 0, "mode": "0644", "mtime_ns": 0},
                ]
            )
        ),
        "a cube in it that is not named: 'z'",
    ),
    "a cube within a file": (
        lambda g: Forged(g).rename("work/alpha/notes", "law/notes.txt/x").bytes(),
        "lies in what is a file",
    ),
    "payload.md is a directory": (
        recoded(
            lambda m: (
                m["cubes"][1]["entries"].remove(
                    next(e for e in m["cubes"][1]["entries"] if e["name"] == "payload.md")
                )
                or m["cubes"][1]["entries"].append(
                    {"name": "payload.md", "mode": "0755", "mtime_ns": 0}
                )
            )
        ),
        "is a directory",
    ),
    "a file in no directory": (lambda g: Forged(g).add("x/y").bytes(), "no directory of it"),
    "no id": (recoded(lambda m: m["cubes"][0].update(id=None)), "other way round"),
    "another id": (
        recoded(lambda m: m["cubes"][0].update(id="0" * 8 + "-0000" * 3 + "-" + "0" * 12)),
        "has another id",
    ),
    "bad meta.json": (
        lambda g: g.replace(b'"priority": 0', b'"priority": x'),
        "is not what SHA256SUMS says",
    ),
    "setuid": (lambda g: Forged(g).add("z", mode="4755").bytes(), "has the mode 4755"),
    "a number too large": (
        lambda g: Forged(g).add("z", mtime_ns=1 << 70).bytes(),
        "a time that no file has",
    ),
    "a number that is none": (
        lambda g: Forged(g).add("z", bytes=1e300).bytes(),
        "is not one: TypeError",
    ),
    "a name that is half a character": (
        recoded(lambda m: m["cubes"][0].update(path="\ud800")),
        "is not one: UnicodeEncodeError",
    ),
    "a name within that is half a character": (
        recoded(lambda m: m["cubes"][0]["entries"][1].update(name="\ud800")),
        "is not one: UnicodeEncodeError",
    ),
    "a deep manifest": (
        recoded(lambda m: m.update(cubes=json.loads("[" * 900 + "]" * 900))),
        "is not one",
    ),
    "another format": (recoded(lambda m: m.update(format="memfs-archive-9")), "'memfs-archive-9'"),
    "more in the manifest": (recoded(lambda m: m.update(more=1)), "not written as memfs dump"),
    "gzip": (lambda g: b"\x1f\x8b\x08" + g, "compressed .gzip"),
    "zip": (lambda g: b"PK\x03\x04" + g, "compressed .zip"),
    "trailing bytes": (lambda g: g + b"x" * contents.RECORD, "goes on for 10240 bytes"),
    "trailing zeros": (lambda g: g + bytes(contents.RECORD), "goes on for 10240 bytes"),
    "concatenated": (lambda g: g + g, "goes on for"),
    "cut short": (lambda g: g[:-1000], "cut short"),
    "cut to records": (lambda g: g[: contents.RECORD], "ends behind|ends where|damaged"),
    "something in the padding": (
        lambda g: g.replace(b"Some text.\n\0", b"Some text.\nx"),
        "followed by something else than zeros",
    ),
    "something after the end": (lambda g: g[:-1] + b"x", "the end"),
    "empty": (lambda g: b"", "0 bytes long"),
    "no tar": (lambda g: b"hello" * 4096, "damaged or no tar"),
    "zeros": (lambda g: bytes(contents.RECORD), "ends where 'SHA256SUMS' must"),
}


def test_a_forged_archive_is_a_good_one(store: Store, tmp_path: Path) -> None:
    """What the table below is made with adds nothing that would be refused by itself."""
    forged = Forged(dumped(store, "law", "work/alpha/notes")).add("z")
    assert [cube.path for cube in checked(forged.bytes(), tmp_path).cubes] == [
        "law",
        "work/alpha/notes",
    ]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_by_name(store: Store, empty: Store, kind: str) -> None:
    forge, message = HOSTILE[kind]
    good = dumped(store, "law", "work/alpha/notes")
    data = forge(good)
    assert data != good
    around = tree(empty.root.parent)
    with pytest.raises(BadArchive, match=message):
        loaded(data, empty)
    (empty.root.parent / "archive.tar").unlink()
    assert tree(empty.root.parent) == around


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_mutated_archive_is_refused_or_the_same(
    store: Store, empty: Store, data: st.DataObject
) -> None:
    good = dumped(store, "law")
    mutated = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["byte", "delete", "insert", "copy"]))
        at = data.draw(st.integers(0, len(mutated) - 1))
        if kind == "byte":
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del mutated[at : at + data.draw(st.sampled_from([1, 512, 1024, 10240]))]
        elif kind == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=512))
        else:
            block = at // 512 * 512
            mutated[block:block] = mutated[: data.draw(st.sampled_from([512, 1024]))]
        if not mutated:
            break
    try:
        loaded(bytes(mutated), empty)
    except BadArchive:
        assert bytes(mutated) != good
        assert tree(empty.root) == {}
    else:
        assert bytes(mutated) == good
        shutil.rmtree(empty.root / "law")


KINDS = st.sampled_from([b"0", b"5", b"x", b"g", b"S", b"L", b"1", b"2"])
FIELDS = st.one_of(
    st.tuples(st.just(156), KINDS),
    st.tuples(st.sampled_from([100, 108, 124, 136]), st.binary(min_size=1, max_size=12)),
    st.tuples(st.just(124), st.binary(min_size=11, max_size=11).map(lambda raw: b"\x80" + raw)),
    st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=12)),
)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(st.characters(exclude_categories=())),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def only_refused(data: bytes, good: bytes, empty: Store) -> None:
    """Anything but the good archive is BadArchive, and leaves nothing."""
    if data != good:
        with pytest.raises(BadArchive):
            loaded(data, empty)
    assert os.listdir(empty.root) == [".memfs"]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    fields=st.lists(FIELDS, min_size=1, max_size=3), which=st.integers(0, 10), more=st.booleans()
)
def test_headers_of_any_kind_are_refused_and_nothing_else_comes_of_them(
    store: Store, empty: Store, fields: list[tuple[int, bytes]], which: int, more: bool
) -> None:
    good = dumped(store, "law")
    with tarfile.open(fileobj=io.BytesIO(good)) as opened:
        members = opened.getmembers()
    start = members[which % len(members)].offset
    block = good[start : start + 512]
    for offset, value in fields:
        block = overwritten(block, offset, value[: 512 - offset])
    rest = good[start:] if more else good[start + 512 :]
    data = good[:start] + block + rest
    only_refused(data + contents.padding(len(data), contents.RECORD), good, empty)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_manifests_of_any_kind_are_refused_and_nothing_else_comes_of_them(
    store: Store, empty: Store, data: st.DataObject
) -> None:
    forged = Forged(dumped(store, "law"))
    good = forged.bytes()
    node = forged.manifest
    while True:
        key = data.draw(
            st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
        )
        if not node[key] or not isinstance(node[key], dict | list) or data.draw(st.booleans()):
            break
        node = node[key]
    if key in ("redacted", "text_only"):  # which says nothing of what is in it
        return
    node[key] = data.draw(JSON)
    only_refused(forged.bytes(), good, empty)


def test_a_file_changed_after_the_check_is_not_loaded(store: Store, empty: Store) -> None:
    path = empty.root.parent / "archive.tar"
    path.write_bytes(dumped(store, "law", "work/alpha/notes"))
    with open(path, "rb+") as file:
        found = check(file.fileno())
        places = plan(empty, "", found.cubes, name=None, force=False)
        path.write_bytes(path.read_bytes().replace(b"Others.\n", b"Ethers.\n"))
        with pytest.raises(BadArchive, match=r"payload\.md' was changed while"):
            load(file.fileno(), found, empty, "", places, lambda done: None)
    assert os.listdir(empty.root) == [".memfs"]


def test_a_device_is_not_read(tmp_path: Path) -> None:
    fd = os.open("/dev/zero", os.O_RDONLY)
    with pytest.raises(BadArchive, match="not a regular file"):
        check(fd)
    os.close(fd)


# Where it goes


def test_a_name_that_is_taken(store: Store, empty: Store) -> None:
    data = dumped(store, "law")
    loaded(data, empty)
    before = tree(empty.root)
    with pytest.raises(InvalidRequest, match="law is there already: --force"):
        loaded(data, empty)
    loaded(data, empty, name="second/law")
    (empty.root / "law/payload.md").write_text("A newer text.\n")
    (empty.root / "law/more.txt").write_text("goes too")
    loaded(data, empty, force=True)
    after = tree(empty.root)
    assert {n: v for n, v in after.items() if not n.startswith("second")} == before
    assert (empty.root / "second/law/payload.md").read_text() == "Some text.\n"


@needs_root
def test_read_only_directories_travel_and_are_replaced(store: Store, public: Path) -> None:
    """By somebody who is not root, who may move and remove only what he may write."""
    make_cube(store.root, "law/inner")
    both = {"law/adapter": 0o555, "law/inner": 0o100, "law": 0o555}
    for name, mode in both.items():
        (store.root / name).chmod(mode)
    data, one = dumped(store, "law", "law/inner", "work/alpha/notes"), dumped(store, "law")
    for name in ("first", "second"):
        (public / name).mkdir()
        os.chown(public / name, 1234, 1234)

    def body() -> None:
        with Store.open(public / "first") as first:
            loaded(data, first)
        with Store.open(public / "second") as second:
            loaded(one, second)
            (public / "second/law").chmod(0o755)
            (public / "second/law/more").write_text("x")
            (public / "second/law").chmod(0o555)
            loaded(one, second, force=True)

    public.chmod(0o777)
    as_user(1234, body)
    for name, mode in both.items():
        assert stat.S_IMODE((public / "first" / name).stat().st_mode) == mode
    assert (public / "first/law/inner/payload.md").exists()
    assert sorted(os.listdir(public / "second")) == [".memfs", "law"]
    del both["law/inner"]
    for name, mode in both.items():
        assert stat.S_IMODE((public / "second" / name).stat().st_mode) == mode
    assert "more" not in os.listdir(public / "second/law")


@needs_root
def test_a_replacement_that_fails_leaves_the_old_one_as_it_was(store: Store, public: Path) -> None:
    """The collection that it is in is another's."""
    data = dumped(store, "work/alpha/notes")
    with Store.open(public) as other:
        loaded(data, other)
        for path in (public, public / "work/alpha/notes"):
            os.chown(path, 1234, 1234)
        (public / "work/alpha/notes").chmod(0o555)
        before = tree(public)

        def body() -> None:
            with Store.open(public, create_control=False) as other, pytest.raises(PermissionError):
                loaded(data, other, force=True, archive=public.parent / f"{public.name}.tar")

        as_user(1234, body)
    (public.parent / f"{public.name}.tar").unlink()
    assert tree(public) == before


def test_what_is_not_replaced(store: Store, empty: Store) -> None:
    data = dumped(store, "law")
    law = empty.root / "law"
    law.write_text("a file")
    with pytest.raises(NotAllowed, match="not a cube"):
        loaded(data, empty, force=True)
    law.unlink()
    law.mkdir()
    with pytest.raises(NotAllowed, match="not a cube"):
        loaded(data, empty, force=True)
    make_cube(empty.root, "law/inside")
    (law / "payload.md").write_text("x")
    with pytest.raises(NotAllowed, match="another cube is in it, law/inside"):
        loaded(data, empty, force=True)
    shutil.rmtree(law)
    cube = make_cube(empty.root, "law")
    meta = metadata.parse((cube / "meta.json").read_bytes())
    meta["state"]["frozen"] = True
    (cube / "meta.json").write_bytes(metadata.render(meta))
    before = tree(empty.root)
    with pytest.raises(NotAllowed, match="law is frozen"):
        loaded(data, empty, force=True)
    assert tree(empty.root) == before


def test_where_it_cannot_go(store: Store, empty: Store) -> None:
    data = dumped(store, "law", "work/alpha/notes")
    with pytest.raises(NotFound):
        loaded(data, empty, "nowhere")
    with pytest.raises(NotAllowed, match="memfs's own"):
        loaded(data, empty, ".memfs")
    with pytest.raises(InvalidRequest, match="one name for 2 cubes"):
        loaded(data, empty, name="one")
    with pytest.raises(InvalidRequest, match=r"by '\.\.'"):
        loaded(dumped(store, "law"), empty, name="../one")
    make_cube(empty.root, "cube")
    with pytest.raises(InvalidRequest, match="cube is a cube"):
        loaded(data, empty, "cube")
    (empty.root / "work").write_text("a file")
    with pytest.raises(NotAllowed, match="work is not a directory"):
        loaded(data, empty)
    (empty.root / "work").unlink()
    outside = empty.root.parent / "outside"
    outside.mkdir()
    (empty.root / "work").symlink_to(outside)
    with pytest.raises(NotAllowed, match="work is not a directory"):
        loaded(data, empty)
    assert os.listdir(outside) == []
    assert sorted(os.listdir(empty.root)) == [".memfs", "cube", "work"]


def test_no_room(store: Store, empty: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(dumped(store, "law"), empty.root.parent)
    room = os.fstatvfs(empty.fd)
    full = os.statvfs_result((*room[:3], 0, 0, *room[5:]))
    monkeypatch.setattr(os, "fstatvfs", lambda fd: full)
    with pytest.raises(OSError, match="bytes are needed"):
        plan(empty, "", found.cubes, name=None, force=False)


def test_collections_and_a_read_only_cube(store: Store, empty: Store) -> None:
    (store.root / "law/adapter").chmod(0o500)
    (store.root / "law").chmod(0o500)
    (empty.root / "from/elsewhere").mkdir(parents=True)
    loaded(dumped(store, "law", "work/alpha/notes"), empty, "from/elsewhere")
    arrived = empty.root / "from/elsewhere"
    assert sorted(os.listdir(arrived)) == ["law", "work"]
    assert stat.S_IMODE((arrived / "law").stat().st_mode) == 0o500
    assert stat.S_IMODE((arrived / "law/adapter").stat().st_mode) == 0o500
    assert stat.S_IMODE((arrived / "law/payload.md").stat().st_mode) == 0o640


def test_signed(store: Store, tmp_path: Path) -> None:
    signed = dumped(store, "law", sign=lambda sums: b"signature of " + sums[:64])
    found = checked(signed, tmp_path)
    assert names(signed)[1] == SIGNATURE
    assert found.signature == b"signature of " + found.sums[:64]
    plain = checked(dumped(store, "law"), tmp_path)
    assert (plain.signature, plain.sums) == (None, found.sums)

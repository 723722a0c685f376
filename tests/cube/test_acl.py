"""Access lists: the kernel's bytes, and the entries of meta.json beside them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.cube import access_list
from memfs.cube.acl import READ, WRITE, XATTR, Acl, Who, text_of, who_of
from memfs.errors import InvalidMetadata

BITS = st.integers(0, 7)
WHOS = st.builds(Who, st.sampled_from(["user", "group"]), st.integers(70001, 70004))
NAMED = st.dictionaries(WHOS, BITS, max_size=5)
ACLS = st.builds(Acl, BITS, BITS, BITS).flatmap(lambda acl: NAMED.map(acl.with_entries))


@given(ACLS)
def test_bytes_and_back(acl: Acl) -> None:
    assert Acl.parse(acl.render()) == acl


def test_the_same_as_setfacl_writes(tmp_path: Path) -> None:
    import os

    file = tmp_path / "f"
    file.touch(0o640)
    try:
        os.setxattr(file, XATTR, Acl.of_mode(0o640).render())
    except OSError:
        pytest.skip("no access lists on this filesystem")
    acl = Acl.of_mode(0o640).with_entries({Who("user", 70001): 6, Who("group", 70002): 4})
    os.setxattr(file, XATTR, acl.render())
    said = subprocess.run(
        ["getfacl", "-cn", "--", file], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said == [
        "user::rw-",
        "user:70001:rw-",
        "group::r--",
        "group:70002:r--",
        "mask::rw-",
        "other::---",
    ]
    subprocess.run(["setfacl", "-n", "-m", "u:70003:rwx", file], check=True)
    parsed = Acl.parse(os.getxattr(file, XATTR))
    assert parsed.named[Who("user", 70003)] == 7
    assert parsed.effective[Who("user", 70003)] == 6


@pytest.mark.parametrize("raw", [b"", b"\x02\0\0", b"\x01\0\0\0", b"\x02\0\0\0\x01"])
def test_other_bytes_are_none(raw: bytes) -> None:
    with pytest.raises(ValueError, match="access list"):
        Acl.parse(raw)


def test_names() -> None:
    assert who_of("user:root") == Who("user", 0)
    assert who_of("group:70001") == Who("group", 70001)
    assert who_of("user:no such user") is None
    assert who_of("user:99999999999") is None
    assert who_of("context:agent.service") is None
    assert text_of(Who("user", 0)) == "user:root"
    assert text_of(Who("group", 70001)) == "group:70001"


def entry(who: str, *rights: str, **more: str) -> dict[str, object]:
    return {"who": who, "rights": list(rights), **more}


def test_what_is_shown_is_what_the_kernel_holds() -> None:
    stored = [
        entry("user:root", "read", "write", "mount", note="kept"),
        entry("user:somebody else", "read"),
        entry("context:agent.service", "mount"),
        entry("user:70001", "read"),
        entry("group:70002", "share"),
    ]
    acl = Acl.of_mode(0o600).with_entries({Who("user", 0): 4, Who("user", 70003): 6})
    assert access_list.shown(stored, acl) == [
        entry("user:root", "read", "mount", note="kept"),
        entry("user:somebody else", "read"),
        entry("context:agent.service", "mount"),
        entry("group:70002", "share"),
        entry("user:70003", "read", "write"),
    ]
    masked = Acl(6, 0, 0, READ, {Who("user", 70001): READ | WRITE})
    assert access_list.shown([], masked) == [entry("user:70001", "read")]
    assert access_list.shown([], None) == []


def test_what_an_edit_changes() -> None:
    seen = [entry("user:70001", "read", "mount"), entry("user:gone before", "read")]
    assert access_list.changed(seen, seen) == {}
    more = [entry("user:70001", "write"), entry("user:root", "read"), seen[1]]
    assert access_list.changed(more, seen) == {
        Who("user", 70001): WRITE,
        Who("user", 0): READ,
    }
    assert access_list.changed([], seen) == {Who("user", 70001): 0}
    assert access_list.changed([entry("context:agent.service", "mount")], []) == {}
    for bad in (
        entry("user:no such user", "read"),
        entry("group:no such group", "mount"),
        entry("context:agent.service", "read"),
    ):
        with pytest.raises(InvalidMetadata, match="access"):
            access_list.changed([bad], seen)


@given(ACLS, st.dictionaries(WHOS, st.sampled_from([0, 4, 2, 6]), max_size=4))
def test_an_edit_reads_back_as_it_was_written(acl: Acl, wanted: dict[Who, int]) -> None:
    """What somebody is given in the header is what the header then says of him."""
    seen = access_list.shown([], acl)
    entries = [
        entry(text_of(who), *[r for r, bit in access_list.BITS.items() if bits & bit])
        for who, bits in sorted(wanted.items())
        if bits
    ]
    changes = access_list.changed(entries, seen)
    after = acl.with_entries(changes)
    assert {w: b & 6 for w, b in after.effective.items() if b & 6} == {
        w: b for w, b in wanted.items() if b
    }
    for gid in {0, 70001, 70002} - {who.number for who in changes}:
        for rights in (READ, WRITE):  # nobody else may more than before
            if after.allows(70009, {gid}, 1, 0, rights):
                assert acl.allows(70009, {gid}, 1, 0, rights)


NUMBERS = st.sampled_from([70000, 70001, 70002, 70003, 70004])


@given(
    ACLS,
    ACLS,
    st.tuples(NUMBERS, NUMBERS),
    st.booleans(),
    NUMBERS,
    st.frozensets(NUMBERS),
    st.sampled_from([1, 2, 4]),
)
def test_what_two_lists_give_neither_denies(
    first: Acl,
    second: Acl,
    owners: tuple[int, int],
    same_group: bool,
    uid: int,
    gids: frozenset[int],
    right: int,
) -> None:
    differ = owners[0] != owners[1]
    both = first.meet(second, same_group=same_group, owners=owners if differ else None)
    groups = 70003, 70003 if same_group else 70004
    if both.allows(uid, gids, 0 if differ else owners[1], groups[1], right):
        assert first.allows(uid, gids, owners[0], groups[0], right)
        assert second.allows(uid, gids, owners[1], groups[1], right)


def test_who_owned_one_of_two_files_has_what_the_other_gives_him_by_name() -> None:
    his, hers = Acl.of_mode(0o640), Acl(6, 0, 0, 4, {Who("user", 1): 4, Who("user", 3): 4})
    both = his.meet(hers, same_group=False, owners=(1, 2))
    assert both.allows(1, {1}, 0, 0, READ)
    assert not both.allows(2, {2}, 0, 0, READ)
    shared = Acl.of_mode(0o660).meet(Acl.of_mode(0o664), same_group=True, owners=(1, 2))
    assert [shared.allows(uid, {9}, 0, 9, READ) for uid in (1, 2, 3)] == [True] * 3
    assert not shared.allows(2, {2}, 0, 9, READ)


@given(ACLS)
def test_a_list_and_itself_give_the_same(acl: Acl) -> None:
    both = acl.meet(acl, same_group=True)
    assert both.effective == acl.effective
    assert both.mode & 0o707 == acl.mode & 0o707
    assert Acl.of_mode(acl.mode).mode == acl.mode

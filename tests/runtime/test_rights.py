"""Rights at the runtime's socket: real other users, their own processes, one shared runtime."""

from __future__ import annotations

import grp
import json
import os
import shutil
import signal
import socket
import stat
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from memfs.config import Config, shared_dir
from memfs.cube import metadata
from memfs.cube.fingerprint import CHECKSUMS
from memfs.cube.kvfile import TOKEN_IDS
from memfs.errors import InvalidConfig, InvalidRequest, MemfsError, NotAllowed, RuntimeUnavailable
from memfs.runtime.client import RuntimeClient, connect, stop
from memfs.runtime.protocol import shared_socket_path, socket_path
from memfs.vault.rename import RENAME_EXCHANGE, renameat2
from tests.kvbytes import kv_bytes
from tests.users import as_user, in_context, needs_root

from .conftest import Shop, ask, how, prose

pytestmark = needs_root

ANN, BEN, CAT, STAFF = 70001, 70002, 70003, 70010


@pytest.fixture(scope="module")
def shared(tiny_model_dir: Path) -> Iterator[Config]:
    """A runtime of root's that all users may use."""
    directory = tempfile.mkdtemp(prefix="memfs-model-")  # which others may name as well
    model = Path(directory, "model")
    shutil.copytree(tiny_model_dir, model)
    config = Config(str(model), "cpu", "float32", 1, shared="all")
    try:
        with connect(config, start=True) as client:
            client.call("ready", timeout=120)
        yield config
    finally:
        stop(config)
        shutil.rmtree(directory)


@pytest.fixture
def shop(public: Path) -> Shop:
    """A store of Ann's in a place that everybody may enter."""
    root = public / "store"
    root.mkdir()
    shop = Shop(root)
    os.chown(root, ANN, ANN)
    return shop


def cube_of(shop: Shop, path: str, mode: int, **governance: Any) -> dict[str, str]:
    """A cube of Ann's, with a header where something is to stand in it."""
    named = shop.cube(path, prose(40))
    directory = shop.root / path
    for above in (directory, *directory.parents):
        if shop.root in above.parents:
            os.chown(above, ANN, ANN)
    os.chown(directory / "payload.md", ANN, ANN)
    (directory / "payload.md").chmod(mode)
    if governance:
        meta = metadata.new()
        meta["governance"] |= governance
        (directory / "meta.json").write_bytes(metadata.render(meta))
        os.chown(directory / "meta.json", ANN, ANN)
        (directory / "meta.json").chmod(mode)
    return named


def allow(right: str, *who: str) -> list[dict[str, Any]]:
    return [{"who": name, "rights": [right]} for name in who]


def request(config: Config, user: int, op: str, **args: Any) -> Any:
    """What a user's own process is answered, at the shared socket."""
    ids = {name: args.pop(name) for name in ("groups", "before") if name in args}

    def run() -> dict[str, Any]:
        with RuntimeClient(shared_socket_path(config, 0), served_by=0) as client:
            return client.call(op, timeout=60, **args)

    return as_user(user, run, **ids)


def forge(kv: Path) -> None:
    """Turns the sign of every key and value, and makes the checksums right again."""
    with safe_open(kv, "numpy") as file:
        fields = file.metadata()
    tensors = load_file(kv)
    forged = {name: -tensors[name] for name in sorted(tensors.keys() - {TOKEN_IDS})}
    del fields[CHECKSUMS]
    kv.write_bytes(kv_bytes(fields, forged | {TOKEN_IDS: tensors[TOKEN_IDS]}))
    kv.chmod(0o644)


def question(config: Config, uid: int, *cubes: dict[str, str], **ids: Any) -> Any:
    wanted = {"question": "What did the keeper write?", "max_tokens": 4}
    return request(config, uid, "ask", cubes=list(cubes) or None, **wanted, **ids)


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """Class and text of the error."""
    with pytest.raises(MemfsError) as raised:
        call()
    return type(raised.value).__name__, str(raised.value)


def test_who_may_read_may_mount_and_ask(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o644)
    request(shared, BEN, "encode", **cube)
    found = shop.kv("a").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (ANN, 0o644), "it is the text's owner's"
    request(shared, BEN, "mount", **cube)
    assert how(question(shared, BEN)) == ["kv"]
    assert how(question(shared, CAT)) == [], "a session is one user's own"
    assert how(question(shared, CAT, cube)) == ["kv"]


def test_who_may_not_read_gets_nothing(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o600)
    request(shared, ANN, "encode", **cube, mount=True)
    assert stat.S_IMODE(shop.kv("a").stat().st_mode) == 0o600, "the KV cache holds the text"
    for op in ("mount", "unmount", "encode"):
        with pytest.raises(NotAllowed, match="you may not read"):
            request(shared, BEN, op, **cube)
    with pytest.raises(NotAllowed):
        question(shared, BEN, cube)
    with pytest.raises(NotAllowed):
        request(shared, BEN, "encode", **cube, uid=ANN, gid=ANN)  # its word for it is nothing
    assert how(question(shared, ANN)) == ["kv"], "and hers is where it was"


def test_groups_and_access_lists_count_as_the_kernel_counts_them(
    shared: Config, shop: Shop
) -> None:
    cube = cube_of(shop, "a", 0o640)
    os.chown(shop.root / "a/payload.md", ANN, STAFF)
    question(shared, BEN, cube, groups=[STAFF])
    with pytest.raises(NotAllowed):
        question(shared, BEN, cube)
    text = shop.root / "a/payload.md"
    subprocess.run(["setfacl", "-m", f"u:{BEN}:r,u:{CAT}:---", text], check=True)
    question(shared, BEN, cube)
    with pytest.raises(NotAllowed):
        question(shared, CAT, cube, groups=[STAFF])
    subprocess.run(["setfacl", "-m", f"u:{BEN}:---", shop.root / "a"], check=True)
    with pytest.raises(NotAllowed, match="enter a"):
        question(shared, BEN, cube)


def test_behind_a_closed_door_everything_answers_the_same(shared: Config, shop: Shop) -> None:
    """Whether a cube is there, resident, encoded or nothing at all."""
    cubes = [cube_of(shop, f"closed/{name}", 0o644) for name in ("mounted", "encoded", "text")]
    request(shared, ANN, "encode", **cubes[0], mount=True)
    request(shared, ANN, "encode", **cubes[1])
    (shop.root / "closed").chmod(0o700)
    cubes.append(shop.named("closed/nothing"))
    for op in ("mount", "unmount", "encode"):
        answers = {
            refusal(lambda op=op, cube=cube: request(shared, BEN, op, **cube))[1].replace(
                cube["path"], "CUBE"
            )
            for cube in cubes
        }
        assert len(answers) == 1, answers
    answers = {
        refusal(lambda cube=cube: question(shared, BEN, cube))[1].replace(cube["path"], "CUBE")
        for cube in cubes
    }
    assert len(answers) == 1, answers


def test_and_takes_the_same_time(shared: Config, shop: Shop) -> None:
    """No work is done for a refusal: the model's is tens of milliseconds, and would show."""
    mounted, text = cube_of(shop, "closed/mounted", 0o644), cube_of(shop, "closed/text", 0o644)
    request(shared, ANN, "encode", **mounted, mount=True)
    (shop.root / "closed").chmod(0o700)
    nothing = shop.named("closed/nothing")

    def timed() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"mounted": [], "text": [], "nothing": []}
        with RuntimeClient(shared_socket_path(shared, 0), served_by=0) as client:
            for _ in range(60):
                for name, cube in (("mounted", mounted), ("text", text), ("nothing", nothing)):
                    start = time.perf_counter()
                    with pytest.raises(NotAllowed):
                        ask(client, [cube])
                    found[name].append(time.perf_counter() - start)
        return found

    medians = {name: statistics.median(times) for name, times in as_user(BEN, timed).items()}
    assert max(medians.values()) < 0.1, medians
    assert max(medians.values()) < 2 * min(medians.values()), medians


def test_the_way_to_the_store_counts(shared: Config, public: Path) -> None:
    """A store that is open to all in a home that is not."""
    home = public / "home"
    store = home / "of ann/store"
    store.mkdir(parents=True)
    for directory in (home, home / "of ann", store):
        os.chown(directory, ANN, ANN)
    cube = cube_of(Shop(store), "a", 0o644)
    request(shared, BEN, "encode", **cube, mount=True)
    home.chmod(0o700)
    for call in (
        lambda: request(shared, BEN, "encode", **cube),
        lambda: request(shared, BEN, "mount", **cube),
        lambda: question(shared, BEN, cube),
    ):
        assert refusal(call)[1].endswith("there is no store that you may enter")
    request(shared, ANN, "encode", **cube)
    request(shared, 0, "encode", **cube, uid=BEN, gids=[BEN])  # it reached the cube by a mount
    subprocess.run(["setfacl", "-m", f"u:{BEN}:x", home], check=True)
    request(shared, BEN, "encode", **cube)


def test_a_directory_that_is_exchanged_meanwhile_is_not_read(shared: Config, shop: Shop) -> None:
    """Ben may rename in the collection, and puts his cube where Ann's was, and back, all the time.

    He gets what he may read, whatever was looked at: her text and her KV cache are longer.
    """
    words = {"ann": 300, "ben": 20}
    for name, uid in (("ann", ANN), ("ben", BEN)):
        cube_of(shop, f"open/{name}", 0o644)
        (shop.root / "open" / name / "payload.md").write_text(prose(words[name]))
        request(shared, ANN, "encode", **shop.named(f"open/{name}"), mount=True)
        os.chown(shop.root / "open" / name, uid, uid)
        (shop.root / "open" / name).chmod(0o700)
    (shop.root / "open").chmod(0o777)
    known = request(shared, BEN, "ask", cubes=[shop.named("open/ben")], question="?", max_tokens=1)

    stop = shop.root / "open/stop"

    def exchange() -> None:
        signal.alarm(60)
        both = os.open(shop.root / "open", os.O_PATH)
        while not stop.exists():
            renameat2(both, "ann", both, "ben", RENAME_EXCHANGE)

    def attempt() -> dict[str, int]:
        found = {"right": 0, "refused": 0, "wrong": 0}
        with RuntimeClient(shared_socket_path(shared, 0), served_by=0) as client:
            until = time.monotonic() + 4
            while time.monotonic() < until:
                for name in ("ann", "ben"):
                    for kv in (True, False):
                        asked = {"cubes": [shop.named(f"open/{name}")], "kv": kv}
                        try:
                            got = client.call("ask", question="?", max_tokens=1, **asked)
                        except NotAllowed:
                            found["refused"] += 1
                            continue
                        same = got["prompt_tokens"] == known["prompt_tokens"]
                        found["right" if same else "wrong"] += 1
        stop.touch()
        return found

    with ThreadPoolExecutor(1) as pool:
        exchanging = pool.submit(as_user, BEN, exchange)
        found = as_user(BEN, attempt)
        exchanging.result()
    assert found["right"] and found["refused"], found
    assert not found["wrong"], found


def test_directories_that_are_no_store_are_all_the_same(shared: Config, public: Path) -> None:
    (public / "plain").mkdir()
    (public / "private").mkdir(0o700)
    (public / "closed").mkdir(0o700)
    (public / "closed/.memfs").mkdir()
    answers = {
        refusal(
            lambda name=name: request(shared, BEN, "mount", store=str(public / name), path="a")
        )[1].replace(name, "NAME")
        for name in ("plain", "private", "closed", "nothing")
    }
    assert len(answers) == 1, answers


def test_status_hides_what_others_may_not_know(shared: Config, shop: Shop) -> None:
    secret, known = cube_of(shop, "secret", 0o600), cube_of(shop, "known", 0o644)
    for cube in (secret, known):
        request(shared, ANN, "encode", **cube, mount=True)

    def lines(uid: int) -> dict[str, list[int]]:
        status = request(shared, uid, "status")
        assert "secret" not in json.dumps(status) or uid == ANN
        assert status["used_bytes"] == sum(line["bytes"] for line in status["mounted"])
        assert "encoding" not in status
        return {
            line["cube"]: line["sessions"]
            for line in status["mounted"]
            if line["store"] == str(shop.root)
        }

    assert lines(ANN) == {"secret": [ANN], "known": [ANN]}
    assert lines(BEN) == {"known": []}
    request(shared, BEN, "mount", **known)
    assert lines(BEN) == {"known": [BEN]}
    assert lines(ANN)["known"] == [ANN]
    known_bytes, all_bytes = (
        sum(line["bytes"] for line in request(shared, uid, "status")["mounted"]) for uid in (BEN, 0)
    )
    assert known_bytes < all_bytes == request(shared, 0, "status")["used_bytes"]
    assert request(shared, 0, "status")["encoding"] == 0


def test_what_a_store_tells_is_its_owners(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o644)
    for op, args in (
        ("subscribe", {"store": str(shop.root)}),
        ("changed", cube),
        ("moved", {"store": str(shop.root), "old": "a", "new": "b"}),
        ("stop", {}),
    ):
        with pytest.raises(NotAllowed):
            request(shared, BEN, op, **args)
    request(shared, ANN, "changed", **cube)


def test_a_link_to_a_store_is_not_its_owners(shared: Config, shop: Shop, public: Path) -> None:
    """Ben's link leads to Ann's store: what he says of it would be said of hers."""
    cube_of(shop, "secret", 0o644)
    cube_of(shop, "evil", 0o644)
    request(shared, ANN, "encode", **shop.named("secret"), mount=True)
    link = public / "link"
    link.symlink_to(shop.root)
    os.lchown(link, BEN, BEN)
    for op, args in (
        ("subscribe", {}),
        ("changed", {"path": "secret"}),
        ("moved", {"old": "secret", "new": "evil"}),
    ):
        with pytest.raises(NotAllowed, match="only its owner"):
            request(shared, BEN, op, store=str(link), **args)
    assert [cube["path"] for cube in question(shared, ANN)["cubes"]] == ["secret"]
    request(shared, ANN, "moved", store=str(shop.root), old="secret", new="evil")
    assert [cube["path"] for cube in question(shared, ANN)["cubes"]] == ["evil"]


def test_who_subscribed_hears_nothing_of_the_store_that_took_the_place(
    shared: Config, public: Path
) -> None:
    """Ben had a directory there first, in a place where everybody makes some."""
    root = public / "taken"
    root.mkdir()
    os.chown(root, BEN, BEN)
    ready, said = os.pipe()

    def hear() -> list[str]:
        heard = []
        signal.alarm(30)
        with RuntimeClient(shared_socket_path(shared, 0), served_by=0) as client:
            try:
                for event in client.stream("subscribe", store=str(root)):
                    heard.append(event["event"])
                    os.write(said, b"!")
            except NotAllowed:
                return heard
        raise AssertionError("it has no end")

    with ThreadPoolExecutor(1) as pool:
        hearing = pool.submit(as_user, BEN, hear)
        os.read(ready, 1)
        root.rmdir()
        root.mkdir()
        store = Shop(root)
        os.chown(root, ANN, ANN)
        request(shared, ANN, "encode", **cube_of(store, "a", 0o644), mount=True)
        assert hearing.result(timeout=30) == ["state"]
    for end in (ready, said):
        os.close(end)


def test_a_mount_that_says_no_user_clearly_asks_for_nobody(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o600)
    for ids in (
        {"uid": BEN},
        {"uid": BEN, "gids": ["x"]},
        {"uid": BEN, "gids": [-1]},
        {"uid": str(BEN), "gids": [BEN]},
        {"gids": [BEN]},
    ):
        with pytest.raises(InvalidRequest, match="named by uid"):
            request(shared, 0, "encode", **cube, **ids)
    with pytest.raises(NotAllowed):
        request(shared, 0, "encode", **cube, uid=BEN, gids=[BEN])
    assert request(shared, 0, "encode", **cube)["made"]


def test_rows_that_others_made_for_the_same_texts_are_not_lent(shared: Config, shop: Shop) -> None:
    """Ben's KV caches fit the texts by every digest, and hold what he likes."""
    names = ("one", "two")
    hers, his = ([cube_of(shop, f"{whose}/{name}", 0o644) for name in names] for whose in "ab")
    for number, cubes in enumerate(zip(hers, his, strict=True)):
        for cube in cubes:
            (shop.root / cube["path"] / "payload.md").write_text(prose(40, number))
            request(shared, ANN, "encode", **cube)
    for cube in his:
        forge(shop.kv(cube["path"]))
    asked = {"question": "What did the keeper write?", "max_tokens": 16}
    forged = request(shared, BEN, "ask", cubes=his, **asked)
    right = request(shared, ANN, "ask", cubes=hers, **asked)
    assert how(forged) == how(right) == ["kv", "kv"]
    assert right["answer"] != forged["answer"]


def test_rights_beyond_reading(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o644, access=allow("mount", f"user:{BEN}", f"group:{STAFF}"))
    request(shared, CAT, "encode", **cube)  # promote is not named
    question(shared, BEN, cube)
    question(shared, CAT, cube, groups=[STAFF])
    question(shared, ANN, cube)
    with pytest.raises(NotAllowed, match="gives mount to others"):
        question(shared, CAT, cube)
    with pytest.raises(NotAllowed, match="gives mount to others"):
        request(shared, CAT, "mount", **cube)
    other = cube_of(shop, "b", 0o644, access=allow("promote", "user:somebody elsewhere"))
    with pytest.raises(NotAllowed, match="gives promote to others"):
        request(shared, BEN, "encode", **other)
    question(shared, BEN, other)
    request(shared, ANN, "encode", **other)
    (shop.root / "b/meta.json").write_text("{")
    with pytest.raises(NotAllowed, match="cannot be read"):
        question(shared, BEN, other)


def test_a_right_that_is_taken_away_counts_at_once(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o644)
    request(shared, BEN, "encode", **cube, mount=True)
    assert how(question(shared, BEN)) == ["kv"]
    (shop.root / "a/payload.md").chmod(0o600)
    assert how(question(shared, BEN)) == []
    with pytest.raises(NotAllowed):
        question(shared, BEN, cube)


def test_who_may_not_promote_has_nothing_written(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o644, access=allow("promote", f"user:{CAT}"))
    request(shared, ANN, "encode", **cube)
    kept = shop.digest("a")
    with (shop.root / "a/payload.md").open("a") as file:
        file.write(" and more")
    for way in ("made again", "resident"):
        report = question(shared, BEN, cube)
        assert report["cubes"][0]["chose"]["way"] == way
    with RuntimeClient(shared_socket_path(shared, 0), served_by=0) as client:
        told = client.stream("subscribe", store=str(shop.root))
        assert next(told)["event"] == "state"
        time.sleep(0.2)
        assert shop.digest("a") == kept
        assert question(shared, CAT, cube)["cubes"][0]["chose"]["way"] == "resident"
        assert [next(told)["event"] for _ in range(2)] == ["asked", "encoded"], "no denial of Ben"
    assert shop.digest("a") != kept
    assert (shop.root / "a/kv.safetensors").stat().st_uid == ANN


def test_a_frozen_cube_keeps_the_file_it_has(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o644, access=[])
    request(shared, ANN, "encode", **cube)
    kept = shop.digest("a")
    (shop.root / "a/payload.md").write_text(prose(50, 3))
    meta = metadata.parse((shop.root / "a/meta.json").read_bytes())
    meta["state"]["frozen"] = True
    (shop.root / "a/meta.json").write_bytes(metadata.render(meta))
    assert question(shared, ANN, cube)["cubes"][0]["chose"]["way"] == "made again"
    time.sleep(0.2)
    assert shop.digest("a") == kept


def test_a_calling_context(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o644, access=allow("mount", "context:memfs-agent.service"))
    with in_context("memfs-agent.service") as enter:
        question(shared, BEN, cube, before=enter)
        with pytest.raises(NotAllowed):
            question(shared, BEN, cube)
    with in_context("memfs-other.service") as enter, pytest.raises(NotAllowed):
        question(shared, BEN, cube, before=enter)


def test_nothing_is_made_for_a_frozen_cube(shared: Config, shop: Shop) -> None:
    cube = cube_of(shop, "a", 0o644, access=[])
    request(shared, ANN, "encode", **cube)
    kept = shop.digest("a")
    meta = metadata.parse((shop.root / "a/meta.json").read_bytes())
    meta["state"]["frozen"] = True
    (shop.root / "a/meta.json").write_bytes(metadata.render(meta))
    request(shared, ANN, "mount", **cube)
    assert how(question(shared, ANN, cube)) == ["kv"]
    for uid in (ANN, 0):
        with RuntimeClient(shared_socket_path(shared, 0), served_by=0) as client:
            told = client.stream("subscribe", store=str(shop.root))
            assert next(told)["event"] == "state"
            with pytest.raises(NotAllowed, match="frozen"):
                request(shared, uid, "encode", **cube, force=True)
            event = next(told)
        assert (event["event"], event["uid"], event["right"]) == ("denied", uid, "promote")
        assert "frozen" in event["reason"]
    assert shop.digest("a") == kept
    shop.kv("a").unlink()
    with pytest.raises(NotAllowed, match="frozen"):
        request(shared, ANN, "encode", **cube)
    assert how(question(shared, ANN, cube)) == ["text"]


# The socket


def test_the_shared_socket(shared: Config) -> None:
    found = shared_socket_path(shared, 0).lstat()
    assert stat.S_IMODE(found.st_mode) == 0o666
    assert stat.S_IMODE(socket_path(shared).lstat().st_mode) == 0o600
    assert stat.S_IMODE(shared_dir(0).stat().st_mode) == 0o755


def test_others_find_roots_runtime_by_themselves(shared: Config) -> None:
    def found() -> dict[str, Any]:
        os.environ.pop("XDG_RUNTIME_DIR")
        try:
            with connect(replace(shared, shared=""), start=False) as client:
                return client.call("hello")
        finally:
            shutil.rmtree(f"/tmp/memfs-{BEN}", ignore_errors=True)

    assert as_user(BEN, found)["state"] == "ready"


def test_who_serves_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        RuntimeClient(path, served_by=os.getuid()).close()
    path.unlink()
    public = Path(tempfile.mkdtemp(prefix="memfs-"))
    public.chmod(0o777)
    listener = socket.socket(socket.AF_UNIX)
    try:
        as_user(CAT, lambda: listener.bind(str(public / "s")))
        as_user(CAT, listener.listen)  # whose credentials the other end is shown
        with pytest.raises(RuntimeUnavailable):
            RuntimeClient(public / "s", served_by=BEN)
    finally:
        listener.close()
        shutil.rmtree(public)


def test_a_group(tiny_config: Config) -> None:
    group = next(g for g in grp.getgrall() if g.gr_gid)
    config = replace(tiny_config, shared=group.gr_name)
    with connect(config, start=True) as client:
        assert client.call("hello")
        found = shared_socket_path(config, 0).lstat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, group.gr_gid)
        with pytest.raises(RuntimeUnavailable, match="denied"):
            request(config, BEN, "hello")
        assert request(config, BEN, "hello", groups=[group.gr_gid])
    stop(config)
    assert not shared_socket_path(config, 0).exists()
    with pytest.raises(RuntimeUnavailable):
        connect(replace(config, shared="no such group"), start=True)


def test_a_user_who_is_none() -> None:
    with pytest.raises(InvalidConfig, match="no user"):
        connect(Config(runtime_of="no such user"), start=False)

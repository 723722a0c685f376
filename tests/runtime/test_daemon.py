"""The runtime as its clients meet it: real processes, real sockets, a real model."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from memfs.config import Config
from memfs.errors import (
    InvalidRequest,
    KVStale,
    ModelUnusable,
    NotACube,
    NotAllowed,
    NotFound,
    OverBudget,
    RuntimeUnavailable,
    TooLong,
)
from memfs.runtime.client import RuntimeClient, connect, stop
from memfs.runtime.protocol import MAX_REQUEST, socket_path

from .conftest import Shop, ask, daemon, how, prose

ROOT = os.getuid() == 0


def mounted(client: RuntimeClient, shop: Shop) -> dict[str, dict]:
    """What is in the model of this store."""
    lines = client.call("status")["mounted"]
    return {line["cube"]: line for line in lines if line["store"] == str(shop.root)}


def test_the_socket_is_private(runtime: RuntimeClient, tiny_config: Config) -> None:
    found = socket_path(tiny_config).lstat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600


def test_status_says_what_there_is(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(50))
    runtime.call("encode", **cube)
    runtime.call("mount", **cube)
    status = runtime.call("status")
    assert status["state"] == "ready"
    assert status["device"] == "cpu"
    assert status["budget_bytes"] == Config.budget_bytes
    line = mounted(runtime, shop)["a"]
    assert {"cube", "kind", "tokens", "bytes", "tier", "hits"} <= line.keys()
    assert line["kind"] == "kv"
    assert line["sessions"] == [os.getuid()]


def test_one_hundred_answers_leave_the_file_as_it_was(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(50))
    runtime.call("encode", **cube)
    digest = shop.digest("a")
    first = ask(runtime, [cube])
    assert all(ask(runtime, [cube])["answer"] == first["answer"] for _ in range(99))
    assert how(first) == ["kv"]
    assert shop.digest("a") == digest
    assert mounted(runtime, shop)["a"]["hits"] >= 100


def test_without_cubes_the_session_answers(runtime: RuntimeClient, shop: Shop) -> None:
    runtime.call("unmount")
    assert ask(runtime, None)["cubes"] == []
    for name in "ab":
        runtime.call("encode", **shop.cube(name, prose(40, ord(name))), mount=True)
    assert [c["path"] for c in ask(runtime, None)["cubes"]] == ["a", "b"]
    assert runtime.call("unmount", **shop.named("a"))["unmounted"] == ["a"]
    assert [c["path"] for c in ask(runtime, None)["cubes"]] == ["b"]
    with pytest.raises(NotFound, match="not mounted"):
        runtime.call("unmount", **shop.named("a"))
    assert "a" not in mounted(runtime, shop)


def test_a_deleted_cube_leaves_the_session(runtime: RuntimeClient, shop: Shop) -> None:
    runtime.call("unmount")
    cube = shop.cube("a", prose(40))
    runtime.call("encode", **cube, mount=True)
    for file in (shop.root / "a").iterdir():
        file.unlink()
    runtime.call("changed", **cube)
    assert "a" not in mounted(runtime, shop)
    assert ask(runtime, None)["cubes"] == []


def test_an_edit_makes_it_stale_at_once(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(50))
    runtime.call("encode", **cube, mount=True)
    assert how(ask(runtime, None)) == ["kv"]
    shop.cube("a", prose(50) + " edited")
    with pytest.raises(KVStale, match="payload_sha256"):
        runtime.call("mount", **cube)
    assert "a" not in mounted(runtime, shop)
    report = ask(runtime, None)
    assert how(report) == ["kv"]
    assert report["cubes"][0]["chose"]["way"] == "made again"
    runtime.call("unmount")


def test_the_same_words_saved_again_stay_mounted(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(50))
    runtime.call("encode", **cube, mount=True)
    shop.cube("a", prose(50))
    runtime.call("changed", **cube)
    assert "a" in mounted(runtime, shop)
    runtime.call("unmount")


def test_encode_keeps_an_unchanged_beginning(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(400))
    made = runtime.call("encode", **cube)
    assert made["made"] and made["kept_tokens"] == 0
    assert not runtime.call("encode", **cube)["made"]
    shop.cube("a", prose(400) + " and more")
    again = runtime.call("encode", **cube)
    assert 256 <= again["kept_tokens"] < again["tokens"]
    kept = shop.digest("a")
    runtime.call("encode", **cube, force=True)
    assert shop.digest("a") == kept, "as if made from nothing"


def test_the_kv_file_belongs_to_who_owns_the_text(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(30))
    payload = shop.root / "a" / "payload.md"
    payload.chmod(0o640)
    if ROOT:
        os.chown(payload, 1234, 1234)
    runtime.call("encode", **cube)
    made, text = shop.kv("a").stat(), payload.stat()
    assert (made.st_uid, made.st_gid) == (text.st_uid, text.st_gid)
    assert stat.S_IMODE(made.st_mode) == 0o640


def test_progress_is_told(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(300))
    events = list(runtime.stream("encode", **cube))
    progress = [event for event in events if event["event"] == "progress"]
    assert [e["done"] for e in progress] == sorted({e["done"] for e in progress})
    assert progress[-1]["done"] == progress[-1]["total"] == events[-1]["tokens"]
    assert all(event["tokens_per_s"] > 0 for event in progress)


def test_answers_stream(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(30))
    events = list(runtime.stream("ask", cubes=[cube], question="Why?", max_tokens=12))
    text = "".join(event["text"] for event in events if event.get("event") == "text")
    assert text == events[-1]["answer"]
    assert events[0]["event"] == "first"
    report = events[-1]
    wanted = {"answer", "ttft_s", "prompt_tokens", "cached_tokens", "cubes", "tokens_per_s"}
    assert wanted <= report.keys()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"op": "nonsense"}, InvalidRequest),
        ({"op": "mount", "store": "relative", "path": "a"}, InvalidRequest),
        ({"op": "mount", "store": 7, "path": "a"}, InvalidRequest),
        ({"op": "mount", "store": "/", "path": "a/" * 2048 + "b"}, InvalidRequest),
        ({"op": "mount", "store": "/nonexistent", "path": "a"}, NotFound),
        ({"op": "ask", "question": " "}, InvalidRequest),
        ({"op": "ask", "question": "q", "cubes": "a"}, InvalidRequest),
        ({"op": "ask", "question": "q", "max_tokens": 0}, InvalidRequest),
        ({"op": "ask", "question": "q", "max_tokens": "9"}, InvalidRequest),
    ],
)
def test_bad_requests_are_refused(
    runtime: RuntimeClient, request_: dict, error: type[Exception]
) -> None:
    with pytest.raises(error):
        runtime.call(**request_)
    assert runtime.call("hello")["state"] == "ready", "and the connection goes on"


def test_what_is_no_json_is_refused(runtime: RuntimeClient, tiny_config: Config) -> None:
    for junk in (b"\xff\n", b"[1]\n", b"[" * 5000 + b"\n"):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(10)
            raw.connect(str(socket_path(tiny_config)))
            raw.sendall(junk)
            assert b'"InvalidRequest"' in raw.recv(4096)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(str(socket_path(tiny_config)))
        with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
            raw.sendall(b"x" * 3 * MAX_REQUEST)
            assert b'"InvalidRequest"' in raw.recv(4096)
    assert runtime.call("hello")["state"] == "ready"


def test_paths_do_not_lead_out_of_the_store(runtime: RuntimeClient, shop: Shop) -> None:
    secret = shop.root.parent / "secret"
    secret.mkdir()
    (secret / "payload.md").write_text("the secret is 42")
    (shop.root / "link").symlink_to(secret)
    (shop.root / "file").mkdir()
    (shop.root / "file" / "payload.md").symlink_to(secret / "payload.md")
    (shop.root / "fifo").mkdir()
    os.mkfifo(shop.root / "fifo" / "payload.md")
    for path in ("link", "file", "fifo", "../secret", "a/../../secret", "nothing"):
        for op, more in (("ask", {}), ("encode", {}), ("mount", {})):
            with pytest.raises(Exception, match=r".") as refusal:
                if op == "ask":
                    ask(runtime, [shop.named(path)])
                else:
                    runtime.call(op, timeout=20, **shop.named(path), **more)
            assert "42" not in str(refusal.value)
    assert not (secret / "kv.safetensors").exists()


def test_a_text_that_is_not_utf8_is_refused(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", "x")
    (shop.root / "a" / "payload.md").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidRequest, match="UTF-8 at byte 3"):
        runtime.call("encode", **cube)


def test_an_empty_text_is_a_memory_too(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", "")
    runtime.call("encode", **cube)
    assert how(ask(runtime, [cube])) == ["kv"]


def test_a_text_longer_than_the_context_is_refused(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("long", prose(6000))
    with pytest.raises(TooLong, match="the model takes 8192"):
        runtime.call("encode", **cube)
    with pytest.raises(TooLong):
        ask(runtime, [cube])
    assert not shop.kv("long").exists()


def test_megabytes_of_text_are_refused_at_once(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("huge", prose(100) * 20_000)
    for op in ("encode", "ask"):
        began = time.monotonic()
        with pytest.raises(TooLong, match="characters"):
            ask(runtime, [cube]) if op == "ask" else runtime.call(op, **cube)
        assert time.monotonic() - began < 2


def test_a_session_longer_than_the_context_drops_the_oldest(
    runtime: RuntimeClient, shop: Shop
) -> None:
    runtime.call("unmount")
    for name in "abc":
        runtime.call("encode", **shop.cube(name, prose(1400, ord(name))), mount=True)
    report = ask(runtime, None)
    assert [cube["tokens"] > 0 for cube in report["cubes"]] == [False, True, True]
    assert "longer than the context" in report["cubes"][0]["why"]
    with pytest.raises(TooLong):
        ask(runtime, [shop.named(name) for name in "abc"])
    runtime.call("unmount")


def test_renaming_keeps_it_mounted_in_its_place(runtime: RuntimeClient, shop: Shop) -> None:
    runtime.call("unmount")
    for path in ("work/a", "b", "work/c"):
        runtime.call("encode", **shop.cube(path, prose(40, ord(path[-1]))), mount=True)
    shop.cube("work/c", "edited: no KV cache of it is in the model, and it is in the session")
    runtime.call("changed", **shop.named("work/c"))
    (shop.root / "work").rename(shop.root / "done")
    runtime.call("moved", store=str(shop.root), old="work", new="done")
    assert mounted(runtime, shop).keys() == {"done/a", "b"}
    assert [c["path"] for c in ask(runtime, None)["cubes"]] == ["done/a", "b", "done/c"]
    runtime.call("unmount")


def test_a_missing_kv_cache_is_named(runtime: RuntimeClient, shop: Shop) -> None:
    with pytest.raises(NotFound, match=r"a has no kv\.safetensors"):
        runtime.call("mount", **shop.cube("a", "x"))


def test_where_every_memory_is_left_out_the_question_stands_alone(
    runtime: RuntimeClient, shop: Shop
) -> None:
    runtime.call("unmount")
    question = prose(300)
    bare = ask(runtime, None, question=question)
    runtime.call("encode", **shop.cube("a", prose(3860)), mount=True)
    report = ask(runtime, None, question=question)
    assert report["cubes"][0]["tokens"] == 0
    assert "left out" in report["cubes"][0]["why"]
    assert report["prompt_tokens"] == bare["prompt_tokens"]
    assert report["answer"] == bare["answer"]
    runtime.call("unmount")


def test_loads_at_once_keep_the_budget(tiny_config: Config, shop: Shop) -> None:
    row = 2 * 2 * 2 * 16 * 2  # layers, keys and values, KV heads, head_dim, bytes
    config = replace(tiny_config, dtype="bfloat16", budget_bytes=2000 * row)
    with daemon(config) as client:
        cubes = [shop.cube(name, prose(60, ord(name))) for name in "abcdef"]
        for cube in cubes:
            client.call("encode", **cube)

        def load(cube: dict[str, str]) -> None:
            with connect(config, start=False) as own:
                own.call("mount", **cube)

        threads = [threading.Thread(target=load, args=(cube,)) for cube in cubes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        status = client.call("status")
        assert 0 < status["used_bytes"] <= status["budget_bytes"]


def test_events_are_told_to_subscribers(
    runtime: RuntimeClient, tiny_config: Config, shop: Shop
) -> None:
    cube = shop.cube("a", prose(40))
    with connect(tiny_config, start=False) as listening:
        events = listening.stream("subscribe", timeout=30, store=str(shop.root))
        assert next(events)["model"]["fingerprint"]["architecture"] == "LlamaForCausalLM"
        runtime.call("encode", **cube, mount=True)
        ask(runtime, [cube])
        shop.cube("a", "other")
        runtime.call("changed", **cube)
        with pytest.raises(KVStale):
            runtime.call("mount", **cube)
        told = [next(events) for _ in range(5)]
    assert [e["event"] for e in told] == ["encoded", "mounted", "asked", "unmounted", "refused"]
    assert all(e["path"] == "a" and e["store"] == str(shop.root) for e in told)
    runtime.call("unmount")


def test_an_adapter_is_refused_with_the_reason(runtime: RuntimeClient, shop: Shop) -> None:
    with pytest.raises(Exception, match="mounts KV caches, not adapters"):
        runtime.call("mount", **shop.cube("a", "x"), kind="adapter")


def test_the_budget_is_kept(tiny_config: Config, shop: Shop) -> None:
    row = 2 * 2 * 2 * 16 * 2  # layers, keys and values, KV heads, head_dim, bytes
    config = replace(tiny_config, dtype="bfloat16", budget_bytes=2000 * row)
    with daemon(config) as client:
        cubes = [shop.cube(name, prose(60, ord(name))) for name in "abcdef"]
        for cube in cubes:
            client.call("encode", **cube)
        client.call("mount", **cubes[0], pin=True)
        for cube in cubes[1:]:
            client.call("mount", **cube)
        status = client.call("status")
        assert status["used_bytes"] <= status["budget_bytes"]
        assert {"a", "f"} <= mounted(client, shop).keys()
        assert "b" not in mounted(client, shop)
        assert mounted(client, shop)["a"]["pinned"]
        huge = shop.cube("huge", prose(1500))
        client.call("encode", **huge)
        with pytest.raises(OverBudget):
            client.call("mount", **huge)
        report = ask(client, [huge])
        assert how(report) == ["text"]
        assert "budget" in report["cubes"][0]["why"]
        assert "a" in mounted(client, shop)


def test_answers_go_on_during_an_encode(
    runtime: RuntimeClient, tiny_config: Config, shop: Shop
) -> None:
    small = shop.cube("small", prose(20))
    with connect(tiny_config, start=False) as other:
        encode = other.stream("encode", **shop.cube("long", prose(3500)))
        first = next(encode)
        assert ask(runtime, [small])["answer"]
        rest = list(encode)
    assert first["done"] < rest[-1]["tokens"]
    assert rest[-1]["event"] == "done"


def test_two_who_want_the_same_encode_share_it(
    runtime: RuntimeClient, tiny_config: Config, shop: Shop
) -> None:
    cube = shop.cube("a", prose(2000))
    with connect(tiny_config, start=False) as other:
        one, two = runtime.stream("encode", **cube), other.stream("encode", **cube)
        next(one)
        next(two)
        *_, done = one
        *_, also = two
    assert done == also


def test_a_client_that_leaves_cancels_its_encode(
    runtime: RuntimeClient, tiny_config: Config, shop: Shop
) -> None:
    with connect(tiny_config, start=False) as leaving:
        next(leaving.stream("encode", **shop.cube("a", prose(3500))))
    deadline = time.monotonic() + 10
    while runtime.call("status")["encoding"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert runtime.call("status")["encoding"] == 0
    assert not shop.kv("a").exists()
    assert not list((shop.root / "a").glob(".memfs-tmp-*"))


def test_several_clients_at_once_get_the_same_answers(
    runtime: RuntimeClient, tiny_config: Config, shop: Shop
) -> None:
    cubes = [shop.cube(name, prose(50, ord(name))) for name in "abc"]
    for cube in cubes:
        runtime.call("encode", **cube)
    wanted = [ask(runtime, [c], max_tokens=20)["answer"] for c in cubes]
    wanted.append(ask(runtime, cubes[:1] + cubes[1:2], max_tokens=20)["answer"])
    asked = [[cubes[0]], [cubes[1]], [cubes[2]], cubes[:2]]
    found: list[tuple[int, str]] = []

    def client(number: int) -> None:
        with connect(tiny_config, start=False) as own:
            for turn in range(3):
                which = (number + turn) % 4
                found.append((which, ask(own, asked[which], max_tokens=20)["answer"]))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert all(answer == wanted[which] for which, answer in found)


def test_killed_while_answering_the_next_one_starts_it_again(
    tiny_config: Config, shop: Shop
) -> None:
    config = replace(tiny_config, dtype="bfloat16")
    cube = shop.cube("a", prose(3000))
    with connect(config, start=True) as client:
        client.call("ready", timeout=120)
        pid = client.call("status")["pid"]
        encode = client.stream("encode", **cube)
        next(encode)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeUnavailable):
            list(encode)
    while Path(f"/proc/{pid}").exists():  # its sockets go one after another
        time.sleep(0.01)
    assert not shop.kv("a").exists(), "the file is there whole or not at all"
    with pytest.raises(RuntimeUnavailable):
        connect(config, start=False)
    with connect(config, start=True) as again:
        again.call("ready", timeout=120)
        assert again.call("status")["pid"] != pid
        assert ask(again, [shop.cube("b", "a short one")])["answer"]
    stop(config)


def test_status_answers_while_the_model_loads(tiny_config: Config, shop: Shop) -> None:
    config = replace(tiny_config, dtype="bfloat16")
    with connect(config, start=True) as client:
        states = {client.call("status", timeout=60)["state"]}
        client.call("ready", timeout=120)
        states.add(client.call("status")["state"])
    assert states <= {"loading", "ready"}
    assert "ready" in states
    stop(config)


def test_a_second_daemon_for_a_model_is_refused(
    runtime: RuntimeClient, tiny_config: Config
) -> None:
    command = [sys.executable, "-m", "memfs.runtime.daemon", "--model", tiny_config.model]
    done = subprocess.run(
        [*command, "--socket", socket_path(tiny_config)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == RuntimeUnavailable.exit_code
    assert "running already, as process" in done.stderr
    assert runtime.call("hello")["state"] == "ready"


def test_a_model_that_cannot_serve_says_why(tmp_path: Path, shop: Shop) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    config = Config(model=str(tmp_path), device="cpu", threads=1)
    with connect(config, start=True) as client:
        with pytest.raises(ModelUnusable):
            client.call("ready", timeout=60)
        with pytest.raises(ModelUnusable):
            ask(client, [shop.cube("a", "x")])
        assert client.call("status")["state"] == "failed"
    stop(config)


@pytest.mark.skipif(not ROOT, reason="changing the user needs root")
def test_a_user_who_may_not_read_a_cube_may_not_have_it(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(30))
    runtime.call("encode", **cube)
    (shop.root / "a" / "payload.md").chmod(0o600)
    stranger = {"uid": 4321, "gid": 4321}
    for op in ("mount", "encode"):
        with pytest.raises(NotAllowed):
            runtime.call(op, **cube, **stranger)
    with pytest.raises(NotAllowed):
        ask(runtime, [cube], **stranger)
    (shop.root / "a" / "payload.md").chmod(0o644)
    shop.kv("a").chmod(0o644)
    (shop.root / "a").chmod(0o700)
    with pytest.raises(NotAllowed):
        ask(runtime, [cube], **stranger)
    with pytest.raises(NotACube):
        ask(runtime, [shop.named("b")], **stranger)


@pytest.mark.skipif(not ROOT, reason="changing the user needs root")
def test_another_user_cannot_connect(runtime: RuntimeClient, tiny_config: Config) -> None:
    code = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(4321); os.setuid(4321)\n"
        "try: socket.socket(socket.AF_UNIX).connect(sys.argv[1])\n"
        "except PermissionError: sys.exit(7)\n"
    )
    command = [sys.executable, "-c", code, socket_path(tiny_config)]
    assert subprocess.run(command, check=False, timeout=30).returncode == 7

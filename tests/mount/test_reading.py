"""Reading a file puts a memory into the model: a real mount, a real runtime, a small model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from memfs.config import Config
from memfs.errors import RuntimeUnavailable
from memfs.runtime.client import RuntimeClient, connect, stop
from tests.users import as_user

from .conftest import Mount, memfs, mounted_at, needs_root, stopped, until

TEXT = "The keeper wrote that the wind had turned to the north. " * 40


@pytest.fixture
def reading(
    tmp_path: Path, environment: dict[str, str], ready: RuntimeClient
) -> Iterator[tuple[Mount, RuntimeClient]]:
    """A mount, and its runtime with nothing in it."""
    ready.call("unmount")
    with mounted_at(tmp_path, **environment) as mount:
        until(mount.has_index)
        until(lambda: mount.status()["runtime"] == "ready")
        yield mount, ready


def in_model(client: RuntimeClient, mount: Mount) -> set[str]:
    """The cubes of a mount that are in the model."""
    lines = client.call("status")["mounted"]
    return {line["cube"] for line in lines if line["store"] == str(mount.store)}


def read_all(path: Path, flags: int = 0) -> int:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        return sum(len(part) for part in iter(lambda: os.read(fd, 1 << 16), b""))
    finally:
        os.close(fd)


Reading = tuple[Mount, RuntimeClient]


def test_cat_makes_it_and_mounts_it(reading: Reading, environment: dict[str, str]) -> None:
    mount, client = reading
    cube = mount.cube("work/law", TEXT)
    assert "kv.safetensors" not in os.listdir(cube)
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", cube / "kv.safetensors"], stdout=nowhere, check=True, timeout=60)
    assert "work/law" in in_model(client, mount), "by the time cat has ended"
    status = json.loads(memfs("status", "--json", **environment).stdout)
    assert {"model", "device", "mounted", "budget_bytes"} <= status.keys()
    assert [line["cube"] for line in status["mounted"]] == ["work/law"]
    assert "kv.safetensors" in os.listdir(cube)
    assert (cube / "kv.safetensors").stat().st_size > 1000
    meta = until(lambda: (m := mount.meta("work/law"))["state"]["kv"]["state"] == "ready" and m)
    assert meta["behavioural"]["reads"] == 1
    link = mount.dir / ".memfs/mounted/work%2Flaw"
    assert os.path.samefile(link, cube)
    events = [json.loads(line) for line in (mount.dir / ".memfs/events").read_text().splitlines()]
    told = [e["event"] for e in events if e["path"] == "work/law"]
    # The watcher tells of the new file, too, before or after the runtime does.
    assert [kind for kind in told if kind != "changed"] == ["created", "encoded", "mounted"]
    assert "work/law" in (mount.dir / ".memfs/status").read_text()


def test_what_cat_prints_is_the_file(reading: Reading) -> None:
    mount, _ = reading
    cube = mount.cube("a", TEXT)
    first = subprocess.run(
        ["cat", cube / "kv.safetensors"], capture_output=True, check=True, timeout=60
    ).stdout
    assert first == (mount.store / "a/kv.safetensors").read_bytes()
    assert first == (cube / "kv.safetensors").read_bytes(), "also once it is resident"


@pytest.mark.parametrize("copier", [["cp"], ["cp", "-a"], ["rsync", "-a"]], ids=" ".join)
def test_copying_it_out_before_it_exists(
    reading: Reading, tmp_path: Path, copier: list[str]
) -> None:
    mount, _ = reading
    cube = mount.cube("a", TEXT)
    if copier[0] == "rsync":  # it looks first, and takes the size it was told
        read_all(cube / "kv.safetensors")
    out = tmp_path / "out"
    subprocess.run([*copier, cube / "kv.safetensors", out], check=True, timeout=60)
    assert out.read_bytes() == (mount.store / "a/kv.safetensors").read_bytes()


def encoded(mount: Mount, client: RuntimeClient, name: str) -> Path:
    """A cube whose KV cache exists and is not mounted."""
    cube = mount.cube(name, TEXT)
    client.call("encode", store=str(mount.store), path=name)
    return cube / "kv.safetensors"


LOOKS: dict[str, Callable[[Path], Any]] = {
    "stat": lambda kv: kv.stat(),
    "open": lambda kv: os.close(os.open(kv, os.O_RDONLY)),
    "file": lambda kv: subprocess.run(["file", kv], check=True, capture_output=True),
    "head": lambda kv: subprocess.run(["head", "-c", "8", kv], check=True, capture_output=True),
    "keys": lambda kv: list(safe_open(kv, framework="np").keys()),
    "O_NOATIME": lambda kv: read_all(kv, os.O_NOATIME),
    "find": lambda kv: subprocess.run(["find", kv.parent, "-ls"], check=True, capture_output=True),
}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_mounts_nothing(reading: Reading, look: str) -> None:
    mount, client = reading
    kv = encoded(mount, client, "a")
    if look == "file" and not shutil.which("file"):
        pytest.skip("there is no file command")
    LOOKS[look](kv)
    time.sleep(0.3)
    assert in_model(client, mount) == set()
    assert mount.meta("a")["behavioural"]["reads"] == 0
    read_all(kv)
    assert in_model(client, mount) == {"a"}
    assert mount.meta("a")["behavioural"]["reads"] == 1


def test_data_behind_the_header_is_a_read(reading: Reading) -> None:
    mount, client = reading
    kv = encoded(mount, client, "a")
    with safe_open(kv, framework="np") as file:
        file.get_tensor("layers.001")
    until(lambda: in_model(client, mount) == {"a"})


def test_grep_starts_nothing(reading: Reading) -> None:
    mount, client = reading
    for name in "abc":
        mount.cube(name, TEXT)
    found = subprocess.run(
        ["grep", "-rl", "north", mount.dir], capture_output=True, text=True, check=True, timeout=30
    ).stdout.split()
    assert len(found) == 3
    assert client.call("status")["encoding"] == 0
    assert not list(mount.store.glob("*/kv.safetensors"))


def test_a_mount_may_be_told_not_to(
    tmp_path: Path, environment: dict[str, str], ready: RuntimeClient
) -> None:
    with mounted_at(tmp_path, "-o", "mount_on_read=off", **environment) as mount:
        kv = encoded(mount, ready, "a")
        read_all(kv)
        time.sleep(0.3)
        assert in_model(ready, mount) == set()


def test_an_edit_is_stale_at_once_and_made_anew(reading: Reading, config: Config) -> None:
    mount, client = reading
    cube = mount.cube("a", TEXT)
    read_all(cube / "kv.safetensors")
    assert in_model(client, mount) == {"a"}
    with (cube / "payload.md").open("a") as file:
        file.write("And then to the east.\n")
    assert mount.meta("a")["state"]["kv"]["state"] == "stale"
    until(lambda: in_model(client, mount) == set())
    read_all(cube / "kv.safetensors")
    assert mount.meta("a")["state"]["kv"]["state"] == "ready"
    with (cube / "payload.md").open("a") as file:
        file.write("And to the south.\n")
    assert mount.meta("a")["state"]["kv"]["state"] == "stale"
    report = client.call("ask", question="Where is the wind?", max_tokens=4)
    assert [cube["chose"]["way"] for cube in report["cubes"]] == ["made again"]
    until(lambda: mount.meta("a")["state"]["kv"]["state"] == "ready")
    report = client.call("ask", question="Where is the wind?", max_tokens=4)
    assert [cube["how"] for cube in report["cubes"]] == ["kv"]


def test_another_models_kv_is_foreign_and_made_anew_when_it_is_read(reading: Reading) -> None:
    mount, client = reading
    kv = encoded(mount, client, "a")
    data = kv.read_bytes()
    other = data.replace(b'"architecture":"LlamaForCausalLM"', b'"architecture":"LlamaForCausalXX"')
    kv.write_bytes(other)
    kind = until(lambda: (k := mount.meta("a")["state"]["kv"])["state"] == "foreign" and k)
    assert "architecture" in kind["reason"]
    assert kv.read_bytes() == other, "whole, and as it was"
    until(lambda: in_model(client, mount) == {"a"})
    assert any("architecture" in r["reason"] for r in mount.status()["refusals"])
    assert (mount.store / "a/kv.safetensors").read_bytes() == data


def test_ask_by_path_from_the_command_line(reading: Reading, environment: dict[str, str]) -> None:
    mount, _ = reading
    cube = mount.cube("work/law", TEXT)
    for given in (cube, cube / "payload.md", "work/law", mount.store / "work/law"):
        done = memfs("ask", "--json", "-n", "4", "-c", given, "Why?", **environment)
        report = json.loads(done.stdout)
        assert [(c["path"], c["how"]) for c in report["cubes"]] == [("work/law", "text")]
    done = memfs("ask", "-n", "4", "-c", mount.dir / "nothing", "Why?", check=False, **environment)
    assert done.returncode == 3
    assert "not a MemCube" in done.stderr


def test_encode_attach_and_detach(reading: Reading, environment: dict[str, str]) -> None:
    mount, client = reading
    cube = mount.cube("law", TEXT)
    assert "tokens" in memfs("encode", cube, **environment).stdout
    assert in_model(client, mount) == set()
    assert "in the model" in memfs("attach", cube, **environment).stdout
    assert in_model(client, mount) == {"law"}
    memfs("detach", cube, **environment)
    assert in_model(client, mount) == set()
    again = memfs("detach", cube, check=False, **environment)
    assert again.returncode == 3
    (cube / "payload.md").write_text("Another text.")
    memfs("attach", "--pin", cube, **environment)
    assert json.loads(memfs("status", "--json", **environment).stdout)["mounted"][0]["pinned"]
    memfs("detach", "--all", **environment)
    assert in_model(client, mount) == set()


def test_the_order_of_reading_is_the_order_of_the_session(reading: Reading) -> None:
    mount, client = reading
    for name in ("b", "a", "c"):
        read_all(encoded(mount, client, name))
    report = client.call("ask", question="Why?", max_tokens=2)
    assert [cube["path"] for cube in report["cubes"]] == ["b", "a", "c"]


def test_renaming_a_mounted_cube(reading: Reading) -> None:
    mount, client = reading
    read_all(encoded(mount, client, "old/a"))
    (mount.dir / "old").rename(mount.dir / "new")
    until(lambda: in_model(client, mount) == {"new/a"})


@needs_root
def test_another_user_has_a_session_of_its_own(reading: Reading, tmp_path: Path) -> None:
    mount, client = reading
    tmp_path.chmod(0o755)
    for above in tmp_path.parents:
        if above.stat().st_uid == os.getuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    kv = encoded(mount, client, "a")
    private = encoded(mount, client, "private")
    (mount.dir / "private").chmod(0o700)

    def as_other(path: Path) -> int:
        code = (
            "import os, sys; os.setgroups([]); os.setgid(4321); os.setuid(4321)\n"
            "try: open(sys.argv[1], 'rb').read()\n"
            "except PermissionError: sys.exit(7)\n"
        )
        command = [sys.executable, "-S", "-c", code, str(path)]
        return subprocess.run(command, check=False, timeout=30).returncode

    assert as_other(kv) == 0
    lines = client.call("status")["mounted"]
    assert [line["sessions"] for line in lines if line["store"] == str(mount.store)] == [[4321]]
    assert as_other(private) == 7
    assert in_model(client, mount) == {"a"}
    for file in (kv, private):
        read_all(file)
    until(lambda: in_model(client, mount) == {"a", "private"})
    told = as_user(4321, mount.status)
    (line,) = told["mounted"]
    assert (line["cube"], line["sessions"]) == ("a", [4321])
    assert told["used_bytes"] == line["bytes"] < mount.status()["used_bytes"]
    assert not {"encoding", "nearby", "tiers", "ahead"} & told.keys(), "of everybody's memories"


# The model never stands in the way of the files.


def operations(mount: Mount) -> Callable[[], None]:
    """What people do with files, none of it the model's."""
    cube = mount.cube("busy", TEXT)
    counter = iter(range(1 << 30))

    def once() -> None:
        (cube / "payload.md").write_text(f"{TEXT}{next(counter)}")
        json.loads((cube / "meta.json").read_text())
        os.listdir(cube)
        (cube / "notes").write_text("x")
        (cube / "notes").rename(cube / "other")
        (mount.dir / ".memfs/status").read_text()
        (cube / "kv.safetensors").stat()

    return once


def slowest(operation: Callable[[], None], rounds: int) -> tuple[float, float]:
    """(median, longest) seconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        operation()
        times.append(time.perf_counter() - began)
    return statistics.median(times), max(times)


def test_files_work_while_the_model_loads(
    tmp_path: Path, environment: dict[str, str], config: Config
) -> None:
    stop(config)
    with mounted_at(tmp_path, **environment) as mount:
        cube = mount.cube("a", TEXT)
        reader = threading.Thread(target=read_all, args=(cube / "kv.safetensors",))
        reader.start()  # starts the runtime, and waits for it
        with stopped(until(lambda: pid_of(config))):  # so that it loads for as long as this takes
            _, longest = slowest(operations(mount), 5)
            assert longest < 3
            assert reader.is_alive(), "it waits for the KV cache"
            assert not (mount.store / "a/kv.safetensors").exists()
        reader.join(120)
        assert (mount.store / "a/kv.safetensors").exists()


def pid_of(config: Config) -> int | None:
    """The process of a model's runtime, once there is one."""
    try:
        with connect(config, start=False) as client:
            return int(client.call("status", timeout=60)["pid"])
    except RuntimeUnavailable:
        return None


def test_files_work_while_the_runtime_hangs(reading: Reading) -> None:
    mount, client = reading
    kv = encoded(mount, client, "a")
    unmade = mount.cube("b", TEXT) / "kv.safetensors"
    with stopped(client.call("status")["pid"]):
        threads = [
            threading.Thread(target=_ignoring_errors, args=(read_all, unmade)) for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        once = operations(mount)

        def with_reading() -> None:
            once()
            read_all(kv)

        median, longest = slowest(with_reading, 20)
        assert longest < 3
        assert median < 0.5, "after one close that waited in vain the next do not"
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    until(lambda: in_model(client, mount) >= {"a"})


def _ignoring_errors(function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except OSError as e:
        assert e.errno in (errno.EBUSY, errno.EINTR)


def test_a_waiting_reader_can_be_interrupted(reading: Reading) -> None:
    mount, client = reading
    unmade = mount.cube("b", TEXT) / "kv.safetensors"
    with stopped(client.call("status")["pid"]):
        cat = subprocess.Popen(
            ["cat", unmade], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(0.5)
        cat.send_signal(signal.SIGTERM)
        assert cat.wait(timeout=60) != 0


def test_killed_while_answering_the_files_work_and_the_next_question_too(
    reading: Reading, config: Config, environment: dict[str, str]
) -> None:
    mount, client = reading
    kv = encoded(mount, client, "a")
    read_all(kv)
    pid = client.call("status")["pid"]
    steps = client.stream("ask", question="Tell all.", max_tokens=4000)
    next(steps)
    os.kill(pid, signal.SIGKILL)
    _, longest = slowest(operations(mount), 5)
    assert longest < 2
    assert read_all(kv) == kv.stat().st_size
    done = memfs("ask", "--json", "-n", "4", "-c", mount.dir / "a", "Why?", **environment)
    report = json.loads(done.stdout)
    assert [cube["how"] for cube in report["cubes"]] == ["kv"]
    with connect(config, start=False) as again:
        assert again.call("status")["pid"] != pid

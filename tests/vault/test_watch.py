"""Changes beside the mount are told within a second or so, and lost events are not lost on us."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfs.vault import watch
from memfs.vault.store import Store
from memfs.vault.watch import Watcher

QUEUE = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


class Told:
    """What a watcher told, and when it has told something."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.lost = 0
        self.calls = 0
        self._news = threading.Condition()

    def on_paths(self, paths: set[str]) -> None:
        with self._news:
            self.paths |= paths
            self.calls += 1
            self._news.notify_all()

    def on_lost(self) -> None:
        with self._news:
            self.lost += 1
            self._news.notify_all()

    def wait(self, for_what: Callable[[], bool], seconds: float = 10.0) -> bool:
        with self._news:
            return self._news.wait_for(for_what, seconds)

    def forget(self) -> None:
        with self._news:
            self.paths, self.lost, self.calls = set(), 0, 0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    root = tmp_path / "store"
    (root / "work" / "law").mkdir(parents=True)
    with Store.open(root) as opened:
        yield opened


@pytest.fixture
def told(store: Store) -> Iterator[Told]:
    found = Told()
    watcher = Watcher(store, found.on_paths, found.on_lost)
    watcher.start()
    assert found.wait(lambda: found.lost == 1)  # for what was changed before
    found.forget()
    yield found
    watcher.stop()
    assert not [t for t in threading.enumerate() if t.name == "watcher"]


def test_a_file_that_is_written(store: Store, told: Told) -> None:
    began = time.monotonic()
    (store.root / "work" / "law" / "payload.md").write_text("text")
    assert told.wait(lambda: bool(told.paths))
    assert time.monotonic() - began < 1.5
    assert told.paths == {"work/law"}


@pytest.mark.parametrize(
    "change",
    [
        lambda cube: (cube / "payload.md").unlink(),
        lambda cube: (cube / "payload.md").chmod(0o600),
        lambda cube: (cube / "payload.md").rename(cube / "notes.md"),
        lambda cube: os.utime(cube / "payload.md"),
        lambda cube: os.link(cube / "payload.md", cube / "kv.safetensors"),
        lambda cube: (cube / "meta.json").symlink_to("x"),
        lambda cube: (cube / "adapter").mkdir(),
    ],
    ids=["unlink", "chmod", "rename", "utime", "link", "symlink", "mkdir"],
)
def test_each_way_of_changing_a_cube(
    store: Store, told: Told, change: Callable[[Path], object]
) -> None:
    (store.root / "work" / "law" / "payload.md").write_text("text")
    assert told.wait(lambda: bool(told.paths))
    told.forget()
    change(store.root / "work" / "law")
    assert told.wait(lambda: "work/law" in told.paths)


def test_an_adapters_files_are_the_cubes(store: Store, told: Told) -> None:
    (store.root / "work" / "law" / "adapter").mkdir()
    (store.root / "work" / "law" / "adapter" / "adapter_model.safetensors").write_text("x")
    assert told.wait(lambda: "work/law" in told.paths)


def test_directories_that_come_and_go(store: Store, told: Told, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "deep" / "cube").mkdir(parents=True)
    (made / "deep" / "cube" / "payload.md").write_text("text")
    made.rename(store.root / "in")
    assert told.wait(lambda: {"in", "in/deep", "in/deep/cube"} <= told.paths)
    told.forget()
    (store.root / "in").rename(store.root / "work" / "in")
    assert told.wait(lambda: {"in", "work/in", "work/in/deep/cube"} <= told.paths)
    told.forget()
    (store.root / "work" / "in" / "deep" / "cube" / "payload.md").write_text("new")
    assert told.wait(lambda: told.paths == {"work/in/deep/cube"})
    told.forget()
    (store.root / "work" / "in").rename(tmp_path / "out")
    assert told.wait(lambda: "work/in" in told.paths)
    told.forget()
    (tmp_path / "out").rename(store.root / "in")
    assert told.wait(lambda: "in/deep/cube" in told.paths)
    told.forget()
    (store.root / "in" / "deep" / "cube" / "payload.md").write_text("again")
    assert told.wait(lambda: "in/deep/cube" in told.paths)


def test_a_tree_made_at_once_is_told_whole(store: Store, told: Told) -> None:
    for i in range(30):
        cube = store.root / f"t{i % 3}" / f"u{i}"
        cube.mkdir(parents=True)
        (cube / "payload.md").write_text("text")
    assert told.wait(lambda: {f"t{i % 3}/u{i}" for i in range(30)} <= told.paths)


def test_memfss_own_files_are_none_of_it(store: Store, told: Told) -> None:
    (store.control_dir / "index").mkdir()
    (store.control_dir / "index" / "data.mdb").write_text("x")
    (store.root / "work" / "law" / ".memfs-tmp-1").write_text("x")
    (store.root / "file").write_text("x")  # a collection's own file
    (store.root / "end").mkdir()
    assert told.wait(lambda: "end" in told.paths)
    assert told.paths == {"end"}


def test_nothing_outside_is_watched(store: Store, told: Told, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.root / "link").symlink_to(outside)
    time.sleep(0.5)
    (outside / "payload.md").write_text("x")
    (store.root / "end").mkdir()
    assert told.wait(lambda: "end" in told.paths)
    assert not {path for path in told.paths if path.startswith("link")}


def test_many_changes_are_told_together_yet_not_late(store: Store, told: Told) -> None:
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        (store.root / "work" / "law" / "payload.md").write_text("text")
        time.sleep(0.05)
    assert told.wait(lambda: told.calls >= 2)
    assert told.calls <= 4


def test_names_that_are_not_utf8(store: Store, told: Told) -> None:
    name = os.fsdecode(b"caf\xe9")
    (store.root / name).mkdir()
    assert told.wait(lambda: name in told.paths)


def test_an_error_of_the_callback_does_not_end_it(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    found = Told()

    def on_paths(paths: set[str]) -> None:
        found.on_paths(paths)
        raise OSError("disk full")

    watcher = Watcher(store, on_paths, found.on_lost)
    watcher.start()
    assert found.wait(lambda: found.lost == 1)
    for name in ("one", "two"):
        (store.root / name).mkdir()
        assert found.wait(lambda name=name: name in found.paths)
    watcher.stop()
    assert "disk full" in caplog.text


@pytest.mark.skipif(QUEUE > 20_000, reason="the kernel's queue is too long to fill in a test")
def test_lost_events_are_noticed(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    found = Told()
    watcher = Watcher(store, found.on_paths, found.on_lost)
    watcher.start()
    assert found.wait(lambda: found.lost == 1)
    # Other processes make events faster than any reader takes them.
    flood = "mkdir -p {0}; cd {0} && seq 25000 | xargs touch"
    floods = [
        subprocess.Popen(["sh", "-c", flood.format(store.root / f"flood{i}")]) for i in range(2)
    ]
    assert [process.wait() for process in floods] == [0, 0]
    overflowed = found.wait(lambda: found.lost >= 2, 30)
    if not overflowed:
        watcher.stop()
        pytest.skip("the events were read faster than they could be made")
    assert "overflow" in caplog.text
    found.forget()
    (store.root / "work" / "law" / "payload.md").write_text("after")
    assert found.wait(lambda: "work/law" in found.paths or found.lost > 0, 30)
    watcher.stop()


LIMITED = """
import logging, sys, threading, time
from pathlib import Path
from memfs.vault import watch
from memfs.vault.store import Store
logging.basicConfig(level=logging.WARNING)
watch.RESCAN_S = 0.5
lost = threading.Semaphore(0)
store = Store.open(Path(sys.argv[1]))
watcher = watch.Watcher(store, lambda paths: None, lost.release)
watcher.start()
print([lost.acquire(timeout=20) for _ in range(3)])
watcher.stop()
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/sys/user/max_inotify_watches"), reason="no such kernel limit"
)
def test_what_cannot_be_watched_is_looked_at_now_and_then(store: Store) -> None:
    for i in range(30):
        (store.root / f"d{i}").mkdir()
    limited = 'echo 10 > /proc/sys/user/max_inotify_watches && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", limited, "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", LIMITED, store.root],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout.strip() == "[True, True, True]", done.stderr
    assert "max_user_watches" in done.stderr


def test_stopping_before_it_began(store: Store) -> None:
    Watcher(store, lambda paths: None, lambda: None).stop()
    watcher = Watcher(store, lambda paths: None, lambda: None)
    watcher.start()
    watcher.stop()


def test_quiet_is_quiet(store: Store, told: Told) -> None:
    """An idle watcher calls nobody."""
    list(store.walk())
    (store.root / "work" / "law" / "x").write_text("x")
    assert told.wait(lambda: told.calls == 1)
    (store.root / "work" / "law" / "x").read_text()
    time.sleep(watch.QUIET_S * 3)
    assert (told.calls, told.lost) == (1, 0)

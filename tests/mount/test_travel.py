"""Cubes that are copied between two machines with different models, by what people copy with.

Each machine is a store, a mount and a runtime. Where root may, they are in two network namespaces,
joined by a pair of interfaces: sshd listens in one, rsync over ssh comes from the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from memfs.config import Config
from memfs.filesystem.renewal import SCAN_SECONDS
from memfs.runtime.client import RuntimeClient, connect, stop

from .conftest import Mount, until

TEXT = "The keeper of the light wrote down what the ships had passed, and when. " * 30
ADDRESSES = ("10.213.77.1", "10.213.77.2")
SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def why_no_network() -> str | None:
    """Why there can be no two network namespaces with sshd and rsync in them."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = ("ip", "nsenter", "rsync", "ssh", "ssh-keygen")
    missing = [name for name in tools if shutil.which(name) is None]
    if missing or SSHD is None:
        return f"not installed: {', '.join(missing or ['sshd'])}"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return None if probe.returncode == 0 else "there are no network namespaces here"


NO_NETWORK = why_no_network()


@pytest.fixture(scope="module")
def prefixes() -> Iterator[tuple[list[str], list[str]]]:
    """What a command begins with to run on the one machine or the other."""
    if NO_NETWORK is not None:
        yield [], []
        return
    names = [f"memfs-{os.getpid()}-{side}" for side in "ab"]

    def ip(*args: str) -> None:
        subprocess.run(["ip", *args], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        pair = ("type", "veth", "peer", "veth0", "netns", names[1])
        ip("link", "add", "veth0", "netns", names[0], *pair)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            for device in ("veth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        # ``ip netns exec`` would give each command mounts of its own.
        first, second = (["nsenter", f"--net=/run/netns/{name}"] for name in names)
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@dataclass
class Machine:
    """A store, its mount, and the runtime of its model."""

    mount: Mount
    config: Config
    prefix: list[str]
    environment: dict[str, str]

    def memfs(self, *args: str | Path) -> str:
        """Runs a command there."""
        command = [*self.prefix, sys.executable, "-m", "memfs.cli.main", *map(str, args)]
        env = os.environ | self.environment
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=90, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def dir(self) -> Path:
        return self.mount.dir

    @property
    def store(self) -> Path:
        return self.mount.store

    def client(self) -> RuntimeClient:
        return connect(self.config, start=False)

    def kv(self, name: str) -> dict[str, Any]:
        """What meta.json says of a cube's KV cache, once it was looked at."""
        return until(lambda: (k := self._kv(name))["state"] != "unchecked" and k)  # type: ignore

    def _kv(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.mount.meta(name)["state"]["kv"]
        return found

    def in_model(self) -> set[str]:
        with self.client() as client:
            lines = client.call("status", timeout=10)["mounted"]
        return {line["cube"] for line in lines if line["store"] == str(self.store)}

    def ask(self, name: str) -> dict[str, Any]:
        """How a cube was used for an answer."""
        said = json.loads(self.memfs("ask", "--json", "-n", "2", "-c", self.dir / name, "When?"))
        cubes: list[dict[str, Any]] = said["cubes"]
        return cubes[0]


@contextlib.contextmanager
def machine(root: Path, model: Path, prefix: list[str]) -> Iterator[Machine]:
    config = Config(model=str(model), device="cpu", dtype="float32", threads=1)
    environment = {
        "MEMFS_MODEL": config.model,
        "MEMFS_DEVICE": config.device,
        "MEMFS_DTYPE": config.dtype,
        "MEMFS_THREADS": "1",
        "MEMFS_AUTOSTART": "on",
    }
    root.mkdir()
    made = Machine(Mount(root, **environment), config, prefix, environment)
    try:
        made.memfs("mount", made.store, made.dir)
        made.memfs("runtime")
        until(made.mount.has_index)
        until(lambda: made.mount.status()["runtime"] == "ready", 60)
        yield made
    finally:
        if os.path.ismount(made.dir):
            made.mount.stop()
        stop(config)


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_dir: Path,
    prefixes: tuple[list[str], list[str]],
) -> Iterator[Machine]:
    """Where the cubes come from."""
    root = tmp_path_factory.mktemp("home") / "machine"
    with machine(root, tiny_model_dir, prefixes[0]) as made:
        yield made


@pytest.fixture(scope="module")
def away(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_qwen_dir: Path,
    prefixes: tuple[list[str], list[str]],
) -> Iterator[Machine]:
    """Where they go: another model is there."""
    root = tmp_path_factory.mktemp("away") / "machine"
    with machine(root, tiny_qwen_dir, prefixes[1]) as made:
        yield made


@pytest.fixture
def cube(home: Machine, request: pytest.FixtureRequest) -> Path:
    """A cube with all that one can have, of the test's own; named in its machine's mount."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    cube = home.mount.cube(name, TEXT + name)
    (cube / "adapter").mkdir()
    weights = {"lora_A": np.arange(16, dtype=np.float32)}
    save_file(weights, home.store / name / "adapter/adapter_model.safetensors")
    (cube / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (cube / "notes.txt").write_text("more")
    home.memfs("encode", cube)
    read(cube)  # once, so that it has a history
    until(lambda: home.mount.meta(name)["behavioural"]["reads"] == 1)
    os.setxattr(cube / "notes.txt", "user.colour", b"blue")
    (cube / "payload.md").chmod(0o640)
    for number, path in enumerate(sorted(p for p in cube.rglob("*") if p.is_file())):
        if path.name != "meta.json":
            os.utime(path, ns=(10**18, 10**18 + number * 1001))
    return cube


def read(cube: Path, flags: int = 0) -> bytes:
    """The KV cache, by ``read``."""
    fd = os.open(cube / "kv.safetensors", os.O_RDONLY | flags)
    try:
        return b"".join(iter(lambda: os.read(fd, 1 << 17), b""))
    finally:
        os.close(fd)


def run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), f"{command}\n{done.stderr}"


COPIERS: dict[str, Callable[[Path, Path], None]] = {
    "cp -a": lambda source, target: run("cp", "-a", source, target),
    "rsync -aX": lambda source, target: run("rsync", "-aX", f"{source}/", f"{target}/"),
    "tar": lambda source, target: run(
        "sh", "-c", f"tar -C {source.parent} --xattrs -cf - {source.name} |"
        f" tar -C {target.parent} --xattrs --xattrs-include='user.*' -xpf -",
    ),
    "scp -rp": lambda source, target: run("scp", "-q", "-rp", source, target),
}  # fmt: skip


@pytest.mark.parametrize("into", ["mount", "store"])
@pytest.mark.parametrize("copier", COPIERS)
def test_everything_arrives_and_is_checked(
    home: Machine, away: Machine, cube: Path, copier: str, into: str
) -> None:
    program = copier.partition(" ")[0]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    name, before = cube.name, home.mount.meta(cube.name)
    COPIERS[copier](cube, (away.dir if into == "mount" else away.store) / name)
    there = away.dir / name
    kv = away.kv(name)
    assert kv["state"] == "foreign"
    assert kv["reason"].startswith("weights_sha256 is ")
    assert sorted(os.listdir(there)) == sorted(os.listdir(cube))
    for path in (p for p in cube.rglob("*") if p.is_file() and p.name != "meta.json"):
        copy = away.store / name / path.relative_to(cube)
        original = home.store / name / path.relative_to(cube)
        assert copy.read_bytes() == original.read_bytes(), path
        assert copy.stat().st_mode == original.stat().st_mode, path
        # scp's protocol has whole seconds alone.
        unit = 10**9 if copier == "scp -rp" else 1
        assert copy.stat().st_mtime_ns // unit == original.stat().st_mtime_ns // unit, path
    if copier != "scp -rp":
        assert os.getxattr(there / "notes.txt", "user.colour") == b"blue"
    meta = away.mount.meta(name)
    assert meta["descriptive"] == before["descriptive"]
    assert meta["behavioural"]["reads"] >= before["behavioural"]["reads"] == 1
    assert meta["state"]["adapter"]["state"] == before["state"]["adapter"]["state"]
    assert meta["state"]["payload"] == before["state"]["payload"]


def test_at_home_it_is_ready_again(home: Machine, cube: Path, tmp_path: Path) -> None:
    """The same model, in another store: its KV cache is used as it came."""
    with Mounted(home, tmp_path / "second") as second:
        run("cp", "-a", cube, second.dir / cube.name)
        assert until(lambda: second.meta(cube.name)["state"]["kv"]["state"] == "ready")
        assert second.meta(cube.name)["descriptive"] == home.mount.meta(cube.name)["descriptive"]


class Mounted:
    """One more store on a machine."""

    def __init__(self, on: Machine, root: Path, *options: str) -> None:
        self._on, self._options = on, options
        root.mkdir()
        self.mount = Mount(root, **on.environment)

    def __enter__(self) -> Mount:
        self._on.memfs("mount", *self._options, self.mount.store, self.mount.dir)
        until(self.mount.has_index)
        until(lambda: self.mount.status()["runtime"] == "ready")
        return self.mount

    def __exit__(self, *_: object) -> None:
        self.mount.stop()


@pytest.fixture
def foreign(home: Machine, away: Machine, cube: Path) -> Path:
    """A cube that has come from home, with the KV cache of the model there."""
    run("cp", "-a", home.store / cube.name, away.store / cube.name)
    assert away.kv(cube.name)["state"] == "foreign"
    return away.dir / cube.name


def test_reading_it_makes_it_anew(home: Machine, away: Machine, foreign: Path) -> None:
    name = foreign.name
    original = (home.store / name / "kv.safetensors").read_bytes()
    assert read(foreign) == original, "the reader gets the file that was there, whole"
    until(lambda: away.kv(name)["state"] == "ready")
    until(lambda: name in away.in_model())
    made = read(foreign)
    assert made != original
    assert away.ask(name)["how"] == "kv"
    # Back at home it is foreign in its turn, and what is made there is what there was.
    run("cp", "-a", foreign, home.dir / f"{name}-back")
    assert home.kv(f"{name}-back")["state"] == "foreign"
    assert read(home.dir / f"{name}-back") == made
    until(lambda: home.kv(f"{name}-back")["state"] == "ready")
    assert (home.store / f"{name}-back/kv.safetensors").read_bytes() == original


def test_asking_makes_it_anew(away: Machine, foreign: Path) -> None:
    asked = away.ask(foreign.name)
    assert asked["how"] == "kv"
    assert asked["chose"]["way"] == "made again"
    assert "made by another model: weights_sha256 is " in asked["chose"]["why"]
    until(lambda: away.kv(foreign.name)["state"] == "ready", 30)
    assert away.ask(foreign.name)["how"] == "kv"


def test_attaching_makes_it_anew(away: Machine, foreign: Path) -> None:
    away.memfs("attach", foreign)
    assert foreign.name in away.in_model()
    assert away.kv(foreign.name)["state"] == "ready"


def test_what_is_no_use_of_it(away: Machine, foreign: Path, tmp_path: Path) -> None:
    inode = (away.store / foreign.name / "kv.safetensors").stat().st_ino
    with open(foreign / "kv.safetensors", "rb", buffering=0) as file:
        file.read(8)
    read(foreign, os.O_NOATIME)
    run("rsync", "-a", "--open-noatime", f"{foreign}/", f"{tmp_path}/copy/")
    away.memfs("dump", foreign, "-o", tmp_path / "dump.tar")
    with Mounted(away, tmp_path / "quiet", "-o", "mount_on_read=off") as quiet:
        run("cp", "-a", tmp_path / "copy", quiet.dir / "copy")
        assert until(lambda: quiet.meta("copy")["state"]["kv"]["state"] == "foreign")
        read(quiet.dir / "copy")
        time.sleep(2 * SCAN_SECONDS)
        assert quiet.meta("copy")["state"]["kv"]["state"] == "foreign"
    assert (away.store / foreign.name / "kv.safetensors").stat().st_ino == inode
    assert away.kv(foreign.name)["state"] == "foreign"


@pytest.fixture
def several(away: Machine, foreign: Path, tmp_path: Path) -> list[Path]:
    """More cubes with the KV cache of another model, in a directory of their own."""
    away.memfs("dump", foreign, "-o", tmp_path / "dump.tar")
    collection = away.dir / f"{foreign.name}-several"
    cubes = [collection / str(number) for number in range(4)]
    for cube in cubes:
        name = str(cube.relative_to(away.dir))
        away.memfs("load", tmp_path / "dump.tar", away.dir, "--as", name)
        assert away.kv(name)["state"] == "foreign"
    return cubes


def require_nothing_made(away: Machine, cubes: list[Path]) -> None:
    """No KV cache of these is made anew, nor will be for what was read until now."""
    time.sleep(2 * SCAN_SECONDS)
    with away.client() as client:
        assert client.call("status", timeout=10)["encoding"] == 0
    names = [str(cube.relative_to(away.dir)) for cube in cubes]
    assert {away.kv(name)["state"] for name in names} == {"foreign"}
    assert away.in_model().isdisjoint(names)


def test_a_scan_makes_nothing(away: Machine, several: list[Path], tmp_path: Path) -> None:
    collection = several[0].parent
    subprocess.run(["grep", "-rc", "keeper", collection], capture_output=True, check=True)
    subprocess.run(["cp", "-a", collection, tmp_path / "backup"], check=True)
    require_nothing_made(away, several)


def test_a_scan_of_files_that_take_long_makes_nothing(away: Machine, several: list[Path]) -> None:
    """Each is read for longer than a scan may pause, as a file of gigabytes is; one fits."""
    away.memfs("encode", several[1])
    for cube in several:
        with open(cube / "kv.safetensors", "rb", buffering=0) as file:
            while file.read(1 << 16):
                pass
            time.sleep(1.5 * SCAN_SECONDS)
    require_nothing_made(away, [several[0], *several[2:]])


def test_files_that_are_read_at_the_same_time_are_a_scan(
    away: Machine, several: list[Path]
) -> None:
    with contextlib.ExitStack() as stack:
        for cube in several:
            file = stack.enter_context(open(cube / "kv.safetensors", "rb", buffering=0))
            while file.read(1 << 16):
                pass
    require_nothing_made(away, several)


def test_a_damaged_one_is_said_so(home: Machine, away: Machine, cube: Path) -> None:
    damaged = bytearray((home.store / cube.name / "kv.safetensors").read_bytes())
    damaged[-5] ^= 1
    for name in (f"{cube.name}-read", f"{cube.name}-asked", f"{cube.name}-attached"):
        shutil.copytree(home.store / cube.name, away.store / name)
        (away.store / name / "kv.safetensors").write_bytes(damaged)
        kv = away.kv(name)
        assert kv["state"] == "corrupt"
        assert "do not match their checksum" in kv["reason"]
        if name.endswith("read"):
            assert read(away.dir / name) == damaged
        elif name.endswith("asked"):
            assert away.ask(name)["chose"]["way"] == "made again"
        else:
            away.memfs("attach", away.dir / name)
        until(lambda name=name: away.kv(name)["state"] == "ready", 30)  # type: ignore[misc]
        assert away.ask(name)["how"] == "kv"


# Over the network


@pytest.fixture(scope="module")
def ssh(
    prefixes: tuple[list[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The ssh command that reaches the machine away from home, whose sshd is private."""
    if NO_NETWORK is not None:
        pytest.skip(NO_NETWORK)
    directory = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name]
        subprocess.run(key, check=True)
    public = (directory / "host.pub").read_text()
    (directory / "known").write_text(f"[{ADDRESSES[1]}]:2222 {public}")
    (directory / "config").write_text(f"""\
ListenAddress {ADDRESSES[1]}:2222
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
""")
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd separates its privileges
    assert SSHD is not None
    command = [*prefixes[1], SSHD, "-D", "-e", "-f", directory / "config"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as sshd:
        assert sshd.stderr is not None
        assert b"listening" in sshd.stderr.readline()
        yield (
            f"ssh -F none -p 2222 -i {directory}/user -o BatchMode=yes -o LogLevel=ERROR"
            f" -o UserKnownHostsFile={directory}/known -o StrictHostKeyChecking=yes"
        )
        sshd.send_signal(signal.SIGTERM)
        sshd.communicate()


@pytest.mark.parametrize("into", ["mount", "store"])
def test_rsync_over_ssh(home: Machine, away: Machine, cube: Path, ssh: str, into: str) -> None:
    unreachable = subprocess.run(
        [*ssh.split(), "-o", "ConnectTimeout=1", f"root@{ADDRESSES[1]}", "true"],
        capture_output=True,
        check=False,
    )
    assert unreachable.returncode == 255, "from here nobody gets there: it is another network"
    name = cube.name
    root = away.dir if into == "mount" else away.store

    def rsync(*options: str) -> list[str]:
        target = f"root@{ADDRESSES[1]}:{root}/{name}/"
        command = ["rsync", "-aX", "--open-noatime", *options, "-e", ssh, f"{cube}/", target]
        done = subprocess.run([*home.prefix, *command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    rsync()
    kv = away.kv(name)
    assert (kv["state"], kv["reason"][:14]) == ("foreign", "weights_sha256")
    assert away.mount.meta(name)["descriptive"] == home.mount.meta(name)["descriptive"]
    assert away.mount.meta(name)["behavioural"]["reads"] == 1
    sent = [line for line in rsync("-i", "--checksum") if line.startswith("<")]
    sent = [line for line in sent if not line.endswith("meta.json")]
    assert sent == [], "nothing is sent twice but the header, which says how the cube is there"
    read(away.dir / name)
    until(lambda: away.kv(name)["state"] == "ready")
    until(lambda: name in away.in_model())
    assert home.kv(name)["state"] == "ready"


def test_an_archive_through_ssh(home: Machine, away: Machine, cube: Path, ssh: str) -> None:
    memfs = f"{sys.executable} -m memfs.cli.main"
    variables = ("PYTHONPATH", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME")
    env = " ".join(f"{n}={os.environ[n]}" for n in variables if n in os.environ)
    command = (
        f"{memfs} dump {cube} -o - | {ssh} root@{ADDRESSES[1]} env {env} {memfs} load - {away.dir}"
    )
    run(*home.prefix, "sh", "-c", f"{command} > /dev/null")
    assert away.kv(cube.name)["state"] == "foreign"
    assert (away.dir / cube.name / "payload.md").read_text() == TEXT + cube.name

"""Signatures by real ssh-keygen: who may have signed, and who has not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfs.errors import MemfsError, NotFound, Untrusted
from memfs.vault.archive import signing

pytestmark = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen (openssh-client) is not installed"
)
DATA = b"what is signed\n"


def make_key(path: Path, passphrase: str = "") -> Path:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "", "-f", path], check=True
    )
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "ann")


@pytest.fixture
def allowed(tmp_path: Path, key: Path) -> Path:
    path = tmp_path / "allowed"
    path.write_text(f"ann@example.org,ann {key.with_suffix('.pub').read_text()}")
    return path


def test_a_signature_says_who_signed(key: Path, allowed: Path) -> None:
    signature = signing.sign(DATA, key)
    assert signature == signing.sign(DATA, key)
    assert signing.verify(DATA, signature, allowed) == "ann@example.org"
    assert signing.verify(DATA, signature, allowed, "ann") == "ann"
    assert signing.require_own(DATA, signature).startswith("SHA256:")


def test_what_is_not_accepted(key: Path, allowed: Path, tmp_path: Path) -> None:
    signature = signing.sign(DATA, key)
    with pytest.raises(Untrusted, match="Signature verification failed"):
        signing.verify(DATA + b"more", signature, allowed)
    with pytest.raises(Untrusted):
        signing.verify(DATA, signature, allowed, "bob")
    with pytest.raises(Untrusted, match="none of the allowed signers"):
        signing.verify(DATA, signing.sign(DATA, make_key(tmp_path / "eve")), allowed)
    with pytest.raises(Untrusted):
        signing.verify(DATA, b"no signature", allowed)
    with pytest.raises(Untrusted):
        signing.require_own(DATA + b"more", signature)
    with pytest.raises(NotFound, match="no such file of allowed signers"):
        signing.verify(DATA, signature, tmp_path / "nothing")
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", key, allowed], check=True)
    for_git = allowed.with_name("allowed.sig").read_bytes()
    with pytest.raises(Untrusted, match="namespace does not match"):
        signing.verify(allowed.read_bytes(), for_git, allowed)


def test_an_allowed_signer_for_something_else_or_no_more(key: Path, tmp_path: Path) -> None:
    signature, public = signing.sign(DATA, key), key.with_suffix(".pub").read_text()
    allowed = tmp_path / "allowed"
    for option in ('namespaces="git"', 'valid-before="20200101"'):
        allowed.write_text(f"ann {option} {public}")
        with pytest.raises(Untrusted):
            signing.verify(DATA, signature, allowed)
    allowed.write_text(f'ann namespaces="git,memfs" {public}')
    assert signing.verify(DATA, signature, allowed) == "ann"


def test_keys_that_cannot_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="no such key"):
        signing.sign(DATA, tmp_path / "nothing")
    (tmp_path / "junk").write_text("no key")
    with pytest.raises(MemfsError, match="junk did not sign"):
        signing.sign(DATA, tmp_path / "junk")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(NotFound, match="ssh-keygen -t ed25519 makes one"):
        signing.default_key()
    (tmp_path / ".ssh").mkdir()
    key = make_key(tmp_path / ".ssh/id_ed25519")
    assert signing.default_key() == key


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    socket = tmp_path / "agent"
    said = subprocess.run(["ssh-agent", "-s", "-a", socket], capture_output=True, check=True).stdout
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    yield
    os.kill(int(said.split(b"SSH_AGENT_PID=")[1].split(b";")[0]), signal.SIGTERM)


def test_a_key_that_only_an_agent_has(key: Path, allowed: Path, agent: None) -> None:
    subprocess.run(["ssh-add", "-q", key], check=True)
    key.unlink()
    signature = signing.sign(DATA, key.with_suffix(".pub"))
    assert signing.verify(DATA, signature, allowed, "ann") == "ann"

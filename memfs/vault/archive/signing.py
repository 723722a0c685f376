"""Signatures by the user's own ssh key: ``ssh-keygen -Y``, as git has them for commits.

An ssh agent, a security key, a passphrase and a file of allowed signers are then OpenSSH's matter,
and a signature can be made and checked by hand. Used by the archive's commands; blocks, and may ask
for a passphrase on the terminal.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from memfs.config import config_file
from memfs.errors import MemfsError, NotFound, Untrusted

NAMESPACE = "memfs"
"""What the signature is for: one over something else is not taken for it."""
_DEFAULT_KEYS = ("id_ed25519", "id_ed25519_sk", "id_ecdsa", "id_ecdsa_sk", "id_rsa")


def default_key() -> Path:
    """The user's own key, the first that ssh would take. Raises NotFound."""
    directory = Path.home() / ".ssh"
    for name in _DEFAULT_KEYS:
        if (directory / name).exists():
            return directory / name
    raise NotFound(f"there is no key in {directory}; ssh-keygen -t ed25519 makes one")


def default_allowed_signers() -> Path | None:
    """The file of allowed signers in the configuration directory, where there is one."""
    path = config_file().with_name("allowed_signers")
    return path if path.exists() else None


def sign(data: bytes, key: Path) -> bytes:
    """The armored signature of ``data`` by a key: a private one, or a public one that an agent has.

    Raises:
        NotFound: there is no such key.
        MemfsError: ssh-keygen did not sign; with what it said.
    """
    if not key.exists():
        raise NotFound(f"{key}: no such key")
    done = _run("sign", "-f", str(key), data=data)
    if done.returncode != 0:
        raise MemfsError(f"{key} did not sign: {_said(done)}")
    return done.stdout


def verify(data: bytes, signature: bytes, allowed: Path, signer: str | None = None) -> str:
    """Who signed, by the name that the file of allowed signers gives.

    Args:
        allowed: the file, as ``man ssh-keygen`` describes it under ALLOWED SIGNERS.
        signer: the only one who will do; None for any of them.

    Raises:
        NotFound: there is no such file.
        Untrusted: nobody who may, or not this, or not ``signer``.
    """
    if not allowed.exists():
        raise NotFound(f"{allowed}: no such file of allowed signers")
    with tempfile.NamedTemporaryFile() as file:
        file.write(signature)
        file.flush()
        names = [signer] if signer is not None else _principals(file.name, allowed)
        why = ""
        for name in names:
            options = ("-f", str(allowed), "-I", name, "-s", file.name)
            done = _run("verify", *options, data=data)
            if done.returncode == 0:
                return name
            why = _said(done)
    raise Untrusted(f"{why} (allowed signers: {allowed})")


def require_own(data: bytes, signature: bytes) -> str:
    """The key that made a signature, where nobody says whose it is: it signed ``data``.

    Raises Untrusted where it did not.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(signature)
        file.flush()
        done = _run("check-novalidate", "-s", file.name, data=data)
    if done.returncode != 0:
        raise Untrusted(_said(done))
    return done.stdout.decode("utf-8", "replace").strip().rpartition(" ")[2]


def _principals(signature: str, allowed: Path) -> list[str]:
    """The names that the key of a signature has in the file of allowed signers."""
    done = _run("find-principals", "-s", signature, "-f", str(allowed), namespace=False)
    if done.returncode != 0:
        raise Untrusted(f"its key is none of the allowed signers' ({allowed}): {_said(done)}")
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return [name for line in lines for name in line.split(",") if name]


def _run(
    action: str, *options: str, data: bytes = b"", namespace: bool = True
) -> subprocess.CompletedProcess[bytes]:
    command = ["ssh-keygen", "-Y", action, *options]
    if namespace:
        command += ["-n", NAMESPACE]
    try:
        return subprocess.run(
            command, input=data, capture_output=True, check=False, env=os.environ | {"LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise NotFound("ssh-keygen is not installed (Debian: openssh-client)") from None


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr + done.stdout).decode("utf-8", "replace").strip().splitlines()
    return "; ".join(line.strip() for line in lines) or f"ssh-keygen ended with {done.returncode}"

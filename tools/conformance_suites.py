"""The suites that ``tools/conformance`` runs: what each needs, and its cases as commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from environments import environment, python


@dataclass(frozen=True)
class Suite:
    """What is needed to run a suite, and its cases in a directory."""

    what: str
    packages: tuple[str, ...]
    cases: Callable[[Path], Iterator[tuple[str, list[str], dict[str, str]]]]
    """Name, command and environment of each; the command runs in the directory."""
    skips: tuple[int, ...] = ()
    """Exit codes that say that a case cannot be run here."""


def fio(place: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    common = [
        "--size=16m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--output=/dev/null",
    ]
    shapes = {
        "buffered, sequential": ["--rw=write", "--bs=64k"],
        "buffered, random, blocks of any size": ["--rw=randwrite", "--bsrange=512-64k"],
        "O_DIRECT": ["--rw=randwrite", "--bs=4k", "--direct=1"],
        "O_SYNC": ["--rw=randwrite", "--bs=16k", "--sync=1", "--size=2m"],
        "shared mapping": ["--rw=randwrite", "--bs=4k", "--ioengine=mmap"],
        "libaio, 16 deep": [
            "--rw=randwrite",
            "--bs=4k",
            "--ioengine=libaio",
            "--iodepth=16",
            "--direct=1",
        ],
        "pwritev, appended, synced now and then": [
            "--rw=write",
            "--bs=8k",
            "--ioengine=pvsync",
            "--fsync=64",
        ],
        "four writers, a file each": ["--rw=randrw", "--bs=4k", "--numjobs=4", "--size=4m"],
        "preallocated, trimmed": [
            "--rw=randwrite",
            "--bs=4k",
            "--fallocate=posix",
            "--end_fsync=1",
        ],
    }
    for name, options in shapes.items():
        yield (
            name,
            ["fio", f"--name=job-{len(name)}", f"--directory={place}", *common, *options],
            {},
        )
    together = ["--offset_increment=4m", "--size=4m", "--numjobs=4", f"--filename={place}/one"]
    yield (
        "four writers, one file",
        ["fio", "--name=together", "--rw=randwrite", "--bs=4k", *common, *together],
        {},
    )


STRESSORS = (
    "access chdir chmod chown copy-file dentry dir dirdeep dirmany dnotify dup fallocate "
    "fanotify fcntl fiemap file-ioctl filename flock fpunch fsize fstat getdent handle hdd "
    "inode-flags inotify io iomix lease link locka lockf lockofd mknod open rename symlink "
    "sync-file touch utime xattr"
)


def stress_ng(place: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    for name in STRESSORS.split():
        options = ["--timeout", "2s", "--verify", "--temp-path", str(place)]
        yield name, ["stress-ng", f"--{name}", "2", *options], {}


CPYTHON = (
    "test_os test_posix test_posixpath test_genericpath test_shutil test_tempfile test_fileio "
    "test_io test_file test_file_eintr test_fileinput test_mmap test_glob test_fnmatch "
    "test_pathlib test_stat test_filecmp test_zipfile test_zipimport test_tarfile test_gzip "
    "test_bz2 test_lzma test_largefile test_fcntl test_ioctl test_dbm test_dbm_dumb "
    "test_dbm_gnu test_dbm_ndbm test_shelve test_mailbox test_bufio "
    "test_univnewlines test_unicode_file test_unicode_file_functions test_pkg test_import "
    "test_compileall test_py_compile test_linecache test_netrc"
)


def debian_python() -> str:
    """The version of the system's own Python, as Debian's packages have it in their names."""
    found = os.path.realpath("/usr/bin/python3")
    return found.rpartition("python")[2]


def cpython(place: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    for name in CPYTHON.split():
        command = [
            "/usr/bin/python3",
            "-m",
            "test",
            "-u",
            "largefile",
            "--tempdir",
            str(place),
            name,
        ]
        yield name, command, {"TMPDIR": str(place), "PYTHONDONTWRITEBYTECODE": "1"}


PYFILESYSTEM = """
import os, shutil, tempfile, unittest, warnings
warnings.simplefilter("ignore")
from fs.osfs import OSFS
from fs.test import FSTestCases

class OnPlace(FSTestCases, unittest.TestCase):
    def make_fs(self):
        self.made = tempfile.mkdtemp(dir=os.environ["PLACE"])
        return OSFS(self.made)

    def destroy_fs(self, fs):
        fs.close()
        shutil.rmtree(self.made)

unittest.main(argv=["OnPlace", os.environ["CASE"]])
"""
PYFILESYSTEM_NEEDS = ("fs==2.4.16", "setuptools<81", "pytz", "parameterized")


def pyfilesystem(place: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    inside = python(environment("conformance-pyfilesystem", PYFILESYSTEM_NEEDS))
    listed = (
        "import fs.test; print(*(n for n in dir(fs.test.FSTestCases) if n.startswith('test_')))"
    )
    names = subprocess.run(
        [inside, "-W", "ignore", "-c", listed], check=True, capture_output=True, text=True
    ).stdout.split()
    for name in names:
        extra = {"PLACE": str(place), "CASE": f"OnPlace.{name}"}
        yield name, [inside, "-W", "ignore", "-c", PYFILESYSTEM], extra


SCRIPTS = {
    "postmark": """
        printf "set location $PWD\\nset number 500\\nset transactions 1000\\nrun\\nquit\\n" |
            postmark | grep "seconds of transactions"
    """,
    "secure-delete": """
        mkdir wiped
        for i in 1 2 3; do head -c 300000 /dev/urandom > wiped/$i; done
        srm -rll wiped
        test ! -e wiped
    """,
    "rm -r of 10,000 files": """
        mkdir many
        (cd many && seq 10000 | xargs touch)
        test $(ls many | wc -l) = 10000
        rm -r many
    """,
}


def loads(place: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Programs that load a filesystem and notice where it fails them."""
    yield "dbench, 4 clients", ["dbench", "-D", str(place), "-t", "10", "4"], {}
    bonnie = ["bonnie++", "-d", str(place), "-u", "root", "-s", "32", "-r", "16", "-n", "1", "-f"]
    yield "bonnie++", bonnie, {}
    ways = {0: "not synced", 1: "fsync before close", 3: "fsync in reverse", 5: "fsync after"}
    for number, way in ways.items():
        marks = f"mkdir marks && fs_mark -d marks -n 400 -s 8192 -S {number}"  # a short path alone
        yield f"fs_mark, {way}", ["sh", "-c", marks], {}
    for name, script in SCRIPTS.items():
        yield name, ["sh", "-ec", script], {}


SUITES = {
    "fio": Suite("fio --verify: what was written is read", ("fio",), fio),
    "stress-ng": Suite(
        "stress-ng's filesystem class, each stressor for 2 s in 2 processes",
        ("stress-ng",),
        stress_ng,
        (3, 4, 6),
    ),
    "cpython": Suite(
        "CPython's own file tests, TMPDIR on the mount",
        (f"libpython{debian_python()}-testsuite",),
        cpython,
        (4, 5),
    ),
    "pyfilesystem": Suite("PyFilesystem2's conformance cases", ("python3-venv",), pyfilesystem),
    "loads": Suite(
        "dbench, bonnie++, fs_mark, postmark, secure-delete, rm -r",
        ("dbench", "bonnie++", "fsmark", "postmark", "secure-delete"),
        loads,
    ),
}

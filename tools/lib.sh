# shellcheck shell=bash
# Sourced by tools/quickstart and tools/test: puts on the machine what memfs needs, once.
#
# install             makes .venv with memfs and its development tools, and installs libfuse 3.
# install_for_tests   installs the programs that the tests drive, too.
#
# What is there already is left alone; a second run takes well under a second.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
torch=torch==2.13.0
torch_cpu_index=https://download.pytorch.org/whl/cpu

# What the tests drive: a Debian package, and a program or file by which it is known to be there.
# A test that needs one which is missing says so and is skipped (needs() in tests/conftest.py).
test_packages=(
    acl:getfacl
    attr:getfattr
    e2fsprogs:mkfs.ext4
    ed:ed
    emacs-nox:emacs
    gcc:gcc
    git:git
    inotify-tools:inotifywait
    iproute2:ip
    libc6-dev:/usr/include/stdio.h
    libglib2.0-bin:gio
    make:make
    moreutils:sponge
    nano:nano
    openssh-client:ssh
    openssh-server:sshd
    patch:patch
    rsync:rsync
    sqlite3:sqlite3
    strace:strace
    tmux:tmux
    unzip:unzip
    util-linux:flock
    vim:vim
    xfsprogs:mkfs.xfs
    zip:zip
)

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# The first Python that is new enough. The system's own comes first: it is the one that is whole.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    die "memfs needs Python 3.11 or newer, and there is none on the PATH"
}

# Names of the Debian packages that are missing. Debian keeps venv's installer apart from Python.
missing_packages() {
    local python=$1
    if ! [ -x "$venv/bin/python" ] && ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
        "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
    fi
    if ! command -v fusermount3 > /dev/null ||
        ! "$python" -c 'import ctypes.util, sys; sys.exit(not ctypes.util.find_library("fuse3"))'; then
        say fuse3
    fi
}

install_packages() {
    local line="apt-get install -y --no-install-recommends $*" as_root=()
    if ! command -v apt-get > /dev/null; then
        die "please install with your system's package manager: $*"
    elif [ "$(id -u)" != 0 ]; then
        if command -v sudo > /dev/null && { [ -t 0 ] || sudo -n true 2> /dev/null; }; then
            as_root=(sudo)
        else
            die "please run this as root, then try again:

    apt-get update && $line
"
        fi
    fi
    say "installing system packages: $*"
    # The package lists of a fresh machine or image are empty or old.
    "${as_root[@]}" apt-get update -qq
    # shellcheck disable=SC2086  # one word an argument
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive $line -qq > /dev/null
}

# Names of the packages in test_packages that are missing. Some programs are not on a user's PATH.
missing_test_packages() {
    local PATH=$PATH:/usr/sbin:/sbin entry proof
    for entry in "${test_packages[@]}"; do
        proof=${entry#*:}
        [[ $proof == /* && -e $proof ]] || command -v "$proof" > /dev/null || say "${entry%%:*}"
    done
}

install_for_tests() {
    local packages
    packages=$(missing_test_packages)
    if [ -n "$packages" ]; then
        # shellcheck disable=SC2086  # one word a package
        (install_packages $packages) || say "going on without; what needs them is skipped"
    fi
}

# PyPI's torch brings 3 GB of CUDA along. Without an NVIDIA GPU, and where the user has not told pip
# where to look, PyTorch's own index of CPU builds is offered too: pip prefers 2.13.0+cpu to 2.13.0.
torch_options() {
    local configured
    configured=$("$venv/bin/python" -m pip config list)
    if [ "$(uname -m)" = x86_64 ] && ! [ -e /dev/nvidiactl ] && ! [ -e /dev/dxg ] &&
        ! [[ $configured =~ index-url|find-links|no-index ]]; then
        say --extra-index-url "$torch_cpu_index"
    fi
}

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install -qq "$@"
}

# What the environment was made from: when it changes, pip runs again.
environment_key() {
    {
        cat "$root/pyproject.toml" "$root/tools/constraints.txt"
        say "$torch" "$root"
        "$venv/bin/python" -c 'import sys; print(sys.version)'
    } | sha256sum
}

install() {
    local python packages stamp=$venv/.memfs-installed
    python=$(find_python)
    packages=$(missing_packages "$python")
    if [ -n "$packages" ]; then
        # shellcheck disable=SC2086  # one word a package
        install_packages $packages
    fi
    if ! "$venv/bin/python" -c '' 2> /dev/null; then
        say "making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv"
    fi
    if [ "$(cat "$stamp" 2> /dev/null)" != "$(environment_key)" ]; then
        say "installing torch (once; it is large)"
        # shellcheck disable=SC2046  # options, or nothing
        pip_install $(torch_options) "$torch"
        say "installing memfs and what it needs"
        pip_install -c "$root/tools/constraints.txt" -e "${root}[dev]"
        environment_key > "$stamp"
    fi
    export PATH=$venv/bin:$PATH
}

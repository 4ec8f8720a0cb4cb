"""The boxes that a program can run in: their command lines, and which of them works here.

Both kinds, bubblewrap and util-linux's unshare, make new user, mount, process, network, IPC and
host-name namespaces. Their root has nothing but a read-only /usr, the interpreter, a private /tmp
and a /proc of its own. They drop every capability.
"""

import os
import subprocess
import sys
from functools import cache
from typing import NamedTuple

from eval.errors import EvalError

SCRATCH = 64 << 20  # bytes of the private /tmp
LEVELS = ("bubblewrap", "namespaces")  # the better first
UNPROTECTED = "none"  # the level of a program that no box isolates
# The user that a box has outside if we are root, because a limit on processes does not bind root.
NOBODY = "65534"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
# Hashes are fixed, here and in the judge, so that a program that lists a set has one verdict in all
# runs.
# Python reads the seed from the environment, so -I is not possible; the other flags do what else -I
# does. The environment holds nothing else, and the path no folder but the standard library's.
BOX_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
PYTHON_FLAGS = ["-P", "-s", "-S", "-B"]
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")

# Runs as root. It shows the interpreter, which may be in a closed home, to nobody, in a mount
# namespace of the box's own.
_AS_NOBODY = """
mount -t tmpfs -o mode=755 tmpfs /mnt && mkdir /mnt/python /mnt/root &&
mount --bind "$1" /mnt/python && shift &&
exec setpriv --reuid=65534 --regid=65534 --clear-groups -- "$@"
"""
# Runs in new namespaces, as their root. It makes a root of its own and then drops its capabilities,
# and the user namespaces that would give them back.
_NAMESPACES = r"""
set -e
[ -d /mnt/root ] && root=/mnt/root || root=/mnt
source=$1 prefix=$2; shift 2
mount -t tmpfs -o mode=755,size=1m tmpfs $root
cd $root
mkdir old proc dev tmp
show() { mkdir -p ".$2"; mount --rbind "$1" ".$2"; mount -o remount,bind,ro ".$2"; }
for path in SYSTEM; do
  if [ -L $path ]; then ln -s "$(readlink $path)" .$path
  elif [ -d $path ]; then show $path $path
  fi
done
mount -t tmpfs -o mode=1777,nosuid,nodev,size=SCRATCH tmpfs tmp
[ -e ".$prefix" ] || show "$source" "$prefix"
for name in null zero full random urandom; do : > dev/$name; mount --bind /dev/$name dev/$name; done
mount -t proc proc proc
echo 0 > proc/sys/user/max_user_namespaces
mount -o remount,bind,ro $root
pivot_root . old
cd /tmp
umount -l /old
exec env -i ENVIRONMENT \
  setpriv --bounding-set=-all --inh-caps=-all --ambient-caps=-all --no-new-privs -- "$@"
"""
_BWRAP_OPTIONS = """
--unshare-user --unshare-all --disable-userns --die-with-parent --new-session --as-pid-1
--cap-drop ALL
"""


class Box(NamedTuple):
    """A way to isolate a program."""

    level: str  # one of LEVELS, or UNPROTECTED
    command: list[str]  # `-c`, a program and its arguments follow it


def choose_box(allow_unsandboxed: bool = False) -> Box:
    """Return the best box that works on this machine. Each process tries them once.

    Args:
        allow_unsandboxed: if no box works, return one that does not isolate.

    Raises:
        EvalError: no box works and `allow_unsandboxed` is false, or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise EvalError(
            "the sandbox for model-written programs needs Linux; run this benchmark there"
        )
    box = _find_best_box()
    if box.level == UNPROTECTED and not allow_unsandboxed:
        raise EvalError(
            "no sandbox works here to run model-written programs in: install bubblewrap (Debian: "
            "apt-get install bubblewrap) where user namespaces are allowed, "
            "or run them unprotected",
            subject="sandbox",
        )
    return box


@cache
def _find_best_box() -> Box:
    for level in LEVELS:
        box = find_box(level)
        if box is not None:
            return box
    return Box(UNPROTECTED, [get_interpreter(), *PYTHON_FLAGS])


def choose_bubblewrap(folders: tuple[str, ...]) -> Box:
    """Return a bubblewrap box that shows `folders` too, read-only.

    Raises:
        EvalError: bubblewrap does not work here.
    """
    box = find_box("bubblewrap", folders)
    if box is None:
        raise EvalError(
            "the sandbox needs bubblewrap here (Debian: apt-get install bubblewrap), "
            "and user namespaces"
        )
    return box


def find_box(level: str, folders: tuple[str, ...] = ()) -> Box | None:
    """Return the first box of a level that runs a program here, or None.

    Args:
        folders: what bubblewrap shows besides the system and the interpreter, read-only.
    """
    for before, source, prefix, interpreter in _list_ways():
        if level == "bubblewrap":
            isolate = _make_bubblewrap_command(source, prefix, folders)
        else:
            isolate = _make_namespaces_command(source, prefix)
        box = Box(level, [*before, *isolate, interpreter, *PYTHON_FLAGS])
        if _runs_programs(box):
            return box
    return None


def _list_ways() -> list[tuple[list[str], str, str, str]]:
    """Return the ways to show an interpreter to a box, the best first.

    Returns:
        (command before the box's, folder to show, where the box sees it, interpreter in it). The
        system's interpreter is the last choice: a home of mode 0700 may hide ours from nobody, and
        the root of a container may not mount.
    """
    own, prefix = get_interpreter(), os.path.realpath(sys.base_prefix)
    ways = [([], prefix, prefix, own), ([], "/usr", "/usr", "/usr/bin/python3")]
    if os.geteuid() != 0:
        return ways
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    show = ["unshare", "--mount", "--", "sh", "-c", _AS_NOBODY, "sh", prefix]
    dropped = [(drop, *way[1:]) for way in ways]
    return [(show, "/mnt/python", prefix, own), *dropped]


def _runs_programs(box: Box) -> bool:
    command = [*box.command, "-c", "import json"]
    try:
        ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ran.returncode == 0


def _make_bubblewrap_command(source: str, prefix: str, folders: tuple[str, ...]) -> list[str]:
    show = []
    for path in _SYSTEM:
        if os.path.islink(path):
            show += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            show += ["--ro-bind", path, path]
    show += ["--proc", "/proc", "--dev", "/dev", "--size", str(SCRATCH), "--tmpfs", "/tmp"]
    if not prefix.startswith("/usr"):
        show += ["--ro-bind", source, prefix]  # after /tmp, because it may be there
    for folder in folders:
        show += ["--ro-bind", folder, folder]
    if folders:  # they hold libraries, which may need shared memory
        show += ["--size", str(SCRATCH), "--tmpfs", "/dev/shm"]
    for name, value in BOX_ENVIRONMENT.items():
        show += ["--setenv", name, value]
    user = f"--uid {NOBODY} --gid {NOBODY} --hostname box --clearenv"
    last = "--remount-ro / --remount-ro /dev --chdir /tmp --"
    return ["bwrap", *_BWRAP_OPTIONS.split(), *user.split(), *show, *last.split()]


def _make_namespaces_command(source: str, prefix: str) -> list[str]:
    # The first process ends when its parent ends. The second keeps that bond, because nothing
    # changes its user any more.
    first = "unshare --user --map-root-user -- setpriv --pdeathsig KILL --"
    second = "unshare --mount --pid --net --ipc --uts --cgroup --fork --kill-child --"
    script = _NAMESPACES.replace("SYSTEM", " ".join(_SYSTEM)).replace("SCRATCH", str(SCRATCH))
    environment = " ".join(f"{name}={value}" for name, value in BOX_ENVIRONMENT.items())
    script = script.replace("ENVIRONMENT", environment)
    return [*first.split(), *second.split(), "sh", "-c", script, "sh", source, prefix]


def get_interpreter() -> str:
    """Return the path of the Python that runs this, links resolved."""
    return os.path.realpath(sys.executable)

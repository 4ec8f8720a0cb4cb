"""The boxes that eval.sandbox.check can run a program in: the command lines, and which of them works on this machine.

Both, bubblewrap and util-linux's unshare, make new user, mount, process, network, IPC and host-name namespaces, a root
with nothing but a read-only /usr, the interpreter, a private /tmp and a /proc of its own, and drop every capability.
"""

import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

SCRATCH = 64 << 20  # bytes of the private /tmp
LEVELS = ("bubblewrap", "namespaces")
NOBODY = (
    "65534"  # the user that the box has outside where we are root, whom no limit on processes binds
)
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
# Fixed hashes: a solution that returns list(set(words)) has one verdict, not one a run. They need the environment, so
# not -I, but all else that it means: the environment holds nothing else, and no folder is on the path but the library.
BOX_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
FLAGS = ["-P", "-s", "-S", "-B"]
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")

# As root: shows the interpreter, which may be in a closed home, to nobody, in a mount namespace of the box's own.
_AS_NOBODY = """
mount -t tmpfs -o mode=755 tmpfs /mnt && mkdir /mnt/python /mnt/root && mount --bind "$1" /mnt/python && shift &&
exec setpriv --reuid=65534 --regid=65534 --clear-groups -- "$@"
"""
# In new namespaces, as their root: a root of its own, then no capabilities, and no user namespaces to get them in.
_NAMESPACES = """
set -e
[ -d /mnt/root ] && root=/mnt/root || root=/mnt
source=$1 prefix=$2; shift 2
mount -t tmpfs -o mode=755,size=1m tmpfs $root
cd $root
mkdir old proc dev tmp
show() { mkdir -p ".$2"; mount --rbind "$1" ".$2"; mount -o remount,bind,ro ".$2"; }
for path in SYSTEM; do
  if [ -L $path ]; then ln -s "$(readlink $path)" .$path; elif [ -d $path ]; then show $path $path; fi
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
exec env -i ENVIRONMENT setpriv --bounding-set=-all --inh-caps=-all --ambient-caps=-all --no-new-privs -- "$@"
"""
for _name, _value in {
    "SYSTEM": " ".join(_SYSTEM),
    "SCRATCH": str(SCRATCH),
    "ENVIRONMENT": " ".join(f"{name}={value}" for name, value in BOX_ENVIRONMENT.items()),
}.items():
    _NAMESPACES = _NAMESPACES.replace(_name, _value)


class Box(NamedTuple):
    """A way to isolate a program."""

    level: str
    command: list[str]
    """What to put `-c`, a program and its arguments after."""


def find(level: str, folders: tuple[str, ...] = ()) -> Box | None:
    """The first form of a level that runs a program, or None; with bubblewrap it can show more `folders`, read-only."""
    build = partial(_bubblewrap, folders=folders) if level == "bubblewrap" else _namespaces
    own, prefix = python(), os.path.realpath(sys.base_prefix)
    # A 0700 home hides our interpreter from nobody, and a container's root may not mount: then the system's.
    ways = [([], prefix, prefix, own), ([], "/usr", "/usr", "/usr/bin/python3")]
    if os.geteuid() == 0:
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        show = ["unshare", "--mount", "--", "sh", "-c", _AS_NOBODY, "sh", prefix]
        ways = [(show, "/mnt/python", prefix, own), *((drop, *way[1:]) for way in ways)]
    for before, source, prefix, interpreter in ways:
        box = Box(level, [*before, *build(source, prefix), interpreter, *FLAGS])
        try:
            ran = subprocess.run(
                [*box.command, "-c", "import json"],
                env=ENVIRONMENT,
                capture_output=True,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if ran.returncode == 0:
            return box
    return None


def _bubblewrap(source: str, prefix: str, folders: tuple[str, ...]) -> list[str]:
    show = []
    for path in _SYSTEM:
        if os.path.islink(path):
            show += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            show += ["--ro-bind", path, path]
    show += ["--proc", "/proc", "--dev", "/dev", "--size", str(SCRATCH), "--tmpfs", "/tmp"]
    if not prefix.startswith("/usr"):
        show += ["--ro-bind", source, prefix]  # after /tmp, where it may be
    for folder in folders:
        show += ["--ro-bind", folder, folder]
    if folders:  # of libraries, which may want shared memory
        show += ["--size", str(SCRATCH), "--tmpfs", "/dev/shm"]
    for name, value in BOX_ENVIRONMENT.items():
        show += ["--setenv", name, value]
    options = "--unshare-user --unshare-all --disable-userns --die-with-parent --new-session --as-pid-1 --cap-drop ALL"
    user = f"--uid {NOBODY} --gid {NOBODY} --hostname box --clearenv"
    last = "--remount-ro / --remount-ro /dev --chdir /tmp --"
    return ["bwrap", *options.split(), *user.split(), *show, *last.split()]


def _namespaces(source: str, prefix: str) -> list[str]:
    # The first is bound to our life; the second, in which nothing changes its user any more, keeps that.
    first = "unshare --user --map-root-user -- setpriv --pdeathsig KILL --"
    second = "unshare --mount --pid --net --ipc --uts --cgroup --fork --kill-child --"
    return [*first.split(), *second.split(), "sh", "-c", _NAMESPACES, "sh", source, prefix]


def python() -> str:
    return os.path.realpath(sys.executable)

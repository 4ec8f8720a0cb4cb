"""The boxes that a program can run in: their command lines, and which of them works here.

Both kinds, bubblewrap and util-linux's unshare, make new user, mount, process, network, IPC and
host-name namespaces. Their root has nothing but a read-only /usr, the interpreter, a private /tmp
and a /proc of its own, and what else is mounted below those is covered. They drop every capability
and filter system calls (eval.sandbox.seccomp). What a box claims is looked up from inside of it,
by a program that runs there first.
"""

import binascii
import json
import marshal
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from eval.errors import EvalError
from eval.sandbox import enter
from eval.sandbox.seccomp import make_filter

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

# If memory is short, the kernel ends a box first. Raised here, because /proc is read-only inside.
_FIRST_TO_DIE = "{ echo 1000 > /proc/self/oom_score_adj; } 2> /dev/null\n"
_AS_CALLER = _FIRST_TO_DIE + 'exec "$@"'
# Runs as root. It shows the interpreter, which may be in a closed home, to nobody, in a mount
# namespace of the box's own.
_AS_NOBODY = (
    _FIRST_TO_DIE
    + """mount --bind "$1" /mnt && shift &&
exec setpriv --reuid=65534 --regid=65534 --clear-groups -- "$@"
"""
)
# bwrap's own process 1 would be left to the machine's init when a program ends, which in a container
# may not reap. So process 1 is a shell: not the program, see eval.sandbox.enter.
_BWRAP_OPTIONS = """
--unshare-user --unshare-all --disable-userns --die-with-parent --new-session --as-pid-1
--cap-drop ALL
"""
_INIT = '"$@"; exit $?'
_ENTER = Path(enter.__file__).read_text(encoding="utf-8")
# Runs in a box. It writes what the box claims and is not so, and what may be missing.
_PROBE = """
import json, os
with open("/proc/self/status") as file:
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
with open("/proc/self/mountinfo") as file:
    mounts = [line.split(" ")[4:6] for line in file]
with open("/proc/net/route") as file:
    routes = file.read().splitlines()[1:]
broken = [name for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb") if int(status[name], 16)]
broken += [
    point
    for point, options in mounts
    if "rw" in options.split(",") and point != "/tmp" and not point.startswith("/dev/")
    and os.access(point, os.F_OK)
]
broken += ["network"] if routes else []
broken += ["no_new_privs"] if status["NoNewPrivs"] != "1" else []
broken += ["processes"] if sum(name.isdigit() for name in os.listdir("/proc")) > 3 else []
with open("/proc/self/oom_score_adj") as file:
    missing = [] if file.read().strip() == "1000" else ["not first to die if memory is short"]
if status.get("Seccomp") != "2":
    missing.append("no filter of system calls")
print(json.dumps([broken, missing]))
"""


class Box(NamedTuple):
    """A way to isolate a program."""

    level: str  # one of LEVELS, or UNPROTECTED
    command: list[str]  # what `start_box` adds a program to
    shown: tuple[str, ...] = ()  # folders that it shows, besides the system's
    lacks: str = ""  # what it does not have on this machine, or why it is not a better one

    @property
    def isolation(self) -> str:
        """What is recorded with a verdict."""
        return self.level + (f" ({self.lacks})" if self.lacks else "")


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
    why = ""
    for level in LEVELS:
        box, reason = _try_level(level)
        if box is not None:
            return box._replace(lacks=", ".join(filter(None, (box.lacks, why))))
        # An old bubblewrap, say, which lacks --disable-userns: not to be taken for none at all.
        if level == "bubblewrap" and shutil.which("bwrap", path=ENVIRONMENT["PATH"]):
            why = f"bubblewrap does not work: {reason}"
    return Box(UNPROTECTED, [get_interpreter(), *PYTHON_FLAGS], lacks=why)


def choose_bubblewrap(folders: tuple[str, ...]) -> Box:
    """Return a bubblewrap box that shows `folders` too, read-only.

    Raises:
        EvalError: bubblewrap does not work here.
    """
    box, reason = _try_level("bubblewrap", folders)
    if box is None:
        raise EvalError(
            "the sandbox needs bubblewrap here (Debian: apt-get install bubblewrap), "
            f"and user namespaces: {reason}"
        )
    return box


def find_box(level: str) -> Box | None:
    """Return the first box of a level that runs a program here, or None."""
    return _try_level(level)[0]


def _try_level(level: str, folders: tuple[str, ...] = ()) -> tuple[Box | None, str]:
    """Return the first box of a level that is what it claims to be; and why the last one is not."""
    reason = ""
    # A kernel may lack seccomp.
    for instructions in dict.fromkeys((make_filter().hex(), "")):
        for before, source, prefix, interpreter in _list_ways():
            python = [interpreter, *PYTHON_FLAGS]
            if level == "bubblewrap":
                isolate = _make_bubblewrap_command(source, prefix, folders, instructions)
            else:
                first = source + interpreter.removeprefix(prefix)
                isolate = _make_namespaces_command(first, source, prefix, instructions)
            box = Box(level, [*before, *isolate, *python], (prefix, *folders))
            found, reason = _probe_box(box)
            if found is not None:
                return found, ""
    return None, reason


def _list_ways() -> list[tuple[list[str], str, str, str]]:
    """Return the ways to show an interpreter to a box, the best first.

    Returns:
        (command before the box's, folder to show, where the box sees it, interpreter in it). The
        system's interpreter is the last choice: a home of mode 0700 may hide ours from nobody, and
        the root of a container may not mount.
    """
    own, prefix = get_interpreter(), os.path.realpath(sys.base_prefix)
    as_caller = ["sh", "-c", _AS_CALLER, "sh"]
    ways = [
        (as_caller, prefix, prefix, own),
        (as_caller, "/usr", "/usr", "/usr/bin/python3"),
    ]
    if os.geteuid() != 0:
        return ways
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    show = ["unshare", "--mount", "--", "sh", "-c", _AS_NOBODY, "sh", prefix]
    dropped = [([*way[0], *drop], *way[1:]) for way in ways]
    return [(show, "/mnt", prefix, own), *dropped]


def _probe_box(box: Box) -> tuple[Box | None, str]:
    """Return the box with what it lacks, or None if it does not run or does not hold; and why."""
    try:
        pipe = subprocess.PIPE
        with start_box(box, _PROBE, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as ran:
            try:
                out, errors = ran.communicate(timeout=20)
            finally:
                ran.kill()
        broken, missing = json.loads(out)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, " ".join(str(error).split())[:100]
    except ValueError:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        return None, lines[-1][:100] if lines else "no message"
    if broken:
        return None, f"not closed: {', '.join(broken)}"
    return box._replace(lacks=", ".join(missing)), ""


def start_box(
    box: Box,
    program: str,
    *arguments: str,
    stdin: Any,
    stdout: Any,
    stderr: int,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen:
    """Start a box with the text of a Python program in it.

    Args:
        arguments: of the program.
        pass_fds: further descriptors that it gets.

    Returns:
        bwrap or unshare, outside of the box: its child is process 1 of the box.
    """
    command = list(box.command)
    if box.level == "bubblewrap" and box.shown:
        # What is mounted now: a box is found long before it is used. The other kind looks itself.
        at = command.index("--remount-ro")
        command[at:at] = _hide_mounts([*enter.SYSTEM, *box.shown])
    command += ["-c", _pack_program(program, command), *arguments]
    read_filter = None
    if "--seccomp" in command:
        # bwrap reads the filter from a descriptor, to its end; the command has it as text.
        read_filter, write_filter = os.pipe()
        at = command.index("--seccomp") + 1
        os.write(write_filter, bytes.fromhex(command[at]))
        os.close(write_filter)
        command[at] = str(read_filter)
        pass_fds = [*pass_fds, read_filter]
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=BOX_ENVIRONMENT if box.level == UNPROTECTED else ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            pass_fds=pass_fds,
        )
    finally:
        if read_filter is not None:
            os.close(read_filter)


def _hide_mounts(shown: list[str]) -> list[str]:
    options = []
    for path in enter.list_mounts_to_hide(shown):
        if os.path.isdir(path):
            options += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
        else:
            options += ["--ro-bind", "/dev/null", path]
    return options


def _pack_program(text: str, command: list[str]) -> str:
    return f"exec({write_code(text, get_interpreter() in command)})"


@cache
def write_code(text: str, is_ours: bool, name: str = "<program>") -> str:
    """Return an expression for the compiled `text`.

    Args:
        is_ours: whether our own interpreter is to read it, which spares it to compile.
    """
    if not is_ours:
        return f"compile({text!r}, {name!r}, 'exec')"
    code = binascii.b2a_base64(marshal.dumps(compile(text, name, "exec")), newline=False)
    return f"__import__('marshal').loads(__import__('binascii').a2b_base64({code!r}))"


def _make_bubblewrap_command(
    source: str, prefix: str, folders: tuple[str, ...], instructions: str
) -> list[str]:
    show = []
    for path in enter.SYSTEM:
        if os.path.islink(path):
            show += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            show += ["--ro-bind", path, path]
    show += ["--proc", "/proc", "--dev", "/dev", "--size", str(SCRATCH), "--tmpfs", "/tmp"]
    if prefix != "/usr" and not enter.is_below(prefix, "/usr"):
        show += ["--ro-bind", source, prefix]  # after /tmp, because it may be there
    for folder in folders:
        show += ["--ro-bind", folder, folder]
    if folders:  # they hold libraries, which may need shared memory
        show += ["--size", str(SCRATCH), "--tmpfs", "/dev/shm"]
    for path in ("/dev/zero", *filter(os.path.exists, enter.MASKED)):
        show += ["--ro-bind", "/dev/null", path]
    for name, value in BOX_ENVIRONMENT.items():
        show += ["--setenv", name, value]
    user = f"--uid {NOBODY} --gid {NOBODY} --hostname box --clearenv"
    last = "--remount-ro / --remount-ro /dev --remount-ro /proc --chdir /tmp"
    system_calls = ["--seccomp", instructions] if instructions else []
    options = [*_BWRAP_OPTIONS.split(), *user.split(), *show, *last.split(), *system_calls]
    return ["bwrap", *options, "--", "sh", "-c", _INIT, "sh"]


def _make_namespaces_command(
    interpreter: str, source: str, prefix: str, instructions: str
) -> list[str]:
    # The first process ends when its parent ends. The second keeps that bond, because nothing
    # changes its user any more.
    first = "unshare --user --map-root-user -- setpriv --pdeathsig KILL --"
    second = "unshare --mount --pid --net --ipc --uts --cgroup --fork --kill-child --"
    environment = [f"{name}={value}" for name, value in BOX_ENVIRONMENT.items()]
    python = ["env", "-i", *environment, interpreter, *PYTHON_FLAGS]
    program = _pack_program(_ENTER, [interpreter.replace(source, prefix, 1)])
    root = [source, prefix, str(SCRATCH), instructions]
    return [*first.split(), *second.split(), *python, "-c", program, *root]


def get_interpreter() -> str:
    """Return the path of the Python that runs this, links resolved."""
    return os.path.realpath(sys.executable)

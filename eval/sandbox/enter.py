"""Make the root of the box of new namespaces, close the box for good, and run its program.

eval.sandbox.box passes this file's text to `python -c` where bubblewrap is missing: util-linux's
`unshare` makes namespaces only. So it imports nothing of this repository.
"""

import ctypes
import os
import struct
import sys

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
# The names of the caller's keys, which belong to its user, not to its namespaces, see keyrings(7).
MASKED = ("/proc/keys", "/proc/key-users")
# Without "zero", whose shared mappings are memory that belongs to no process, see
# eval.sandbox.seccomp.
DEVICES = ("null", "full", "random", "urandom")
# mount(2)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC = 1, 2, 4, 8, 32, 4096, 16384
DETACH = 2  # umount2(2)
# prctl(2)
SET_SECCOMP, FILTER_MODE, DROP_BOUNDING, SET_NO_NEW_PRIVS, AMBIENT, CLEAR = 22, 2, 24, 38, 47, 4
CAPABILITIES = 0x20080522  # capset(2), _LINUX_CAPABILITY_VERSION_3
# How a table of mounts writes these characters in a path; the backslash last.
ESCAPES = ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\043", "#"), (r"\134", "\\"))
_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call a function of the C library that returns 0.

    Raises:
        OSError: it does not.
    """
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def list_mounts(table: str = "/proc/self/mountinfo") -> list[tuple[str, set[str]]]:
    """Return (mount point, options) of all mounts that this process may see, see proc(5)."""
    mounts = []
    with open(table, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            point, options = line.split(" ")[4:6]
            for written, character in ESCAPES:
                point = point.replace(written, character)
            mounts.append((point, set(options.split(","))))
    return mounts


def is_below(path: str, folder: str) -> bool:
    """Return whether a path is strictly below a folder."""
    return path != folder and path.startswith(folder.rstrip("/") + "/")


def list_mounts_to_hide(shown: list[str]) -> list[str]:
    """Return the outermost mounts below folders that a box shows: they are other people's data.

    A mount that one of those folders lies in is not among them.
    """
    hide: list[str] = []
    for point, _ in sorted(list_mounts()):
        leads_to_shown = any(path == point or is_below(path, point) for path in shown)
        is_shown = any(is_below(point, path) for path in shown)
        is_hidden = any(point == path or is_below(point, path) for path in hide)
        if is_shown and not leads_to_shown and not is_hidden and os.path.lexists(point):
            hide.append(point)
    return hide


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Call mount(2).

    Raises:
        OSError: it fails.
    """
    kind_bytes = None if kind is None else kind.encode()
    data = options.encode() or None
    flags_long = ctypes.c_ulong(flags)
    call("mount", os.fsencode(source), os.fsencode(target), kind_bytes, flags_long, data)


def make_root(source: str, prefix: str, scratch: int) -> None:
    """Make a root of this mount namespace's own, and leave the one before.

    Args:
        source: the interpreter's folder, as it is found here.
        prefix: where the box shows it.
        scratch: bytes of the private /tmp.
    """
    root = "/tmp" if (source + "/").startswith("/mnt/") else "/mnt"  # it hides what is there
    hide = list_mounts_to_hide([*SYSTEM, prefix])
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "mode=755,size=1m")
    for name in ("old", "proc", "dev", "tmp"):
        os.mkdir(f"{root}/{name}")
    for path in SYSTEM:
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            os.mkdir(root + path)
            mount(path, root + path, None, BIND | REC)
    mount("tmpfs", f"{root}/tmp", "tmpfs", NOSUID | NODEV, f"mode=1777,size={scratch}")
    if not os.path.exists(root + prefix):
        os.makedirs(root + prefix)
        mount(source, root + prefix, None, BIND | REC)
    protect_mounts(root, hide)
    for name in DEVICES:
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT))
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, BIND)
    mount("proc", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    # Written before it becomes read-only: new user namespaces would have capabilities.
    with open(f"{root}/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    for path in MASKED:
        if os.path.exists(path):
            cover_file(root + path)
    mount("none", f"{root}/proc", None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | NOEXEC)
    mount("none", root, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    os.chdir(root)
    call("pivot_root", b".", b"old")
    os.chdir("/tmp")
    call("umount2", b"/old", DETACH)


def protect_mounts(root: str, hide: list[str]) -> None:
    """Make all mounts below `root` but /tmp read-only, one by one, and cover those to hide.

    A bind mount can be made read-only only as a whole tree with mount_setattr(2), which is new.
    In a user namespace flags that were set before must stay set, see mount_namespaces(7).
    """
    for point, options in list_mounts():
        if is_below(point, root) and point != f"{root}/tmp":
            kept = NOEXEC if "noexec" in options else 0
            try:
                mount("none", point, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV | kept)
            except (PermissionError, FileNotFoundError):
                if os.path.lexists(point):  # else it is in a folder that no program may enter
                    raise
    for path in hide:
        if not os.path.lexists(root + path):
            continue
        if os.path.isdir(root + path):
            mount("tmpfs", root + path, "tmpfs", RDONLY | NOSUID | NODEV, "mode=555,size=4k")
        else:
            cover_file(root + path)


def cover_file(path: str) -> None:
    """Let nobody open a file: a device, on a mount where devices do not work, lies over it."""
    mount("/dev/null", path, None, BIND)
    mount("none", path, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)


def drop_capabilities() -> None:
    """Drop all capabilities of this process, and those that a program could give it again."""
    number = 0
    while _libc.prctl(DROP_BOUNDING, number, 0, 0, 0) == 0:  # until there is no such capability
        number += 1
    call("prctl", AMBIENT, CLEAR, 0, 0, 0)
    call("capset", struct.pack("=Ii", CAPABILITIES, 0), bytes(24))
    call("prctl", SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def install_filter(instructions: bytes) -> None:
    """Filter the system calls of this process, of its children and of what they execute."""
    array = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(array))
    call("prctl", SET_SECCOMP, FILTER_MODE, program, 0, 0)


def stay_as_init(program: int) -> None:
    """Be process 1 until a program ends. All others in the box end with process 1."""
    os.closerange(0, 256)  # the channel is the program's
    while True:
        process, status = os.wait()
        if process == program:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main() -> None:
    """Close the box. The arguments are `make_root`'s, the filter, a program and its arguments."""
    source, prefix, scratch, instructions, *command = sys.argv[1:]
    make_root(source, prefix, int(scratch))
    call("sethostname", b"box", 3)
    drop_capabilities()
    if instructions:
        install_filter(bytes.fromhex(instructions))
    # Process 1 is bound to the life of the caller (PR_SET_PDEATHSIG), and all others in the box to
    # process 1. So it is not the program, which could undo the bond where there is no filter, and
    # which, as process 1, would not get signals and would have to reap.
    program = os.fork()
    if program:
        stay_as_init(program)
    os.execve(command[0], command, dict(os.environ))


if __name__ == "__main__":
    main()

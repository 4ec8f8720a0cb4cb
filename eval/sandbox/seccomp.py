"""The filter of system calls that every program in a box has, as a seccomp program for x86-64.

A user namespace gives no protection from a call that reaches what namespaces do not divide: the
caller's keyrings, locks on the machine's files, AF_VSOCK. And io_uring, userfaultfd or bpf are
where the kernel's flaws are found. No honest program of a benchmark needs any of them. The filter
is written by hand, because libseccomp's Python bindings need a compiler or a library of the
system's.

Sources: seccomp(2); the kernel's Documentation/userspace-api/seccomp_filter.rst and
arch/x86/entry/syscalls/syscall_64.tbl; the list that Docker denies by default.
"""

import errno
import platform
import struct

# x86-64's numbers. Each call fails with EPERM, as it does without the capability that it needs.
DENIED = {
    # What is not divided by namespaces. The session's keyring is shared with the caller.
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "flock": 73,  # a descriptor that is open for reading is enough to lock a file of the machine's
    "inotify_init": 253,  # tells when others use a file
    "inotify_init1": 294,
    "fanotify_init": 300,
    # Memory that belongs to no process, so that eval.sandbox.watch would not see it.
    "memfd_create": 319,
    "memfd_secret": 447,
    "shmget": 29,
    "msgget": 68,
    "semget": 64,
    "mq_open": 240,
    # Other processes.
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "process_madvise": 440,
    "process_mrelease": 448,
    "pidfd_getfd": 438,
    "kcmp": 312,
    # Wide interfaces of the kernel.
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "userfaultfd": 323,
    "bpf": 321,
    "perf_event_open": 298,
    "modify_ldt": 154,
    "personality": 135,
    "move_pages": 279,
    "migrate_pages": 256,
    # Namespaces and mounts: with a user namespace a program would have capabilities again.
    "unshare": 272,
    "setns": 308,
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "chroot": 161,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
    "name_to_handle_at": 303,
    "open_by_handle_at": 304,
    # The machine itself. They need capabilities, which no program has.
    "acct": 163,
    "adjtimex": 159,
    "clock_adjtime": 305,
    "clock_settime": 227,
    "settimeofday": 164,
    "delete_module": 176,
    "finit_module": 313,
    "init_module": 175,
    "ioperm": 173,
    "iopl": 172,
    "kexec_file_load": 320,
    "kexec_load": 246,
    "quotactl": 179,
    "quotactl_fd": 443,
    "reboot": 169,
    "setdomainname": 171,
    "sethostname": 170,
    "swapoff": 168,
    "swapon": 167,
    "syslog": 103,
    "vhangup": 153,
}
# Calls that an argument decides: (number, its index, values that are denied).
DENIED_ARGUMENTS = {
    "prctl": (157, 0, (1,)),  # PR_SET_PDEATHSIG: a box ends with its caller
    # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETLEASE and F_NOTIFY, see flock above.
    "fcntl": (72, 1, (6, 7, 37, 38, 1024, 1026)),
}
# Calls that an argument decides: (number, its index, values that are allowed).
ALLOWED_ARGUMENTS = {
    # AF_UNIX, as asyncio needs it. What waits in a socket is memory that belongs to no process, too;
    # of AF_INET that is megabytes each, and a box has no network.
    "socket": (41, 0, (1,)),
    "socketpair": (53, 0, (1,)),
}
# Shared memory without a file: it stays when a process drops its pages (MADV_DONTNEED) or maps
# fewer of them, so it is memory that belongs to no process, too.
MMAP, MAP_SHARED, MAP_ANONYMOUS = 9, 0x01, 0x20  # MAP_SHARED_VALIDATE (0x03) has the first bit, too
CLONE = 56
CLONE_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
# Its flags are in memory, where a filter cannot read. glibc uses clone after ENOSYS.
CLONE3 = 435
# Newer calls, and those of the x32 interface (from 1 << 30), are as if the kernel did not have
# them.
LAST = 450
_ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64; int 0x80 makes calls of i386, with other numbers

# struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
_LOAD, _RETURN = 0x20, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_RET | BPF_K
_EQUAL, _ABOVE, _ANY_BIT = 0x15, 0x25, 0x45  # BPF_JMP | BPF_K | BPF_JEQ, BPF_JGT, BPF_JSET


def make_filter() -> bytes:
    """Return the filter as an array of struct sock_filter; none (b"") on other architectures."""
    if platform.machine() != "x86_64" or struct.calcsize("P") != 8:
        return b""
    denied = _encode(_RETURN, _ERROR | errno.EPERM)
    missing = _encode(_RETURN, _ERROR | errno.ENOSYS)
    program = [_encode(_LOAD, _ARCHITECTURE_AT), _encode(_EQUAL, _ARCHITECTURE, 1, 0), missing]
    program += [_encode(_LOAD, _NUMBER_AT), _encode(_ABOVE, LAST, 0, 1), missing]
    program += [_encode(_EQUAL, CLONE3, 0, 1), missing]
    for number in DENIED.values():
        program += [_encode(_EQUAL, number, 0, 1), denied]
    for number, index, values in DENIED_ARGUMENTS.values():
        check = [_load_argument(index)]
        for value in values:
            check += [_encode(_EQUAL, value, 0, 1), denied]
        program += _for_call(number, check)
    for number, index, values in ALLOWED_ARGUMENTS.values():
        check = [_load_argument(index)]
        for left, value in reversed(list(enumerate(values))):
            check.append(_encode(_EQUAL, value, left + 1, 0))
        program += _for_call(number, [*check, denied])
    check = [_load_argument(0), _encode(_ANY_BIT, CLONE_NAMESPACES, 0, 1), denied]
    program += _for_call(CLONE, check)
    check = [_load_argument(3), _encode(_ANY_BIT, MAP_SHARED, 0, 2)]
    check += [_encode(_ANY_BIT, MAP_ANONYMOUS, 0, 1), denied]
    program += _for_call(MMAP, check)
    return b"".join([*program, _encode(_RETURN, _ALLOW)])


def _for_call(number: int, check: list[bytes]) -> list[bytes]:
    """Return instructions that run `check` for one call alone, and allow it after that."""
    allow = _encode(_RETURN, _ALLOW)
    return [_encode(_EQUAL, number, 0, len(check) + 1), *check, allow]


def _load_argument(index: int) -> bytes:
    """Load the low half of an argument: the kernel takes these arguments as 32 bits."""
    return _encode(_LOAD, 16 + 8 * index)


def _encode(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return one struct sock_filter; the jumps count the instructions that they skip."""
    return struct.pack("=HBBI", code, if_true, if_false, value)

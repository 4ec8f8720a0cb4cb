"""Programs that try what a box must not let through, and tests of a benchmark that attack.

Each solution defines f, and f() returns what it could do: an empty list, or an empty text, if the
box holds.
"""

from eval.sandbox.seccomp import DENIED, LAST

# Numbers and arguments of calls that a filter must deny, by name: (number, arguments). The
# arguments are such that an unfiltered kernel would not answer EPERM, or not do harm.
_ARGUMENTS = """
    'add_key': lambda: (b'user', b'astra', b'x', 1, -4),  # to the user's keyring
    'keyctl': lambda: (0, -3, 0),  # KEYCTL_GET_KEYRING_ID of the session's
    'flock': lambda: (os.open(os.__file__, 0), 2),
    'memfd_create': lambda: (b'x', 0),
    'shmget': lambda: (0, 4096, 0o1600),
    'io_uring_setup': lambda: (1, ctypes.create_string_buffer(256)),
    'userfaultfd': lambda: (1,),
    'inotify_init1': lambda: (0,),
    'kcmp': lambda: (os.getpid(), os.getpid(), 1, 0, 0),
"""

CALLS = f"""
import asyncio, ctypes, errno, fcntl, mmap, os, socket, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *values):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *values)
    return errno.errorcode.get(ctypes.get_errno(), '0') if result == -1 else 'done'
def lock(path, flags, command, kind):
    fd = os.open(path, flags)
    try:
        fcntl.fcntl(fd, command, kind)
        return 'done'
    except OSError as error:
        return errno.errorcode[error.errno]
def make_socket(family, kind=socket.SOCK_STREAM):
    try:
        socket.socket(family, kind)
        return 'done'
    except OSError as error:
        return errno.errorcode[error.errno]
def call_as_i386():
    # mov eax, 20 (getpid); int 0x80; ret
    code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
    code.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')
    child = os.fork()
    if child == 0:
        start = ctypes.addressof(ctypes.c_char.from_buffer(code))
        os._exit(7 if ctypes.CFUNCTYPE(ctypes.c_int)(start)() > 0 else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
calls = {{}}
arguments = {{ARGUMENTS}}
for name, number in {dict(DENIED)!r}.items():
    values = arguments.get(name, lambda: (0, 0, 0, 0, 0, 0))
    calls[name] = lambda number=number, values=values: call(number, *values())
for name, value in dict(SETLK=6, SETLKW=7, OFD_SETLK=37, OFD_SETLKW=38).items():
    calls['fcntl ' + name] = lambda value=value: lock(os.__file__, 0, value, bytes(32))
calls['fcntl SETLEASE'] = lambda: lock(os.__file__, 0, 1024, 0)
calls['fcntl NOTIFY'] = lambda: lock('/usr', 0, 1026, 1)
calls['prctl PDEATHSIG'] = lambda: call(157, 1, 0, 0, 0, 0)
for kind in (1, 3):  # MAP_SHARED, MAP_SHARED_VALIDATE; with MAP_ANONYMOUS, readable and writable
    calls['mmap %d' % kind] = lambda kind=kind: call(9, 0, 4096, 3, kind | 32, -1, 0)
buffer = ctypes.create_string_buffer(88)
# INET, INET6, NETLINK, PACKET, BLUETOOTH, ALG, VSOCK, XDP
for family in (2, 10, 16, 17, 31, 38, 40, 44):
    calls['socket %d' % family] = lambda family=family: call(41, family, 1, 0)
    calls['socketpair %d' % family] = lambda family=family: call(53, family, 1, 0, buffer)
for bit in (17, 25, 26, 27, 28, 29, 30):
    calls['clone %d' % bit] = lambda bit=bit: call(56, 1 << bit, 0, 0, 0, 0)
high = 1 << 40
calls['clone, high bits'] = lambda: call(56, ctypes.c_ulong(high | 1 << 28), 0, 0, 0, 0)
calls['prctl, high bits'] = lambda: call(157, ctypes.c_ulong(high | 1), 0, 0, 0, 0)
calls['clone3'] = lambda: call(435, buffer, 88)
for number in ({LAST} + 1, 467, 1000, 1 << 30, 1 << 30 | 39, 1 << 30 | 165):
    calls['number %d' % number] = lambda number=number: call(number, 0, 0, 0, 0, 0, 0)
calls['i386'] = lambda: 'done' if call_as_i386() == 7 else 'ENOSYS'
def f(names=None):
    found = {{name: calls[name]() for name in names or calls}}
    # What honest programs need.
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    subprocess.run(['/bin/true'], check=True)
    asyncio.run(asyncio.sleep(0))
    pair = socket.socketpair()
    fcntl.fcntl(pair[0], fcntl.F_GETFL)
    mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with open(os.__file__, 'rb') as file:
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
    return found
""".replace("ARGUMENTS", _ARGUMENTS)

# f() returns "" if it found nothing that it should not.
LEAKS = {
    "oom_score_adj": """
def f():
    try:
        open('/proc/self/oom_score_adj', 'w').write('0')
    except OSError:
        pass
    score = open('/proc/self/oom_score_adj').read().strip()
    return '' if score == '1000' else score
""",
    "memory that belongs to no process": """
import mmap, os
def f():
    found = []
    for name in ('', '/dev/zero'):
        try:
            fd = os.open(name, os.O_RDONLY) if name else -1
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
            found.append(name)
        except OSError:
            pass
    return found
""",
    "memory of others": """
def f():
    for process in ('1', 'self'):
        try:
            open(f'/proc/{process}/mem', 'r+b')
            return process
        except OSError:
            pass
    return ''
""",
    "a keyring": """
import ctypes
def f():
    libc = ctypes.CDLL(None)
    found = [libc.syscall(250, 10, keyring, b'user', b'WORD', 0) for keyring in (-3, -4, -5)]
    return '' if found == [-1, -1, -1] else str(found)
""",
    "names of keys": """
def f():
    try:
        return 'found' if 'sandbox-test-key' in open('/proc/keys').read() else ''
    except OSError:
        return ''
""",
    "mounts": """
import os
def f():
    found = []
    for place in MOUNTS:
        try:
            found.append(open(place + '/data.txt').read())
        except OSError:
            pass
        try:
            open(place + '/WORD', 'w')
            found.append(place)
        except OSError:
            pass
        found += ['data.txt'] if os.path.exists(place + '/data.txt') else []
    for place in FILES:
        try:
            found += [place] if 'intact' in open(place).read() else []
        except OSError:
            pass
    return str(found or '')
""",
    "writable mounts": """
import os
def f():
    lines = [line.split()[4:6] for line in open('/proc/self/mountinfo')]
    rw = [point for point, options in lines if 'rw' in options.split(',')]
    return str([p for p in rw if p != '/tmp' and not p.startswith('/dev/')] or '')
""",
}

# Tests of a benchmark that attack: `done` collects what they could do; it must stay empty.
HOSTILE_SETUP = """
import glob, os, socket, subprocess
done = []
def attempt(name, action):
    try:
        if action():
            done.append(name)
    except Exception:
        pass
attempt('read', lambda: open('WITNESS').read())
attempt('write', lambda: open('WITNESS', 'w'))
attempt('new file', lambda: open('FOLDER/WORD', 'w'))
attempt('list', lambda: os.listdir('FOLDER'))
attempt('passwords', lambda: open('/etc/passwd').read())
for place in ('/', '/usr', '/etc', '/var/tmp', '/dev/shm', os.path.dirname(os.__file__)):
    attempt('write ' + place, lambda: open(place + '/WORD', 'w'))
attempt('shell', lambda: subprocess.run('echo here > FOLDER/WORD', shell=True).returncode == 0)
attempt('network', lambda: socket.create_connection(('127.0.0.1', PORT), 1))
attempt('kill', lambda: os.kill(CALLER, 9) is None)
attempt('secret', lambda: 'WORD' in str(dict(os.environ)))
attempt('others', lambda: len(glob.glob('/proc/[0-9]*')) > 3)
attempt('solution', lambda: [p for p in glob.glob('/proc/[0-9]*/cmdline') if 'pytest' in open(p).read()])
"""
HOSTILE_TESTS = "assert f(2) == 4\nassert not done, done"

# Programs that stay behind if their caller is killed, unless the box ends them: each forks twice,
# leaves its session and ignores signals.
STAYING = """
import ctypes, os, signal, time
def stay():
    for number in set(signal.Signals) - {9, 19}:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
stay()
if os.fork() == 0:
    os.setsid()
    stay()
    if os.fork() == 0:
        stay()
        time.sleep(120)
time.sleep(120)
"""

"""Programs that attack the sandbox: they leave it, forge a pass, or do not end.

Each defines f; `f(2) == 4` is the test that none of them may pass.
"""

# Programs that try to leave the box: f(2) is 4 if they do. The test puts values in the place of WORD,
# WITNESS, FOLDER, TESTS, PORT and CALLER.
ESCAPES = {
    "secret in its environment": "import os\ndef f(x): return 4 if 'WORD' in str(dict(os.environ)) else 0",
    "secret in others' environments": """
import glob
def f(x):
    for path in glob.glob('/proc/[0-9]*/environ'):
        if 'WORD' in open(path).read(): return 4
""",
    "others' command lines": """
import glob
def f(x):
    return 4 if any('pytest' in open(path).read() for path in glob.glob('/proc/[0-9]*/cmdline')) else 0
""",
    "a file of ours": "def f(x): return 4 if open('WITNESS').read() else 0",
    "the tests' own file": "def f(x): return 4 if open('TESTS').read() else 0",
    "passwords": "def f(x): return 4 if open('/etc/shadow').read() else 0",
    "the old root": "import os\ndef f(x): return 4 if os.listdir('/old') or os.path.exists('/oldroot/etc') else 0",
    "writing outside": """
import os
def f(x):
    places = ['/', '/usr', '/usr/lib', '/etc', '/var/tmp', '/dev', '/root', 'FOLDER', os.path.dirname(os.__file__)]
    written = 0
    for place in places:
        try: open(place + '/WORD', 'w').write('here'); written = 4
        except OSError: pass
    return written
""",
    "deleting outside": """
import shutil, os
def f(x):
    shutil.rmtree('FOLDER', ignore_errors=True); shutil.rmtree('/', ignore_errors=True)
    return 0 if os.path.exists('/usr/bin') else 4
""",
    "a server on this machine": """
import socket
def f(x):
    socket.create_connection(('127.0.0.1', PORT), 1)
    return 4
""",
    "an abstract socket": """
import socket
def f(x):
    socket.socket(socket.AF_UNIX).connect('\\0WORD')
    return 4
""",
    "another machine": "import socket\ndef f(x): socket.create_connection(('1.1.1.1', 53), 1); return 4",
    "a user namespace": "import ctypes\ndef f(x): return 4 if ctypes.CDLL(None).unshare(0x10000000) == 0 else 0",
    "a mount": "import subprocess\ndef f(x): return 4 * (subprocess.call(['mount', '-t', 'tmpfs', 'x', '/tmp']) == 0)",
    "killing the caller": "import os\ndef f(x): os.kill(CALLER, 9); return 4",
    "tracing the caller": "import ctypes\ndef f(x): return 4 if ctypes.CDLL(None).ptrace(16, CALLER, 0, 0) == 0 else 0",
    "capabilities": "def f(x): return 0 if 'CapEff:\\t0000000000000000' in open('/proc/self/status').read() else 4",
    "the tests by frames and objects": """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame: seen += [frame.f_locals, frame.f_globals]; frame = frame.f_back
    seen += [thing for thing in gc.get_objects() if type(thing) in (str, dict, list)]
    return 4 if 'assert' + ' f(2)' in str(seen) else 0
""",
}

# Programs that claim to pass.
FORGED = {
    "exit at import": "import os\nos._exit(0)",
    "sys.exit at import": "import sys\nsys.exit(0)",
    "exit in the call": "import os\ndef f(x): os._exit(0)",
    "sys.exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "exit later": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "an always equal object": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "an always equal integer": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(3)",
    "an always equal list": "class A(list):\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "an always equal fraction": """
from fractions import Fraction
class A(Fraction):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = Fraction.__hash__
def f(x): return A(3)
""",
    "an always equal kind": """
class Kind(type):
    def __eq__(self, other): return True
    __hash__ = lambda self: hash(int)
class A(metaclass=Kind):
    __module__, __name__, numerator, denominator = "fractions", "Fraction", 4, 1
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def f(x): return [A()] and A()
""",
    "an object that says it is an int": """
class A:
    __class__ = int
    def __eq__(self, other): return True
def f(x): return A()
""",
    "the equality of a key": """
class A(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return {A(): 4}
""",
    "prints": "print('passed')\nprint('{\"passed\": true}')\ndef f(x): print('passed'); return 3",
    "an exception that says so": "def f(x): raise AssertionError('passed')",
    "an exception that cannot be said": "class E(Exception):\n    def __str__(self): 1 / 0\ndef f(x): raise E",
    "other builtins": """
import builtins
builtins.AssertionError = ()
builtins.compile = lambda *a: ''
def f(x): return 3
""",
    "other json": 'import json\njson.dumps = lambda *a: \'["passed", ""]\'\ndef f(x): return 3',
    "other trace": """
import sys
sys.settrace(lambda *a: sys.exit(0))
sys.excepthook = print
def f(x): raise ValueError
""",
    "other channel": """
import json, os
def f(x):
    for fd in range(3, 64):
        for word in ('["passed", ""]', '["started"]', '["ready"]', '{"passed": true, "fault": "", "started": true}'):
            try: os.write(fd, len(word).to_bytes(4, 'big') + word.encode())
            except OSError: pass
    return 3
""",
    "garbage": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'garbage' * 99)
    except OSError: pass
def f(x): return 3
""",
    "deep garbage": """
import os
for fd in range(3, 64):
    try: os.write(fd, (200000).to_bytes(4, 'big') + b'[' * 200000)
    except OSError: pass
""",
    "the channel closed": "import os\nos.closerange(0, 64)\ndef f(x): return 4",
    "the runner's functions": """
import sys, __main__
__main__.write_message = lambda sink, message: None
for name in ('_run_tests', 'encode_value', 'decode_value', 'serve_solution'):
    setattr(__main__, name, lambda *a, **k: ['passed', ''])
def f(x): return 3
""",
    "an endless generator": "import itertools\ndef f(x): return itertools.count()",
    "a cycle": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "too much": "def f(x): return 'x' * (1 << 28)",
    "not a function": "f = 4",
    "no function": "def g(x): return 4",
    "syntax": "def f(x: return 4",
    "deep parentheses": "f = " + "(" * 100000,
    "null": "def f(x): return 4\0",
    "surrogate": "f = '\ud800'",
}

# Programs that do not end, take all they can or leave something behind.
BOMBS = {
    "loop": "def f(x):\n    while True: pass",
    "loop at import": "while True: pass",
    "loop that swallows": """
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
    "signals ignored": """
import signal, time
for number in set(signal.Signals) - {9, 19}: signal.signal(number, signal.SIG_IGN)
def f(x): time.sleep(60)
""",
    "output": "def f(x):\n    while True: print('x' * 9999)",
    "errors": "import sys\ndef f(x):\n    while True: sys.stderr.write('x' * 9999)",
    "memory by steps": "def f(x):\n    a = []\n    while True: a.append(bytes(1 << 20))",
    "memory at once": "def f(x): return [0] * 10**12",
    "a power": "def f(x): return 9**9**9",
    "forks": "import os\ndef f(x):\n    while True: os.fork()",
    "forks that swallow, at import": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": """
import threading, time
def f(x):
    while True: threading.Thread(target=time.sleep, args=(60,)).start()
""",
    "a large file": "def f(x):\n    with open('/tmp/a', 'wb') as file:\n        while True: file.write(bytes(1 << 20))",
    "many files": "def f(x):\n    n = 0\n    while True: open(f'/tmp/{n}', 'w').write('x'); n += 1",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
    "input": "def f(x): return int(input())",
    "segmentation fault": "import ctypes\ndef f(x): return ctypes.string_at(0)",
    "killing itself": "import os\ndef f(x): os.kill(os.getpid(), 9)",
    "killing all": "import os\ndef f(x): os.kill(-1, 9)",
    "killing its group": "import os\ndef f(x): os.killpg(0, 9); os.kill(os.getppid(), 9)",
    "another program": "import os\ndef f(x): os.execv('/bin/sleep', ['sleep', '60'])",
    "a daemon": "import subprocess\ndef f(x): subprocess.Popen(['/bin/sleep', '60'], start_new_session=True); return 3",
    "orphans": """
import os, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: time.sleep(60)
        os._exit(0)
    return 3
""",
}
ATTACKS = ESCAPES | FORGED | BOMBS

"""`forked.py RANKS SCRIPT ARGUMENT...` launches ranks as forks of a process that has imported the libraries already.

Most of a small launch's time goes into imports, once a rank; here once. For tests that are not about a launcher.
"""

import os
import runpy
import signal
import socket
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
import launch.engines.fsdp
import launch.engines.zero
import launch.pipeline  # noqa: F401


def main() -> None:
    ranks, script, *arguments = sys.argv[1:]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    children = set()
    for rank in range(int(ranks)):
        if child := os.fork():
            children.add(child)
            continue
        os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
        return
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in children:
                os.kill(other, signal.SIGTERM)
    sys.exit(abs(failed))


if __name__ == "__main__":
    main()

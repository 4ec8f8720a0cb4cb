"""Two hosts, as network namespaces joined by one link, which is cut in mid-training: both end, and both go on later."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.faults import Run, same, saved, steps

pytestmark = pytest.mark.xdist_group("faults")

WORKER = Path(__file__).parent / "workers" / "fault.py"
BIN = Path(sys.executable).parent
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def ip(*arguments: str) -> None:
    subprocess.run([IP, *arguments], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    """One end of the link."""

    namespace: str
    address: str
    device: str

    def inside(self, command: list[str]) -> list[str]:
        return [
            IP,
            "netns",
            "exec",
            self.namespace,
            "env",
            f"GLOO_SOCKET_IFNAME={self.device}",
            *command,
        ]

    def link(self, state: str) -> None:
        ip("-n", self.namespace, "link", "set", self.device, state)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() != 0 or IP is None:
        pytest.skip("network namespaces need root and the `ip` command (Debian: iproute2)")
    number = os.getpid() % 10000
    made = [Host(f"astra{i}-{number}", f"10.77.0.{i}", f"v{i}x{number}") for i in (1, 2)]
    try:
        try:
            for host in made:
                ip("netns", "add", host.namespace)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        first, second = made
        peer = ["peer", "name", second.device, "netns", second.namespace]
        ip("-n", first.namespace, "link", "add", first.device, "type", "veth", *peer)
        for host in made:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.link("up")
        yield made
    finally:
        for host in made:
            subprocess.run([IP, "netns", "delete", host.namespace], capture_output=True)


def lines(engine: str, hosts: list[Host], options: list[object], folder: Path) -> list[list[str]]:
    """The same command on both hosts, one rank each."""
    port = str(random.randrange(20000, 60000))
    if engine == "zero3":
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        launcher = [BIN / "deepspeed", "--hostfile", hostfile, "--no_ssh"]
    else:
        launcher = [BIN / "torchrun", "--nnodes", "2", "--nproc_per_node", "1"]
    found = []
    for node, host in enumerate(hosts):
        place = ["--node_rank", node, "--master_addr", hosts[0].address, "--master_port", port]
        found.append(
            host.inside([str(word) for word in (*launcher, *place, WORKER, "none", *options)])
        )
    return found


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_a_cut_link_ends_both_hosts_and_mended_they_go_on(
    engine: str,
    hosts: list[Host],
    start_run: Callable[..., Run],
    arguments: list[object],
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    options = [*arguments, "--engine", engine, "--output", tmp_path / "run"]

    def start(name: str) -> list[Run]:
        commands = lines(engine, hosts, options, tmp_path)
        return [start_run(line, tmp_path / f"{name}-{node}") for node, line in enumerate(commands)]

    runs = start("cut")
    runs[0].wait_for(lambda: len(steps(tmp_path / "run")) >= 7)
    hosts[0].link("down")
    cut = time.monotonic()
    for run in runs:
        run.wait(limit=60)
        assert run.launcher.returncode not in (0, 2), run.output()[-3000:]
    assert time.monotonic() - cut < 45  # 8 s of silence, here; then the launchers' own clearing up
    assert "error: rank 1 (" in runs[0].output()
    assert "gone; not heard of for 8 s" in runs[0].output()
    assert (
        f"error: no contact with rank 0 at {hosts[0].address} for 8 s, at training step"
        in runs[1].output()
    )
    reached = saved(tmp_path / "run")

    hosts[0].link("up")
    for run in (again := start("mended")):
        run.wait()
        assert run.launcher.returncode == 0, run.output()[-3000:]
    assert f"going on after step {reached} of 12" in again[0].output()
    assert same(tmp_path / "run", undisturbed(engine))  # which ran on one host

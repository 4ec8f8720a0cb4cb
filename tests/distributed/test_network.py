"""Train on two hosts, and cut the link between them in the middle of it, mend it, and start again.

Proves that both hosts end, name the rank that they lost, and resume to the result of an undisturbed
run on one host; and that two hosts that hold the base each (`shard_within: node`) train what one host
does. The hosts are network namespaces, which need root and the `ip` command (Debian: iproute2). About
40 s an engine.

FSDP2 under torchrun runs always. ZeRO-3 under `deepspeed --hostfile` is left to `make test-full`:
what finds the cut is the same watchdog, and test_faults.py kills ranks and launchers of ZeRO-3.
"""

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
import torch
from safetensors.torch import load_file

from tests.support.cases import NO_SCORES
from tests.support.paths import ROOT, WORKERS
from tests.support.processes import Run, make_set_options
from tests.support.runs import (
    find_newest_step,
    read_losses,
    read_results,
    read_steps,
    runs_are_equal,
)

pytestmark = pytest.mark.xdist_group("faults")

BIN = Path(sys.executable).parent
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def run_ip(*arguments: str) -> None:
    """Run the `ip` command."""
    subprocess.run([IP, *arguments], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Host:
    """One end of the link: a network namespace with an address and a device."""

    namespace: str
    address: str
    device: str

    def wrap(self, command: list[str]) -> list[str]:
        """Return the command that runs `command` on this host."""
        inside = [IP, "netns", "exec", self.namespace]
        return [*inside, "env", f"GLOO_SOCKET_IFNAME={self.device}", *command]

    def set_link(self, state: str) -> None:
        """Set the link `up` or `down`."""
        run_ip("-n", self.namespace, "link", "set", self.device, state)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Make two hosts that a link joins."""
    if os.geteuid() != 0 or IP is None:
        pytest.skip("network namespaces need root and the `ip` command (Debian: iproute2)")
    number = os.getpid() % 10000
    made = [Host(f"astra{i}-{number}", f"10.77.0.{i}", f"v{i}x{number}") for i in (1, 2)]
    try:
        try:
            for host in made:
                run_ip("netns", "add", host.namespace)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        first, second = made
        peer = ["peer", "name", second.device, "netns", second.namespace]
        run_ip("-n", first.namespace, "link", "add", first.device, "type", "veth", *peer)
        for host in made:
            run_ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            run_ip("-n", host.namespace, "link", "set", "lo", "up")
            host.set_link("up")
        yield made
    finally:
        for host in made:
            subprocess.run([IP, "netns", "delete", host.namespace], capture_output=True)


def make_commands(
    engine: str, hosts: list[Host], script: list[object], folder: Path, ranks: int = 1
) -> list[list[str]]:
    """Return the command of each host, which starts `ranks` processes of `script` on it."""
    port = str(random.randrange(20000, 60000))
    if engine == "zero3":
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{host.address} slots={ranks}\n" for host in hosts))
        launcher = [BIN / "deepspeed", "--hostfile", hostfile, "--no_ssh"]
    else:
        launcher = [BIN / "torchrun", "--nnodes", "2", "--nproc_per_node", str(ranks)]
    commands = []
    for node, host in enumerate(hosts):
        place = ["--node_rank", node, "--master_addr", hosts[0].address, "--master_port", port]
        words = [*launcher, *place, *script]
        commands.append(host.wrap([str(word) for word in words]))
    return commands


@pytest.mark.parametrize("engine", [pytest.param("zero3", marks=pytest.mark.full), "fsdp"])
def test_a_cut_link_ends_both_hosts_and_mended_they_resume(
    engine: str,
    hosts: list[Host],
    start_run: Callable[..., Run],
    arguments: list[object],
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    script = [WORKERS / "fault.py", "none", *arguments, "--engine", engine, "--output", folder]

    def start(name: str) -> list[Run]:
        commands = make_commands(engine, hosts, script, tmp_path)
        return [start_run(line, tmp_path / f"{name}-{node}") for node, line in enumerate(commands)]

    runs = start("cut")
    runs[0].wait_for(lambda: len(read_steps(folder)) >= 7)
    hosts[0].set_link("down")
    cut = time.monotonic()
    for run in runs:
        run.wait(limit=60)
        assert run.launcher.returncode not in (0, 2), run.read_output()[-3000:]
    # The worker takes a rank to be gone after 8 s of silence; then the launchers stop the others.
    assert time.monotonic() - cut < 45
    first, second = (run.read_output() for run in runs)
    assert "error: rank 1 (" in first
    assert "gone; not heard of for 8 s" in first
    lost = f"error: no contact with rank 0 at {hosts[0].address} for 8 s, at training step"
    assert lost in second
    saved = find_newest_step(folder)

    hosts[0].set_link("up")
    mended = start("mended")
    for run in mended:
        run.wait()
        assert run.launcher.returncode == 0, run.read_output()[-3000:]
    assert f"resuming after step {saved} of 12" in mended[0].read_output()
    assert runs_are_equal(folder, undisturbed(engine))  # which ran on one host


@pytest.mark.full
@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_hosts_that_hold_the_base_each_train_what_one_host_does(
    engine: str,
    hosts: list[Host],
    launch: Callable,
    start_run: Callable[..., Run],
    recipe: Path,
    tmp_path: Path,
) -> None:
    options = ["--recipe", recipe, *make_set_options([NO_SCORES]), "--engine", engine]
    one, two = tmp_path / "one", tmp_path / "two"
    launch("launch/train.py", *options, "--output", one, ranks=4)
    script = [ROOT / "launch" / "train.py", *options, "--output", two]
    script += make_set_options(["shard_within=node"])
    commands = make_commands(engine, hosts, script, tmp_path, ranks=2)
    runs = [start_run(line, tmp_path / f"log-{node}") for node, line in enumerate(commands)]
    for run in runs:
        run.wait()
        assert run.launcher.returncode == 0, run.read_output()[-3000:]
    assert "each of 2 nodes holds the base, a shard on each of its 2 ranks" in runs[0].read_output()
    conditions = read_results(two)["conditions"]
    assert (conditions["world_size"], conditions["nodes"]) == (4, 2)
    if engine == "zero3":
        assert runs_are_equal(two, one)
    else:  # gradients are summed on each host first: another order of the same four numbers
        assert read_losses(two) == pytest.approx(read_losses(one), rel=1e-6)
        found, wanted = (
            load_file(run / "lora" / "adapter_model.safetensors") for run in (two, one)
        )
        for name, value in wanted.items():
            scale = value.abs().max()
            torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=2e-5)

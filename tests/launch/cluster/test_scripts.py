"""Proves the cluster files: the manifest against Kubernetes' schema, the hostfile by DeepSpeed, and
what the batch scripts do when a run ends; and that srun's tasks become ranks.

Needs bash; stubs stand in for Slurm's commands. Takes 20 seconds. The scripts were also run on a
real Slurm (docs/clusters.md).
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from deepspeed.launcher.constants import PDSH_LAUNCHER
from deepspeed.launcher.runner import fetch_hostfile
from torch.distributed.run import get_args_parser

from launch import sweep
from launch.runtime.distributed import read_slurm_ranks
from launch.runtime.errors import UserError
from launch.sweeps import slurm
from launch.sweeps.table import read_table
from tests.support.paths import ROOT

CLUSTER = ROOT / "launch" / "cluster"


def read_job() -> dict:
    """Return the Job of the Kubernetes manifest."""
    return list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))[-1]


def test_the_manifest_is_valid_and_its_names_fit_together() -> None:
    documents = {
        document["kind"]: document
        for document in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    }
    for document in documents.values():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    name, job = documents["Service"]["metadata"]["name"], documents["Job"]
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["subdomain"] == name
    assert documents["Service"]["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"--master_addr {job['metadata']['name']}-0.{name} " in container["args"][0]
    assert f"--nnodes {job['spec']['completions']} " in container["args"][0]
    assert (
        f"--nproc_per_node {container['resources']['limits']['nvidia.com/gpu']} "
        in container["args"][0]
    )
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == [documents["PersistentVolumeClaim"]["metadata"]["name"]]


@pytest.mark.parametrize(
    ("before", "state", "torchrun", "code"),
    [
        ("", "finished", 0, 0),
        ("", "preempted", 1, 75),
        ("", "error", 1, 2),
        ("error", "error", 1, 2),
        ("", 'error", "exit_code": 1, "x": "', 1, 1),  # a fault, which may not come again
        ("", "running", 1, 1),
        ("", "", 1, 1),
        ("error", "", 1, 1),  # of an earlier start: this one did not find the other pod
        ("preempted", "", 1, 1),
        ("finished", "", 1, 0),
    ],
)
def test_the_pods_exit_code_follows_the_state_of_its_own_start(
    before: str, state: str, torchrun: int, code: int, tmp_path: Path
) -> None:
    script = read_job()["spec"]["template"]["spec"]["containers"][0]["args"][0]
    if before:
        (tmp_path / "state.json").write_text(f'{{"state": "{before}"}}')
    content = f'{{"state": "{state}"}}'
    write = f"echo '{content}' > $RUN/aside; mv $RUN/aside $RUN/state.json" if state else ":"
    write_stub(tmp_path, "torchrun", f"{write}; exit {torchrun}")
    environment = make_environment(tmp_path) | {"RUN": str(tmp_path), "JOB_COMPLETION_INDEX": "0"}
    assert subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path).returncode == code


def test_a_pod_that_was_preempted_does_not_count_as_a_failure_and_an_error_ends_the_job() -> None:
    rules = read_job()["spec"]["podFailurePolicy"]["rules"]
    codes = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {75: "Ignore", 2: "FailJob"}


def read_pods_start() -> tuple[int, str]:
    """Return the seconds that a pod has to stop in, and the script that starts torchrun."""
    pod = read_job()["spec"]["template"]["spec"]
    script = pod["containers"][0]["args"][0].replace("$JOB_COMPLETION_INDEX", "0")
    return pod["terminationGracePeriodSeconds"], script


def read_containers_start() -> tuple[int, str]:
    """Return the same of the container that the Dockerfile's comment starts."""
    comment = (CLUSTER / "Dockerfile").read_text().replace("\n#", "\n")
    return int(re.search(r"--stop-timeout (\d+)", comment)[1]), comment


@pytest.mark.parametrize("read_start", [read_pods_start, read_containers_start])
def test_torchrun_gives_the_ranks_almost_all_of_the_time_to_stop(read_start: Callable) -> None:
    """Torchrun's own default, 30 s, is too short for a step and a checkpoint."""
    grace, script = read_start()
    (words,) = re.findall(r"torchrun (.* launch/train\.py .*)", script.replace("\\\n", " "))
    options = get_args_parser().parse_args(shlex.split(words))
    assert options.training_script == "launch/train.py"
    assert grace - 30 <= options.shutdown_timeout < grace


def test_deepspeed_reads_the_hostfile() -> None:
    assert fetch_hostfile(str(CLUSTER / "hostfile")) == {"node1": 8, "node2": 8}


def test_the_image_has_the_program_with_which_deepspeed_reaches_other_machines() -> None:
    image = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    (line,) = (line for line in image.splitlines() if "apt-get install" in line)
    assert {PDSH_LAUNCHER, "openssh-client"} <= set(shlex.split(line))


def write_stub(folder: Path, name: str, body: str) -> None:
    """Write a command that stands in for another one on the PATH of `make_environment`."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def make_environment(folder: Path) -> dict[str, str]:
    """Return this environment with the stubs in `folder` before all other commands."""
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path}


SLURM = {
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_JOB_ID": "8",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_RESTART_COUNT": "9",  # preemptions, most of them
}
SCONTROL = 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" > requeue.txt; fi'


def run_script(script: str, folder: Path, *arguments: str) -> tuple[int, bool]:
    """Run a batch script with stubs in the place of Slurm's commands.

    Returns:
        Its exit code, and whether it queued itself again.
    """
    write_stub(folder, "scontrol", SCONTROL)
    queued = folder / "requeue.txt"
    queued.unlink(missing_ok=True)
    line = ["bash", str(CLUSTER / script), *arguments]
    done = subprocess.run(
        line, env=make_environment(folder) | SLURM, cwd=folder, capture_output=True, text=True
    )
    assert not done.stderr
    assert not queued.exists() or queued.read_text() == "requeue 7_1\n"
    return done.returncode, queued.exists()


def write_srun_stub(folder: Path, state: str, code: int) -> None:
    """Write an srun whose run ends with `state`; "" for one that does not start."""
    write = f'echo \'{{"state": "{state}"}}\' > runs/codefeedback/state.json' if state else ":"
    write_stub(folder, "srun", f'echo "$@" > srun.txt; {write}; exit {code}')


@pytest.mark.parametrize(
    ("state", "srun", "code", "requeued"),
    [
        ("finished", 0, 0, False),
        ("preempted", 0, 0, True),
        ("preempted", 1, 0, True),  # a launcher's own code counts for nothing
        ("error", 2, 2, False),
        ('error", "exit_code": 2, "x": "', 1, 2, False),
        ('error", "exit_code": 1, "x": "', 1, 0, True),  # a fault, which may not come again
        ("running", 1, 0, True),
        ("", 1, 0, True),
    ],
)
def test_the_slurm_script_queues_again_what_can_resume(
    state: str, srun: int, code: int, requeued: bool, tmp_path: Path
) -> None:
    """It was also run on a real Slurm (docs/clusters.md)."""
    run = tmp_path / "runs" / "codefeedback"
    run.mkdir(parents=True)
    (run / "state.json").write_text('{"state": "error"}')  # of an earlier start
    write_srun_stub(tmp_path, state, srun)
    assert run_script("slurm.sbatch", tmp_path, "--set", "train.lr=1e-4") == (code, requeued)
    started = (tmp_path / "srun.txt").read_text()
    assert started.endswith(
        "launch/train.py --recipe codefeedback --output runs/codefeedback --set train.lr=1e-4\n"
    )


@pytest.mark.parametrize("words", [("--output", "elsewhere"), ("--output=elsewhere",)])
def test_the_slurm_script_refuses_a_folder_in_which_it_would_not_look_for_the_state(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    write_srun_stub(tmp_path, "finished", 0)
    write_stub(tmp_path, "scontrol", SCONTROL)
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sbatch"), "--set", "train.lr=1e-4", *words],
        env=make_environment(tmp_path) | SLURM,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: --output: this script sets it; set RUNS in its place\n"
    assert not (tmp_path / "srun.txt").exists()
    assert not (tmp_path / "requeue.txt").exists()


@pytest.mark.parametrize(
    ("script", "command"), [("slurm.sbatch", "srun"), ("sweep.sbatch", "python")]
)
@pytest.mark.parametrize("asked", ["12", None])
def test_srun_is_told_the_cores_of_a_task(
    script: str, command: str, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm 22.05 and later do not pass --cpus-per-task on. Without it each task has one."""
    set_environment(monkeypatch, {"SLURM_CPUS_PER_TASK": asked, "SRUN_CPUS_PER_TASK": None})
    write_stub(tmp_path, command, 'echo "$SRUN_CPUS_PER_TASK" > cores.txt')
    run_script(script, tmp_path)
    assert (tmp_path / "cores.txt").read_text() == f"{asked or 1}\n"


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (8, 2)])
def test_the_quickstart_starts_no_more_ranks_than_there_are_gpus(
    gpus: int, ranks: int, tmp_path: Path
) -> None:
    """Simulated: torch, by a module that only counts GPUs, and deepspeed."""
    (tmp_path / "torch.py").write_text(f"class cuda: device_count = lambda: {gpus}")
    write_stub(tmp_path, "deepspeed", 'echo "$@" >> deepspeed.txt')
    script = ROOT / "recipes" / "quickstart.sh"
    environment = make_environment(tmp_path) | {"PYTHONPATH": str(tmp_path)}
    environment.pop("LAUNCH", None)
    subprocess.run(["bash", str(script)], env=environment, cwd=tmp_path, capture_output=True)
    started = (tmp_path / "deepspeed.txt").read_text().splitlines()
    assert len(started) == 2
    assert all(line.startswith(f"--quiet --num_gpus {ranks} ") for line in started)


def test_the_slurm_script_gives_a_fault_three_more_tries_however_often_the_job_was_preempted(
    tmp_path: Path,
) -> None:
    for _ in range(3):
        write_srun_stub(tmp_path, "running", 1)
        assert run_script("slurm.sbatch", tmp_path) == (0, True)
        write_srun_stub(tmp_path, "preempted", 0)
        assert run_script("slurm.sbatch", tmp_path) == (0, True)
    write_srun_stub(tmp_path, "running", 1)
    assert run_script("slurm.sbatch", tmp_path) == (1, False)


@pytest.mark.parametrize(
    ("sweep", "code", "requeued"), [(0, 0, False), (2, 2, False), (75, 0, True)]
)
def test_the_sweeps_script_queues_again_what_was_told_to_stop(
    sweep: int, code: int, requeued: bool, tmp_path: Path
) -> None:
    write_stub(tmp_path, "python", f'echo "$@" > sweep.txt; exit {sweep}')
    assert run_script("sweep.sbatch", tmp_path, "--table", "maths") == (code, requeued)
    assert (
        (tmp_path / "sweep.txt")
        .read_text()
        .startswith("launch/sweep.py --table maths --only 1 --launch srun ")
    )


def test_the_sweeps_script_gives_failed_runs_three_more_tries(tmp_path: Path) -> None:
    write_stub(tmp_path, "python", "exit 1")
    assert [run_script("sweep.sbatch", tmp_path) for _ in range(4)] == [(0, True)] * 3 + [
        (1, False)
    ]


def write_sweep_script(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Path:
    """Write the batch script of the table `miniature` with sweep.py --slurm."""
    script = folder / "table.sbatch"
    monkeypatch.setattr(
        sys, "argv", ["sweep.py", "--table", "miniature", *options, "--slurm", str(script)]
    )
    sweep.main()
    return script


def test_a_sweeps_slurm_script_has_a_task_for_each_row_and_all_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = len(read_table("miniature").list_cells())
    assert rows > 1
    options = [
        "--set",
        "model.name=/my models/it's",
        "--set",
        "train.max_steps=3",
        "--output",
        str(tmp_path / "a b"),
    ]
    script = write_sweep_script(tmp_path, monkeypatch, *options)
    lines = script.read_text().splitlines()
    template = (CLUSTER / "sweep.sbatch").read_text().splitlines()
    changed = [(old, new) for old, new in zip(template, lines, strict=True) if old != new]
    (words,) = (new for _, new in changed if new.startswith("set -- "))
    assert changed == [
        ("#SBATCH --job-name=astra-sweep", "#SBATCH --job-name=miniature"),
        ("#SBATCH --array=0", f"#SBATCH --array=0-{rows - 1}"),
        ("# set -- --table miniature", words),
    ]
    assert shlex.split(words) == ["set", "--", "--table", "miniature", *options]
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize(
    "line", ["#SBATCH --job-name=astra-sweep", "#SBATCH --array=0", "# set -- --table miniature"]
)
def test_a_slurm_script_is_not_written_where_a_line_to_fill_in_is_gone(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "sweep.sbatch"
    template.write_text(slurm.TEMPLATE.read_text().replace(f"{line}\n", f"{line}0\n"))
    monkeypatch.setattr(slurm, "TEMPLATE", template)
    with pytest.raises(UserError, match=f"must have the line '{line}' once"):
        write_sweep_script(tmp_path, monkeypatch)
    assert not (tmp_path / "table.sbatch").exists()


@pytest.mark.parametrize(
    ("ended", "code", "requeued"), [(0, 0, False), (2, 2, False), (75, 0, True), (1, 0, True)]
)
def test_a_sweeps_task_runs_its_row_and_queues_again_what_can_resume(
    ended: int, code: int, requeued: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = write_sweep_script(tmp_path, monkeypatch, "--set", "model.name=a b")
    write_stub(tmp_path, "python", f'printf "%s\\n" "$@" > python.txt; exit {ended}')
    write_stub(
        tmp_path,
        "scontrol",
        'if [ "$1" = show ]; then echo node1; else echo "$@" > requeue.txt; fi',
    )
    environment = make_environment(tmp_path) | {
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_JOB_ID": "8",
        "SLURM_JOB_NODELIST": "node1",
    }
    done = subprocess.run(
        ["bash", str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    words = [
        "launch/sweep.py",
        "--table",
        "miniature",
        "--set",
        "model.name=a b",
        "--only",
        "3",
        "--launch",
    ]
    assert (tmp_path / "python.txt").read_text().splitlines() == [
        *words,
        "srun --kill-on-bad-exit=1 python",
    ]
    assert (tmp_path / "requeue.txt").exists() is requeued


STEP = {
    "SLURM_JOB_ID": "50007",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "9",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
    "MASTER_ADDR": "node1",
}


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, {}),
        ({"MASTER_PORT": "29500"}, {"MASTER_PORT": "29500"}),
        (
            {"SLURM_NODEID": "2", "SLURM_PROCID": "8", "SLURM_LOCALID": "0"},
            {"RANK": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "4(x3)", "SLURM_STEP_NUM_TASKS": "12"},
            {"WORLD_SIZE": "12"},
        ),
        (
            {
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_NODEID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "9",
                "MASTER_ADDR": None,
            },
            {"LOCAL_WORLD_SIZE": "9", "MASTER_ADDR": "127.0.0.1"},
        ),
    ],
)
def test_tasks_of_srun_are_ranks(
    changed: dict[str, str | None], wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    set_environment(monkeypatch, STEP | changed)
    ranks = {"RANK": "5", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert read_slurm_ranks() == ranks | {"MASTER_ADDR": "node1", "MASTER_PORT": "30007"} | wanted


def test_tasks_of_srun_on_several_nodes_want_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, STEP | {"MASTER_ADDR": None})
    with pytest.raises(UserError, match="MASTER_ADDR: set it"):
        read_slurm_ranks()


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None]) -> None:
    """Set environment variables for a test, and delete those that are None."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)

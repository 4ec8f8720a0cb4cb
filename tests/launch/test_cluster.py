"""The cluster files: the manifest against Kubernetes' schema, the hostfile by DeepSpeed, the scripts' decisions."""

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile

CLUSTER = Path(__file__).resolve().parents[2] / "launch" / "cluster"


def test_the_manifest_is_valid_and_its_names_fit_together() -> None:
    documents = {
        document["kind"]: document for document in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
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
    assert f"--nproc_per_node {container['resources']['limits']['nvidia.com/gpu']} " in container["args"][0]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claims == [documents["PersistentVolumeClaim"]["metadata"]["name"]]


@pytest.mark.parametrize(
    ("state", "torchrun", "code"), [("finished", 0, 0), ("preempted", 1, 1), ("error", 1, 2), ("running", 1, 1)]
)
def test_the_pods_exit_code_follows_the_state(state: str, torchrun: int, code: int, tmp_path: Path) -> None:
    job = list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))[-1]
    script = job["spec"]["template"]["spec"]["containers"][0]["args"][0]
    stub(tmp_path, "torchrun", f'echo \'{{"state": "{state}"}}\' > "$RUN/state.json"; exit {torchrun}')
    environment = path_with(tmp_path) | {"RUN": str(tmp_path), "JOB_COMPLETION_INDEX": "0"}
    assert subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path).returncode == code


def test_deepspeed_reads_the_hostfile() -> None:
    assert fetch_hostfile(str(CLUSTER / "hostfile")) == {"node1": 8, "node2": 8}


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def path_with(folder: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("state", "srun", "restarts", "code", "requeued"),
    [
        ("finished", 0, 0, 0, False),
        ("preempted", 0, 9, 0, True),
        ("preempted", 1, 0, 0, True),  # a launcher's own code counts for nothing
        ("error", 2, 0, 2, False),
        ("running", 1, 0, 0, True),
        ("running", 1, 3, 1, False),
    ],
)
def test_the_slurm_script_queues_again_what_can_go_on(
    state: str, srun: int, restarts: int, code: int, requeued: bool, tmp_path: Path
) -> None:
    """The script with stubs for srun and scontrol; it was also run on a real Slurm (launch/cluster/README.md)."""
    write = f'mkdir -p runs/codefeedback; echo \'{{"state": "{state}"}}\' > runs/codefeedback/state.json'
    stub(tmp_path, "srun", f'echo "$@" > srun.txt; {write}; exit {srun}')
    stub(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" > requeue.txt; fi')
    environment = path_with(tmp_path) | {
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_JOB_ID": "8",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    script = [str(CLUSTER / "slurm.sbatch"), "--set", "train.lr=1e-4"]
    done = subprocess.run(["bash", *script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (
        (tmp_path / "srun.txt")
        .read_text()
        .endswith("launch/train.py --recipe codefeedback --output runs/codefeedback --set train.lr=1e-4\n")
    )
    assert (tmp_path / "requeue.txt").exists() is requeued
    if requeued:
        assert (tmp_path / "requeue.txt").read_text() == "requeue 7_1\n"

"""Write a Slurm batch script that runs a sweep, one array task for each cell."""

import shlex
from pathlib import Path

from launch.runtime.errors import UserError
from launch.runtime.files import write_text
from launch.sweeps.table import Sweep

TEMPLATE = Path(__file__).resolve().parents[1] / "cluster" / "sweep.sbatch"


def write_slurm_script(path: Path, sweep: Sweep) -> None:
    """Write launch/cluster/sweep.sbatch, filled in for a sweep, to `path`; print how to submit it.

    Raises:
        UserError: the template lacks a line that is filled in. A cluster may need changes to it.
    """
    num_tasks = len(sweep.list_cells())
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines()
    replacements = {
        "#SBATCH --job-name=astra-sweep": f"#SBATCH --job-name={sweep.name}",
        "#SBATCH --array=0": f"#SBATCH --array=0-{num_tasks - 1}",
        "# set -- --table miniature": f"set -- {shlex.join(sweep.options)}",
    }
    for old, new in replacements.items():
        if lines.count(old) != 1:
            raise UserError(f"--slurm: {TEMPLATE} must have the line {old!r} once; bring it back")
        lines[lines.index(old)] = new
    write_text(path, "\n".join(lines) + "\n")
    print(f"{path}: {num_tasks} tasks; submit it from the repository with: sbatch {path}")

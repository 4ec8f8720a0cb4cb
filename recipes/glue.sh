#!/usr/bin/env bash
# Train glue on one task, score it and print its results row:
#   bash recipes/glue.sh --set task.name=cola
#   LAUNCH="torchrun --nproc_per_node 8" bash recipes/glue.sh --set task.name=rte --output runs/mine
# Arguments go to launch/train.py. LAUNCH is the launcher; the default, deepspeed, uses every GPU of
# this machine. Prerequisites and hardware are in recipes/glue.yaml.
set -euo pipefail
exec ${LAUNCH:-deepspeed} "$(dirname "$0")/../launch/train.py" --recipe glue "$@"

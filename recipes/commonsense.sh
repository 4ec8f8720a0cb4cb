#!/usr/bin/env bash
# Train commonsense, score it and print its results row:
#   bash recipes/commonsense.sh
#   LAUNCH="torchrun --nproc_per_node 8" bash recipes/commonsense.sh --engine fsdp --output runs/mine
# Arguments go to launch/train.py. LAUNCH is the launcher; the default, deepspeed, uses every GPU of
# this machine. Prerequisites and hardware are in recipes/commonsense.yaml.
set -euo pipefail
exec ${LAUNCH:-deepspeed} "$(dirname "$0")/../launch/train.py" --recipe commonsense "$@"

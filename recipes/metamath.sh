#!/usr/bin/env bash
# Train metamath, score it and print its results row:
#   bash recipes/metamath.sh
#   LAUNCH="torchrun --nproc_per_node 8" bash recipes/metamath.sh --engine fsdp --output runs/mine
# Arguments go to launch/train.py. LAUNCH is the launcher; the default, deepspeed, uses every GPU of
# this machine. Prerequisites and hardware are in recipes/metamath.yaml.
set -euo pipefail
exec ${LAUNCH:-deepspeed} "$(dirname "$0")/../launch/train.py" --recipe metamath "$@"

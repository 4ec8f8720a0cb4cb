#!/usr/bin/env bash
# Train, score and print the row: recipes/codefeedback.sh [--output DIR] [--set FIELD=VALUE ...]
# LAUNCH chooses the launcher: "torchrun --nproc_per_node 8", "deepspeed --hostfile hosts" (default: deepspeed).
set -euo pipefail
exec ${LAUNCH:-deepspeed} "$(dirname "$0")/../launch/train.py" --recipe codefeedback "$@"

#!/usr/bin/env bash
# Train smollm2 and print its results row:
#   bash recipes/smollm2.sh
#   bash recipes/smollm2.sh --set adapter.method=lora --output runs/smollm2-lora
# Arguments go to launch/train.py. One process: the engine is `single`, on CPUs or one GPU.
# Prerequisites and hardware are in recipes/smollm2.yaml.
set -euo pipefail
exec ${LAUNCH:-python} "$(dirname "$0")/../launch/train.py" --recipe smollm2 "$@"

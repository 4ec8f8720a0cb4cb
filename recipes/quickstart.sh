#!/usr/bin/env bash
# The quickstart: pretrain a small base (once), train Astra and plain LoRA at the same rate, print both rows.
# recipes/quickstart.sh [--set FIELD=VALUE ...]; run folders go to $RUNS (default runs/).
# LAUNCH chooses the launcher, as in the other scripts.
set -euo pipefail
launch="$(dirname "$0")/../launch"
runs="${RUNS:-runs}"
LAUNCH="${LAUNCH:-deepspeed --quiet --num_gpus 2}"
$LAUNCH "$launch/train.py" --recipe quickstart --output "$runs/quickstart" "$@"
$LAUNCH "$launch/train.py" --recipe quickstart --set adapter.method=lora --set eval.baseline=false \
    --output "$runs/quickstart-lora" "$@"
python "$launch/report.py" "$runs/quickstart" "$runs/quickstart-lora" --figures "$runs/quickstart-figures"

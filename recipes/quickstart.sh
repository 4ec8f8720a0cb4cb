#!/usr/bin/env bash
# Pretrain a small base (once), train Astra and plain LoRA on it at the same learning rate, and
# print both rows, and make a page of them:
#   bash recipes/quickstart.sh
#   RUNS=trials bash recipes/quickstart.sh --set train.max_steps=50
# Arguments go to launch/train.py. Run folders are in $RUNS (default runs). LAUNCH is the launcher;
# the default starts two ranks, or one where there is one GPU. Hardware: 2 CPU cores. Needs the packages of requirements.txt on PATH; `make quickstart` sees to it.
set -euo pipefail
launch="$(dirname "$0")/../launch"
runs="${RUNS:-runs}"
ranks="$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')"
LAUNCH="${LAUNCH:-deepspeed --quiet --num_gpus $ranks}"
$LAUNCH "$launch/train.py" --recipe quickstart --output "$runs/quickstart" "$@"
$LAUNCH "$launch/train.py" --recipe quickstart --set adapter.method=lora --set eval.baseline=false \
    --output "$runs/quickstart-lora" "$@"
python "$launch/report.py" "$runs/quickstart" "$runs/quickstart-lora" --figures "$runs/quickstart-figures" \
    --html "$runs/quickstart.html"

#!/usr/bin/env bash
# Continual forgetting: pre-train (once), then forget a fifth of the classes in each of four tasks, and print the table.
#
#   bash scripts/run_cl_forget.sh                                   drawn faces, at most 10 minutes on two CPU cores
#   DATA=path/to/faces bash scripts/run_cl_forget.sh                real faces
#   SEED=1 EPOCHS=50 bash scripts/run_cl_forget.sh -- --few-shot 4  another class order, longer, on four images a class
#
# Variables: DATA CHECKPOINT OUTPUT SEED SETTING MODEL EPOCHS PRETRAIN_EPOCHS GPUS METHODS, explained in settings.sh.
# A run that was interrupted is taken up again with: bash scripts/run_cl_forget.sh -- --resume
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

forget() { # method, further arguments
  local options="CONTINUAL_$1" output=()
  [ -z "$OUTPUT" ] || output=(--output-dir "$OUTPUT")
  # Several methods share OUTPUT, a folder each.
  [ -z "$OUTPUT" ] || [ "$(wc -w <<<"$METHODS")" -eq 1 ] || output=(--output-dir "$OUTPUT/$1")
  "$PYTHON" train_forget.py --method "$1" --checkpoint "$CHECKPOINT" --data "$DATA" --num-tasks 4 --seed "$SEED" \
    $FORGET ${!options-} "${output[@]}" $(replace "$@") "${@:2}"
}

pretrain_if_missing
gpus=(${GPUS:-}) started=0 failed=0
for method in $METHODS; do
  if [ ${#gpus[@]} -le 1 ]; then
    forget "$method" "$@" || failed=$?
  else
    # A round of as many runs as there are devices, then the next.
    CUDA_VISIBLE_DEVICES=${gpus[started % ${#gpus[@]}]} forget "$method" "$@" &
    started=$((started + 1))
    [ $((started % ${#gpus[@]})) -ne 0 ] || wait
  fi
done
wait
exit $failed

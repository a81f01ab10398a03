#!/usr/bin/env bash
# Single-step forgetting of a tenth of the classes with GS-LoRA, and the paper's explorations as small sweeps.
#
#   bash scripts/run_forget.sh            one run (100-10)
#   bash scripts/run_forget.sh ratio      share of the training images that the method sees: 0.05 to 1
#   bash scripts/run_forget.sh grouping   what a group is: block, module, matrix
#   bash scripts/run_forget.sh depth      6, 12, 18 blocks; pre-trains each (on two CPU cores: half an hour)
#   bash scripts/run_forget.sh beta       weight of the forgetting loss
#   bash scripts/run_forget.sh rank       rank of the adapters
#   bash scripts/run_forget.sh position   adapters in the FFN or in the attention
#
#   bash scripts/run_forget.sh -- --overwrite     replace the run that its folder holds; one of other options is refused
#
# Each sweep ends in one table and one figure, in exps/sweep-<name>-<data>-seed<seed> (or OUTPUT).
# Variables: DATA CHECKPOINT OUTPUT SEED SETTING MODEL EPOCHS PRETRAIN_EPOCHS GPUS, explained in settings.sh; and
#   VALUES      the values of a sweep, as "0.1 0.5 1"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
case "${1:-}" in ratio | grouping | depth | beta | rank | position) sweep=$1 && shift ;; "" | -*) sweep="" ;; *)
  refuse "unknown sweep '$1': ratio, grouping, depth, beta, rank or position" ;;
esac
[ "$sweep" != depth ] || [ -z "${CHECKPOINT:-}" ] || refuse "CHECKPOINT has one depth: the depth sweep pre-trains its own"
source scripts/settings.sh

forget() { # output folder or nothing, further arguments
  local output=()
  [ -z "$1" ] || output=(--output-dir "$1")
  "$PYTHON" train_forget.py --method gs_lora --checkpoint "$CHECKPOINT" --data "$DATA" --num-tasks 1 --seed "$SEED" \
    $FORGET $SINGLE_STEP "${output[@]}" $(resume_or_overwrite "$@") "${@:2}"
}

if [ -z "$sweep" ]; then
  pretrain_if_missing
  forget "$OUTPUT" "$@"
  exit
fi

case "$sweep" in
ratio) option=--data-ratio values="0.05 0.1 0.2 0.5 1" title="share of the training images" ;;
grouping) option=--grouping values="block module matrix" title="grouping" ;;
depth) option="" values="6 12 18" title="number of blocks" ;;
beta) option=--beta values="0.05 0.1 0.15 0.2 0.25" title="weight β of the forgetting loss" ;;
rank) option=--rank values="1 2 4 8 16 32" title="rank r of the adapters" ;;
position) option=--lora-place values="ffn attention" title="place of the adapters" ;;
esac
values=${VALUES:-$values}
[ -n "$OUTPUT" ] || tag_data
folder=${OUTPUT:-exps/sweep-$sweep-$tag-seed$SEED}

runs=()
for value in $values; do
  if [ "$sweep" = depth ]; then
    CHECKPOINT=""
    pretrain_if_missing "-depth$value" --depth "$value"
    forget "$folder/$value" "$@" || exit $?
  else
    pretrain_if_missing
    forget "$folder/$value" "$option" "$value" "$@" || exit $?
  fi
  runs+=("$folder/$value/results.json")
done
"$PYTHON" scripts/table.py --sweep "$title" --labels $values --results "${runs[@]}" --output-dir "$folder"

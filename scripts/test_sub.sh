#!/usr/bin/env bash
# Evaluate a checkpoint on DATA; arguments after -- are passed to test.py.
#
#   bash scripts/test_sub.sh                                        the pre-trained tiny model on synthetic faces
#   CHECKPOINT=exps/…/checkpoints/task_2.pth bash scripts/test_sub.sh
#
# Variables: DATA CHECKPOINT OUTPUT SETTING MODEL GPUS, explained in settings.sh; pre-trains where there is no checkpoint.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
source scripts/settings.sh
pretrain_if_missing
output=()
[ -z "$OUTPUT" ] || output=(--output-dir "$OUTPUT")
"$PYTHON" test.py --checkpoint "$CHECKPOINT" --data "$DATA" "${output[@]}" "$@"

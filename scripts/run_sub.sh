#!/usr/bin/env bash
# Pre-train a recognizer on DATA; arguments after -- are passed to train_pretrain.py.
#
#   bash scripts/run_sub.sh                                         the tiny model on synthetic faces
#   DATA=path/to/faces MODEL=face_vit_p8s8_d6 SETTING=paper bash scripts/run_sub.sh
#
# Variables: DATA OUTPUT SEED SETTING MODEL PRETRAIN_EPOCHS GPUS, explained in settings.sh. With none of OUTPUT and SEED
# set, the checkpoint is the one that run_cl_forget.sh and run_forget.sh take; --overwrite replaces it.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
source scripts/settings.sh
if [ -z "$OUTPUT" ]; then
  tag_data
  OUTPUT="exps/pretrain-$tag-$MODEL"
  [ "$SEED" = 1337 ] || OUTPUT+="-seed$SEED"
fi
"$PYTHON" train_pretrain.py --data "$DATA" --model "$MODEL" "${START[@]}" $PRETRAIN --seed "$SEED" \
  --output-dir "$OUTPUT" $(resume_or_overwrite "$@") "$@"

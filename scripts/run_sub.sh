#!/usr/bin/env bash
# Pre-train a recognizer on DATA; arguments after -- go to train_pretrain.py.
#
#   bash scripts/run_sub.sh                                         the tiny model on drawn faces
#   DATA=path/to/faces MODEL=face_vit_p8s8_d6 SETTING=paper bash scripts/run_sub.sh
#
# Variables: DATA OUTPUT SEED SETTING MODEL PRETRAIN_EPOCHS GPUS, explained in settings.sh. With none of OUTPUT and SEED
# set, the checkpoint is the one that run_cl_forget.sh and run_forget.sh take.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
"$PYTHON" train_pretrain.py --data "$DATA" --model "$MODEL" $PRETRAIN --seed "$SEED" \
  --output-dir "${OUTPUT:-exps/pretrain-$(basename "$DATA")-$MODEL}" $(continue_or_replace "$@") "$@"

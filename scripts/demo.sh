#!/usr/bin/env bash
# A first look, in minutes: GS-LoRA and Unseen forget 20 of 100 synthetic people, then 20 more, and the audit compares both
# with models that never saw the first 20. Ends with the path of a page. run_cl_forget.sh reuses the models trained here.
#
#   bash scripts/demo.sh
#   DATA=path/to/faces bash scripts/demo.sh     real faces; the variables of run_cl_forget.sh
#
# The pre-trained model is demo.pth, made by: OMP_NUM_THREADS=1 python train_pretrain.py --epochs 30 --image-size 32 --output-dir DIR
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
split_words "$@"
root=$PWD && cd "$_caller" || exit 1
# Other data or another model are pre-trained first.
[ -n "${DATA:-}${MODEL:-}${SETTING:-}${PRETRAIN_EPOCHS:-}" ] || export CHECKPOINT=${CHECKPOINT:-$root/scripts/demo.pth} DATA=synthetic_faces
METHODS=${METHODS:-gs_lora unseen} RUN_NAME=demo exec bash "$root/scripts/run_cl_forget.sh" "${options[@]}" -- --num-tasks 2 "${rest[@]}"

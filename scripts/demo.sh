#!/usr/bin/env bash
# A first look in minutes: GS-LoRA and Unseen forget 20 of 100 synthetic people, and the audit compares both with models that
# never saw them. Ends with the path of a page. run_cl_forget.sh uses again what this has trained.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
METHODS="gs_lora unseen" DATA=synthetic_faces SETTING=small OUTPUT=${OUTPUT:-exps/demo} exec bash scripts/run_cl_forget.sh \
  -- --num-tasks 1 --forget-per-task 20

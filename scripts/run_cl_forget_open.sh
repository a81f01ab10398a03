#!/usr/bin/env bash
# The papers' missing-class experiment: continual forgetting where MISSING remaining classes (5) lend no training images,
# yet must remain. Acc_m reports them. Everything else as in run_cl_forget.sh.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
split_words "$@"
root=$PWD && cd "$_caller" || exit 1
RUN_NAME=cl_forget_open exec bash "$root/scripts/run_cl_forget.sh" "${options[@]}" -- --missing-classes "${MISSING:-5}" "${rest[@]}"

#!/usr/bin/env bash
# The papers' missing-class experiment: continual forgetting where MISSING remaining classes (5) lend no training images,
# yet must remain. Acc_m reports them. Everything else as in run_cl_forget.sh.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
options=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do # as run_cl_forget.sh tells them apart
  options+=("$1") && shift
done
root=$PWD && cd "$_caller" || exit 1
RUN_NAME=cl_forget_open exec bash "$root/scripts/run_cl_forget.sh" "${options[@]}" -- --missing-classes "${MISSING:-5}" "${@:2}"

#!/usr/bin/env bash
# The papers' missing-class experiment: continual forgetting where MISSING remaining classes (5) lend no training images,
# yet must remain. Acc_m reports them. Everything else as in run_cl_forget.sh.
[ "${1:-}" != "--" ] || shift
RUN_NAME=cl_forget_open exec bash "$(dirname "${BASH_SOURCE[0]}")/run_cl_forget.sh" -- --missing-classes "${MISSING:-5}" "$@"

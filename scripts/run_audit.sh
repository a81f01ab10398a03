#!/usr/bin/env bash
# Does the model still know the person? Compares runs of forgetting with models that never saw the forgotten people. Missing
# ones are trained first. Leaves RUN/audit/audit.html, .md and .json.
#
#   bash scripts/run_audit.sh exps/gs_lora-yaleb38-38-8-seed1337                one run, its first request
#   bash scripts/run_audit.sh exps/cl_forget-yaleb38-3f2a9c01 --requests all             every run of a comparison, every request
#   bash scripts/run_audit.sh RUN --strangers path/to/strangers                 with people in no training set
#   bash scripts/run_audit.sh RUN --strangers path/to/strangers --compare-with strangers     trains nothing
#   bash scripts/run_audit.sh --before a.pth --after b.pth --forget-classes "ann, bob" --data path/to/faces
#
# All arguments are passed to scripts/audit.py; -- --help lists its options. Paths are relative to the current folder, RUNs come
# first. Variables: GPUS JOBS_PER_GPU CLUSTER SBATCH, explained in settings.sh, say where references are trained.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
absolute_paths RUN "$@"
[ -z "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES=${GPUS%% *}
source scripts/setup.sh
"$PYTHON" scripts/audit.py "${arguments[@]}" ${GPUS:+--gpus $GPUS} ${JOBS_PER_GPU:+--jobs-per-gpu $JOBS_PER_GPU} \
  ${CLUSTER:+--cluster "$CLUSTER"} ${SBATCH:+--sbatch="$SBATCH"}

#!/usr/bin/env bash
# Continual forgetting: pre-train (once), then forget a fifth of the classes in each of four tasks, with every method from
# the same checkpoint, and print the papers' main table line by line. Then audit what is left of the first request's people.
#
#   bash scripts/run_cl_forget.sh                                   synthetic faces, all methods: 10 to 13 minutes on two CPU cores
#   METHODS="gs_lora scrub ewc" bash scripts/run_cl_forget.sh       some methods
#   DATA=path/to/faces SEEDS="1337 1 2" bash scripts/run_cl_forget.sh    real faces, mean ± standard deviation
#   METHODS=gs_lora EPOCHS=50 bash scripts/run_cl_forget.sh -- --few-shot 4    longer, on four images a class
#   bash scripts/run_cl_forget.sh -- --num-tasks 1                  single-step forgetting
#
#   bash scripts/run_cl_forget.sh --overwrite                       rerun finished runs
#   bash scripts/run_cl_forget.sh --published                       the papers' results too (CASIA-100, ImageNet-100)
#   SETTING=imagenet DATA=imagenet100 WEIGHTS=vit.safetensors bash scripts/run_cl_forget.sh --published     their table 4
#
# Finished runs are skipped, interrupted runs are continued. Variables, besides those explained in settings.sh
# (DATA CHECKPOINT OUTPUT SETTING MODEL EPOCHS PRETRAIN_EPOCHS GPUS JOBS_PER_GPU CLUSTER SBATCH):
#   METHODS     names, as "gs_lora ewc", or all (the default); python train_forget.py --help lists them
#   SEEDS       class orders, as "1337 1 2"; default SEED, which is 1337
#   AUDIT       first (the default): a first look at the first request; all: every metric of all requests; off: none
#   STRANGERS   folder <person>/<image> of people in no training set, for Unseen and the audit; synthetic faces make their own
#   OPTIONS_<method>   options for that method alone, as OPTIONS_ewc="--lr 1e-3 --lambda 1"; paths in them are absolute

source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/command_line.sh" || exit 1
split_words "$@"
set -- "${rest[@]}"
case "${options[0]:-}" in "" | -*) ;; *) refuse "unknown word '${options[0]}': methods are named in METHODS" ;; esac
asked=${AUDIT:-}
case "${AUDIT:=first}" in first) look=(--quick) ;; all) look=(--requests all) ;; off) ;; *)
  refuse "AUDIT=$AUDIT is unknown: first, all or off" ;;
esac
if [ -n "${STRANGERS:-}" ]; then
  STRANGERS=$(_absolute "$STRANGERS") && look+=(--strangers "$STRANGERS")
  [ -d "$STRANGERS" ] || refuse "STRANGERS=$STRANGERS is no folder"
  OPTIONS_unseen="--strangers ${STRANGERS@Q} ${OPTIONS_unseen:-}"
fi
absolute_paths none "${options[@]}"
options=("${arguments[@]}")
source scripts/settings.sh
pretrain_if_missing

options=("${options[@]/%--published/--published${PUBLISHED:+=$PUBLISHED}}")
for name in ${!OPTIONS_@}; do
  options+=(--options "${name#OPTIONS_}" " ${!name}")
done
[ -n "$OUTPUT" ] || tag_data
output=${OUTPUT:-exps/${RUN_NAME:-cl_forget}-$tag}
"$PYTHON" scripts/compare.py --methods ${METHODS:-all} --seeds ${SEEDS:-$SEED} --gpus ${GPUS:-} \
  ${JOBS_PER_GPU:+--jobs-per-gpu $JOBS_PER_GPU} "${cluster[@]}" --output-dir "$output" "${options[@]}" -- \
  --checkpoint "$CHECKPOINT" --data "$DATA" --num-tasks 4 $FORGET "$@"
code=$?

# Where nothing has run, nothing is audited.
[ "$AUDIT" != off ] && [ "$code" -lt 2 ] || exit "$code"
echo
"$PYTHON" scripts/audit.py "$output" "${look[@]}" --gpus ${GPUS:-} ${JOBS_PER_GPU:+--jobs-per-gpu $JOBS_PER_GPU} "${cluster[@]}"
audited=$?
# A first look that nobody asked for may be impossible, as where a published checkpoint names no recipe for references.
[ "$audited" = 2 ] && [ -z "$asked" ] && audited=0
[ "$audited" = 0 ] || exit "$audited"
exit "$code"

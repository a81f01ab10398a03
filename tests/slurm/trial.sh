#!/usr/bin/env bash
# The same comparison on this machine and on a SLURM of one node, where one run is requeued, one is told that its time is up
# and one is cancelled while they train. Both must end in the same checkpoints. Minutes; as root, after
# apt-get install slurm-wlm munge.
#
#   bash tests/slurm/trial.sh DIR [PYTHON]
set -euo pipefail
dir=$(realpath -m "$1") python=$(realpath -s "${2:-.venv/bin/python}") # not the link's target: that has no packages
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
export OMP_NUM_THREADS=1 XDG_CACHE_HOME="$dir/cache" # a CPU's bits depend on the number of threads
export SLURM_CONF="$dir/slurm/slurm.conf"
data="--data synthetic_faces --identities 20 --train-per-identity 8 --test-per-identity 4"

compare() { # OUTPUT options
  "$python" scripts/compare.py --methods all --output-dir "$@" -- \
    --checkpoint "$dir/pretrained/checkpoint.pth" $data --num-tasks 2 --forget-per-task 4 --epochs 12 --batch-size 16 \
    --data-ratio 1
}

once_it_trains() { # METHOD command: SLURM's job of the method is put at its end
  until [ -f "$dir/slurm_runs/$1-seed1337/checkpoints/last.pth" ]; do sleep 0.2; done
  echo "\$ ${*:2} $(squeue --noheader --format=%A --name="$1-seed1337")"
  "${@:2}" "$(squeue --noheader --format=%A --name="$1-seed1337")"
}

"$python" train_pretrain.py $data --image-size 32 --depth 2 --epochs 40 --batch-size 16 --output-dir "$dir/pretrained"
compare "$dir/local"
bash tests/slurm/one_node.sh start "$dir/slurm"
trap 'bash tests/slurm/one_node.sh stop "$dir/slurm"' EXIT
once_it_trains gs_lora scontrol requeue &
once_it_trains scrub scancel --signal=USR2 &
once_it_trains lwf scancel &
compare "$dir/slurm_runs" --cluster slurm --sbatch="--cpus-per-task=1" || echo "exit code $?"
wait %1 %2 %3 2>/dev/null || true
compare "$dir/slurm_runs" --cluster slurm --sbatch="--cpus-per-task=1" # goes on with the cancelled one
for run in "$dir"/local/*-seed1337; do
  cmp "$run/checkpoints/task_2.pth" "$dir/slurm_runs/${run##*/}/checkpoints/task_2.pth" && echo "${run##*/}: the same bits"
done

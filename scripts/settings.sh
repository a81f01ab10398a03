# Sourced by run_*.sh and test_sub.sh: the variables they share, the settings, and pre-training where it is needed.
#
#   DATA        folder with train/ and test/, or synthetic_faces. Default: CASIA-100 if it lies at
#               data/faces_webface_112x112_sub100_train_test and there is a GPU, else synthetic_faces (rendered, no download)
#   CHECKPOINT  a pre-trained recognizer, ours or published. Default: exps/pretrain-<data>-<model>/checkpoint.pth, <data>
#               being the folder's name and a hash of its images, which is trained first where it is missing
#               (one that was trained with other options is refused: run_sub.sh --overwrite replaces it)
#   OUTPUT      folder for the results. Default: one in exps, named for the script and the data
#   SEED        class order, samples, batches; default 1337, the published one (pre-training always uses 1337)
#   SETTING     paper, small, or imagenet: the papers' ImageNet-100, for a folder of 100 of ImageNet's classes, named by their
#               numbers (n01440764). Default: paper with a GPU and a data folder, else small
#   WEIGHTS     a file of the model's weights to start from; imagenet: with its classifier. Default: none; imagenet: timm's
#               published ones (needs a network)
#   MODEL       a timm model: face_vit_tiny (small), face_vit_p8s8_d6 (paper), or any other; or one that others have trained,
#               an ONNX file or a folder with config.json (docs/your-model.md), which is fine-tuned
#   EPOCHS      epochs of a forgetting task; PRETRAIN_EPOCHS those of pre-training
#   GPUS        CUDA devices to use, as "0 1 2"; run_cl_forget.sh shares its runs out over them; default: the first one
#   JOBS_PER_GPU  of these runs, how many share a device; default: 1 on a GPU (small steps leave it idle: try 4), and
#               without one a run on each core
#   CLUSTER     slurm: send each run to the cluster as a job of its own (docs/speed.md); default: this machine
#   SBATCH      options of sbatch for these jobs, as "--partition=gpu --gpus=1 --time=240"
# Paths are relative to where the script was called from. Arguments after -- go to the Python script.

_has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

CASIA=data/faces_webface_112x112_sub100_train_test
SEED=${SEED:-1337}
if [ -z "${DATA:-}" ]; then
  if _has_gpu && [ -d "$CASIA" ]; then DATA="$PWD/$CASIA"; else DATA=synthetic_faces; fi
elif [ "$DATA" != synthetic_faces ]; then
  DATA=$(_absolute "$DATA")
fi
if [ -z "${SETTING:-}" ]; then
  if _has_gpu && [ "$DATA" != synthetic_faces ]; then SETTING=paper; else SETTING=small; fi
fi

START=() PUBLISHED=""
case "$SETTING" in
paper) # arXiv 2403.11530 and 2501.09705, as their published code runs them
  MODEL=${MODEL:-face_vit_p8s8_d6}
  PRETRAIN="--epochs ${PRETRAIN_EPOCHS:-1200} --batch-size 480 --lr 3e-4 --warmup-epochs 10"
  PRETRAIN+=" --sched cosine-by-epoch --init published --mirror off --last-batch short"
  FORGET="--as-published ${EPOCHS:+--epochs $EPOCHS}"
  SINGLE_STEP="--alpha 1e-2 --sparsity-warmup-epochs 20 --bound 110 --beta 0.15" # of GS-LoRA
  ;;
small) # minutes on two CPU cores
  MODEL=${MODEL:-face_vit_tiny}
  PRETRAIN="${PRETRAIN_EPOCHS:+--epochs $PRETRAIN_EPOCHS}" epochs=5
  if [ "$DATA $MODEL" = "synthetic_faces face_vit_tiny" ]; then # what is enough for these
    PRETRAIN="--epochs ${PRETRAIN_EPOCHS:-30} --image-size 32" epochs=1
  fi
  FORGET="--epochs ${EPOCHS:-$epochs} --min-updates $([ -n "${EPOCHS:-}" ] && echo 0 || echo 300) --batch-size 16 --data-ratio 1"
  SINGLE_STEP="--alpha 1e-2 --bound 110 --beta 0.15" # of GS-LoRA
  ;;
imagenet) # table 4 of arXiv 2501.09705: the model's own classifier, cut to the folder's classes
  MODEL=${MODEL:-vit_base_patch16_224}
  START=(--pretrained)
  PRETRAIN="--epochs ${PRETRAIN_EPOCHS:-0} --rows classifier --crop-pct 0.9"
  FORGET="--as-published --data-ratio 0.05 ${EPOCHS:+--epochs $EPOCHS}"
  SINGLE_STEP="--alpha 1e-2 --sparsity-warmup-epochs 20 --bound 110 --beta 0.15" # of GS-LoRA
  PUBLISHED=imagenet_100
  # Where the published script for ImageNet-100 differs from the one for CASIA-100; what the caller says counts after it.
  OPTIONS_gs_lora="--beta 0.2 0.25 0.25 0.25 ${OPTIONS_gs_lora:-}"
  OPTIONS_gs_lora_pp="--beta 0.2 0.25 0.25 0.25 --lambda-forget 0.05 --ema-decay 0.9 --ema-start 30 ${OPTIONS_gs_lora_pp:-}"
  OPTIONS_l2="--lambda 0.05 ${OPTIONS_l2:-}"
  OPTIONS_ewc="--lambda 3 ${OPTIONS_ewc:-}"
  OPTIONS_mas="--lambda 0.002 ${OPTIONS_mas:-}"
  OPTIONS_der="--lr 1e-4 ${OPTIONS_der:-}"
  OPTIONS_der_pp="--lr 1e-4 --lambda 0.01 --lambda-replay 0.5 ${OPTIONS_der_pp:-}"
  OPTIONS_fdr="--lambda 40 --min-lr 1e-8 ${OPTIONS_fdr:-}"
  OPTIONS_retrain="--init timm ${OPTIONS_retrain:-}"
  OPTIONS_scrub="--gamma 20 ${OPTIONS_scrub:-}"
  OPTIONS_scrub_s="--gamma 10 --rho 0.05 ${OPTIONS_scrub_s:-}"
  ;;
*) refuse "SETTING=$SETTING is unknown: paper, small or imagenet" ;;
esac

if [ -e "$(_absolute "$MODEL")" ] || [ "${MODEL%.onnx}" != "$MODEL" ]; then
  MODEL=$(_absolute "$MODEL") START=()
  [ "$SETTING" = imagenet ] || PRETRAIN="${PRETRAIN_EPOCHS:+--epochs $PRETRAIN_EPOCHS}"
fi
[ -z "${WEIGHTS:-}" ] || START=(--weights "$(_absolute "$WEIGHTS")")
CHECKPOINT=$(_absolute "${CHECKPOINT:-}")
OUTPUT=$(_absolute "${OUTPUT:-}")
cluster=(${CLUSTER:+--cluster "$CLUSTER"} ${SBATCH:+--sbatch="$SBATCH"})
[ -z "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES=${GPUS%% *}
absolute_paths none "$@"
set -- "${arguments[@]}"
source scripts/setup.sh

# Sets `tag`, which names the data and changes with its images, for the names of folders.
tag=$([ "$DATA" != synthetic_faces ] || echo "$DATA")
tag_data() { [ -n "$tag" ] || tag=$("$PYTHON" scripts/data_tag.py "$DATA") || exit $?; }

# Sets CHECKPOINT, pre-training first where that was not done. Arguments: a suffix of the folder's name and further options,
# for models that are pre-trained differently.
pretrain_if_missing() {
  [ -z "$CHECKPOINT" ] || return 0
  tag_data
  local folder="exps/pretrain-$tag-${MODEL##*/}${1:-}"
  "$PYTHON" train_pretrain.py --data "$DATA" --model "$MODEL" "${START[@]}" $PRETRAIN --output-dir "$folder" --resume "${@:2}" ||
    exit $?
  CHECKPOINT="$PWD/$folder/checkpoint.pth"
}

# A run of the same options is continued or was finished before, any other refused, unless the arguments say --overwrite.
resume_or_overwrite() { case " $* " in *" --overwrite "*) ;; *) echo --resume ;; esac; }

# Sourced by run_*.sh and test_sub.sh: the variables they share, the two settings, and pre-training where it is needed.
#
#   DATA        folder with train/ and test/, or synthetic_faces. Default: CASIA-100 if it lies at
#               data/faces_webface_112x112_sub100_train_test and there is a GPU, else synthetic_faces (drawn, no download)
#   CHECKPOINT  a pre-trained recognizer, ours or published. Default: exps/pretrain-<data>-<model>/checkpoint.pth, <data>
#               being the folder's name and a hash of its images, which is trained first where it is missing
#               (one that was trained with other options is refused: run_sub.sh --overwrite replaces it)
#   OUTPUT      folder for the results. Default: one in exps, named for the script and the data
#   SEED        class order, samples, batches; default 1337, the published one (pre-training always uses 1337)
#   SETTING     paper or small. Default: paper with a GPU and a data folder, else small
#   MODEL       a timm model: face_vit_tiny (small), face_vit_p8s8_d6 (paper), or any other; or one that others have trained,
#               an ONNX file or a folder with config.json (docs/your-model.md), which is fine-tuned
#   EPOCHS      epochs of a forgetting task; PRETRAIN_EPOCHS those of pre-training
#   GPUS        CUDA devices to use, as "0 1 2"; run_cl_forget.sh deals its runs out over them; default: the first one
#   JOBS_PER_GPU  of these runs, how many share a device; default: 1 on a GPU (small steps leave it idle: try 4), and
#               without one a run on each core
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
  PRETRAIN="${PRETRAIN_EPOCHS:+--epochs $PRETRAIN_EPOCHS}"
  FORGET="--epochs ${EPOCHS:-5} --min-updates $([ -n "${EPOCHS:-}" ] && echo 0 || echo 300) --batch-size 16 --data-ratio 1"
  SINGLE_STEP="--alpha 1e-2 --bound 110 --beta 0.15" # of GS-LoRA
  ;;
*) refuse "SETTING=$SETTING is unknown: paper or small" ;;
esac

if [ -e "$(_absolute "$MODEL")" ] || [ "${MODEL%.onnx}" != "$MODEL" ]; then
  MODEL=$(_absolute "$MODEL")
  PRETRAIN="${PRETRAIN_EPOCHS:+--epochs $PRETRAIN_EPOCHS}"
fi
CHECKPOINT=$(_absolute "${CHECKPOINT:-}")
OUTPUT=$(_absolute "${OUTPUT:-}")
[ -z "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES=${GPUS%% *}
absolute_paths none "$@"
set -- "${arguments[@]}"
source scripts/setup.sh

# Sets `tag`, which names the data and changes with its images, for the names of folders.
tag=""
tag_data() { [ -n "$tag" ] || tag=$("$PYTHON" scripts/data_tag.py "$DATA") || exit $?; }

# Sets CHECKPOINT, pre-training first where that was not done. Arguments: a suffix of the folder's name and further options,
# for models that are pre-trained differently.
pretrain_if_missing() {
  [ -z "$CHECKPOINT" ] || return 0
  tag_data
  local folder="exps/pretrain-$tag-${MODEL##*/}${1:-}"
  "$PYTHON" train_pretrain.py --data "$DATA" --model "$MODEL" $PRETRAIN --output-dir "$folder" --resume "${@:2}" || exit $?
  CHECKPOINT="$PWD/$folder/checkpoint.pth"
}

# A run of the same options is continued or was finished before, any other refused, unless the arguments say --overwrite.
resume_or_overwrite() { case " $* " in *" --overwrite "*) ;; *) echo --resume ;; esac; }

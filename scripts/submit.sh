#!/usr/bin/env bash
# Put the whole way from a dense model to an evaluated Mixture-of-Experts into Slurm's queue.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'EOF'
usage: scripts/submit.sh --work DIR (--hf FOLDER | --dense CHECKPOINT) --config YAML --data PREFIXES [options]
                         [-- flags of pretrain]

Queues five jobs, each after the one before has ended well, and prints their numbers:
  import    Hugging Face folder -> DIR/dense                        1 node, no GPU     (with --hf)
  keys      average keys over training data -> DIR/key_stats.safetensors    1 whole node
  convert   -> DIR/moe, then verify                                 1 node, no GPU
  train     -> DIR/run; queues itself again until it is finished    --nodes, whole
  evaluate  -> DIR/hf, DIR/evaluation                               1 node, 1 GPU
What DIR holds already is not made again: after a failure, mend its cause and give the same command.

example (the paper's run, 8 nodes of 8 GPUs):
  export SBATCH_ACCOUNT=... SBATCH_PARTITION=...       # any of sbatch's own variables
  scripts/submit.sh --work /shared/me/8x0.5b --hf /shared/models/Qwen1.5-0.5B \
      --config configs/qwen1.5-0.5b-8x/moe.yaml --data /shared/data/tokens_text_document \
      --nodes 8 --time 24:00:00 --container /shared/images/upcycling.sqsh

required:
  --work DIR           where everything goes, on a file system that all nodes share
  --hf FOLDER          the dense model in Hugging Face format, or
  --dense CHECKPOINT   the dense model as a Megatron checkpoint root
  --config YAML        what trains the Mixture-of-Experts
  --data PREFIXES      Megatron data as --data-path takes it: one prefix, or weights and prefixes in quotes

options:
  --dense-config YAML  batches and parallelism for keys (default: dense.yaml beside --config)
  --nodes N            nodes of train (default 8)
  --gpus-per-node N    GPUs of each node (default 8; 0 on nodes without: NPROC_PER_NODE processes on the CPU)
  --time LIMIT         of one run of train, as sbatch takes it (default: the partition's)
  --stages LIST        of import,keys,convert,train,evaluate (default: all)
  --container IMAGE    run in this image (pyxis and enroot), with the folders of all that is named here mounted;
                       CONTAINER_MOUNTS adds SOURCE:TARGET pairs
  --venv DIR           run in this virtual environment (default, without --container: .venv here)
  --import-flags, --keys-flags, --convert-flags, --evaluate-flags "FLAGS"
                       added to import-hf, collect_keys, convert (default: --num-experts 8 --top-k 2), evaluate
  --dry-run            print the sbatch commands and submit nothing
  -- FLAGS             everything after it goes to pretrain, above the YAML

Follow a run: tail -f DIR/logs/train-JOB.log, or tensorboard --logdir DIR/run/tensorboard.
Stop it so that it saves and is queued again: scancel --signal=URG JOB. Stop it for good: scancel JOB.
EOF
}

fail() {
    echo "error: $1; see scripts/submit.sh --help" >&2
    exit 2
}

WORK='' HF='' DENSE='' CONFIG='' DENSE_CONFIG='' DATA=''
nodes=8 gpus=8 time='' stages=import,keys,convert,train,evaluate dry_run=''
import_flags='' keys_flags='' convert_flags='--num-experts 8 --top-k 2' evaluate_flags=''
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=yes && shift && continue ;;
    --*) [[ $# -ge 2 ]] || fail "$1: needs a value" ;;&
    --work) WORK=$2 ;;
    --hf) HF=$2 ;;
    --dense) DENSE=$2 ;;
    --config) CONFIG=$2 ;;
    --dense-config) DENSE_CONFIG=$2 ;;
    --data) DATA=$2 ;;
    --nodes) nodes=$2 ;;
    --gpus-per-node) gpus=$2 ;;
    --time) time=$2 ;;
    --stages) stages=$2 ;;
    --container) CONTAINER_IMAGE=$2 ;;
    --venv) VENV=$2 ;;
    --import-flags) import_flags=$2 ;;
    --keys-flags) keys_flags=$2 ;;
    --convert-flags) convert_flags=$2 ;;
    --evaluate-flags) evaluate_flags=$2 ;;
    *) fail "$1: unknown option" ;;
    esac
    shift 2
done
[[ ${1:-} == -- ]] && shift

# Before anything waits in a queue: is everything there that can be known now?
[[ -n $WORK ]] || fail "--work: name the folder for everything of this run"
[[ -n $HF$DENSE ]] || fail "--hf or --dense: name the dense model"
[[ -z $HF || -f $HF/config.json ]] || fail "--hf $HF: no config.json there"
[[ -z $DENSE || -f $DENSE/latest_checkpointed_iteration.txt ]] ||
    fail "--dense $DENSE: no latest_checkpointed_iteration.txt there; name a checkpoint's root folder"
[[ -f $CONFIG ]] || fail "--config $CONFIG: no such file"
DENSE_CONFIG=${DENSE_CONFIG:-$(dirname "$CONFIG")/dense.yaml}
[[ -f $DENSE_CONFIG ]] || fail "--dense-config $DENSE_CONFIG: no such file"
read -ra parts <<<"$DATA"
[[ ${#parts[@]} -gt 0 ]] || fail "--data: name the training data"
DATA=''
for part in "${parts[@]}"; do
    if [[ ! $part =~ ^[0-9.]+$ ]]; then
        [[ -f $part.bin && -f $part.idx ]] || fail "--data $part: no $part.bin and .idx"
        part=$(realpath -sm "$part")
    fi
    DATA+="${DATA:+ }$part"
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes $nodes: must be a number from 1"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus-per-node $gpus: must be a number"
for stage in ${stages//,/ }; do
    [[ -f $ROOT/scripts/slurm/$stage.sbatch ]] || fail "--stages $stage: not one of import, keys, convert, train, evaluate"
done
if [[ -z ${CONTAINER_IMAGE:-} ]]; then
    python=${PYTHON:-${VENV:-$ROOT/.venv}/bin/python}
    command -v "$python" >/dev/null || fail "--venv: no $python; 'make setup' makes .venv, or pass --container IMAGE"
fi
[[ -n $dry_run ]] || command -v sbatch >/dev/null || fail "no sbatch here: give this command on a login node"

[[ -n $dry_run ]] || mkdir -p "$WORK/logs" || fail "--work $WORK: cannot be made"
WORK=$(realpath -m "$WORK")
DENSE=$(realpath -m "${DENSE:-$WORK/dense}") HF=${HF:+$(realpath "$HF")}
CONFIG=$(realpath "$CONFIG") DENSE_CONFIG=$(realpath "$DENSE_CONFIG")
# The jobs start in ROOT. (An image may be a registry's, which is no file.)
[[ -z ${VENV:-} ]] || VENV=$(realpath -s "$VENV")
[[ ! -f ${CONTAINER_IMAGE:-} ]] || CONTAINER_IMAGE=$(realpath "$CONTAINER_IMAGE")
export ROOT WORK HF DENSE CONFIG DENSE_CONFIG DATA CONTAINER_IMAGE VENV

previous=''
# submit STAGE RESULT GPUS FLAGS...: queue a stage after the one before; nothing to do where RESULT is there.
submit() {
    local stage=$1 result=$2 gpus=$3
    shift 3
    [[ ,$stages, == *,$stage,* ]] || return 0
    if [[ -e $result ]]; then
        printf '%-9s %s is there\n' "$stage" "$result"
        return 0
    fi
    local command=(sbatch --parsable --export=ALL "--output=$WORK/logs/%x-%j.log" "--chdir=$ROOT")
    [[ -z $previous ]] || command+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
    [[ $gpus -eq 0 ]] || command+=("--gpus-per-node=$gpus")
    [[ $stage != train ]] || command+=("--nodes=$nodes" ${time:+"--time=$time"})
    command+=("$ROOT/scripts/slurm/$stage.sbatch" "$@")
    if [[ -n $dry_run ]]; then
        printf '%s\n' "${command[*]@Q}"
        previous="${stage^^}"
    else
        previous=$("${command[@]}")
        previous=${previous%%;*} # NUMBER;CLUSTER
        printf '%-9s job %s, log %s\n' "$stage" "$previous" "$WORK/logs/$stage-$previous.log"
    fi
}

words() { read -ra flags <<<"$1"; }
words "$import_flags"
[[ -z $HF ]] || submit import "$DENSE/latest_checkpointed_iteration.txt" 0 "${flags[@]}"
words "$keys_flags"
submit keys "$WORK/key_stats.safetensors" "$gpus" "${flags[@]}"
words "$convert_flags"
submit convert "$WORK/moe/verified" 0 "${flags[@]}"
finished=''
[[ $(cat "$WORK/run/run_state" 2>/dev/null) != finished ]] || finished=$WORK/run/run_state
submit train "${finished:-/nonexistent/}" "$gpus" "$@"
words "$evaluate_flags"
submit evaluate "$WORK/evaluation/results.json" "$((gpus > 0))" "${flags[@]}"

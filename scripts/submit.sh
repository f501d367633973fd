#!/usr/bin/env bash
# Run all stages from a dense model to an evaluated Mixture-of-Experts, as Slurm jobs or on this machine.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'EOF'
usage: scripts/submit.sh --work DIR (--hf FOLDER | --dense CHECKPOINT) --config YAML
                         (--data PREFIXES | --text FILES...) [options] [-- flags of pretrain]
       scripts/submit.sh --local --work DIR --hf FOLDER --text FILES... [options] [-- flags of pretrain]

Queues these jobs, each depending on the success of the one before, and prints their numbers; with --local it
runs them on this machine, one after another:
  data      text -> DIR/data/text, with the model's tokenizer       1 node, no GPU     (with --text)
  import    Hugging Face folder -> DIR/dense                        1 node, no GPU     (with --hf)
  keys      average keys over training data -> DIR/key_stats.safetensors    1 whole node
  convert   -> DIR/moe, then verify                                 1 node, no GPU
  train     -> DIR/run; queues itself again until it is finished    --nodes, whole
  evaluate  -> DIR/hf, DIR/evaluation                               1 node, 1 GPU
Finished stages are skipped: after a failure, fix its cause and run the same command again. The request is checked
before the first stage, with the checks of all stages, and saved in DIR/request.yaml: another model, text, size or
configuration needs another DIR.

example (this machine: its GPUs, or two processes on the CPU with --nproc 2):
  scripts/submit.sh --local --work runs/8x0.5b --hf models/Qwen1.5-0.5B --text texts/

example (the paper's run, 8 nodes of 8 GPUs):
  export SBATCH_ACCOUNT=... SBATCH_PARTITION=...       # any of sbatch's own variables
  scripts/submit.sh --work /shared/me/8x0.5b --hf /shared/models/Qwen1.5-0.5B \
      --config configs/qwen1.5-0.5b-8x/moe.yaml --data /shared/data/tokens_text_document \
      --nodes 8 --time 24:00:00 --container /shared/images/upcycling.sqsh

required:
  --work DIR           folder for all outputs, on a file system that all nodes share
  --hf FOLDER          the dense model in Hugging Face format, or
  --dense CHECKPOINT   the dense model as a Megatron checkpoint root
  --config YAML        training configuration of the Mixture-of-Experts (default with --local:
                       configs/one_machine/moe.yaml, and one pass over the data)
  --data PREFIXES...   Megatron data as --data-path takes it: one prefix, or weights and prefixes, or
  --text FILES...      files and folders of text, as router-upcycle prepare-data takes them

options:
  --dense-config YAML  batches and parallelism for keys (default: dense.yaml in the folder of --config)
  --nodes N            nodes of train (default 8)
  --gpus-per-node N    GPUs of each node (default 8; 0 on nodes without: NPROC_PER_NODE processes on the CPU)
  --time LIMIT         time limit of one job of train, as sbatch takes it (default: the partition's)
  --stages LIST        stages to run, some of data,import,keys,convert,train,evaluate (default: all)
  --local              run on this machine. Ctrl-C stops it (training first finishes a step and saves), and the same
                       command resumes. --nodes, --gpus-per-node, --time and --container do not apply
  --nproc N            with --local: number of processes (default: one for each GPU, as many as divide the batches;
                       1 on the CPU)
  --container IMAGE    run in this image (pyxis and enroot), with the folders of all named files mounted;
                       CONTAINER_MOUNTS adds SOURCE:TARGET pairs
  --venv DIR           run in this virtual environment (default, without --container: .venv here)
  --data-flags, --import-flags, --keys-flags, --convert-flags, --evaluate-flags "FLAGS"
                       flags for prepare-data, import-hf, collect_keys, convert (default: --num-experts 8 --top-k 2)
                       and evaluate (default with --local: --tasks stdlib, which needs no data); FLAGS may contain
                       quoted words
  --dry-run            print the sbatch commands and submit nothing
  -- FLAGS             flags for pretrain, which override the YAML

Follow a run: tail -f DIR/logs/train-JOB.log, or tensorboard --logdir DIR/run/tensorboard.
Stop a job so that it saves and is queued again: scancel --signal=URG JOB. Stop it for good: scancel JOB.
EOF
}

fail() {
    echo "error: $1; see scripts/submit.sh --help" >&2
    exit 2
}

WORK='' HF='' DENSE='' CONFIG='' DENSE_CONFIG='' DATA='' TEXT='' LOCAL='' parts=()
nodes=8 gpus=8 time='' stages=data,import,keys,convert,train,evaluate dry_run=''
data_flags='' import_flags='' keys_flags='' convert_flags='--num-experts 8 --top-k 2' evaluate_flags=''
while [[ $# -gt 0 && $1 != -- ]]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=yes && shift && continue ;;
    --local) LOCAL=yes && shift && continue ;;
    --text)
        while [[ $# -ge 2 && $2 != -* ]]; do
            [[ -e $2 ]] || fail "--text $2: no such file or folder"
            TEXT+=${TEXT:+$'\n'}$(realpath -s "$2")
            shift
        done
        [[ -n $TEXT ]] || fail "--text: name files or folders of text"
        shift && continue
        ;;
    --data)
        parts=()
        while [[ $# -ge 2 && $2 != -* ]]; do
            # One argument may hold several, unless it is a prefix that contains spaces.
            words=("$2")
            [[ -f $2.bin ]] || read -ra words <<<"$2"
            parts+=("${words[@]}")
            shift
        done
        shift && continue
        ;;
    --*) [[ $# -ge 2 ]] || fail "$1: needs a value" ;;&
    --work) WORK=$2 ;;
    --hf) HF=$2 ;;
    --dense) DENSE=$2 ;;
    --config) CONFIG=$2 ;;
    --dense-config) DENSE_CONFIG=$2 ;;
    --nodes) nodes=$2 ;;
    --gpus-per-node) gpus=$2 ;;
    --nproc) export NPROC_PER_NODE=$2 ;;
    --time) time=$2 ;;
    --stages) stages=$2 ;;
    --container) CONTAINER_IMAGE=$2 ;;
    --venv) VENV=$2 ;;
    --data-flags) data_flags=$2 ;;
    --import-flags) import_flags=$2 ;;
    --keys-flags) keys_flags=$2 ;;
    --convert-flags) convert_flags=$2 ;;
    --evaluate-flags) evaluate_flags=$2 ;;
    *) fail "$1: unknown option" ;;
    esac
    shift 2
done
[[ ${1:-} == -- ]] && shift

# Before queueing anything, check all that can be checked now.
[[ -n $WORK ]] || fail "--work: name the folder for everything of this run"
[[ -n $HF$DENSE ]] || fail "--hf or --dense: name the dense model"
[[ -z $HF || -f $HF/config.json ]] || fail "--hf $HF: no config.json there"
[[ -z $DENSE || -f $DENSE/latest_checkpointed_iteration.txt ]] ||
    fail "--dense $DENSE: no latest_checkpointed_iteration.txt there; name a checkpoint's root folder"
own_config=''
if [[ -n $LOCAL ]]; then
    [[ -n $CONFIG ]] || own_config=yes CONFIG=$ROOT/configs/one_machine/moe.yaml
    evaluate_flags=${evaluate_flags:---tasks stdlib}
fi
[[ -f $CONFIG ]] || fail "--config $CONFIG: no such file"
[[ -z $own_config || -z $DENSE || -f $DENSE/model.yaml ]] ||
    fail "--config: name what trains the Mixture-of-Experts; $DENSE has no model.yaml with its architecture"
DENSE_CONFIG=${DENSE_CONFIG:-$(dirname "$CONFIG")/dense.yaml}
[[ -f $DENSE_CONFIG ]] || fail "--dense-config $DENSE_CONFIG: no such file"
[[ ${#parts[@]} -eq 0 || -z $TEXT ]] || fail "--text: not with --data, which is text made into data already"
[[ ${#parts[@]} -gt 0 || -n $TEXT ]] || fail "--data or --text: name the training data"
for part in "${parts[@]}"; do
    if [[ ! $part =~ ^[0-9.]+$ ]]; then
        [[ -f $part.bin && -f $part.idx ]] || fail "--data $part: no $part.bin and .idx"
        part=$(realpath -sm "$part")
    fi
    DATA+=${DATA:+$'\n'}$part
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes $nodes: must be a number from 1"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus-per-node $gpus: must be a number"
for stage in ${stages//,/ }; do
    [[ -f $ROOT/scripts/slurm/$stage.sbatch ]] || fail "--stages $stage: not one of data, import, keys, convert, train, evaluate"
done
if [[ -z ${CONTAINER_IMAGE:-} ]]; then
    python=${PYTHON:-${VENV:-$ROOT/.venv}/bin/python}
    command -v "$python" >/dev/null || fail "--venv: no $python; 'make setup' makes .venv, or pass --container IMAGE"
fi
[[ -z $LOCAL || -z ${CONTAINER_IMAGE:-} ]] || fail "--local: not with --container; run it in the container"
[[ -n $dry_run$LOCAL ]] || command -v sbatch >/dev/null ||
    fail "no sbatch here: give this command on a login node, or --local to run everything on this machine"
[[ ${NPROC_PER_NODE:-1} =~ ^[1-9][0-9]*$ ]] || fail "--nproc $NPROC_PER_NODE: must be a number from 1"

WORK=$(realpath -m "$WORK")
DENSE=$(realpath -m "${DENSE:-$WORK/dense}") HF=${HF:+$(realpath "$HF")}
CONFIG=$(realpath "$CONFIG") DENSE_CONFIG=$(realpath "$DENSE_CONFIG")
# Make paths absolute, because jobs start in ROOT. (An image may be in a registry instead of a file.)
[[ -z ${VENV:-} ]] || VENV=$(realpath -s "$VENV")
[[ ! -f ${CONTAINER_IMAGE:-} ]] || CONTAINER_IMAGE=$(realpath "$CONTAINER_IMAGE")
[[ -z $TEXT ]] || DATA=$WORK/data/text
# Without a configuration, training is one pass; its length is computed once the data exists.
ONE_PASS=${own_config:+$WORK/one_pass.yaml}
export ROOT WORK HF DENSE CONFIG DENSE_CONFIG DATA TEXT ONE_PASS LOCAL CONTAINER_IMAGE VENV

# words FLAGS: split FLAGS into the array flags like a shell, but without expansions.
words() { mapfile -t flags < <(xargs -rn1 printf '%s\n' <<<"$1"); }
requested=()
for name in data import keys convert evaluate; do
    value=${name}_flags
    xargs <<<"${!value}" >/dev/null 2>&1 || fail "--$name-flags ${!value}: a quote is missing in it"
    words "${!value}"
    requested+=("$(IFS=$'\n' && printf %s "${flags[*]}")")
done
[[ -z $LOCAL ]] || nodes=1 gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
python=${PYTHON:-${VENV:-$ROOT/.venv}/bin/python}
# (A login node may have the container's image but no Python environment.)
if [[ -z ${CONTAINER_IMAGE:-} ]] || command -v "$python" >/dev/null; then
    processes=$(cd "$ROOT" && PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} "$python" scripts/check_request.py \
        "$stages" "$nodes" "$gpus" "$dry_run" "${requested[@]}" "$@") || exit 2
    [[ -z $LOCAL ]] || export NPROC_PER_NODE=$processes
fi
[[ -n $dry_run ]] || mkdir -p "$WORK/logs" || fail "--work $WORK: cannot be made"

job='' interrupts=0
# Pass Ctrl-C on to the running stage; training saves first.
interrupt() {
    [[ -n $job ]] || exit 130
    interrupts=$((interrupts + 1))
    if [[ $stage_running == train && $interrupts -eq 1 ]]; then
        printf '\n          saving, then it ends; Ctrl-C again ends it at once\n'
        kill -URG -- "-$job" 2>/dev/null || true
    else
        kill -TERM -- "-$job" 2>/dev/null || true
    fi
}

# run_here STAGE FLAGS...: run a stage's batch file on this machine, in a separate session.
run_here() {
    local stage=$1 log=$WORK/logs/$1.log start=$SECONDS status follower
    shift
    printf '%-9s log %s ... ' "$stage" "$log"
    [[ $stage != train ]] || echo
    stage_running=$stage
    echo "== $(date)" >>"$log"
    local first=$(($(wc -l <"$log") + 1))
    setsid bash "$ROOT/scripts/slurm/$stage.sbatch" "$@" >>"$log" 2>&1 </dev/null &
    job=$!
    if [[ $stage == train ]]; then
        "$python" "$ROOT/scripts/follow.py" "$log" "$first" "$WORK/run/arguments.txt" &
        follower=$!
    fi
    while :; do
        status=0
        wait "$job" || status=$?
        kill -0 "$job" 2>/dev/null || break # otherwise a signal interrupted only the wait
    done
    job=''
    if [[ $stage == train ]]; then
        kill "$follower" 2>/dev/null || true
        wait "$follower" 2>/dev/null || true
        [[ ! -t 1 ]] || echo
        printf '%-9s ' ''
    fi
    if [[ $status -eq 0 && $interrupts -eq 0 ]]; then
        printf 'done in %d s\n' $((SECONDS - start))
        return 0
    fi
    printf 'ended after %d s\n' $((SECONDS - start))
    if [[ $interrupts -gt 0 ]]; then
        echo "          run the same command again to resume"
        exit 130
    fi
    tail -n "+$first" "$log" | grep -a '^error: ' | tail -n 1 >&2 ||
        echo "error: $stage: ended with status $status; the reason is in $log" >&2
    exit "$status"
}
[[ -z $LOCAL ]] || trap interrupt INT TERM

previous=''
# submit STAGE RESULT GPUS FLAGS...: queue a stage after the previous one, unless RESULT exists.
submit() {
    local stage=$1 result=$2 gpus=$3
    shift 3
    [[ ,$stages, == *,$stage,* ]] || return 0
    if [[ -e $result ]]; then
        printf '%-9s %s is there\n' "$stage" "$result"
        return 0
    fi
    if [[ -n $LOCAL && -z $dry_run ]]; then
        run_here "$stage" "$@"
        return
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

words "$data_flags"
[[ -z $TEXT ]] || submit data "$DATA.json" 0 "${flags[@]}"
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
[[ -z $LOCAL || -n $dry_run || ! -f $WORK/result.txt ]] || cat "$WORK/result.txt"

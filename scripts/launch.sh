#!/usr/bin/env bash
# Start a torchrun entry point of the package on this node: alone, as one of several nodes, or as a Slurm task.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'EOF'
usage: scripts/launch.sh [torchrun options] pretrain|collect_keys CONFIG [Megatron flags]

examples:
  # one machine, all its GPUs (one process without a GPU)
  scripts/launch.sh pretrain configs/qwen1.5-0.5b-8x/moe.yaml --load MOE --save RUN --data-path DATA

  # two processes on a laptop
  scripts/launch.sh --nproc-per-node 2 pretrain configs/demo/moe.yaml --load MOE --save RUN ...

  # several machines without Slurm: the same command on each, with its own --node-rank
  scripts/launch.sh --nnodes 8 --node-rank 0 --master-addr node-0 --master-port 29500 pretrain CONFIG ...

  # a Slurm job step, one task a node: nodes and ranks come from Slurm (scripts/submit.sh does this)
  srun --ntasks-per-node=1 scripts/launch.sh pretrain CONFIG ...

environment:
  PYTHON            the Python to run (default: $VENV/bin/python, else .venv/bin/python, else python3)
  NPROC_PER_NODE    processes a node (default: its GPUs, or 1)
  PYTHONWARNINGS    Python's filter for library warnings in the log (default: ignore)
  MASTER_ADDR, MASTER_PORT   the first node (default under Slurm: from the job's nodes and number)

A SIGURG to this script reaches every training process on this node. With exit_signal: SIGURG in the
configuration, as in those for clusters, the run then finishes its step, saves a checkpoint and ends.
EOF
}

fail() {
    echo "error: $1; see scripts/launch.sh --help" >&2
    exit 2
}

options=()
while [[ ${1:-} == -* ]]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    *=*) options+=("$1") && shift ;;
    --standalone) options+=("$1") && shift ;;
    *)
        [[ $# -ge 2 ]] || fail "$1: needs a value"
        options+=("$1" "$2") && shift 2
        ;;
    esac
done
[[ ${1:-} == pretrain || ${1:-} == collect_keys ]] || fail "${1:-no command}: name pretrain or collect_keys"
[[ -n ${2:-} ]] || fail "$1: name a configuration (a YAML file) after it"
module=$1 config=$2
shift 2

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    for python in ${VENV:+"$VENV/bin/python"} "$ROOT/.venv/bin/python"; do
        if [[ -x $python ]]; then
            PYTHON=$python
            break
        fi
    done
fi

given() { [[ " ${options[*]//_/-} " == *" --$1"[\ =]* ]]; } # torchrun takes --nproc_per_node as well
if ! given nproc-per-node; then
    gpus=${SLURM_GPUS_ON_NODE:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
    options+=(--nproc-per-node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}")
fi
if ! given nnodes && [[ -n ${SLURM_NODEID:-} && ${SLURM_NNODES:-1} -gt 1 ]]; then
    options+=(--nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID")
    if [[ -z ${MASTER_ADDR:-} ]]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) ||
            fail "no scontrol here to name the first node: set MASTER_ADDR"
    fi
    options+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}")
elif ! given nnodes && ! given standalone; then
    options+=(--standalone)
fi

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Expandable segments reduce memory fragmentation.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Hide warnings of Megatron and PyTorch about their own code. The run prints its own notices and errors.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"$PYTHON" -m torch.distributed.run "${options[@]}" \
    -m "megatron_router_upcycling.$module" --config "$config" "$@" &
torchrun=$!
# Pass SIGURG on to the training processes, as Slurm may signal only the task (proctrack/cgroup). torchrun and
# helper processes without a handler ignore SIGURG; SIGUSR1 would kill them.
# shellcheck disable=SC2046 # a word is a process
trap 'kill -URG $(cat /proc/"$torchrun"/task/*/children) 2>/dev/null || true' URG
trap 'kill -TERM "$torchrun" 2>/dev/null || true' TERM INT
while :; do
    status=0
    wait "$torchrun" || status=$?
    kill -0 "$torchrun" 2>/dev/null || break # otherwise a signal interrupted only the wait
done
exit "$status"

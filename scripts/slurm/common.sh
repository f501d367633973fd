# shellcheck shell=bash
# Read by the batch files in this folder. What submit.sh sets: ROOT (this repository), WORK (where everything
# of the run lies), HF, DENSE, CONFIG, DENSE_CONFIG, DATA (weights and prefixes) and TEXT (files and folders), one a
# line, CONTAINER_IMAGE or VENV, LOCAL if there is no Slurm, and ONE_PASS (a YAML file to write) where no
# configuration says how long to train.
cd "$ROOT" || exit
mapfile -t prefixes <<<"$DATA"
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    export PYTHON=${PYTHON:-python3}
else
    export PYTHON=${PYTHON:-${VENV:-$ROOT/.venv}/bin/python}
fi

# Folders of the files that submit.sh was given, each at its own path. (Files that are links to elsewhere, as in
# the Hub's cache, need CONTAINER_MOUNTS.)
mounts() {
    local path folder found=$ROOT:$ROOT,$WORK:$WORK texts
    mapfile -t texts <<<"${TEXT:-}"
    for path in "$HF" "$DENSE" "$CONFIG" "$DENSE_CONFIG" "${prefixes[@]}" "${texts[@]}"; do
        folder=$(dirname "$path")
        case $folder/ in
        // | ./ | "$ROOT"/* | "$WORK"/*) continue ;; # the root, a weight or nothing, what is mounted already
        esac
        [[ ,$found, == *",$folder:$folder,"* ]] || found+=,$folder:$folder
    done
    echo "$found${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
}

# Run a command once on each node of the job, in the container (pyxis) or in the virtual environment.
on_each_node() {
    if [[ -n ${LOCAL:-} ]]; then
        "$@"
        return
    fi
    local container=()
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        container=(
            "--container-image=$CONTAINER_IMAGE" "--container-workdir=$ROOT"
            "--container-mounts=$(mounts)"
        )
    fi
    # By the address that Slurm itself uses; inside a container there may be no scontrol to ask.
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    MASTER_ADDR=$(scontrol show node -o "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    export MASTER_ADDR
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}" "$@"
}

router_upcycle() {
    on_each_node "$PYTHON" -m megatron_router_upcycling.cli "$@"
}

# Write $WORK/$2: the configuration $1, and above it the flags and tokenizer of the model that was imported.
over_imported_model() {
    local base bases=("$1")
    [[ -f $DENSE/model.yaml ]] && bases+=("$DENSE/model.yaml")
    if [[ -n ${ONE_PASS:-} ]]; then
        "$PYTHON" "$ROOT/scripts/one_pass.py" "$DENSE" "$ONE_PASS" "${prefixes[@]}"
        bases+=("$ONE_PASS")
    fi
    {
        printf '# Written by submit.sh for this run.\nbase:\n'
        for base in "${bases[@]}"; do
            printf "  - '%s'\n" "${base//\'/\'\'}"
        done
    } >"$WORK/$2"
}

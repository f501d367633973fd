# shellcheck shell=bash
# Sourced by the batch files in this folder. submit.sh sets these variables: ROOT (this repository), WORK (the
# folder of the run), HF, DENSE, CONFIG, DENSE_CONFIG, DATA (weights and prefixes) and TEXT (files and folders), both
# one a line, CONTAINER_IMAGE or VENV, LOCAL if there is no Slurm, and ONE_PASS (a YAML file to write) if no
# configuration sets the length of training.
cd "$ROOT" || exit
mapfile -t prefixes <<<"$DATA"
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    export PYTHON=${PYTHON:-python3}
else
    export PYTHON=${PYTHON:-${VENV:-$ROOT/.venv}/bin/python}
fi

# Mounts, at their own paths, for the folders of all files that submit.sh was given. (Files that are links to
# other folders, as in the Hub's cache, need CONTAINER_MOUNTS.)
mounts() {
    local path folder found=$ROOT:$ROOT,$WORK:$WORK texts
    mapfile -t texts <<<"${TEXT:-}"
    for path in "$HF" "$DENSE" "$CONFIG" "$DENSE_CONFIG" "${prefixes[@]}" "${texts[@]}"; do
        folder=$(dirname "$path")
        case $folder/ in
        // | ./ | "$ROOT"/* | "$WORK"/*) continue ;; # the root, a weight or nothing, or already mounted
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
    # The address that Slurm itself uses. Set it here, since a container may have no scontrol.
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    MASTER_ADDR=$(scontrol show node -o "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    export MASTER_ADDR
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}" "$@"
}

router_upcycle() {
    on_each_node "$PYTHON" -m megatron_router_upcycling.cli "$@"
}

# Write $WORK/$2: the configuration $1, overridden by the flags and tokenizer of the imported model.
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

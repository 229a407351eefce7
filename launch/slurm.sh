#!/usr/bin/env bash
# Train in a SLURM job that ends before its time limit with a checkpoint, and is requeued to go on from it:
#   sbatch launch/slurm.sh [SCRIPT [ARGUMENTS]]      default: examples/train.py --checkpoint-dir checkpoints
# Submit it from the root of the repository, with torchrun in PATH, on a file system that all nodes see.
# SLURM sends SIGUSR1 to this script, which passes it to srun. srun passes it to torchrun, and torchrun to its ranks.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

(($#)) || set -- examples/train.py --checkpoint-dir checkpoints
# The ranks have this time to save after SIGUSR1, in seconds. Keep it below that of --signal. By default it is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150

stopping=''
# shellcheck disable=SC2329 # the trap calls it
stop() {
    [[ ! $stopping ]] || return 0 # a second SIGUSR1 would end torchrun while its ranks save
    stopping=yes
    kill -USR1 %1 || true # fails if srun has ended
}
trap stop USR1

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 50000))}
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:$port" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal has ended `wait`, and the ranks are still saving
    wait "$step" || true
done
if [[ $stopping ]]; then
    status=0
    wait "$step" || status=$? # of the step, not of a `wait` that a signal has ended
    # torchrun that got SIGUSR1 fails, also if the training has just ended: the next job then finds nothing to do.
    if ((status)); then
        echo "launch/slurm.sh: requeues job $SLURM_JOB_ID after SIGUSR1" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"

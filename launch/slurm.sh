#!/usr/bin/env bash
# Several nodes with GPUs under Slurm: sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh CONFIG-FLAGS...
# Or of another verb: ... launch/slurm.sh predict|extract FLAGS... Tasks of predict go on when another dies.
# One task per GPU, or --ntasks-per-node=1 for one per node. Do not use --gpus-per-task: JAX picks a task's GPU by its
# SLURM_LOCALID among all of the node's. Submit from the repository, with the environment active (or set PYTHON).
# Exit status: 0 finished, 75 stopped by a signal (the same command goes on), else failed.
#SBATCH --job-name=ktda
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=ktda-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -euo pipefail

readonly PYTHON=${PYTHON:-python}
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "slurm.sh: error: no SLURM_JOB_ID; submit it: sbatch launch/slurm.sh --config=FILE [FLAGS...]" >&2
  exit 2
fi

verb=main together=(--kill-on-bad-exit=1)
if [[ -n ${1:-} && $1 != -* ]]; then
  verb=$1
  shift
fi
case $verb in
  main | extract) ;;
  predict) together=(--kill-on-bad-exit=0 --wait=0) ;; # seconds after the first has ended; 0: for ever
  *)
    echo "slurm.sh: error: '$verb' is no verb for several processes; use main, predict or extract" >&2
    exit 2
    ;;
esac

# Under Slurm JAX gives a task one GPU. A task alone on its node shall have all of them.
if [[ ${SLURM_NTASKS_PER_NODE:-} == 1 && ${SLURM_GPUS_ON_NODE:-1} -gt 1 ]]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# SIGTERM, 300 s before the time limit or on preemption, comes to this script alone (B:). Passed on to the tasks by
# scancel, which leaves this script out; srun itself would answer a SIGTERM by killing them. All tasks end together, once
# the checkpoint is complete, so that --kill-on-bad-exit finds nothing to kill.
requeue=0 interrupted=0
# shellcheck disable=SC2329 # the trap's
pass_on() {
  requeue=1 interrupted=1
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap pass_on TERM

srun "${together[@]}" "$PYTHON" -m "ktda_jax.$verb" "$@" --coordinator=auto --stopped_status=75 &
tasks=$!
while :; do
  status=0 interrupted=0
  wait "$tasks" || status=$?
  ((interrupted)) || break # a trap ends `wait` early: the tasks are still saving
done

if ((requeue)); then
  echo "slurm.sh: stopped by SIGTERM (tasks ended with status $status); requeued to go on"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

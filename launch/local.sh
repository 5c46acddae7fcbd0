#!/usr/bin/env bash
# N processes of one training on this machine: launch/local.sh N CONFIG-FLAGS...
# Or of another verb: launch/local.sh N predict|extract FLAGS... Those of predict go on when another dies.
# Exit status: 0 finished, 75 stopped by a signal (the same command goes on), else that of the first worker that died.
# Environment: RETRIES=0 restarts after a failure, GRACE=5 seconds for the others to end by themselves after a failure,
# LOGS= folder of the other processes' output (default <workdir>/logs, below runs/ for one in a bucket), PYTHON=python.
set -euo pipefail

readonly STOPPED=75 # what workers are told to exit with when a signal stopped them before the end

die() {
  echo "local.sh: error: $1" >&2
  exit 2
}

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || die "the number of processes is '${1:-}'; usage: local.sh N --config=FILE [FLAGS...]"
readonly N=$1
shift
verb=main
if [[ -n ${1:-} && $1 != -* ]]; then
  verb=$1
  shift
fi
[[ $verb =~ ^(main|predict|extract)$ ]] || die "'$verb' is no verb for several processes; use main, predict or extract"
readonly PYTHON=${PYTHON:-python} RETRIES=${RETRIES:-0} GRACE=${GRACE:-5}
[[ $RETRIES =~ ^[0-9]+$ ]] || die "RETRIES is '$RETRIES'; give a number of restarts, such as RETRIES=3"
[[ $GRACE =~ ^[0-9]+$ ]] || die "GRACE is '$GRACE'; give whole seconds, such as GRACE=5"
command -v "$PYTHON" >/dev/null || die "no '$PYTHON' on PATH; activate the environment, or set PYTHON=/path/to/python"

logs=runs/logs
for flag in "$@"; do
  case $flag in
    --workdir=gs://*) logs=runs/${flag#--workdir=gs://}/logs ;;
    --workdir=*) logs=${flag#--workdir=}/logs ;;
  esac
done
logs=${LOGS:-$logs}
mkdir -p "$logs" || die "cannot make the log folder '$logs'; set LOGS to a folder that can be written"

# Workers inherit the lock: those that outlive a killed local.sh still write to the workdir and must be ended first.
if command -v flock >/dev/null; then
  exec 9>"$logs/lock"
  flock -w 5 9 || die "processes of an earlier local.sh still run with logs in '$logs'; stop them, or use another --workdir or LOGS"
fi

# One GPU for each process, if there are as many. CPUs need nothing: a process has one CPU device unless XLA_FLAGS
# or JAX_NUM_CPU_DEVICES say otherwise.
gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    [[ $CUDA_VISIBLE_DEVICES == -1 ]] || IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  else
    while read -r line; do
      if [[ $line == GPU* ]]; then gpus+=("${#gpus[@]}"); fi
    done < <(nvidia-smi -L 2>/dev/null || true)
  fi
  if ((N > 1 && ${#gpus[@]} > 0 && ${#gpus[@]} != N)); then
    die "$N processes do not fit ${#gpus[@]} GPUs; use ${#gpus[@]}, or set CUDA_VISIBLE_DEVICES or JAX_PLATFORMS=cpu"
  fi
fi

pids=()
signals=0

# shellcheck disable=SC2329 # the trap's
pass_on() { # the first signal lets the workers save and stop, a second one ends them now
  signals=$((signals + 1))
  local name=TERM pid
  ((signals == 1)) || name=KILL
  echo "local.sh: stopping ${#pids[@]} processes (SIG$name)" >&2
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$name" -- "-$pid" 2>/dev/null || true; done
}

start() {
  local port k
  port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
  pids=()
  # A process group each: ctrl-C on a terminal then reaches the workers once, through pass_on, and a kill their children.
  set -m
  for ((k = 0; k < N; k++)); do
    local command=("$PYTHON" -m "ktda_jax.$verb" "$@" "--coordinator=localhost:$port" "--num_processes=$N"
      "--process_id=$k" "--stopped_status=$STOPPED")
    ((${#gpus[@]} != N)) || command=(env "CUDA_VISIBLE_DEVICES=${gpus[k]}" "${command[@]}")
    if ((k == 0)); then
      "${command[@]}" </dev/null &
    else
      "${command[@]}" </dev/null >"$logs/process_$k.log" 2>&1 &
    fi
    pids+=($!)
  done
  set +m
}

watch() { # until all have ended; the status of the first that died, and the others killed after it unless they map
  local others="are stopped"
  [[ $verb != predict ]] || others="go on"
  local k status running failed=0 deadline=0
  local -a ended=()
  while :; do
    running=0
    for ((k = 0; k < N; k++)); do
      [[ -z ${ended[k]:-} ]] || continue
      if kill -0 "${pids[k]}" 2>/dev/null; then
        running=$((running + 1))
        continue
      fi
      status=0
      wait "${pids[k]}" 2>/dev/null || status=$?
      ended[k]=$status
      if ((status != 0 && status != STOPPED && failed == 0)); then
        failed=$status deadline=$((SECONDS + GRACE))
        echo "local.sh: process $k ended with status $status; the others $others" >&2
        ((k == 0)) || tail -n 3 "$logs/process_$k.log" >&2
      elif ((status == STOPPED && failed == 0)); then
        stopped=1
      fi
    done
    ((running > 0)) || break
    # The others wait for the dead one and do not listen to SIGTERM.
    if [[ $verb != predict ]] && ((failed != 0 && SECONDS >= deadline)); then
      for ((k = 0; k < N; k++)); do
        [[ -n ${ended[k]:-} ]] || kill -KILL -- "-${pids[k]}" 2>/dev/null || true
      done
    fi
    sleep 0.2
  done
  return "$failed"
}

trap pass_on INT TERM HUP
for ((attempt = 0; ; attempt++)); do
  stopped=0 status=0
  start "$@"
  watch || status=$?
  if ((signals > 0 || attempt >= RETRIES || status == 0)); then
    break
  fi
  echo "local.sh: restart $((attempt + 1)) of $RETRIES" >&2
done
if ((status == 0 && stopped)); then
  status=$STOPPED
fi
case $verb in
  main) remedy="the same command goes on from the last checkpoint" ;;
  extract) remedy="the same command goes on" ;;
  predict) remedy="the same command with --skip_existing maps what is left" ;;
esac
((status == 0 || status == STOPPED)) || echo "local.sh: failed with status $status; $remedy" >&2
exit "$status"

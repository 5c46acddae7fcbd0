#!/usr/bin/env bash
# A training on a Cloud TPU slice of any number of hosts, from a machine that has gcloud.
#   launch/tpu_pod.sh run CONFIG-FLAGS...   creates the slice or takes the one there is, installs, trains or resumes
#   launch/tpu_pod.sh run predict|extract FLAGS...   the same with another verb; hosts that predict are independent
#   launch/tpu_pod.sh stop                  the training saves a checkpoint and ends; the slice stays (and costs)
#   launch/tpu_pod.sh delete                deletes the slice
# Environment: NAME, ZONE, TYPE=v5litepod-16, RUNTIME=v2-alpha-tpuv5-lite (NAME and ZONE alone for stop and delete);
# BUCKET=gs://BUCKET[/FOLDER], where the workdir NAME will be, unless --workdir is given: one that every host sees;
# PROJECT; SPOT=1 for spot capacity; SETUP='shell commands' run on every host before each start, to mount a disk, say;
# RETRIES=3 restarts on a slice that is still there (preemptions are not counted); POLL=30 seconds between looks.
# Exit status of run: 0 finished, 75 stopped (the same command goes on), 130 ctrl-C, else failed.
set -euo pipefail

readonly STOPPED=75

die() {
  echo "tpu_pod.sh: error: $1" >&2
  exit 2
}
say() { echo "tpu_pod.sh: $1" >&2; }

readonly verb=${1:-}
case $verb in
  run) needed="NAME ZONE TYPE RUNTIME" ;;
  stop | delete) needed="NAME ZONE" ;;
  *) die "'$verb' is not a subcommand; use run, stop or delete" ;;
esac
shift
program=main
if [[ $verb == run && -n ${1:-} && $1 != -* ]]; then
  program=$1
  shift
fi
[[ $program =~ ^(main|predict|extract)$ ]] || die "'$program' is no verb for several hosts; use main, predict or extract"
for variable in $needed; do
  [[ -n ${!variable:-} ]] || die "$variable is not set; the top of tpu_pod.sh has examples"
done
workdir= # the flag that the command lacks
if [[ $verb == run && $program == main && " $*" != *" --workdir="* ]]; then
  [[ -n ${BUCKET:-} ]] || die "no workdir; set BUCKET=gs://BUCKET, or give --workdir=gs://BUCKET/FOLDER"
  workdir=--workdir=gs://${BUCKET#gs://}/$NAME
fi
command -v gcloud >/dev/null || die "no gcloud on PATH; install the Google Cloud SDK"
readonly POLL=${POLL:-30} RETRIES=${RETRIES:-3}
where=("--zone=$ZONE")
[[ -z ${PROJECT:-} ]] || where+=("--project=$PROJECT")

# `list` rather than `describe`: no slice is then an empty answer, and a non-zero status a real error.
slice_state() {
  gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/$NAME\$" --format="value(state.state)"
}

on_all() { # a command on every host, in their login shells. --command, not `--`, so that gcloud quotes nothing itself
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

delete_slice() { # --force: with its TPU VMs
  gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

ensure_slice() {
  local state
  while :; do
    state=$(slice_state)
    case $state in
      ACTIVE) return ;;
      "")
        say "creating $NAME ($TYPE)"
        local options=("--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME")
        [[ -z ${SPOT:-} ]] || options+=(--spot)
        gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${options[@]}"
        ;;
      SUSPENDED) # preempted: such a request is never filled again
        say "$NAME was preempted; it is made anew"
        delete_slice
        ;;
      FAILED) die "the request for $NAME failed (gcloud compute tpus queued-resources describe); delete it and try again" ;;
      *)
        say "waiting: $NAME is $state"
        sleep "$POLL"
        ;;
    esac
  done
}

# Runs on the hosts. A dropped connection leaves the program running, and gcloud may then start the command again.
# shellcheck disable=SC2016
readonly STOP='pid=$(cat ~/.ktda.pid 2>/dev/null || true)
if [ -n "$pid" ] && grep -aqs ktda_jax "/proc/$pid/cmdline"; then
  kill -TERM "$pid"
  timeout 300 tail --pid="$pid" -f /dev/null || kill -KILL "$pid"
fi
rm -f ~/.ktda.pid'

# uv, since the images have a Python older than the 3.11 that ktda_jax needs.
readonly INSTALL='set -e
rm -rf ~/ktda_jax && mkdir ~/ktda_jax && tar -xzf ~/ktda_jax.tar.gz -C ~/ktda_jax && cd ~/ktda_jax
python3 -m pip install --quiet --user uv
[ -d ~/ktda_venv ] || python3 -m uv venv --quiet --python 3.12 ~/ktda_venv
python3 -m uv pip install --quiet --python ~/ktda_venv/bin/python -e ".[tpu,gcs]"'

install_on_all() { # what is committed, so that every host has the same
  local archive=$scratch/ktda_jax.tar.gz
  git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar.gz -o "$archive" HEAD &&
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:ktda_jax.tar.gz" "${where[@]}" --worker=all &&
    on_all "$INSTALL" &&
    { [[ -z ${SETUP:-} ]] || on_all "$SETUP"; }
}

# Which host of how many this is, as GKE puts it into the environment: hosts that predict do not meet through JAX.
# shellcheck disable=SC2016
readonly WHICH='meta() {
  curl -sf -H "Metadata-Flavor: Google" "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
TPU_WORKER_ID=$(meta agent-worker-number) && export TPU_WORKER_ID
TPU_WORKER_HOSTNAMES=$(meta worker-network-endpoints | tr , "\n" | cut -d: -f3 | paste -sd,) && export TPU_WORKER_HOSTNAMES
'

train_on_all() { # its output is process 0's, and other hosts' errors
  local flags which=
  [[ $program != predict ]] || which=$WHICH
  flags=$(printf ' %q' "$@" ${workdir:+"$workdir"} --coordinator=auto "--stopped_status=$STOPPED")
  on_all "$STOP"$'\n'"${which}cd ~/ktda_jax && echo \$\$ > ~/.ktda.pid && exec ~/ktda_venv/bin/python -m ktda_jax.$program$flags"
}

interrupted=0
pass_on() {
  interrupted=1
  say "stopping the training on all hosts"
  on_all "$STOP" || true
}

run() {
  local status attempt=0 training
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  while :; do
    ensure_slice
    status=0
    install_on_all || status=$?
    if ((status == 0)); then
      trap pass_on INT TERM
      # In the background a signal to this script comes here, not to gcloud: the output of the stop is still shown.
      { train_on_all "$@" 2>&1 | tee "$scratch/output"; } &
      training=$!
      wait "$training" || status=$?
      while kill -0 "$training" 2>/dev/null; do
        status=0
        wait "$training" || status=$?
      done
      trap - INT TERM
      if ((interrupted)); then
        say "stopped; the same command goes on. $NAME still costs: launch/tpu_pod.sh delete"
        exit 130
      fi
      if ((status == 0)); then
        say "finished. $NAME still costs: launch/tpu_pod.sh delete"
        return
      fi
      # What ktda_jax refuses once it refuses again; but a preemption may stop it before training has begun.
      # What it cannot read or write just now, in a bucket say, may be there again.
      if grep "^error: " "$scratch/output" | grep -qvE "^error: (stopped|cannot) "; then
        die "refused, see above; $NAME still costs: launch/tpu_pod.sh delete"
      fi
    fi
    sleep "$POLL" # the state follows a preemption by some seconds
    if [[ $(slice_state) == ACTIVE ]]; then
      if ((status == STOPPED)); then
        say "the training was stopped by a signal; the same command goes on"
        exit "$STOPPED"
      fi
      ((attempt < RETRIES)) || die "failed with status $status on a slice that is still there, after $RETRIES restarts"
      attempt=$((attempt + 1))
      say "status $status; restart $attempt of $RETRIES on the same slice"
    fi
  done
}

case $verb in
  run) run "$@" ;;
  stop) on_all "$STOP" ;;
  delete) delete_slice ;;
esac

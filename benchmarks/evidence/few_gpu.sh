#!/usr/bin/env bash
# Rows of few_labels.py, many at a time on one GPU, in one call:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 -d wheels \
#     grain==0.2.18 array-record portpicker ml-collections tensorboardX 'rasterio<1.5'   # once, where there is a network
#   TILES=tiles/dubai TEACHER=dinov2s bash benchmarks/evidence/few_gpu.sh QUEUE
#
# QUEUE is a file with a row's arguments on each line, such as `--set=choose --row=student --draw=0`; a line `wait`
# waits for those before it: first distillations, then what starts from them. Rows and logs go to $OUT or results/, the
# table is printed at the end. What is there already is left alone, so a call that was cut off goes on. JOBS at a time:
# on an H200 with 16 cores one alone made 118 steps a second, 13 together 15. WITH="KEY=VALUE ..." is added to every
# row: model.teacher.preset=base or dinov3_small, with such a TEACHER, or model.student.preset=base.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-results} work=${WORK:-$PWD/results/few_labels} queue=$(realpath "${1:?names the queue}")
mkdir -p "$out/rows" "$work/logs"
if compgen -G 'wheels/*.whl' > /dev/null; then # unpacked, since compiled packages do not import from wheels
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl || exit
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Rows that differ in nothing but their tiles and seed share what is compiled; none takes the whole card.
export JAX_COMPILATION_CACHE_DIR=$work/programs JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# To search for the fastest kernels of one of these small programs takes 900 CPU-seconds; without, it is 120.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0"
with=()
for change in ${WITH:-}; do with+=("--with=$change"); done

row() { # ARGUMENTS
  local log=$work/logs/$(tr -c 'A-Za-z0-9\n' _ <<< "$1").log
  # shellcheck disable=SC2086
  python benchmarks/evidence/few_labels.py --tiles="$TILES" --teacher="$TEACHER" --work="$work" --rows="$out/rows" \
    --computed $1 "${with[@]}" > "$log" 2>&1 || printf 'failed: %s: ' "$1"
  tail -n 1 "$log"
}

: "${TILES:?names the tiles}" "${TEACHER:?names the weights}"
while IFS= read -r line || [[ $line ]]; do
  if [[ $line == wait ]]; then wait; continue; fi
  [[ $line ]] || continue
  while (($(jobs -rp | wc -l) >= ${JOBS:-4})); do wait -n; done
  row "$line" &
done < "$queue"
wait
python benchmarks/evidence/few_table.py --rows="$out/rows" | tee "$out/table.md"

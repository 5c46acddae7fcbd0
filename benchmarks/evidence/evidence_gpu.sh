#!/usr/bin/env bash
# The base-size table of benchmarks/evidence/LANDSAT24.md on one GPU, in one call:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 -d wheels \
#     grain==0.2.18 array-record portpicker ml-collections tensorboardX           # once, where there is a network
#   TEACHER=weights/dinov2b DATA=tiles bash benchmarks/evidence/evidence_gpu.sh    # table, figure: $OUT or results/
#
# It needs jax, flax, optax, orbax, cloudpickle, opencv and matplotlib. Runs are kept in results/evidence: where a call
# may last ten minutes only, and that folder stays, call it again. NAMES, LABELS, SEEDS and SET (KEY=VALUE ..., for all
# runs) may be set; for a teacher of another size than the base one, SET=model.teacher.preset=small.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-results} work=$PWD/results/evidence
mkdir -p "$out"
if compgen -G 'wheels/*.whl' > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
set_flags=()
for setting in ${SET:-}; do set_flags+=("--set=$setting"); done
begun=$SECONDS
python benchmarks/evidence/run.py --published --data="${DATA:?names the tiles}" \
  --teacher="${TEACHER:?names the weights}" --output="$work" --names="${NAMES:-student,full,no_distill,dinov2,probe}" \
  --labels="${LABELS:-100}" --seeds="${SEEDS:-0}" "${set_flags[@]}"
cp "$work/table.md" "$work/figure.png" "$work/folds.json" "$out/"
echo "== evidence: $((SECONDS - begun)) s"

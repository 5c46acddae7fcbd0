#!/usr/bin/env bash
# All that a GPU is to show, checked and timed in one call:
#
#   pip download --no-deps -d wheels ml-collections     # once, where there is a network; pure Python, 0.1 MB
#   bash benchmarks/gpu.sh                              # on the machine with the GPU; results in $OUT or results/
#
# It needs jax, flax, optax, orbax, torch, pytest and what they need, and neither grain nor tensorflow-datasets nor
# pytest-xdist nor a network; wheels/ is unpacked for the time of the call. A part that fails is named at the end, and
# the others go on. PARTS (tests ours peer precomputed ops), CONFIG, BATCH, FORWARD_BATCH, PEER_BATCH, STEPS
# and VARIANTS may be set; where a call may last so long only, LIMIT=SECONDS: a part is then stopped, and named as failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-results}
parts=${PARTS:-tests ours peer precomputed ops} limit=${LIMIT:-86400}
config=${CONFIG:-configs/grass.py} batch=${BATCH:-64} forward=${FORWARD_BATCH:-64} steps=${STEPS:-20}
peer_batch=${PEER_BATCH:-16} variants=${VARIANTS:-published,once,tf32,compiled,compiled_once}
mkdir -p "$out"
if compgen -G 'wheels/*.whl' > /dev/null; then # unpacked, since compiled packages do not import from wheels
  site=$(mktemp -d)
  python -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl || exit
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
programs=$(mktemp -d) # compiled once for all parts
export JAX_COMPILATION_CACHE_DIR=$programs
trap 'rm -rf "$programs" ${site:+"$site"}' EXIT
failed=()

part() { # NAME COMMAND...
  local name=$1 begun=$SECONDS
  shift
  [[ " $parts " == *" ${name%%_*} "* ]] || return 0
  echo "== $name"
  if timeout "$((limit > SECONDS ? limit - SECONDS : 1))" "$@" 2>&1 | tee "$out/$name.log"; then
    echo "== $name: $((SECONDS - begun)) s"
  else
    failed+=("$name")
  fi
}

# On the GPU, which tests/conftest.py would otherwise hide; a part that cannot run has failed. pytest-xdist, which
# pyproject.toml's addopts need, may be missing.
platforms=$(python -c 'import jax; print("cuda,cpu" if jax.default_backend() == "gpu" else "cpu")')
part tests env JAX_PLATFORMS="$platforms" XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0" \
  python -m pytest -o addopts= -q tests/test_attention.py tests/test_depthwise.py
ours() { # IMAGES
  part "ours_$1" python -m ktda_jax.benchmark --config="$config" --config.batch_size="$1" --steps="$steps" \
    --warmup=3 --forwards="$steps" --forward_batch="$forward" --output="$out/ours_$1.json"
}
# What is wanted most comes first: large batches, the peer, small batches, what precomputed features save.
ours "$batch"
part peer python benchmarks/torch_peer/run.py --config="$config" --config.batch_size="$peer_batch" --steps="$steps" \
  --warmup=3 --forwards="$steps" --forward_batch="$peer_batch" --variants="$variants" --output="$out/peer.json"
ours 4
part precomputed python -m ktda_jax.benchmark --config="$config" --config.batch_size="$batch" --steps="$steps" \
  --warmup=3 --forwards=0 --config.teacher.mode=precomputed --output="$out/precomputed.json"
# Which form of attention and depthwise convolution a model should take here.
part ops python benchmarks/ops.py --batch="$batch" --dtype=bfloat16

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi

#!/usr/bin/env bash
# Installs this repository, as launch/Dockerfile does, into any environment: launch/install.sh EXTRAS
# EXTRAS are those of pyproject.toml, such as tpu, gpu or tpu,geo. Environment: PYTHON=python, the environment's.
set -euo pipefail

readonly EXTRAS=${1:-} PYTHON=${PYTHON:-python}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# pip only warns of an extra that it does not know, and JAX would run on CPU.
"$PYTHON" - "$EXTRAS" <<'END'
import sys, tomllib
known = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
unknown = [extra for extra in sys.argv[1].split(",") if extra not in known]
if unknown:
    sys.exit(f"install.sh: error: no extra '{unknown[0]}'; give some of {', '.join(known)}")
END

# Editable, so that there is one copy; no cache, since it would stay in the image.
"$PYTHON" -m pip install --quiet --no-cache-dir --disable-pip-version-check --editable ".[$EXTRAS]"

# A shared library that the system lacks is to be noticed now, not by the first job.
JAX_PLATFORMS=cpu "$PYTHON" -c "import cv2, rasterio, ktda_jax.evaluate, ktda_jax.training.loop"

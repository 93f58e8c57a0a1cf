#!/usr/bin/env bash
# What needs a GPU, in parts of at most four minutes each, on a machine without network:
#
#   bench/gpu_wheels.sh --triton   before, where there are network and nvcc: puts packages into wheelhouse/
#   bench/gpu.sh                   there, with wheelhouse/ beside the sources: all parts
#   bench/gpu.sh cuda 1            doctor, and the tests of kernels and steps
#   bench/gpu.sh cuda 2            rates for the planner, limits, kernels, whole steps
#   bench/gpu.sh cuda 3            a language model of 45M parameters, physics, wave functions
#   bench/gpu.sh cpu [PARTS]       the same on the CPU and in small, to try the script itself
#
# Wants python3 (3.12 or newer; PYTHON names another) with JAX for CUDA, optax, numpy, pytest. Without a wheel of curvax
# it is built on the spot (nvcc, cmake, ninja, nanobind, scikit-build-core). Writes rows, logs and a summary into $OUT,
# bench/results/gpu unless it is set. Fails if a part fails or the tests do not end in time; a measurement that its time
# limit cuts off keeps the rows it has.
set -uo pipefail
cd "$(dirname "$0")/.."

PLATFORM=${1:-cuda}
PARTS=${2:-123}
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
export PYTHONUNBUFFERED=1 JAX_PLATFORMS=$PLATFORM
# The tests compare with the CPU.
[[ $PLATFORM == cuda ]] && export JAX_PLATFORMS=cuda,cpu
# Several test processes share the GPU.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# What is measured of the machine comes back with the rows, and the plans of all parts follow it.
export CURVAX_CALIBRATION=$OUT/calibration
QUICK=() FEWER=() STUDY=(--only "45M, 224 sequences, cost of a step")
[[ $PLATFORM == cpu ]] && QUICK=(--quick) FEWER=(-k odd) STUDY=(--quick --only "cost of a step")
FAILED=()

# part NAME SECONDS COMMAND...: runs a part under a time limit, its output in $OUT/NAME.log and its end on the screen.
part() {
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  # Interrupted and not ended, pytest still says what failed.
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  # 124: cut off.
  [[ $status -ne 0 && ($status -ne 124 || -z ${MAY_BE_CUT:-}) ]] && FAILED+=("$name")
  printf '%-10s exit %d, %d s of %d\n' "$name" "$status" $((SECONDS - began)) "$limit"
  tail -n "${LINES_SHOWN:-4}" "$OUT/$name.log" | cut -c1-200 | sed 's/^/    /'
}

install() {
  local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$SITE")
  local wheels=()
  for wheel in wheelhouse/*.whl; do [[ -e $wheel ]] && wheels+=("$wheel"); done
  if ! compgen -G 'wheelhouse/curvax-*.whl' >/dev/null; then
    local cuda=ON
    [[ $PLATFORM == cpu ]] && cuda=OFF
    "${pip[@]}" --no-build-isolation -C "cmake.define.CURVAX_CUDA=$cuda" \
      -C cmake.define.CURVAX_CUDA_ARCHITECTURES=90-real . || return
  fi
  [[ ${#wheels[@]} -eq 0 ]] || "${pip[@]}" "${wheels[@]}" || return
  for package in wheelhouse/*.tar.xz; do [[ -e $package ]] && tar -C "$SITE" -xJf "$package"; done
  # Python as it is here; of the wheel the compiled modules count, and they say themselves if they are too old.
  cp -r python/curvax/. "$SITE/curvax/" && cp -r kernels "$SITE/curvax/"
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv 2>/dev/null
  "$PYTHON" -m curvax doctor
}

part install 60 bash -c "$(declare -f install); PYTHON='$PYTHON' SITE='$SITE' PLATFORM='$PLATFORM'; install"
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
if [[ $PARTS == *1* ]]; then
  LINES_SHOWN=30 part doctor 40 bash -c "$(declare -f facts); PYTHON='$PYTHON'; facts"
  LINES_SHOWN=40 part tests 150 "$PYTHON" -m pytest -q -n "${JOBS:-4}" -p no:cacheprovider -p no:benchmark --strict-backend \
    --junitxml="$OUT/tests.xml" -m "not slow" ${FEWER[@]+"${FEWER[@]}"} --ignore=tests/kernels/test_dispatch.py tests/gpu tests/kernels
fi
if [[ $PARTS == *2* ]]; then
  LINES_SHOWN=12 part calibrate 30 "$PYTHON" -m curvax calibrate
  MAY_BE_CUT=1 part limits 30 "$PYTHON" -m bench limits ${QUICK[@]+"${QUICK[@]}"} --out "$OUT"
  MAY_BE_CUT=1 part kernels 120 "$PYTHON" -m bench kernels ${QUICK[@]+"${QUICK[@]}"} --out "$OUT"
  MAY_BE_CUT=1 part gpu_steps 60 "$PYTHON" -m bench gpu_steps ${QUICK[@]+"${QUICK[@]}"} --out "$OUT"
fi
if [[ $PARTS == *3* ]]; then
  MAY_BE_CUT=1 part layerwise 130 "$PYTHON" -m bench layerwise "${STUDY[@]}" --update --out "$OUT"
  MAY_BE_CUT=1 part physics 70 "$PYTHON" -m bench physics --seconds 2 --only Poisson --update --out "$OUT"
  MAY_BE_CUT=1 part vmc 40 "$PYTHON" -m bench vmc ${QUICK[@]+"${QUICK[@]}"} --out "$OUT"
fi
# Few files come back from some machines: the logs as one.
tar -C "$OUT" -czf "$SITE/logs.tgz" --exclude=logs.tgz . && mv "$SITE/logs.tgz" "$OUT" && rm -f "$OUT"/*.log
"$PYTHON" -m bench.summary "$OUT" 2>&1 | tee "$OUT/summary.txt" | cut -c1-160
printf '%d s in all\n' "$SECONDS"
if [[ ${#FAILED[@]} -gt 0 ]]; then
  echo "failed: ${FAILED[*]} (logs in $OUT)"
  exit 1
fi

#!/usr/bin/env bash
# Prepares, where there are network and nvcc, what a GPU machine without network lacks: wheels in wheelhouse/.
#
#   bench/gpu_wheels.sh              curvax with its CUDA extension for Hopper, and jax-triton
#   bench/gpu_wheels.sh --triton     also the triton that jax-triton wants, cut down to 44 MiB (its wheel has 190)
#
# For Python 3.12 and newer on x86-64. PYTHON312 names the interpreter to build with; CURVAX_CUDA_ARCHITECTURES what to
# build for ("80-real;90-real;100" for every supported GPU; "90-real" is the default here, since it is the smallest).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON312=${PYTHON312:-python3.12}
ARCHITECTURES=${CURVAX_CUDA_ARCHITECTURES:-90-real}
JAX_TRITON=jax-triton==0.4.1
TRITON=triton==3.7.0

"$PYTHON312" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || {
  echo "the stable ABI of the wheel starts at Python 3.12: set PYTHON312 to such an interpreter" >&2
  exit 1
}
rm -rf wheelhouse && mkdir wheelhouse
quiet=(--quiet --disable-pip-version-check)
"$PYTHON312" -m pip wheel "${quiet[@]}" --no-deps -w wheelhouse \
  -C cmake.define.CURVAX_CUDA=ON -C "cmake.define.CURVAX_CUDA_ARCHITECTURES=$ARCHITECTURES" .
"$PYTHON312" -m pip download "${quiet[@]}" --no-deps -d wheelhouse "$JAX_TRITON"
if [[ ${1:-} == --triton ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  "$PYTHON312" -m pip download "${quiet[@]}" --no-deps --only-binary=:all: -d "$scratch" "$TRITON"
  "$PYTHON312" -m zipfile -e "$scratch"/triton-*.whl "$scratch/triton"
  (
    cd "$scratch/triton/triton"
    # What compiling for Hopper needs: the compiler without its symbols, and one assembler of three.
    chmod +x backends/nvidia/bin/*
    strip --strip-all _C/libtriton.so
    rm -rf _C/libproton.so backends/nvidia/lib/cupti backends/nvidia/bin/{ptxas-blackwell,nvdisasm,cuobjdump} \
      instrumentation plugins profiler
  )
  tar -C "$scratch/triton" -cJf "wheelhouse/$(basename "$scratch"/triton-*.whl .whl).tar.xz" .
fi
du -ch wheelhouse/* | sed 's/^/  /'

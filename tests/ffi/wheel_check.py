"""Builds the wheel and calls it on the oldest and the newest JAX, each in a clean environment.

    python tests/ffi/wheel_check.py

Builds with the oldest Python (>= 3.11) on PATH for the oldest supported JAX, and with the oldest one that has a stable
ABI (>= 3.12) for the newest JAX, where the newest Python on PATH runs it. Exits non-zero if a handler does not answer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST_JAX = "0.10.2"
MINORS = range(11, 15)

CHECK = """
import sys, jax, jax.numpy as jnp
from curvax import ffi
from curvax.kernels.tree_cg import cg_update
status = ffi.native_status()
assert status.available, status.reason
v = [jnp.arange(5000, dtype=jnp.float32) / 5000, jnp.ones((3, 4), jnp.float32)]
x, r, rr = jax.jit(lambda v: cg_update(jnp.float32(0.5), v, v, v, v, implementation="native"))(v)
expected = cg_update(jnp.float32(0.5), v, v, v, v, implementation="reference")[2]
assert abs(float(rr - expected)) < 1e-5 * float(expected), (rr, expected)
assert bool(jnp.allclose(x[0], 1.5 * v[0]))
print(f"ok: Python {sys.version.split()[0]}, jax {jax.__version__}, {status.reason}")
"""


def pythons() -> dict[int, str]:
    """Minor version -> interpreter, of those on PATH that start."""
    found = {}
    for minor in MINORS:
        path = shutil.which(f"python3.{minor}")
        if path and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
            found[minor] = path
    return found


def run(*command: str | Path) -> None:
    """Runs a command away from the source tree; stops on failure."""
    subprocess.run([str(part) for part in command], check=True, cwd=tempfile.gettempdir())


def check(builder: str, runner: str, jax: str, scratch: Path) -> None:
    """Builds a wheel with one Python, installs it with a JAX into another and calls a handler."""
    wheels = scratch / "wheels"
    run(builder, "-m", "venv", scratch / "build")
    run(scratch / "build/bin/pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", ROOT, "-w", wheels)
    (wheel,) = wheels.glob("curvax-*.whl")
    print(f"built {wheel.name}", flush=True)
    run(runner, "-m", "venv", scratch / "run")
    run(scratch / "run/bin/pip", "install", "--quiet", "--disable-pip-version-check", wheel, jax)
    run(scratch / "run/bin/python", "-W", "error", "-c", CHECK)


def main() -> int:
    """Checks both ends of the supported range."""
    found = pythons()
    stable = [minor for minor in found if minor >= 12]
    if not found:
        print("wheel-check needs a python3.11 or newer on PATH", file=sys.stderr)
        return 1
    ends = [(found[min(found)], found[min(found)], f"jax=={OLDEST_JAX}")]
    if stable:
        ends.append((found[min(stable)], found[max(stable)], "jax"))
    else:
        print("no Python 3.12 or newer on PATH: the newest JAX and the stable ABI are not checked", flush=True)
    for builder, runner, jax in ends:
        with tempfile.TemporaryDirectory() as scratch:
            check(builder, runner, jax, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Trains in several processes on one machine, as on several hosts.

    python examples/multihost --processes 2
    python examples/multihost --processes 4 --steps 40      goes on from the checkpoint of the first

Each process loads its own part of the data and holds its own part of every batch; the parameters are on all of them.
When a process ends before its time the others are ended too, with one sentence, within `--patience` seconds of it. The
next run goes on from the last checkpoint, with as many processes as it likes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import time

WORKER = pathlib.Path(__file__).with_name("worker.py")


def main() -> None:
    """Starts the processes and waits for all of them."""
    parser = argparse.ArgumentParser(prog="python examples/multihost", description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="how many; 32 examples are dealt out to them")
    parser.add_argument("--steps", type=int, default=20, help="steps in all, those of the checkpoint included")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("multihost_out"), help="the checkpoint's folder"
    )
    parser.add_argument("--patience", type=float, default=10.0, help="seconds from a loss to the end of the others")
    parser.add_argument("--die-at", type=int, help="the last process kills itself after this step, to see what happens")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    coordinator = port()
    sys.exit(watched([started(rank, chosen, coordinator) for rank in range(chosen.processes)], chosen.patience))


def port() -> int:
    """A free port for the coordinator."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def started(rank: int, chosen: argparse.Namespace, coordinator: int) -> subprocess.Popen[bytes]:
    """One process."""
    words = [coordinator, chosen.processes, rank, chosen.steps, chosen.out]
    if chosen.die_at is not None and rank == chosen.processes - 1:
        words.append(chosen.die_at)
    return subprocess.Popen([sys.executable, str(WORKER), *map(str, words)], env={**os.environ, "JAX_PLATFORMS": "cpu"})


def watched(processes: list[subprocess.Popen[bytes]], patience: float) -> int:
    """0 when all have ended well. When one has not, ends the others and says so."""
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        time.sleep(0.1)
    ended = {i: process.returncode for i, process in enumerate(processes) if process.returncode}
    end(processes, patience)
    if not ended:
        return 0
    # The others may have noticed already, and ended with an error of their own: a signal came first.
    lost = min(ended, key=lambda i: ended[i])
    print(
        f"process {lost} ended with code {ended[lost]}, and the others with it: run the same command again, with as "
        "many processes as there are, to go on from the last checkpoint.",
        file=sys.stderr,
    )
    return 1


def end(processes: list[subprocess.Popen[bytes]], patience: float) -> None:
    """Ends all processes: they would wait for the lost one. None lives longer than `patience`."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()

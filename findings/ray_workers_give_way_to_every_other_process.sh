#!/usr/bin/env bash
# ray 2.60.0: a worker runs at nice 15, so that beside any ordinary busy process on its core it hardly runs.
#
# Expected: tasks and actors have the priority of the program that calls ray.init(), as the processes of multiprocessing have.
# Happens: the raylet starts every worker with nice 15 (RAY_worker_niceness); num_cpus=1 reserves no core, it only counts. On a
#   core that an ordinary process keeps busy, Linux gives such a worker a small part of the time.
# Versions: ray 2.60.0 (seen 2026-11-29, Python 3.11, Linux).
# Why it matters: rollout workers that share a node with a data loader, a sandbox or another job become many times slower,
#   without any message; start_timeout and heartbeats are then blamed. RAY_worker_niceness=0 before ray.init() mends it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check ray==2.60.0 >/dev/null 2>&1
cat > shares.py <<'PY'
import multiprocessing
import os
import time

import ray

CORE = min(os.sched_getaffinity(0))


def busy(seconds):
    """Compute on one core for some seconds: the niceness, and the CPU time that was had."""
    os.sched_setaffinity(0, {CORE})
    start, end = time.process_time(), time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return os.nice(0), time.process_time() - start


def beside(seconds):
    """What a worker gets of a core beside a process of multiprocessing that computes as long."""
    ray.init(num_cpus=1, include_dashboard=False, logging_level="error", object_store_memory=80 * 2**20)
    work = ray.remote(num_cpus=1)(busy)
    ray.get(work.remote(0.1))  # the worker is there
    other = multiprocessing.get_context("spawn").Process(target=busy, args=(seconds + 4,))
    other.start()
    time.sleep(2)
    nice, used = ray.get(work.remote(seconds))
    other.join()
    ray.shutdown()
    return nice, used / seconds


if __name__ == "__main__":
    usual = beside(4)
    os.environ["RAY_worker_niceness"] = "0"
    told = beside(4)
    for words, (nice, share) in (("as it comes", usual), ("RAY_worker_niceness=0", told)):
        print(f"{words}: nice {nice}, {share:.0%} of the core")
    assert (usual[0], told[0]) == (15, 0)
    assert usual[1] < 0.5 * told[1]
PY
venv/bin/python shares.py 2>/dev/null

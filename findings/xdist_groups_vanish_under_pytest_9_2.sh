#!/usr/bin/env bash
# pytest 9.2.0 beside pytest-xdist 3.8.0: --dist loadgroup forms no groups, and says nothing.
#
# Expected: the tests of one @pytest.mark.xdist_group run on one worker, as pytest-xdist's documentation says of loadgroup.
# Happens: they are spread over all workers. xdist tells the group by writing "@group" behind `item._nodeid` in the worker;
#   pytest 9.2 keeps the id of a node elsewhere and no longer reads that attribute, so every test is a group of its own.
#   Under pytest 9.1.1 the same file keeps its groups. Exit status, summary and warnings are the same in both.
# Versions: pytest 9.2.0 and 9.1.1, pytest-xdist 3.8.0 (seen 2026-11-29, Python 3.11).
# Why it matters: groups are how tests share what exists once on a machine (a Ray cluster, an inference engine, a GPU, a
#   browser). Two workers then start it at the same time: a suite gets slower and fails now and then, far from the cause.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
cat > test_grouped.py <<'PY'
import os
import time

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("i", range(8))
def test_grouped(i):
    time.sleep(0.2)
    with open("workers.txt", "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
PY

workers() {  # how many workers ran the eight tests of the group under this version of pytest
    venv/bin/python -m pip install -q --disable-pip-version-check "pytest==$1" pytest-xdist==3.8.0 >/dev/null 2>&1
    rm -f workers.txt
    venv/bin/python -m pytest -q -n 2 --dist loadgroup -p no:cacheprovider >"log-$1.txt"
    sort -u workers.txt | wc -l
}

before=$(workers 9.1.1)
after=$(workers 9.2.0)
echo "workers that ran the tests of one group: pytest 9.1.1: $before, pytest 9.2.0: $after"
echo "what 9.2.0 printed: $(tail -n 1 log-9.2.0.txt)"
[ "$before" = 1 ] && [ "$after" = 2 ] && ! grep -qi warning log-9.2.0.txt

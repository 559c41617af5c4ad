#!/usr/bin/env bash
# uvloop 0.23.0: a timer fires up to 1.3 ms before its time; asyncio's own never does.
#
# Expected: what loop.call_later(seconds) calls is called when the seconds have passed by time.monotonic(), or later, as with asyncio's loop,
#   for which uvloop is a replacement.
# Happens: uvloop hands libuv whole milliseconds, rounded to the nearest, which count from the time at which the loop last looked at the clock.
#   Of a delay of 10.4 ms most timers come before it has passed, of others some do, by 0.6 to 1.3 ms.
# Versions: uvloop 0.23.0, Python 3.11 (seen 2026-12-01).
# Why it matters: servers of models, and what asks them, run on uvloop. Whoever is woken by a deadline's timer and then looks whether the
#   deadline has passed finds that it has not: a client of ours told a timeout of one try where the deadline of all of them was over.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check uvloop==0.23.0 >/dev/null 2>&1
cat > early.py <<'PY'
import asyncio
import sys
import time

import uvloop


async def timers(delay, count=200):
    """How many milliseconds after its time each of some timers came."""
    loop, late = asyncio.get_running_loop(), []
    for number in range(count):
        fired, begun = loop.create_future(), time.monotonic()
        loop.call_later(delay, fired.set_result, None)
        await fired
        late.append(1e3 * (time.monotonic() - begun - delay))
        until = time.monotonic() + 3e-4 * (number % 4)  # the next one begins at another part of a millisecond
        while time.monotonic() < until:
            pass
    return late


early = {}
for name, run in (("asyncio", asyncio.run), ("uvloop", uvloop.run)):
    for delay in (0.0104, 0.02, 0.0209):
        late = run(timers(delay))
        early[name, delay] = sum(each < -0.05 for each in late)
        print(f"{name:8} {1e3 * delay:5.1f} ms: {early[name, delay]:3} of {len(late)} too early, the first by {max(0, -min(late)):.2f} ms")
seen = not any(early["asyncio", delay] for delay in (0.0104, 0.02, 0.0209)) and early["uvloop", 0.0104] > 20
print("as described" if seen else "this has changed")
sys.exit(not seen)
PY
venv/bin/python early.py

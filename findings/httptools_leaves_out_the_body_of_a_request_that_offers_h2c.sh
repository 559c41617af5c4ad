#!/usr/bin/env bash
# A request that offers another protocol loses its body under uvicorn's faster parser, and keeps it under the other.
#
# Expected: an HTTP/1.1 request with "Upgrade: h2c" and a body is an ordinary request to a server that does not take up the offer (RFC 9110,
# section 7.8: a server may ignore it), so that an application sees the same body whichever of its two parsers uvicorn uses.
# Happens: with h11 the application reads the 17 bytes that were sent; with httptools it reads none, and is told that this is all.
# Versions: uvicorn 0.54.0, httptools 0.9.0, h11 0.16.0, Python 3.11 (uvicorn's issue 2722 tells of it).
# Why it matters: Java's own client offers h2c with the first request of a connection, and "uvicorn[standard]" chooses httptools by itself: an
# agent in Java asks a model's server, and is answered that its request has no body.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q uvicorn==0.54.0 httptools==0.9.0 h11==0.16.0
cat > "$folder/try.py" <<'PY'
import asyncio
import socket

import uvicorn

BODY = b'{"messages": [1]}'
REQUEST = (
    b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAAB\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


async def application(scope, receive, send):
    read, more = b"", True
    while more:
        message = await receive()
        read += message.get("body", b"")
        more = message.get("more_body", False)
    answer = str(len(read)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})


async def seen(parser):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, http=parser, ws="none", lifespan="off", log_level="error"))
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(REQUEST)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
    answer = int(await reader.readexactly(length))
    writer.close()
    server.should_exit = True
    await serving
    return answer


found = {parser: asyncio.run(seen(parser)) for parser in ("h11", "httptools")}
print(f"sent {len(BODY)} bytes; the application read", found)
assert found == {"h11": len(BODY), "httptools": 0}, "this has changed"
PY
"$folder/venv/bin/python" "$folder/try.py"

"""JSON posted over connections that are kept: what goes wrong on the way, and what is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from torchrl_chat import posting
from torchrl_chat.posting import Poster, PostError


@contextlib.asynccontextmanager
async def serving(answer):
    """A server that answers each request with the bytes that a function makes of its body and number; ``None`` hangs up."""
    seen = {"requests": 0, "connections": 0, "heads": []}

    async def connected(reader, writer):
        seen["connections"] += 1
        with contextlib.suppress(EOFError, OSError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split()[0])
                body = json.loads(await reader.readexactly(length))
                seen["requests"] += 1
                seen["heads"].append(head)
                out = answer(body, seen["requests"])
                if asyncio.iscoroutine(out):
                    out = await out
                if out is None:
                    break
                writer.write(out)
                if b"onnection: close" in out:
                    break
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    seen["url"] = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/ids?a=1"
    try:
        yield seen
    finally:
        server.close()


def plain(value, status=200, *headers):
    raw = json.dumps(value).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(raw)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def run(test):
    asyncio.run(asyncio.wait_for(test(), 60))


def test_many_at_once_get_their_own_answers_over_connections_that_are_kept():
    async def all_of_it():
        async with serving(lambda body, number: plain({"twice": 2 * body["n"]})) as server:
            poster = Poster(server["url"], {"X-Key": "k"})
            for _ in range(3):
                found = await asyncio.gather(*(poster.post({"n": n}) for n in range(20)))
                assert found == [{"twice": 2 * n} for n in range(20)]
            assert server["connections"] <= 20
            assert server["heads"][0].startswith(b"POST /ids?a=1 HTTP/1.1\r\nHost: 127.0.0.1:")
            assert b"\r\nX-Key: k\r\n" in server["heads"][0]
            await poster.aclose()
            assert await poster.post({"n": 4}) == {"twice": 8}

    run(all_of_it)


CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\n{"a\r\n4\r\n": 1\r\n1\r\n}\r\n0\r\nTrails: 1\r\n\r\n'
FORMS = {
    "chunks": CHUNKED,
    "until the end": b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"a": 1}',
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + plain({"a": 1}),
    "old": b'HTTP/1.0 200 OK\r\nconnection: close\r\nCONTENT-LENGTH:8\r\n\r\n{"a": 1}',
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_of_every_form_are_read(form):
    async def all_of_it():
        async with serving(lambda body, number: FORMS[form]) as server:
            poster = Poster(server["url"], retries=0)
            assert [await poster.post({}) for _ in range(3)] == [{"a": 1}] * 3

    run(all_of_it)


def test_no_content_is_not_waited_for():
    async def all_of_it():
        async with serving(
            lambda body, number: b"HTTP/1.1 204 X\r\n\r\n" if number == 1 else plain(number)
        ) as server:
            poster = Poster(server["url"], retries=0, timeout=30)
            with pytest.raises(ValueError, match="JSON|empty|Expecting|unexpected"):
                await asyncio.wait_for(poster.post({}), 10)
            assert await poster.post({}) == 2
            assert server["connections"] == 1

    run(all_of_it)


@pytest.mark.parametrize("first", [plain({}, 500), plain({}, 429, "Retry-After: 0.01"), None, b"no HTTP\r\n\r\n"])
def test_what_may_pass_is_tried_again(first):
    async def all_of_it():
        async with serving(lambda body, number: first if number < 3 else plain(number)) as server:
            assert await Poster(server["url"], pause=0.01).post({}) == 3
        async with serving(lambda body, number: first) as server:
            with pytest.raises((PostError, ConnectionError)):
                await Poster(server["url"], pause=0.01, retries=2).post({})
            assert server["requests"] == 3

    run(all_of_it)


@pytest.mark.parametrize("told", ["nan", "inf", "-1", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_server_that_does_not_say_how_long_in_seconds_is_waited_for_as_others_are(told):
    async def all_of_it():
        first = plain({}, 429, f"Retry-After: {told}")
        async with serving(lambda body, number: first if number == 1 else plain(number)) as server:
            assert await asyncio.wait_for(Poster(server["url"], pause=0.01).post({}), 10) == 2

    run(all_of_it)


def test_the_body_of_a_refusal_has_the_time_of_its_try(monkeypatch):
    waits = []

    async def wait(line, what, timeout, before=posting._Line.wait):
        waits.append(timeout)
        await before(line, what, timeout)

    monkeypatch.setattr(posting._Line, "wait", wait)

    async def all_of_it():
        async def in_two(reader, writer):
            with contextlib.suppress(EOFError, OSError):
                await reader.readuntil(b"\r\n\r\n")
                for part in (b"HTTP/1.1 503 X\r\nContent-Length: 2\r\n\r\n", b"{}"):
                    await asyncio.sleep(0.1)
                    writer.write(part)
                await reader.read()
            writer.close()

        server = await asyncio.start_server(in_two, "127.0.0.1", 0)
        poster = Poster(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", retries=0, timeout=30)
        with pytest.raises(PostError, match="503"):
            await anext(poster.stream({}))
        server.close()

    run(all_of_it)
    head, body = waits
    assert body < head - 0.09


def test_a_refusal_is_told_at_once():
    async def all_of_it():
        async with serving(lambda body, number: plain({"error": "no such model"}, 404)) as server:
            with pytest.raises(PostError, match="the server answered 404: .*no such model") as refused:
                await Poster(server["url"]).post({})
            assert (refused.value.status, server["requests"]) == (404, 1)

    run(all_of_it)


def test_a_request_that_is_given_up_leaves_its_connection_to_nobody():
    async def all_of_it():
        async def slow(body, number):
            await asyncio.sleep(body["wait"])
            return plain(body["wait"])

        async with serving(slow) as server:
            poster = Poster(server["url"], retries=0, timeout=5)
            await poster.post({"wait": 0})
            given_up = asyncio.ensure_future(poster.post({"wait": 0.2}))
            await asyncio.sleep(0.1)
            given_up.cancel()
            assert await poster.post({"wait": 0}) == 0
            with pytest.raises(TimeoutError):
                await Poster(server["url"], retries=0, timeout=0.05).post({"wait": 5})

    run(all_of_it)


def test_a_connection_that_the_server_closed_meanwhile_is_made_anew():
    async def all_of_it():
        async with serving(lambda body, number: None if number == 2 else plain(number)) as server:
            poster = Poster(server["url"], retries=0)
            assert [await poster.post({}), await poster.post({})] == [1, 3]

    run(all_of_it)


def test_what_is_no_address_is_refused():
    for url, headers in (("ftp://x", {}), ("http://", {}), ("http://x/", {"A": "b\r\nC: d"})):
        with pytest.raises(ValueError, match="address"):
            Poster(url, headers)


def chunked(*events, after=b"", last=b"0\r\n\r\n", done=True, headers=b""):
    data = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"] * done
    head = (
        b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n" + headers + b"\r\n"
    )
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in data) + last + after


@pytest.mark.parametrize(
    ("how", "connections"),
    [
        ({}, 1),
        ({"done": False}, 1),
        ({"headers": b"Connection: close\r\n"}, 4),
        ({"last": b""}, 4),  # the body does not end in time
        ({"after": chunked({"n": "of nobody"})}, 4),  # what nobody asked for is nobody's answer
    ],
)
def test_streams_follow_each_other_on_a_connection_that_was_read_to_its_end(how, connections):
    async def all_of_it():
        async with serving(lambda body, number: chunked({"n": body["n"]}, {"more": number}, **how)) as server:
            poster = Poster(server["url"], retries=0)
            for n in range(4):
                assert [event async for event in poster.stream({"n": n})] == [{"n": n}, {"more": n + 1}]
            assert server["connections"] == connections
            await poster.aclose()

    run(all_of_it)


def test_a_stream_that_comes_byte_by_byte_is_read_as_it_comes():
    async def all_of_it():
        async with serving(lambda body, number: chunked({"n": number}, headers=b"X: y\r\n")) as server:
            poster = Poster(server["url"], retries=0)
            opened, seen = poster._opened, []

            async def slowly():
                line = await opened()
                received, loop = line.data_received, asyncio.get_running_loop()

                def one_by_one(data):
                    if data:
                        received(data[:1])
                        seen.append(len(line._pieces))
                        loop.call_soon(one_by_one, data[1:])

                line.data_received = one_by_one
                return line

            poster._opened = slowly
            assert [[event async for event in poster.stream({})] for _ in range(2)] == [[{"n": 1}], [{"n": 2}]]
            assert server["connections"] == 1
            assert max(seen) == 1  # each piece was taken before the next one came

    run(all_of_it)


@pytest.mark.parametrize("how", ["post", "stream", "events"])
def test_a_request_has_a_deadline_over_all_its_tries(how):
    async def all_of_it():
        async def answer(body, number):
            if how == "events":
                return chunked(last=b"", done=False)
            return plain({}, 503)

        async with serving(answer) as server:
            poster = Poster(server["url"], retries=1000, pause=0.02, timeout=5, deadline=0.3)
            ends = poster.post({}) if how == "post" else anext(poster.stream({}))
            with pytest.raises(TimeoutError, match=r"no reply within 0\.3 s, with all tries"):
                await ends
            assert (server["requests"] > 1) == (how != "events")

    run(all_of_it)


def test_the_deadline_counts_a_connection_that_was_lost_on_the_way():
    async def all_of_it():
        async def answer(body, number):
            await asyncio.sleep(0 if number == 1 else 0.3)
            return None if number == 2 else plain(number)

        async with serving(answer) as server:
            poster = Poster(server["url"], retries=0, deadline=0.45)
            assert await poster.post({}) == 1
            with pytest.raises(TimeoutError, match=r"no reply within 0\.45 s"):
                await poster.post({})

    run(all_of_it)


def test_a_stream_that_never_ends_has_a_deadline_too_and_is_read_no_faster_than_it_is_taken():
    """The server writes as fast as it can; whoever reads is slower."""

    async def all_of_it():
        written = 0

        async def flood(reader, writer):
            nonlocal written
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            event = b"data: " + json.dumps({"x": "y" * 10_000}).encode() + b"\n\n"
            with contextlib.suppress(OSError):
                while True:
                    writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                    await writer.drain()
                    written += len(event)

        server = await asyncio.start_server(flood, "127.0.0.1", 0)
        poster = Poster(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", deadline=0.5)
        taken = 0

        async def slowly():
            nonlocal taken
            async for _ in poster.stream({}):
                taken += 1
                await asyncio.sleep(0.01)

        with pytest.raises(TimeoutError, match=r"no reply within 0\.5 s"):
            await slowly()
        assert 0 < taken <= 51
        assert written < 2**25  # the buffers of the kernel, and ours
        server.close()

    run(all_of_it)


@pytest.mark.parametrize("after", [b"fffffff\r\n", b"no size\r\n"], ids=["one chunk", "no HTTP"])
def test_what_nobody_takes_is_not_held(after):
    """Behind the first event comes a chunk without end, or what is none."""

    async def all_of_it():
        written = 0

        async def flood(reader, writer):
            nonlocal written
            await reader.readuntil(b"\r\n\r\n")
            head, last = chunked({"n": 1}, last=b"", done=False), b"x" * 100_000
            writer.write(head + after)
            with contextlib.suppress(OSError):
                while not writer.is_closing():
                    writer.write(last)
                    await writer.drain()
                    written += len(last)

        server = await asyncio.start_server(flood, "127.0.0.1", 0)
        poster = Poster(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        events = poster.stream({})
        assert await anext(events) == {"n": 1}
        await asyncio.sleep(0.5)
        assert written < 2**25  # the buffers of the kernel, and ours
        await events.aclose()
        server.close()

    run(all_of_it)


def test_an_answer_that_is_no_stream_keeps_its_connection_too():
    async def all_of_it():
        async with serving(lambda body, number: plain(body["n"])) as server:
            poster = Poster(server["url"], retries=0)
            assert [[event async for event in poster.stream({"n": n})] for n in range(3)] == [[0], [1], [2]]
            assert server["connections"] == 1
            await poster.aclose()

    run(all_of_it)


@pytest.mark.parametrize("deadline", [0.2, 30.0])
def test_an_answer_that_is_no_stream_may_come_in_parts(deadline):
    async def all_of_it():
        async def parts(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            raw = plain({"n": "x" * 1000})
            for at in range(0, len(raw), 200):
                writer.write(raw[at : at + 200])
                await asyncio.sleep(0.05)

        server = await asyncio.start_server(parts, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        events = Poster(url, retries=0, timeout=10, deadline=deadline).stream({})
        if deadline < 1:
            with pytest.raises(TimeoutError, match=r"no reply within 0\.2 s, with all tries"):
                await anext(events)
        else:
            assert [event async for event in events] == [{"n": "x" * 1000}]
        server.close()

    run(all_of_it)


def test_whoever_stops_reading_a_stream_hangs_up():
    async def all_of_it():
        async with serving(lambda body, number: chunked({"n": 1}, {"n": 2}, last=body["last"].encode())) as server:
            poster = Poster(server["url"], retries=0)
            for last, connections in (
                ("", 1),
                ("", 2),
                ("0\r\n\r\n", 3),
                ("", 3),
            ):  # the third was there as a whole
                events = poster.stream({"last": last})
                assert await anext(events) == {"n": 1}
                await events.aclose()
                assert server["connections"] == connections

    run(all_of_it)


def test_a_stream_on_a_connection_that_the_server_closed_meanwhile_begins_anew():
    async def all_of_it():
        async with serving(lambda body, number: None if number == 2 else chunked({"n": number})) as server:
            poster = Poster(server["url"], retries=0)
            assert [[event async for event in poster.stream({})] for _ in range(2)] == [[{"n": 1}], [{"n": 3}]]
            assert (server["requests"], server["connections"]) == (3, 2)

    run(all_of_it)


def test_connections_that_the_server_has_closed_are_not_kept_for_ever(monkeypatch):
    """Of many streams at once; the next one lets go of those that are of no use."""

    async def all_of_it():
        async with serving(lambda body, number: chunked({"n": number})) as server:
            poster = Poster(server["url"], retries=0)

            async def whole():
                return [event async for event in poster.stream({})]

            await asyncio.gather(*(whole() for _ in range(5)))
            assert len(poster._idle) == server["connections"] == 5
            monkeypatch.setattr("torchrl_chat.posting._IDLE", 0.0)
            await whole()
            assert len(poster._idle) == 1
            await poster.aclose()

    run(all_of_it)

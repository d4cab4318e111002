"""What a client can do to a connection: dawdle, babble, pipeline, come in hundreds; and what HTTP has beside POST."""

import asyncio
import json
import logging
import socket
import time
from collections import Counter

import httpx
import pytest
from servers import served

from roberta_fast.serving import connections

JSON = {"content-type": "application/json"}
BODY = json.dumps({"inputs": "Old Marley was dead."}).encode()


def request(body=BODY, path="/embed", content_type="application/json", more=b""):
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + more + b"\r\n" + body


def connect(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def until_closed(connection):
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def sent(client, data):
    connection = connect(client)
    connection.sendall(data)
    return until_closed(connection)


def test_who_sends_no_head_is_not_waited_for(checkpoint, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.4)
    with served(model=checkpoint) as client:
        compute = client.service.batcher._compute
        client.service.batcher._compute = lambda feeds: (time.sleep(1.5), compute(feeds))[1]
        silent, dawdling, asking = connect(client), connect(client), connect(client)
        asking.sendall(request(more=b"Connection: close\r\n"))
        begun = time.monotonic()
        for byte in b"POST /emb":
            dawdling.sendall(bytes([byte]))
            time.sleep(0.02)
        assert until_closed(silent) == until_closed(dawdling) == b""
        assert 0.3 < time.monotonic() - begun < 1.4
        assert until_closed(asking).startswith(b"HTTP/1.1 200"), "whom the model keeps waiting is waited for"


def test_who_sends_no_body_is_told(checkpoint):
    with served(model=checkpoint, timeout=0.5) as client:
        begun = time.monotonic()
        answer = sent(client, request()[:-5])
        assert answer.startswith(b"HTTP/1.1 408") and b"no whole body within 0.5 seconds" in answer
        assert b'"error_type":"timeout"' in answer and time.monotonic() - begun < 3
        assert client.service.batcher.admitted_requests == 0


def test_pipelined_requests_are_answered_in_turn(server):
    texts = [f"text {'and more ' * i}" for i in range(5)]
    bodies = [json.dumps({"inputs": text}).encode() for text in texts]
    data = b"".join(request(body) for body in bodies[:-1]) + request(bodies[-1], more=b"Connection: close\r\n")
    answer = sent(server("embedding"), data)
    got = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    alone = [server("embedding").post("/embed", json={"inputs": text}).json() for text in texts]
    assert [len(vectors) for vectors in got] == [1] * 5
    assert all(a[0] == pytest.approx(b[0], abs=1e-5) for a, b in zip(got, alone, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03secret\r\n\r\n",
        b"GET /secret\r\n\r\n",
        b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\nsecret",
        b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nsecret",
        b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nsecret\r\n",
        b"GET /secret HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000,
    ],
    ids=["TLS", "HTTP/0.9", "negative length", "two lengths", "no chunk", "long header"],
)
def test_what_is_not_http_is_refused_and_not_logged(server, data, caplog):
    with caplog.at_level(logging.DEBUG):
        try:
            answer = sent(server("embedding"), data)
        except ConnectionError:  # closed while there was more to read
            answer = b"HTTP/1.1 400"
    assert answer.startswith(b"HTTP/1.1 400") and "secret" not in caplog.text
    assert server("embedding").get("/health").status_code == 200


def test_websockets_are_not_spoken(server, caplog):
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade, close\r\nSec-WebSocket-Key: YQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with caplog.at_level(logging.DEBUG):
        answer = sent(server("embedding"), b"GET /secret HTTP/1.1\r\nHost: a\r\n" + upgrade)
    assert answer.startswith(b"HTTP/1.1 404") and "secret" not in caplog.text


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=a", 415),
        ("", 415),
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
    ],
)
def test_content_types(server, content_type, status):
    response = server("embedding").post("/embed", content=BODY, headers={"content-type": content_type})
    assert response.status_code == status
    if status == 415:
        assert response.json() == {"error": "Content-Type must be application/json", "error_type": "validation"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"inputs": NaN}', 422, "inputs"),
        (b'{"inputs": "a", "dimensions": -Infinity}', 422, "dimensions"),
        (b'{"inputs": "a", "dimensions": ' + b"9" * 5000 + b"}", 400, "parsing"),
        (b'{"inputs": ' * 20_000, 400, "pars"),
        (b'{"inputs": "\xff\xfe"}', 400, "pars"),
        (b'{"inputs": "a"} {}', 400, "not JSON"),
        (b'{"inputs": 1, "inputs": "the last of a name counts"}', 200, ""),
    ],
    ids=["NaN", "infinity", "digits", "nesting", "UTF-8", "two values", "a name twice"],
)
def test_json_at_its_edges(server, body, status, message):
    response = server("embedding").post("/embed", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status and (status == 200 or message in response.json()["error"])


def test_probes_by_head_and_paths_that_are_not(server):
    client = server("embedding")
    for path in ("/", "/health", "/ready"):
        response = client.head(path)
        assert response.status_code == 200 and response.content == b""
    for method, path, status in (
        ("POST", "/embed/", 404),
        ("OPTIONS", "/embed", 405),
        ("HEAD", "/none", 404),
        ("GET", "/a//", 404),
    ):
        response = client.request(method, path, headers={"host": "elsewhere"})
        assert response.status_code == status and "location" not in response.headers


def test_errors_before_a_route_have_openai_s_form_too(checkpoint):
    with served(model=checkpoint, api_key="correct-horse", max_request_bytes=100) as client:
        response = client.post("/v1/embeddings", json={"input": "a"})
        assert response.json() == {"message": "a valid bearer token is required", "code": 401, "type": "unauthorized"}
        response = client.post("/v1/embeddings", json={"input": "a" * 200}, headers={"authorization": "Bearer correct-horse"})
        assert (response.status_code, response.json()["code"], response.json()["type"]) == (413, 413, "validation")


def test_hundreds_at_a_time_are_answered_or_refused(checkpoint):
    async def ask_all(client, count):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as many:
            return await asyncio.gather(*(many.post("/embed", content=BODY, headers=JSON) for _ in range(count)))

    with served(model=checkpoint, max_queue=30) as client:
        answers = asyncio.run(ask_all(client, 150))
        assert client.get("/ready").status_code == 200 and client.service.batcher.admitted_requests == 0
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() <= {200, 429} and statuses[200] >= 30
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)

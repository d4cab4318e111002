"""What arrives at a server: bad input, too much of it, clients that leave, and many at a time."""

import asyncio
import contextlib
import http.client
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from servers import served

JSON = {"content-type": "application/json"}
QUESTION = {"question": "Who?", "context": "Marley was dead."}


def with_parameters(**parameters):
    return {"inputs": QUESTION, "parameters": parameters}


@pytest.mark.parametrize(
    ("task", "path", "body", "status", "error_type", "message"),
    [
        ("embedding", "/embed", b"", 400, "validation", "the body is not JSON"),
        ("embedding", "/embed", b"{", 400, "validation", "the body is not JSON"),
        ("embedding", "/embed", b"\xff\xfe", 400, "validation", "the body is not JSON"),
        ("embedding", "/embed", b"[" * 100_000, 400, "validation", "pars"),
        ("embedding", "/embed", b"null", 422, "validation", ""),
        ("embedding", "/embed", {"inputs": 1}, 422, "validation", "inputs: Input should be a valid string"),
        ("embedding", "/embed", {"inputs": [["a"]]}, 422, "validation", "inputs.0: Input should be a valid string"),
        ("embedding", "/", {"inputs": ["a", 1]}, 422, "validation", "inputs.1: Input should be a valid string"),
        ("embedding", "/", {"inputs": "a", "Colour": 1}, 422, "validation", "Colour: Extra inputs are not permitted"),
        ("embedding", "/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "empty", "`sentences`"),
        ("embedding", "/embed", {"inputs": "a", "normalize": "yes"}, 422, "validation", "normalize: Input should be"),
        ("embedding", "/embed", {"inputs": "a", "colour": 1}, 422, "validation", "colour: Extra inputs are not permitted"),
        ("embedding", "/embed", {"inputs": "a", "prompt_name": "q"}, 422, "tokenizer", "prompt_name must be one of []"),
        ("embedding", "/embed", {"inputs": "a", "dimensions": 385}, 413, "validation", "dimensions must be at most 384, got 385"),
        ("embedding", "/embed", b'{"inputs": "a\\ud800b"}', 422, "tokenizer", "text 0 holds a lone surrogate at character 1"),
        ("embedding", "/embed", b'{"inputs": "a", "\\ud800": 1}', 422, "validation", "unicode string"),
        ("embedding", "/embed", {"inputs": ""}, 400, "empty", "`inputs` cannot be empty"),
        ("embedding", "/embed", {"inputs": ["a", " \n"]}, 400, "empty", "`inputs` cannot be empty"),
        ("embedding", "/embed", {"inputs": []}, 400, "empty", "`inputs` cannot be empty"),
        ("embedding", "/embed", {"inputs": ["a"] * 33}, 413, "validation", "batch size 33 > maximum allowed batch size 32"),
        ("embedding", "/embed", b'"' + b"a" * 2_000_001 + b'"', 413, "validation", "larger than 2000000 bytes"),
        ("question-answering", "/question", {"question": "Who?"}, 422, "validation", "context: Field required"),
        ("question-answering", "/question", QUESTION | {"context": " "}, 400, "empty", "`context` cannot be empty"),
        ("question-answering", "/question", QUESTION | {"context": None}, 422, "validation", "context: Input"),
        ("question-answering", "/question", QUESTION | {"context": "word " * 120_000}, 413, "validation", "over 65536 tokens"),
        ("question-answering", "/question-answering", with_parameters(top_k=0), 422, "validation", "top_k"),
        ("question-answering", "/question-answering", with_parameters(max_seq_len=513), 413, "validation", "512"),
        ("question-answering", "/", {"inputs": [{"question": "a"}]}, 422, "validation", "inputs.0.context: Field required"),
        ("question-answering", "/question-answering", {"inputs": []}, 400, "empty", "cannot be empty"),
        ("text-classification", "/predict", {"inputs": ["a", "b", "c"]}, 422, "validation", "inputs"),
        ("text-classification", "/rerank", {"query": "a", "texts": []}, 424, "backend", "not a re-ranker"),
    ],
)  # fmt: skip
def test_bad_requests(server, task, path, body, status, error_type, message):
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = server(task).post(path, content=content, headers=JSON)
    assert response.status_code == status, response.text
    assert response.json()["error_type"] == error_type and message in response.json()["error"]


@pytest.mark.parametrize("text", ["a\x00b", "\x01\x1b[31m\x7f", "\ufeff\u202e\u200b x", "\U0010ffff\ufffe", "é" * 200, "🏴‍☠️"])
def test_odd_text_is_text(server, text):
    assert len(server("embedding").post("/embed", json={"inputs": text}).json()[0]) == 384
    answer = server("question-answering").post("/question", json={"question": text, "context": "x " + text}).json()
    assert ("x " + text)[answer["start"] : answer["end"]] == answer["answer"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/embed", 405), ("DELETE", "/", 405), ("POST", "/none", 404)])
def test_other_methods_and_paths(server, method, path, status):
    response = server("embedding").request(method, path)
    assert response.status_code == status and set(response.json()) == {"error", "error_type"}


def chunked(client, size, path="/embed"):
    """The status of a body sent in chunks, its length untold."""
    connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
    parts = (b'{"inputs": "' + b"a" * 60_000 if i == 0 else b"a" * 60_000 for i in range(size // 60_000))
    try:
        # The answer may come, and the connection close, before all of the body is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, body=parts, headers=JSON, encode_chunked=True)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_a_chunked_body_is_limited_too(server):
    status, body = chunked(server("embedding"), 2_040_000)
    assert (status, body["error_type"]) == (413, "validation") and "larger than 2000000 bytes" in body["error"]


def test_bearer_token(checkpoint):
    with served(model=checkpoint, api_key="correct-horse") as client:
        body = {"inputs": "text"}
        for header in (
            None,
            "correct-horse",
            "Bearer correct-hors",
            "Bearer correct-horses",
            "Bearer",
            "Basic correct-horse",
            "é",
        ):
            headers = {} if header is None else {b"authorization": header.encode()}
            response = client.post("/embed", json=body, headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer", header
            assert response.json() == {"error": "a valid bearer token is required", "error_type": "unauthorized"}
        assert client.post("/embed", json=body, headers={"authorization": "Bearer correct-horse"}).status_code == 200
        assert [client.get(path).status_code for path in ("/", "/health", "/ready")] == [200] * 3
        assert [client.get(path).status_code for path in ("/info", "/metrics", "/openapi.json", "/docs")] == [401] * 4
        assert client.post("/", json=body).status_code == 401


@pytest.fixture
def slow_server(checkpoint):
    """A server whose model takes as long as the test holds ``client.gate`` closed, and one sequence a batch."""
    with served(model=checkpoint, max_batch_requests=1, max_queue=4, timeout=2.0) as client:
        compute, client.gate, client.computed = client.service.engine.outputs, threading.Event(), []

        def gated(feeds):
            client.gate.wait(10)
            client.computed.append(len(feeds[0].input_ids))
            return compute(feeds)

        client.service.batcher._compute = gated
        client.gate.set()
        yield client
        client.gate.set()


def waits(condition, seconds=5):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_a_client_that_leaves_is_not_computed_for(slow_server):
    slow_server.gate.clear()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(slow_server.post, "/embed", json={"inputs": "one"})
        waits(lambda: slow_server.service.batcher.admitted_requests == 1)
        with pytest.raises(httpx.ReadTimeout):
            slow_server.post("/embed", json={"inputs": "one two three four five"}, timeout=0.3)
        waits(lambda: slow_server.service.batcher.admitted_requests == 1)
        slow_server.gate.set()
        assert first.result().status_code == 200
    assert slow_server.post("/embed", json={"inputs": "one two"}).status_code == 200
    assert slow_server.computed == [3, 4]
    assert "roberta_fast_disconnects_total 1.0" in slow_server.get("/metrics").text


def test_deadlines_and_overload(slow_server):
    slow_server.gate.clear()
    with ThreadPoolExecutor(8) as threads:
        begun = time.monotonic()
        posted = [threads.submit(slow_server.post, "/embed", json={"inputs": "one"}) for _ in range(7)]
        answers = [post.result() for post in posted]
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [429] * 3 + [504] * 4 and 1.9 < time.monotonic() - begun < 6
    shed = next(answer for answer in answers if answer.status_code == 429)
    assert shed.json() == {"error": "Model is overloaded", "error_type": "overloaded"} and int(shed.headers["retry-after"]) >= 1
    late = next(answer for answer in answers if answer.status_code == 504)
    assert late.json() == {"error": "not computed within 2 seconds", "error_type": "timeout"}
    slow_server.gate.set()
    assert slow_server.post("/embed", json={"inputs": "one"}).status_code == 200
    waits(lambda: slow_server.service.batcher.waiting_tokens == 0)


def test_a_request_that_fails_leaves_its_neighbours_alone(slow_server, caplog):
    compute = slow_server.service.batcher._compute

    def failing(feeds):
        if any(len(feed.input_ids) == 6 for feed in feeds):
            raise RuntimeError("about: secret words of a user")
        return compute(feeds)

    slow_server.service.batcher._compute = failing
    slow_server.service.batcher.max_batch_requests = None
    slow_server.gate.clear()
    with ThreadPoolExecutor(4) as threads, caplog.at_level(logging.DEBUG):
        texts = ["one", "one two", "secret words of user", "one two three"]
        posted = [threads.submit(slow_server.post, "/embed", json={"inputs": text}) for text in texts]
        waits(lambda: slow_server.service.batcher.admitted_requests == 4)
        slow_server.gate.set()
        assert [post.result().status_code for post in posted] == [200, 200, 424, 200]
        assert posted[2].result().json() == {"error": "Inference failed: RuntimeError", "error_type": "backend"}
    assert "secret" not in caplog.text and "RuntimeError" in caplog.text


def test_an_unexpected_error_is_logged_without_the_user_s_text(checkpoint, caplog):
    with served(model=checkpoint) as client:

        def broken(*arguments):
            raise KeyError(f"no {arguments}")

        client.service.batcher.run = broken
        with caplog.at_level(logging.DEBUG):
            response = client.post("/embed", json={"inputs": "secret words"})
        assert response.status_code == 500 and response.json() == {"error": "internal error", "error_type": "backend"}
        assert "POST /embed failed: KeyError" in caplog.text and "no (" not in caplog.text


@pytest.mark.parametrize("deterministic", [False, True], ids=["float32", "deterministic"])
def test_answers_under_load_are_those_alone(model_folder, sentences, deterministic):
    """Many clients at a time with texts of all lengths: bitwise the same answers in deterministic mode, close to them else."""
    from roberta_fast import dispatch

    if deterministic and dispatch.load_cpp():
        pytest.skip("deterministic mode on CPU needs the C++ extension")
    contexts = [" ".join(sentences[i : i + 1 + i % 9]) for i in range(30)]
    bodies = [{"question": "Who was dead?", "context": context} for context in contexts]

    async def ask_all(client):
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
            return await asyncio.gather(*(many.post("/question", json=body) for body in bodies))

    with served(model=model_folder("question-answering"), deterministic=deterministic, max_batch_tokens=1500) as client:
        alone = [client.post("/question", json=body).json() for body in bodies]
        together = [response.json() for response in asyncio.run(ask_all(client))]
        batches = client.get("/metrics").text
    count = next(line for line in batches.splitlines() if line.startswith("roberta_fast_batch_sequences_count"))
    assert float(count.split()[1]) < 30 + 25, "they were batched"
    if deterministic:
        assert together == alone
    else:
        assert [a["score"] for a in together] == pytest.approx([a["score"] for a in alone], rel=1e-3)

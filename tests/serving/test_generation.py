"""Generated texts: those of the model itself, the same in any batch, ended where they should be, and sent as they are made."""

import itertools
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from servers import served
from transformers import AutoModelForCausalLM, AutoTokenizer, EncoderDecoderModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from roberta_fast.serving import generation
from roberta_fast.serving.decoding import Continuation, Sampling
from roberta_fast.serving.engine import Engine, Feed
from roberta_fast.serving.schemas import TextGenerationParameters, TranslationParameters
from roberta_fast.serving.settings import Settings

TASKS = ("translation", "text-generation")
TEXTS = ["Marley was dead, to begin with.", "Scrooge", "There is no doubt whatever about that.", "Old Marley was as dead as"]


@pytest.fixture(scope="module")
def engine(model_folder):
    """engine(task, **settings), each once."""
    made = {}

    def get(task, **settings):
        key = (task, *settings.items())
        if key not in made:
            made[key] = Engine(Settings(model_folder(task), threads=1, **settings))
        return made[key]

    return get


def feeds_of(engine, **options):
    if engine.task == "translation":
        return generation.translate(engine, TEXTS, TranslationParameters(**options)).feeds
    return generation.generate(engine, TEXTS, TextGenerationParameters(**options)).feeds


def ids_of(engine, feeds):
    return [made.ids for made in engine.compute(feeds)]


def greedy(folder, task, feed, count):
    """By the stock model, which reads everything anew for each token, without padding, cache or positions of ours."""
    ids = torch.tensor([feed.input_ids])
    if task == "text-generation":
        model, made = AutoModelForCausalLM.from_pretrained(folder).eval(), ids
        step = lambda made: model(made)
    else:
        model = EncoderDecoderModel.from_pretrained(folder).eval()
        made = torch.tensor([[model.generation_config.decoder_start_token_id]])
        step = lambda made: model(input_ids=ids, decoder_input_ids=made)
    begun = made.shape[1]
    with torch.inference_mode():
        for _ in range(count):
            made = torch.cat([made, step(made).logits[:, -1:].argmax(-1)], 1)
    return made[0, begun:].tolist()


@pytest.mark.parametrize("prepack", [False, True], ids=["", "prepack"])
@pytest.mark.parametrize("task", TASKS)
def test_texts_are_the_model_s_own(engine, model_folder, task, prepack):
    ours = engine(task, prepack=prepack)
    feeds = feeds_of(ours, max_new_tokens=10, num_beams=1)
    own = [greedy(model_folder(task), task, feed, 10) for feed in feeds]
    assert ids_of(ours, feeds) == own and len({tuple(ids) for ids in own}) == len(TEXTS)
    assert [ids_of(ours, [feed]) for feed in feeds] == [[ids] for ids in own]


@pytest.mark.parametrize("task", TASKS)
def test_beams_are_hugging_face_s_whatever_is_beside_them(engine, model_folder, task):
    ours = engine(task)
    beams = [feeds_of(ours, max_new_tokens=n, num_beams=beams) for n, beams in ((8, 3), (12, 3), (8, 2), (8, 1))]
    alone = [[ids_of(ours, [feed])[0] for feed in feeds] for feeds in beams]
    mixed = [feed for several in zip(*beams, strict=True) for feed in several]
    assert ids_of(ours, mixed) == [ids for several in zip(*alone, strict=True) for ids in several]
    assert alone[0] != alone[3], "beams find something else"
    if task == "translation":
        model = EncoderDecoderModel.from_pretrained(model_folder(task)).eval()
        for feed, ids in zip(beams[0], alone[0], strict=True):
            stock = model.generate(torch.tensor([feed.input_ids]), num_beams=3, max_new_tokens=8)
            assert stock[0, 1 : len(ids) + 1].tolist() == ids


@pytest.mark.parametrize("task", TASKS)
def test_deterministic_logits_have_the_same_bits_in_any_batch(engine, task):
    ours = engine(task, deterministic=True)
    feeds = feeds_of(ours, max_new_tokens=9, num_beams=1)
    for feed, made in zip(feeds, ours.compute(feeds), strict=True):
        np.testing.assert_array_equal(made.logprobs, ours.compute([feed])[0].logprobs)


def test_a_seed_draws_the_same_text_whatever_is_beside_it(engine):
    ours = engine("text-generation")
    sampled = [feeds_of(ours, max_new_tokens=12, do_sample=True, seed=seed, top_k=50) for seed in (1, 2)]
    beside = [*feeds_of(ours, max_new_tokens=12), *sampled[1], *sampled[0], *feeds_of(ours, max_new_tokens=5, temperature=0.7)]
    together = ids_of(ours, beside)[4:12]
    assert together == [ids_of(ours, [feed])[0] for feed in (*sampled[1], *sampled[0])]
    assert len({tuple(ids) for ids in together}) == 8


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (0.6, 5, None), (1.7, None, 0.8), (1.2, 6, 0.5)])
def test_tokens_are_drawn_by_hugging_face_s_shares(temperature, top_k, top_p):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    shares = TemperatureLogitsWarper(temperature)(None, logits[None])
    for wanted, warper in ((top_k, TopKLogitsWarper), (top_p, TopPLogitsWarper)):
        shares = warper(wanted)(None, shares) if wanted else shares
    sampling, generator = Sampling(0, temperature, top_k, top_p), torch.Generator().manual_seed(1)
    drawn = torch.bincount(torch.tensor([sampling.draw(logits, generator) for _ in range(6000)]), minlength=12) / 6000
    wanted = shares[0].softmax(0)
    assert torch.equal(drawn > 0, wanted > 0), "the same tokens are left"
    assert (drawn - wanted).abs().max() < 4 * math.sqrt(0.25 / 6000)


def test_rows_that_are_finished_leave_the_batch(engine):
    ours, sizes = engine("text-generation"), []
    hook = ours.model.register_forward_pre_hook(
        lambda module, a, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    try:
        feeds = [feed for n in (2, 5, 5, 9) for feed in feeds_of(ours, max_new_tokens=n)[n % 4 : n % 4 + 1]]
        order = [number for number, _ in ours.outputs(feeds)]
    finally:
        hook.remove()
    assert sizes == [4, 4, 3, 3, 3, 1, 1, 1, 1] and order[0] == 0 and order[-1] == 3


def test_why_texts_end(engine):
    ours = engine("text-generation")
    (plain, *_), feeds = ours.compute(feeds_of(ours, max_new_tokens=12)), feeds_of(ours, max_new_tokens=12)
    usual, ours.decoder.ends = ours.decoder.ends, frozenset({plain.ids[4]})
    try:
        made = ours.compute(feeds)[0]
    finally:
        ours.decoder.ends = usual
    first = plain.ids.index(plain.ids[4])
    assert (made.ids, made.reason) == (plain.ids[: first + 1], "eos_token") and plain.reason == "length"
    whole = generation.generate(ours, TEXTS[:1], TextGenerationParameters(max_new_tokens=12)).finish([plain])[0]["generated_text"]
    stop = whole[6:8]
    job = generation.generate(
        ours, TEXTS[:1], TextGenerationParameters(max_new_tokens=12, stop=["☃", stop], return_full_text=True)
    )
    (stopped,) = ours.compute(job.feeds)
    text = job.finish([stopped])[0]["generated_text"]
    assert text == TEXTS[0] + whole[: whole.index(stop) + len(stop)] and stopped.reason == "stop_sequence"
    assert len(stopped.ids) < 12


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_is_computed_for_those_who_left(engine, beams):
    ours, steps = engine("text-generation"), []
    feeds = feeds_of(ours, max_new_tokens=40, num_beams=beams)

    def leave(module, arguments):
        steps.append(1)
        if len(steps) == 5:
            for feed in feeds:
                feed.continuation.abandoned = True

    hook = ours.model.register_forward_pre_hook(leave)
    try:
        assert [made.reason for made in ours.compute(feeds)] == ["abandoned"] * 4
    finally:
        hook.remove()
    assert len(steps) <= 6


def test_what_was_heard_is_not_generated_again(engine):
    heard = []
    how = Continuation(3, hear=lambda ids, logprob, reason: heard.append((list(ids), reason)))
    feed = feeds_of(engine("text-generation"))[0]._replace(continuation=how)
    (made,) = engine("text-generation").compute([feed])
    assert heard == [(made.ids[:1], None), (made.ids[:2], None), (made.ids, "length")]
    with pytest.raises(RuntimeError, match="cannot be taken back"):
        engine("text-generation").compute([feed])


@pytest.mark.parametrize("beams", [1, 2])
def test_logits_that_are_not_finite_fail_their_own_text_alone(model_folder, beams):
    with served(model=model_folder("text-generation")) as client:
        table = client.service.engine.model.roberta.embeddings.word_embeddings.weight
        (broken,) = client.service.engine.tokenizer("Scrooge", add_special_tokens=False).input_ids[-1:]
        table.data[broken] = math.nan
        body = {"inputs": ["to be", "Scrooge"], "parameters": {"max_new_tokens": 4, "num_beams": beams}}
        assert client.post("/generate", json=body).json()["error"].startswith("Inference failed: ")
        posts = [client.post("/generate", json=body | {"inputs": text}) for text in body["inputs"]]
        assert [post.status_code for post in posts] == [200, 424]


def post(client, path, body, status=200):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def test_translate(server, model_folder):
    client = server("translation")
    folder = model_folder("translation")
    model, target = (
        EncoderDecoderModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder + "/decoder_tokenizer"),
    )
    source = AutoTokenizer.from_pretrained(folder)
    own = [model.generate(**source(text, return_tensors="pt"), max_length=None, max_new_tokens=24)[0] for text in TEXTS]
    assert [made["translation_text"] for made in post(client, "/translate", {"inputs": TEXTS})] == [
        target.decode(ids, skip_special_tokens=True) for ids in own
    ]
    options = {"max_new_tokens": 5, "num_beams": 1}
    (beside,) = post(client, "/translate", {"inputs": TEXTS[0], "parameters": options})
    (within,) = post(client, "/", {"inputs": TEXTS[0], "parameters": {"generate_parameters": options}})
    assert beside == within
    long = {"inputs": "word " * 500}
    assert "must have at most 128 tokens" in post(client, "/translate", long, 413)["error"]
    assert post(client, "/translate", long | {"parameters": {"truncation": "longest_first"}})
    through = InferenceClient(str(client.base_url).rstrip("/")).translation(TEXTS[0], generate_parameters=options)
    assert through.translation_text == beside["translation_text"]


def test_generate_and_its_details(server):
    client = server("text-generation")
    parameters = {"max_new_tokens": 6, "details": True, "temperature": 0.8}
    first = post(client, "/generate", {"inputs": TEXTS[0], "parameters": parameters})
    again = post(client, "/generate", {"inputs": TEXTS[0], "parameters": parameters | {"seed": first["details"]["seed"]}})
    assert first == again and first["details"]["finish_reason"] == "length"
    assert "".join(token["text"] for token in first["details"]["tokens"]) == first["generated_text"]
    several = post(client, "/generate", {"inputs": TEXTS, "parameters": {"max_new_tokens": 6}})
    assert [post(client, "/", {"inputs": text, "parameters": {"max_new_tokens": 6}}) for text in TEXTS] == [
        [one] for one in several
    ]
    assert post(client, "/generate", {"inputs": "to " * 300, "parameters": {"truncate": 20, "max_new_tokens": 3}})


def events_of(response):
    return [json.loads(line.removeprefix("data:")) for line in response.iter_lines() if line]


def test_a_stream_s_tokens_make_the_text(server):
    client = server("text-generation")
    parameters = {"max_new_tokens": 30, "seed": 5, "do_sample": True, "stop": ["e"]}
    body = {"inputs": TEXTS[3], "parameters": parameters}
    whole = post(client, "/generate", body)["generated_text"]
    with client.stream("POST", "/generate", json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response)
    assert "".join(event["token"]["text"] for event in events) == whole == events[-1]["generated_text"]
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert all(event["generated_text"] is None for event in events[:-1])
    assert events[-1]["details"]["finish_reason"] == ("stop_sequence" if "e" in whole else "length")
    assert events[-1]["details"]["generated_tokens"] == len(events)
    paths = client.get("/openapi.json").json()["paths"]
    assert all("text/event-stream" in paths[path]["post"]["responses"]["200"]["content"] for path in ("/", "/generate"))


def test_huggingface_hub_s_client(server):
    client = InferenceClient(str(server("text-generation").base_url).rstrip("/"))
    whole = client.text_generation(TEXTS[0], max_new_tokens=7)
    assert "".join(client.text_generation(TEXTS[0], max_new_tokens=7, stream=True)) == whole
    detailed = client.text_generation(TEXTS[0], max_new_tokens=7, details=True, stop=["☃"], seed=1)
    assert detailed.generated_text == whole and detailed.details.generated_tokens == len(detailed.details.tokens) == 7
    events = list(client.text_generation(TEXTS[0], max_new_tokens=7, details=True, stream=True))
    assert events[-1].details.finish_reason == "length" and events[-1].generated_text == whole


@pytest.fixture
def slow_server(model_folder):
    """A server whose model takes at least 50 ms a token; ``steps`` grows with each."""
    with served(model=model_folder("text-generation"), timeout=1.0) as client:
        client.steps = []
        client.service.engine.model.register_forward_pre_hook(lambda *_: (client.steps.append(1), time.sleep(0.05))[0])
        yield client


def has_stopped(client):
    seen = len(client.steps)
    time.sleep(0.3)
    return len(client.steps) <= seen + 1


def test_deadlines_and_disconnections_end_a_text_between_tokens(slow_server):
    body = {"inputs": "Scrooge", "parameters": {"max_new_tokens": 100}}
    late = slow_server.post("/generate", json=body)
    assert late.status_code == 504 and len(slow_server.steps) < 30 and has_stopped(slow_server)
    with slow_server.stream("POST", "/generate", json=body | {"stream": True}) as response:
        events = events_of(response)
    assert events[-1] == {"error": "not computed within 1 seconds", "error_type": "timeout"} and len(events) > 5
    assert has_stopped(slow_server)
    with slow_server.stream("POST", "/generate", json=body | {"stream": True}) as response:
        list(itertools.islice(response.iter_lines(), 4))
    deadline = time.monotonic() + 5
    while "roberta_fast_disconnects_total 1.0" not in slow_server.get("/metrics").text and time.monotonic() < deadline:
        time.sleep(0.02)
    assert has_stopped(slow_server) and slow_server.service.batcher.admitted_requests == 0


def test_a_short_text_does_not_wait_for_a_long_one_beside_it(slow_server):
    """Both are queued behind a first one, whose only step is held until they are."""
    done, both_wait = {}, threading.Event()
    slow_server.service.engine.model.register_forward_pre_hook(lambda *_: both_wait.wait(5) and None)

    def ask(length):
        slow_server.post("/generate", json={"inputs": "Scrooge", "parameters": {"max_new_tokens": length}})
        done[length] = time.monotonic()

    threads = [threading.Thread(target=ask, args=(length,)) for length in (1, 2, 12)]
    threads[0].start()
    while not slow_server.steps:
        time.sleep(0.002)
    threads[1].start()
    threads[2].start()
    while slow_server.service.batcher.admitted_requests < 3:
        time.sleep(0.002)
    both_wait.set()
    for thread in threads:
        thread.join()
    assert done[12] - done[2] > 0.3 and len(slow_server.steps) == 13


@pytest.mark.parametrize(
    ("task", "body", "status", "message"),
    [
        ("text-generation", {"inputs": " "}, 400, "`inputs` cannot be empty"),
        ("text-generation", {"inputs": "a", "parameters": {"max_new_tokens": 129}}, 413, "must be at most 128, got 129"),
        ("text-generation", {"inputs": "to " * 60, "parameters": {"max_new_tokens": 100}}, 413, "text 0 must have at most 128"),
        ("text-generation", {"inputs": "a", "parameters": {"temperature": 0}}, 422, "temperature"),
        ("text-generation", {"inputs": "a", "parameters": {"do_sample": False, "top_k": 3}}, 422, "do_sample is false"),
        ("text-generation", {"inputs": "a", "parameters": {"num_beams": 2, "top_p": 0.5}}, 422, "num_beams must be 1"),
        ("text-generation", {"inputs": "a", "parameters": {"num_beams": 2, "stop": ["a"]}}, 422, "num_beams must be 1"),
        ("text-generation", {"inputs": "a", "parameters": {"num_beams": 9}}, 422, "num_beams"),
        ("text-generation", {"inputs": "a", "parameters": {"stop": [""]}}, 422, "stop"),
        ("text-generation", {"inputs": "a", "parameters": {"typical_p": 0.5}}, 422, "typical_p"),
        ("text-generation", {"inputs": ["a"], "stream": True}, 422, "a stream has one text"),
        ("text-generation", {"inputs": "to " * 200, "stream": True}, 413, "must have at most 128"),
        ("text-generation", b'{"inputs": "a", "parameters": {"temperature": Infinity}}', 422, "temperature"),
        ("text-generation", b'{"inputs": "a\\udfff", "stream": true}', 422, "lone surrogate"),
        ("translation", {"inputs": ["a"] * 33}, 413, "batch size 33"),
        ("translation", {"inputs": "a", "parameters": {"src_lang": "en"}}, 422, "src_lang"),
        ("translation", {"inputs": "a", "parameters": {"seed": 1, "generate_parameters": {}}}, 422, "generate_parameters"),
    ],
)  # fmt: skip
def test_bad_requests(server, task, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body)
    path = "/generate" if task == "text-generation" else "/translate"
    response = server(task).post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status and message in response.json()["error"], response.text


@pytest.mark.parametrize(
    ("folder", "task", "message"),
    [
        ("embedding", "text-generation", "looks ahead"),
        ("embedding", "translation", "is bert: not for --task translation"),
        ("translation", "text-generation", "is encoder-decoder: not for --task text-generation"),
    ],
)
def test_models_that_cannot_generate(model_folder, folder, task, message):
    with pytest.raises(ValueError, match=message):
        Engine(Settings(model_folder(folder), task=task, threads=1))


def test_feeds_count_what_they_may_come_to():
    assert Feed([1] * 10, None, (), Continuation(20)).cost == 30
    assert Feed([1] * 10, None, (), Continuation(20, num_beams=3)).cost == 90

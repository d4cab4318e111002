"""Each task's answers are those of the model itself, in the forms of those whose clients call."""

import base64
import itertools

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForQuestionAnswering, AutoTokenizer, pipeline

from roberta_fast.tasks import question_answering

QUESTION = "Whose ghost visits Scrooge?"
CONTEXT = (
    "A Christmas Carol is a novella by Charles Dickens. It recounts the story of Ebenezer Scrooge, an elderly miser who is "
    "visited by the ghost of his former business partner Jacob Marley. 👻 Cafe\u0301 “naïve”\r\n\tand more: "
)
LONG_CONTEXT = CONTEXT * 12


def post(client, path, body, status=200):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def own_answers(folder, context, **options):
    """By the stock model, a window at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    windows = question_answering.windows_of(tokenizer, [QUESTION], [context], 384, 96)
    with torch.inference_mode():
        outs = [model(torch.tensor([w.input_ids]), token_type_ids=torch.tensor([w.token_type_ids])) for w in windows]
    starts, ends = ([getattr(out, name)[0].numpy() for out in outs] for name in ("start_logits", "end_logits"))
    return question_answering.best_answers(context, windows, starts, ends, align_to_words=True, **options).answers


@pytest.mark.parametrize("context", [CONTEXT, LONG_CONTEXT], ids=["one window", "several windows"])
def test_question(server, model_folder, context):
    got = post(server("question-answering"), "/question", {"question": QUESTION, "context": context})
    wanted = own_answers(model_folder("question-answering"), context)[0]
    assert (got["answer"], got["start"], got["end"]) == wanted[:1] + wanted[2:4]
    assert got["answer"] == context[got["start"] : got["end"]] != ""
    assert got["score"] == pytest.approx(wanted.score, rel=1e-3)


def test_question_answering_with_parameters(server, model_folder):
    parameters = {"top_k": 4, "max_answer_len": 5, "handle_impossible_answer": True}
    body = {"inputs": {"question": QUESTION, "context": LONG_CONTEXT}, "parameters": parameters}
    got = post(server("question-answering"), "/question-answering", body)
    options = {"top_k": 4, "max_answer_length": 5, "handle_impossible_answer": True}
    wanted = own_answers(model_folder("question-answering"), LONG_CONTEXT, **options)
    assert [(a["answer"], a["start"]) for a in got] == [(a.answer, a.start) for a in wanted]
    batch = post(server("question-answering"), "/question-answering", {"inputs": [body["inputs"]] * 2, "parameters": parameters})
    assert len(batch) == 2 and [a["answer"] for a in batch[1]] == [a["answer"] for a in got]


def test_a_long_question_is_cut_only_on_request(server):
    question = "Who " + "really " * 400 + "wrote it?"
    inputs = {"question": question, "context": CONTEXT}
    error = post(server("question-answering"), "/question-answering", {"inputs": inputs}, 413)
    assert "a first text of 404 tokens leaves 0 places" in error["error"]
    post(server("question-answering"), "/question-answering", {"inputs": inputs, "parameters": {"max_question_len": 64}})


def test_predict(server, model_folder, sentences):
    client = server("text-classification")
    theirs = pipeline("text-classification", model=model_folder("text-classification"), top_k=None)
    for text in sentences[:4]:
        got, wanted = post(client, "/predict", {"inputs": text}), theirs([text])[0]
        assert [p["label"] for p in got] == [p["label"] for p in wanted]
        assert [p["score"] for p in got] == pytest.approx([p["score"] for p in wanted], abs=1e-4)
    pair = post(client, "/predict", {"inputs": sentences[:2]})
    wanted = theirs([{"text": sentences[0], "text_pair": sentences[1]}])[0]
    assert [p["score"] for p in pair] == pytest.approx([p["score"] for p in wanted], abs=1e-4)
    batch = post(client, "/predict", {"inputs": [sentences[:2], sentences[2:3]]})
    assert [p["label"] for p in batch[0]] == [p["label"] for p in pair] and len(batch) == 2
    assert batch[0][0]["score"] == pytest.approx(pair[0]["score"], abs=1e-5)
    raw = post(client, "/predict", {"inputs": sentences[0], "raw_scores": True})
    assert sum(p["score"] for p in raw) != pytest.approx(1, abs=1e-3)


def test_rerank(server, sentences):
    ranks = post(server("reranking"), "/rerank", {"query": "Who was dead?", "texts": sentences[:5], "return_text": True})
    scores = [rank["score"] for rank in ranks]
    assert scores == sorted(scores, reverse=True) and sorted(rank["index"] for rank in ranks) == list(range(5))
    assert all(rank["text"] == sentences[rank["index"]] for rank in ranks)
    alone = [post(server("reranking"), "/predict", {"inputs": ["Who was dead?", rank["text"]]})[0]["score"] for rank in ranks]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert (
        "model is not a re-ranker" in post(server("text-classification"), "/rerank", {"query": "a", "texts": ["b"]}, 424)["error"]
    )


@pytest.mark.parametrize("strategy", ["simple", "average", "none"])
def test_token_classification(server, model_folder, sentences, strategy):
    theirs = pipeline("token-classification", model=model_folder("token-classification"), aggregation_strategy=strategy)
    body = {"inputs": sentences[:6], "parameters": {"aggregation_strategy": strategy}}
    got = post(server("token-classification"), "/token-classification", body)
    for text, entities in zip(sentences, got, strict=False):
        assert [(e["start"], e["end"]) for e in entities] == [(e["start"], e["end"]) for e in theirs(text)]
        assert all(e["word"] == text[e["start"] : e["end"]] for e in entities)
    assert sum(map(len, got)) > 10


def test_token_classification_of_a_long_text(server, sentences):
    text = " ".join(sentences)[:9000]
    entities = post(server("token-classification"), "/token-classification", {"inputs": text})
    assert entities[-1]["end"] > 8000, "far behind one window"
    assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(entities))


def test_embed(server, checkpoint, sentences):
    client, texts = server("embedding"), sentences[:5]
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        means = torch.stack([model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in texts])
    got = np.array(post(client, "/embed", {"inputs": texts}))
    np.testing.assert_allclose(got, torch.nn.functional.normalize(means, dim=1).numpy(), atol=2e-6)
    np.testing.assert_allclose(post(client, "/embed", {"inputs": texts, "normalize": False}), means.numpy(), atol=2e-5)
    small = np.array(post(client, "/embed", {"inputs": texts, "dimensions": 8}))
    np.testing.assert_allclose(small, got[:, :8] / np.linalg.norm(got[:, :8], axis=1, keepdims=True), atol=1e-6)


def test_similarity_is_the_published_one(server):
    inputs = {"source_sentence": "A man is eating food.", "sentences": ["A man is eating a piece of bread."]}
    assert post(server("embedding"), "/similarity", {"inputs": inputs}) == [pytest.approx(0.755, abs=1e-3)]


def test_embeddings_in_openai_s_form(server, sentences):
    client, texts = server("embedding"), sentences[:2]
    plain = post(client, "/v1/embeddings", {"input": texts, "model": "any", "user": "me"})
    coded = post(client, "/v1/embeddings", {"input": texts, "encoding_format": "base64"})
    for a, b in zip(plain["data"], coded["data"], strict=True):
        assert np.frombuffer(base64.b64decode(b["embedding"]), dtype="<f4").tolist() == pytest.approx(a["embedding"], abs=1e-7)
    assert plain["usage"]["prompt_tokens"] > 10 and plain["model"] == "any" and plain["data"][1]["index"] == 1
    error = post(client, "/v1/embeddings", {"input": []}, 400)
    assert error == {"message": "`inputs` cannot be empty", "code": 400, "type": "empty"}


def test_texts_that_are_too_long(server, sentences):
    text = " ".join(sentences)
    error = post(server("embedding"), "/embed", {"inputs": ["short", text]}, 413)
    assert error["error_type"] == "validation" and "text 1 must have at most 256 tokens" in error["error"]
    right = post(server("embedding"), "/embed", {"inputs": text, "truncate": True})
    left = post(server("embedding"), "/embed", {"inputs": text, "truncate": True, "truncation_direction": "Left"})
    assert right != left
    same_beginning = post(server("embedding"), "/embed", {"inputs": text[:4000], "truncate": True})
    np.testing.assert_allclose(right, same_beginning, atol=1e-6)


def test_fill_mask(server, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder("fill-mask"))
    model = AutoModelForMaskedLM.from_pretrained(model_folder("fill-mask")).eval()
    text = "Old Marley was as [MASK] as a door-nail."
    batch = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        scores = model(**batch).logits[0, batch.input_ids[0].tolist().index(tokenizer.mask_token_id)].softmax(0)
    got = post(server("fill-mask"), "/fill-mask", {"inputs": text, "parameters": {"top_k": 3}})
    assert [word["token"] for word in got] == scores.topk(3).indices.tolist()
    assert [word["score"] for word in got] == pytest.approx(scores.topk(3).values.tolist(), rel=1e-3)
    assert got[0]["sequence"].startswith("old marley was as ") and got[0]["token_str"] in got[0]["sequence"]
    two = post(server("fill-mask"), "/fill-mask", {"inputs": [text, "[MASK] and [MASK]"]})
    assert len(two) == 2 and len(two[1]) == 2 and two[0][0]["token"] == got[0]["token"]
    only = post(server("fill-mask"), "/fill-mask", {"inputs": text, "parameters": {"targets": ["dead", "alive"]}})
    assert {word["token_str"] for word in only} == {"dead", "alive"}
    assert "must hold 1 to 16 times [MASK], got 0" in post(server("fill-mask"), "/fill-mask", {"inputs": "none"}, 422)["error"]


def test_huggingface_hub_s_client(server, sentences):
    def client(task):
        return InferenceClient(str(server(task).base_url).rstrip("/"))

    answer = client("question-answering").question_answering(question=QUESTION, context=CONTEXT)
    assert CONTEXT[answer.start : answer.end] == answer.answer != ""
    answers = client("question-answering").question_answering(question=QUESTION, context=CONTEXT, top_k=3)
    assert len(answers) == 3
    labels = client("text-classification").text_classification(sentences[0], top_k=2)
    assert len(labels) == 2 and labels[0].score >= labels[1].score
    entities = client("token-classification").token_classification(sentences[0], aggregation_strategy="simple")
    assert all(e.word == sentences[0][e.start : e.end] for e in entities)
    assert client("embedding").feature_extraction(sentences[0], normalize=True).shape == (1, 384)
    (score,) = client("embedding").sentence_similarity("A man is eating food.", ["A man is eating a piece of bread."])
    assert score == pytest.approx(0.755, abs=1e-3)
    assert len(client("fill-mask").fill_mask("A [MASK] text.")) == 5


def test_a_route_of_another_task(server):
    error = post(server("embedding"), "/predict", {"inputs": "text"}, 424)
    assert error == {"error": "model is not one for text-classification, but for embedding", "error_type": "backend"}


def test_probes_and_info(server):
    client = server("embedding")
    assert client.get("/health").status_code == 200 and client.get("/ready").json() == {"ready": True}
    info = client.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "mean"}} and info["max_input_length"] == 256
    assert server("reranking").get("/info").json()["model_type"]["reranker"]["id2label"] == {"0": "LABEL_0"}
    assert client.get("/openapi.json").json()["paths"].keys() >= {"/", "/embed", "/question", "/predict"}


def test_metrics_count(server):
    client = server("embedding")

    def counted(name):
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
        return float(lines.get(name, 0))

    names = (
        'roberta_fast_requests_total{path="/embed",status="200"}',
        'roberta_fast_requests_total{path="other",status="404"}',
        "roberta_fast_batch_tokens_sum",
    )
    before = [counted(name) for name in names]
    post(client, "/embed", {"inputs": "Old Marley"})
    client.get("/secret-words-of-a-client")
    assert [counted(name) - b for name, b in zip(names, before, strict=True)] == [1, 1, 4]
    assert "secret" not in client.get("/metrics").text and counted("roberta_fast_requests_in_flight") == 0

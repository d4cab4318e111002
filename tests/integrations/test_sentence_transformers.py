"""sentence-transformers: the published MiniLM and a cross-encoder embed, predict and train, accelerated, as they do stock."""

import copy
import importlib.resources
import importlib.util

import pytest
import torch
from model_trio import tiny_model
from transformers import AutoTokenizer, BertForSequenceClassification

from roberta_fast import accelerate_model, explain, patch_transformers, unpatch_transformers

st = pytest.importorskip("sentence_transformers", reason="the package sentence-transformers is not installed")
datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")

PAIR = ["A man is eating food.", "A man is eating a piece of bread."]
QUESTIONS = [
    "What does he eat?",
    "Where?",
    "Who was as dead as a door-nail, by the register that was signed?",
    "How is the weather?",
]
ANSWERS = ["A piece of bread.", "Under the bridge, where the boats lie.", "Old Marley.", "Fine, with clouds in the evening."]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def stock(checkpoint):
    return st.SentenceTransformer(checkpoint, device="cpu", config_kwargs=NO_DROPOUT)


@pytest.fixture
def fast(stock):
    return accelerate_model(copy.deepcopy(stock))


@pytest.fixture(scope="module")
def texts():
    return (importlib.resources.files("roberta_fast") / "sentences.txt").read_text().splitlines()[:16]


def test_embeddings_are_the_published_ones(fast):
    assert fast.similarity(*fast.encode(PAIR)).item() == pytest.approx(0.755, abs=5e-4)
    assert explain(fast).fallbacks == ()


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_encode(batch_size, fast, stock, texts):
    ours, theirs = (model.encode(texts, batch_size=batch_size, convert_to_tensor=True) for model in (fast, stock))
    assert torch.allclose(ours, theirs, atol=2e-6)
    assert explain(fast).stock_calls == {}


def test_encode_tokens(fast, stock, texts):
    """Embeddings of single tokens come without padding, whose values differ."""
    ours, theirs = (model.encode(texts[:9], output_value="token_embeddings") for model in (fast, stock))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-5)


def test_saved_and_loaded(fast, stock, texts, tmp_path):
    fast.save_pretrained(str(tmp_path))
    loaded = st.SentenceTransformer(str(tmp_path), device="cpu")
    assert type(loaded[0].auto_model.encoder).__module__.startswith("transformers.")
    assert (loaded.encode(texts[:5]) == stock.encode(texts[:5])).all()


def test_patch_transformers_reaches_new_models(checkpoint, stock, texts):
    patch_transformers(["bert"])
    try:
        model = st.SentenceTransformer(checkpoint, device="cpu")
    finally:
        unpatch_transformers()
    assert explain(model).layers == 6
    assert abs(model.encode(texts[:5]) - stock.encode(texts[:5])).max() < 2e-6


@pytest.mark.slow
def test_encode_in_a_pool_of_processes(fast, stock, texts):
    pool = fast.start_multi_process_pool(["cpu"])
    try:
        assert abs(fast.encode(texts, pool=pool) - stock.encode(texts)).max() < 2e-6
    finally:
        fast.stop_multi_process_pool(pool)


def loss_curve(folder, trainer_class, arguments_class, model, data, loss, **overrides):
    """The loss at each of three steps."""
    arguments = arguments_class(
        str(folder), max_steps=3, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-4, warmup_steps=0,
        use_cpu=True, disable_tqdm=True, save_strategy="no", seed=1, **overrides,
    )  # fmt: skip
    trainer = trainer_class(model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(data), loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(fast, stock, tmp_path):
    data = {"anchor": QUESTIONS * 2, "positive": ANSWERS * 2}
    curves = []
    for model in (fast, copy.deepcopy(stock)):
        loss = st.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
        curves.append(
            loss_curve(tmp_path, st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments, model, data, loss)
        )
    assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert len(set(curves[0])) == 3, "the steps must change the model"
    assert explain(fast).stock_calls == {} and explain(fast).fallbacks == ()
    assert abs(fast.encode(ANSWERS) - stock.encode(ANSWERS)).max() > 1e-2, "training must show in the embeddings"


def test_fit(fast, stock, tmp_path, monkeypatch):
    """The interface of old scripts."""
    monkeypatch.chdir(tmp_path)
    trained = copy.deepcopy(stock)
    for model in (fast, trained):
        torch.manual_seed(0)
        examples = [st.InputExample(texts=list(pair), label=0.3) for pair in zip(QUESTIONS, ANSWERS, strict=True)]
        loss = st.sentence_transformer.losses.CosineSimilarityLoss(model)
        loader = torch.utils.data.DataLoader(examples, batch_size=2)
        model.fit([(loader, loss)], epochs=2, warmup_steps=0, optimizer_params={"lr": 1e-4}, show_progress_bar=False)
    ours, theirs, before = (model.encode(ANSWERS) for model in (fast, trained, stock))
    moved = abs(theirs - before).max()
    assert moved > 1e-2 and abs(ours - theirs).max() < 0.02 * moved
    assert explain(fast).stock_calls == {}


@pytest.fixture(scope="module")
def cross_encoder(checkpoint, tmp_path_factory):
    """A tiny BERT under MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("cross_encoder")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tiny_model(BertForSequenceClassification, "bert", vocab_size=len(tokenizer), num_labels=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return st.CrossEncoder(str(folder), device="cpu", max_length=48)


def test_cross_encoder_predicts(cross_encoder):
    fast = accelerate_model(copy.deepcopy(cross_encoder))
    texts = list(zip(QUESTIONS, ANSWERS, strict=True))
    ours, theirs = (model.predict(texts, convert_to_tensor=True) for model in (fast, cross_encoder))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert fast.rank(QUESTIONS[2], ANSWERS)[0]["corpus_id"] == cross_encoder.rank(QUESTIONS[2], ANSWERS)[0]["corpus_id"]
    assert explain(fast).stock_calls == {}


def test_cross_encoder_trains(cross_encoder, tmp_path):
    data = {"question": QUESTIONS * 2, "answer": ANSWERS * 2, "label": [1.0, 0.0, 1.0, 0.0] * 2}
    curves, ce = [], st.cross_encoder
    for model in (accelerate_model(copy.deepcopy(cross_encoder)), copy.deepcopy(cross_encoder)):
        loss = ce.losses.BinaryCrossEntropyLoss(model)
        curves.append(loss_curve(tmp_path, ce.CrossEncoderTrainer, ce.CrossEncoderTrainingArguments, model, data, loss))
    assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert len(set(curves[0])) == 3


def test_cross_encoder_fits(cross_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fast, trained = accelerate_model(copy.deepcopy(cross_encoder)), copy.deepcopy(cross_encoder)
    texts = list(zip(QUESTIONS, ANSWERS, strict=True))
    for model in (fast, trained):
        torch.manual_seed(0)
        examples = [st.InputExample(texts=list(pair), label=float(i % 2)) for i, pair in enumerate(texts)]
        model.fit(torch.utils.data.DataLoader(examples, batch_size=2), epochs=2, warmup_steps=0, optimizer_params={"lr": 1e-3})
    ours, theirs, before = (model.predict(texts) for model in (fast, trained, cross_encoder))
    moved = abs(theirs - before).max()
    assert moved > 1e-2 and abs(ours - theirs).max() < 0.02 * moved
    assert explain(fast).stock_calls == {}

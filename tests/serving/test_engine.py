"""What a folder says is what is served: its task, its pooling and prompts, its 8-bit weights."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import roberta_fast
from roberta_fast.serving import jobs
from roberta_fast.serving.engine import Engine, _groups, task_of
from roberta_fast.serving.errors import RequestError
from roberta_fast.serving.settings import TASKS, Settings


@given(st.lists(st.integers(1, 512), min_size=1, max_size=40), st.sampled_from([1.0, 1.25, 3.0]))
def test_groups_hold_each_sequence_once_and_little_padding(lengths, padding):
    groups = _groups(lengths, padding)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[i] for i in group]
        assert max(own) * len(own) <= padding * sum(own)
    if padding == 3.0 and max(lengths) <= 3 * min(lengths):
        assert len(groups) == 1


def test_padding_does_not_change_answers(model_folder, sentences):
    engine = Engine(Settings(model_folder("token-classification"), threads=1))
    feeds = jobs.find_entities(engine, sentences[:12], _parameters()).feeds
    together = engine.compute(feeds)
    for feed, output in zip(feeds, together, strict=True):
        np.testing.assert_allclose(output, engine.compute([feed])[0], atol=1e-4)
        assert output.shape == (len(feed.input_ids), 5)


def _parameters():
    from roberta_fast.serving.schemas import TokenClassificationParameters

    return TokenClassificationParameters()


def changed(checkpoint, folder, **files):
    """A copy of the checkpoint with JSON files replaced; their names' dots and slashes as _ and __."""
    shutil.copytree(checkpoint, folder)
    for name, content in files.items():
        (folder / f"{name.replace('__', '/')}.json").write_text(json.dumps(content))
    return str(folder)


def embedding(engine, text, **options):
    job = jobs.embed(engine, [text], None, **options)
    return job.finish(engine.compute(job.feeds))[0]


def test_prompts_and_pooling_of_the_folder(checkpoint, tmp_path):
    folder = changed(
        checkpoint,
        tmp_path / "model",
        config_sentence_transformers={"prompts": {"query": "query: ", "none": ""}, "default_prompt_name": "query"},
        **{"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}},
    )
    ours, plain = Engine(Settings(folder, threads=1)), Engine(Settings(checkpoint, threads=1, pooling="cls"))
    assert (ours.pooling, plain.pooling) == ("cls", "cls")
    np.testing.assert_array_equal(embedding(ours, "text"), embedding(plain, "query: text"))
    np.testing.assert_array_equal(embedding(ours, "text", prompt_name="none"), embedding(plain, "text"))
    with pytest.raises(RequestError, match=r"prompt_name must be one of \['none', 'query'\]"):
        jobs.embed(ours, ["text"], None, prompt_name="passage")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {
                "modules": [
                    {"type": "sentence_transformers.models.Transformer", "path": ""},
                    {"type": "a.Dense", "path": "2_Dense"},
                ]
            },
            "is made of Transformer, Dense: only Transformer, Pooling and Normalize",
        ),
        ({"1_Pooling__config": {"pooling_mode_lasttoken": True}}, r"pools by \['pooling_mode_lasttoken'\]: give --pooling"),
    ],
    ids=["dense layer", "pooling"],
)
def test_folders_that_are_not_served(checkpoint, tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        Engine(Settings(changed(checkpoint, tmp_path / "model", **files), threads=1))


def test_a_folder_of_8_bit_weights(model_folder, tmp_path, sentences):
    source = model_folder("text-classification")
    model = AutoModelForSequenceClassification.from_pretrained(source)
    roberta_fast.save_quantized(roberta_fast.accelerate_model(model.eval(), precision="int8"), tmp_path / "int8")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "int8")
    saved = Engine(Settings(str(tmp_path / "int8"), threads=1))
    made = Engine(Settings(source, threads=1, precision="int8"))
    feeds = jobs.classify(made, [(text,) for text in sentences[:5]], None, None, None).feeds
    np.testing.assert_array_equal(saved.compute(feeds), made.compute(feeds))
    assert saved.task == "text-classification" and saved.precision == "int8" and "int8" in saved.explanation()
    with pytest.raises(ValueError, match=r"holds tensors that|needs \w+"):
        Engine(Settings(str(tmp_path / "int8"), task="question-answering", threads=1))


def test_the_task_is_that_of_the_architecture(model_folder):
    for task in TASKS:
        assert task_of(Settings(model_folder(task)))[1] == task
    assert task_of(Settings(model_folder("question-answering"), task="embedding"))[1] == "embedding"

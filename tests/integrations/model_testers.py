"""Hugging Face's own model tests on small models of the served families, each family stock and patched.

Not collected by itself: ``test_huggingface_model_tests.py`` runs it in a process of its own, with the package
``transformers_tests``, which it makes of the tests in transformers' source distribution, on the path.
"""

import unittest

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

from roberta_fast import patch_transformers, supported_model_types, unpatch_transformers
from roberta_fast.packing import PackedBatch

HEADS = (
    "MODEL_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING",
)
CLASSES = {  # where the mappings do not name them all
    "dpr": ("DPRContextEncoder", "DPRQuestionEncoder", "DPRReader"),
    "align_text_model": ("AlignTextModel",),
    "clap_text_model": ("ClapTextModel",),
    "chinese_clip_text_model": ("ChineseCLIPTextModel",),
}


class SmallModel:
    """The config and inputs that the tests ask for, in the sizes of Hugging Face's own testers."""

    batch_size, seq_length, num_choices, is_training = 7, 7, 4, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, model_type):
        self.model_type = model_type
        self.token_types = 0 if model_type in ("distilbert", "bert-generation") else 16

    def get_config(self):
        sizes = {name: getattr(self, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        sizes["hidden_dim" if self.model_type == "distilbert" else "intermediate_size"] = 37
        if self.token_types:
            sizes["type_vocab_size"] = self.token_types
        return AutoConfig.for_model(self.model_type, **sizes, max_position_embeddings=64, pad_token_id=1)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        ids = ids_tensor(shape, self.vocab_size - 2) + 2  # no padding token, from which RoBERTa would count positions
        inputs = {"input_ids": ids, "attention_mask": random_attention_mask(shape)}
        if self.token_types:
            inputs["token_type_ids"] = ids_tensor(shape, self.token_types)
        return self.get_config(), inputs


def model_classes(model_type):
    """The base model and those with heads."""
    if model_type in CLASSES:
        return tuple(getattr(transformers, name) for name in CLASSES[model_type])
    config_class = type(SmallModel(model_type).get_config())
    mappings = [getattr(modeling_auto, head) for head in HEADS]
    return tuple(dict.fromkeys(mapping[config_class] for mapping in mappings if config_class in mapping))


class Stock(ModelTesterMixin, GenerationTesterMixin):
    """The tests as they are."""

    def setUp(self):
        transformers.set_seed(0)
        self.model_tester = SmallModel(self.model_type)


class Patched(Stock):
    """The tests while ``patch_transformers`` is in force; an error at the end where nothing fast ran."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        patch_transformers([cls.model_type], on_unsupported="ignore")
        cls.packed, cls.original = [], PackedBatch.of

        def of(hidden_states: torch.Tensor, *args):
            cls.packed.append(hidden_states.shape)
            return cls.original(hidden_states, *args)

        PackedBatch.of = of

    @classmethod
    def tearDownClass(cls):
        PackedBatch.of = cls.original
        unpatch_transformers()
        assert cls.packed, "no encoder was fast"
        super().tearDownClass()


for name in supported_model_types():
    for variant in (Stock, Patched):
        body = {"model_type": name, "all_model_classes": model_classes(name), "__module__": __name__}
        test_class = type(f"{variant.__name__}_{name.replace('-', '_')}", (variant, unittest.TestCase), body)
        globals()[test_class.__name__] = test_class
del test_class

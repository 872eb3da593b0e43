"""Fixtures of the data tests: a private cache, one prepared task, a tiny tokenizer."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from lowrank.data.tasks import IntentsData


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test touches the user's cache."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Folder in which English intents have been prepared; read only."""
    folder = tmp_path_factory.mktemp("prepared")
    IntentsData().load(folder)
    return folder


@pytest.fixture(scope="session")
def english(prepared):
    return IntentsData().load(prepared)


@pytest.fixture
def tokenizer():
    """One token per known word, [CLS] in front and [SEP] behind; pads by default."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(50))]
    made = tokenizers.Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(pad_id=0, pad_token="[PAD]", length=128)
    made.enable_truncation(7)
    return made

"""Our encoder equals transformers' BERT, weight for weight and token for token."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

from lowrank.core.errors import BadInput
from lowrank.io.bert import BERT
from lowrank.io.hub import load
from lowrank.models.encoder import Classifier

pytestmark = pytest.mark.parity

TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    # Far from the 0.02 of a fresh model, so that attention is far from uniform.
    "initializer_range": 0.3,
}
LENGTHS = np.array([12, 7, 1, 9])


def batch_of(vocab_size, seq=12):
    ids = np.random.default_rng(0).integers(1, vocab_size, (len(LENGTHS), seq))
    mask = np.arange(seq)[None] < LENGTHS[:, None]
    return {"ids": np.where(mask, ids, 0).astype(np.int32), "mask": mask}


def save(model, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    words = {f"w{index}": index for index in range(model.config.vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )
    return model


def theirs(model, batch):
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(batch["ids"]).long(),
            attention_mask=torch.from_numpy(batch["mask"]).long(),
        )


def hidden(base, batch, **options):
    model = Classifier(base.spec, 2, precision="highest", **options)
    return model.apply({"params": base.params}, batch, method="hidden")


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_hidden_states_of_a_random_bert(tmp_path, activation, scan):
    torch.manual_seed(0)
    model = save(BertModel(BertConfig(**TINY, hidden_act=activation)), tmp_path)
    batch = batch_of(TINY["vocab_size"])
    base = load(str(tmp_path), num_classes=2, scan=scan)
    want = theirs(model, batch).last_hidden_state.numpy()
    assert np.std(want) > 0.3
    got = hidden(base, batch, scan=scan)
    np.testing.assert_allclose(got[batch["mask"]], want[batch["mask"]], atol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_of_a_random_roberta(tmp_path, side, scan):
    """Positions count tokens that are no padding, from pad_token_id + 1."""
    torch.manual_seed(2)
    config = RobertaConfig(**TINY, pad_token_id=1, type_vocab_size=1)
    save(RobertaModel(config), tmp_path)
    model = RobertaModel.from_pretrained(tmp_path).eval()
    batch = batch_of(TINY["vocab_size"])
    batch["ids"] = np.where(batch["mask"], np.maximum(batch["ids"], 2), 1)
    if side == "left":
        batch = {name: np.ascontiguousarray(x[:, ::-1]) for name, x in batch.items()}
    base = load(str(tmp_path), num_classes=2, scan=scan)
    assert base.spec.max_positions == base.max_length == 38
    want = theirs(model, batch).last_hidden_state.numpy()
    got = hidden(base, batch, scan=scan)
    np.testing.assert_allclose(got[batch["mask"]], want[batch["mask"]], atol=1e-4)
    # To the last position that there is, and no further.
    full = {"ids": np.full((1, 38), 5, np.int32), "mask": np.ones((1, 38), bool)}
    want = theirs(model, full).last_hidden_state.numpy()
    np.testing.assert_allclose(hidden(base, full, scan=scan), want, atol=1e-4)
    with pytest.raises(BadInput, match="knows 38 positions"):
        hidden(base, {n: np.tile(x, 2) for n, x in full.items()}, scan=scan)
    with pytest.raises(BadInput, match="RoBERTa kind, which has no pooler"):
        load(str(tmp_path), num_classes=2, pooling="pooler")


def test_logits_of_a_random_sequence_classifier(tmp_path):
    torch.manual_seed(1)
    model = save(
        BertForSequenceClassification(BertConfig(**TINY, num_labels=5)), tmp_path
    )
    batch = batch_of(TINY["vocab_size"])
    base = load(str(tmp_path), num_classes=5, pooling="pooler")
    head = {
        "kernel": jnp.asarray(model.classifier.weight.detach().numpy().T),
        "bias": jnp.asarray(model.classifier.bias.detach().numpy()),
    }
    got = base.apply({**base.params, "head": head}, batch)
    want = theirs(model, batch).logits.numpy()
    assert np.std(want) > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_sharded_checkpoint_is_the_same_base(tmp_path):
    torch.manual_seed(2)
    (tmp_path / "one").mkdir()
    model = save(BertModel(BertConfig(**TINY)), tmp_path / "one")
    (tmp_path / "many").mkdir()
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    text = (tmp_path / "one" / "tokenizer.json").read_text()
    (tmp_path / "many" / "tokenizer.json").write_text(text)
    one, many = (load(str(tmp_path / name), num_classes=2) for name in ("one", "many"))
    assert one.fingerprint == many.fingerprint


def test_hidden_states_of_the_real_minilm(tmp_path):
    base = load("minilm", num_classes=2)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(base.hf_config)))
    model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    weights = {
        name: torch.from_numpy(value.copy())
        for name, value in BERT.to_hf(base.params, prefix="").items()
        if not name.startswith("classifier.")
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    batch = batch_of(base.spec.vocab_size)
    want = theirs(model.eval(), batch).last_hidden_state.numpy()
    got = hidden(base, batch)
    np.testing.assert_allclose(got[batch["mask"]], want[batch["mask"]], atol=1e-4)

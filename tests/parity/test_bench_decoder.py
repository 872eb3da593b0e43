"""The arms of the decoders' bench compute the same, at toy size."""

import json

import pytest
from decoder_pair import made, tokenizer_beside

from experiments.bench import decoder

pytestmark = pytest.mark.parity


def test_both_pairs_run_and_agree(tmp_path, capsys):
    folder = tmp_path / "llama"
    folder.mkdir()
    made("llama", folder)
    tokenizer_beside(folder)
    out = tmp_path / "bench.json"
    line = ["--quick", "--base", str(folder), "--batch", "2", "--seq", "8"]
    assert decoder.main([*line, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    for what, pair in decoder.PAIRS.items():
        one = found["pairs"][what]
        assert one["loss_gap"] < decoder.SAME_LOSS, what
        assert {*one["seconds"]} == {*pair}
        assert all(len(times) == 2 for times in one["seconds"].values())
    text = out.with_suffix(".md").read_text()
    assert "| generation |" in text
    assert "do not compute the same" not in text
    assert text in capsys.readouterr().out


def test_losses_fall_together(tmp_path):
    """The steps after the first are the same, too: gradients and updates agree."""
    folder = tmp_path / "llama"
    folder.mkdir()
    made("llama", folder)
    tokenizer_beside(folder)
    line = ["--quick", "--base", str(folder), "--batch", "2", "--seq", "8"]
    options = decoder.parse(line)
    report = decoder.compare(options)
    losses = report["pairs"]["training step"]["losses"]
    ours, theirs = losses["decoder"], losses["decoder_peft"]
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < ours[0]

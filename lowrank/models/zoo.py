"""Named sizes: the shapes of published encoders, without their weights."""

from lowrank.models.encoder import EncoderSpec

SIZES = {
    # https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
    "minilm_l6": EncoderSpec(
        vocab_size=30522,
        d_model=384,
        num_layers=6,
        num_heads=12,
        d_ff=1536,
        max_positions=512,
    ),
    # https://huggingface.co/google-bert/bert-base-uncased
    "bert_base": EncoderSpec(
        vocab_size=30522,
        d_model=768,
        num_layers=12,
        num_heads=12,
        d_ff=3072,
        max_positions=512,
    ),
    # https://huggingface.co/google/bert_uncased_L-2_H-128_A-2
    "bert_tiny": EncoderSpec(
        vocab_size=30522,
        d_model=128,
        num_layers=2,
        num_heads=2,
        d_ff=512,
        max_positions=512,
    ),
    # Nobody's: large enough to have every part, small enough for a test.
    "tiny_test": EncoderSpec(
        vocab_size=97,
        d_model=24,
        num_layers=3,
        num_heads=4,
        d_ff=40,
        max_positions=32,
    ),
}

"""A protocol that is over in seconds."""

from experiments.ranks_protocol.settings import read

WANTED = {
    "oracle": 0.05,
    "gain": -1.5,
    "misallocation": 0.02,
    "no_gain": 0.0,
    "equivalence": 0.02,
}


def protocol(folder, **more):
    fields = {
        "tasks": ["heterogeneous"],
        "arms": ["uniform", "oracle", "norm"],
        "rates": [0.01],
        "seeds": 2,
        "tuning_seeds": 1,
        "bases": 1,
        "steps": 14,
        "batch_size": 64,
        "rows": 128,
        "noise": 0.1,
        "test_rows": 64,
        "begin": 1,
        "end": 11,
        "every": 5,
        "wanted": WANTED,
        "level": 0.95,
        "records": str(folder / "records"),
        "results": str(folder / "results"),
    }
    return read({**fields, **more})

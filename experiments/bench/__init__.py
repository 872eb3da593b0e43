"""How fast a training step is, against a hand-written one and against PEFT on torch.

`python -m experiments.bench` runs all arms side by side on the same weights, the same
batch and the same starting point, and prints ratios, not milliseconds: those belong
to the machine. See `__main__` for its options and `child` for the protocol.
"""

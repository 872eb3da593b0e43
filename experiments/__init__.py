"""Doors: commands that compose a config and run it."""

import sys

from lowrank.core.memory import huge_pages

# `python -m experiments.train` comes by here before it imports anything heavy; whoever
# imports this package from a program of their own is left alone.
if sys.argv[:1] == ["-m"]:
    huge_pages()

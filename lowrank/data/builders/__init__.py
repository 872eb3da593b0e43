"""TFDS builders: data sets that this package makes or takes from the user's files."""

from lowrank.data.builders.intents import Intents as Intents
from lowrank.data.builders.table import Table as Table

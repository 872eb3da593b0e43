"""Borders: files in and out of the house.

`checkpoints` and `view` are imported by name: they load Orbax and pandas, a hundred
megabytes that who only reads a base should not hold.
"""

from lowrank.io.files import Lock as Lock
from lowrank.io.record import Record as Record

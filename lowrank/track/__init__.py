"""Where the numbers of a run go while it runs.

`services` and `trackers` are imported by name: they load pandas, 60 MB that who only
reads a base should not hold.
"""

from lowrank.track.jsonl import JsonlTracker as JsonlTracker

"""Where the numbers of a run go while it runs.

`services` and `trackers` are imported by name: who only reads a base tells nobody.
"""

from lowrank.track.jsonl import JsonlTracker as JsonlTracker

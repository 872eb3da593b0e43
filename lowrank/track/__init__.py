"""Where the numbers of a run go while it runs.

`services` and `trackers` are imported by name: they load pandas, 60 MB for nothing
where a base is only read.
"""

from lowrank.track.jsonl import JsonlTracker as JsonlTracker

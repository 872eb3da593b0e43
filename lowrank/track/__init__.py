"""Where the numbers of a run go while it runs."""

from lowrank.track.jsonl import JsonlTracker as JsonlTracker
from lowrank.track.services import TensorboardTracker as TensorboardTracker
from lowrank.track.services import WandbTracker as WandbTracker
from lowrank.track.trackers import Track as Track
from lowrank.track.trackers import Tracker as Tracker
from lowrank.track.trackers import Trackers as Trackers
from lowrank.track.trackers import build_trackers as build_trackers
from lowrank.track.trackers import summarize as summarize

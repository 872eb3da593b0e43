"""Where models meet deltas: discovery, injection by tracing, the adapted model."""

from lowrank.adapt.attach import Adapted as Adapted
from lowrank.adapt.attach import attach as attach
from lowrank.adapt.nnx import from_nnx as from_nnx
from lowrank.adapt.rules import Freeze as Freeze
from lowrank.adapt.rules import Rule as Rule
from lowrank.adapt.rules import Train as Train
from lowrank.adapt.sites import Site as Site
from lowrank.adapt.sites import Use as Use
from lowrank.adapt.sites import discover as discover

"""Allocation of ranks: signals, importance, selection under a budget, transitions."""

from lowrank.allocate.adaptive import Adaptive as Adaptive
from lowrank.allocate.adaptive import Allocator as Allocator
from lowrank.allocate.allocation import Allocation as Allocation
from lowrank.allocate.allocation import pack as pack
from lowrank.allocate.catalogue import CATALOGUE as CATALOGUE
from lowrank.allocate.slots import Competitor as Competitor
from lowrank.allocate.slots import Slots as Slots

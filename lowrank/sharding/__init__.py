"""Where arrays live: meshes of devices, and how weights are split between them."""

from lowrank.sharding.mesh import MeshSpec as MeshSpec
from lowrank.sharding.partition import Partition as Partition

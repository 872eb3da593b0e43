"""Cost: counted from shapes, estimated by the compiler, measured by the clock."""

from lowrank.cost.count import Counts as Counts
from lowrank.cost.count import Flops as Flops
from lowrank.cost.count import count_parameters as count_parameters
from lowrank.cost.count import jaxpr_flops as jaxpr_flops
from lowrank.cost.count import lora_flops as lora_flops
from lowrank.cost.count import lora_flops_per_token as lora_flops_per_token
from lowrank.cost.count import lora_parameters as lora_parameters
from lowrank.cost.measure import CostLedger as CostLedger
from lowrank.cost.measure import StepTimer as StepTimer
from lowrank.cost.measure import compiled_cost as compiled_cost
from lowrank.cost.measure import latency as latency
from lowrank.cost.measure import peak_device_bytes as peak_device_bytes
from lowrank.cost.measure import peak_resident_bytes as peak_resident_bytes
from lowrank.cost.measure import resident_bytes as resident_bytes

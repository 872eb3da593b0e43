"""Training: a list of trials, run as one pack, over time."""

from lowrank.train.aging import reborn as reborn
from lowrank.train.guard import NonFinitePolicy as NonFinitePolicy
from lowrank.train.loop import Events as Events
from lowrank.train.loop import Loop as Loop
from lowrank.train.losses import Loss as Loss
from lowrank.train.losses import Sums as Sums
from lowrank.train.losses import cross_entropy as cross_entropy
from lowrank.train.losses import squared_error as squared_error
from lowrank.train.optim import AdamW as AdamW
from lowrank.train.pack import Pack as Pack
from lowrank.train.penalties import Penalties as Penalties
from lowrank.train.penalties import impose as impose
from lowrank.train.state import TrainState as TrainState
from lowrank.train.step import make_step as make_step

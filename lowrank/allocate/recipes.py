"""Methods with a name: `Adaptive` with other defaults."""

from lowrank.allocate.adaptive import Adaptive, Basis, Mode, Name, Selector, Shape
from lowrank.core.errors import BadInput
from lowrank.core.spec import spec


@spec
class AdaLoRA(Adaptive):
    """Sensitivity, the best of all layers, a cubic fall (Zhang et al. 2023).

    arXiv:2303.10512. Faithful in scores, schedule and revival, beside P Lambda Q and
    the orthogonality penalty, which are a delta's and a penalty's. Departs from the
    code where that is wrong: equal scores do not make it keep less than the budget;
    no penalty and no clipping in the scores; a last event instead of one at every step
    of the final phase (as PEFT has it); events are counted from `begin`. With
    mode=hard the forward budget is the one that is claimed, which in the paper it is
    only after the last event.
    """

    importance: Name = "sensitivity"
    start: float | None = 1.5
    measure_every: int = 1
    decay: float = 0.85
    mode: Mode = "revivable"


@spec
class Fisher(Adaptive):
    """Prunes components whose gates carry the least Fisher information.

    F_j = E_n[(d l_n / d g_j)^2]: half of it is the second-order rise of the loss when
    gate j is shut. The default among the methods; shared out over the singular values
    of its layer (basis=own: as it is).
    """

    basis: Basis = "singular"


@spec
class Norm(Adaptive):
    """Prunes the components of smallest |c_j| |a_j| |b_j|, over all layers.

    Mao et al. 2024 (arXiv:2405.17357), on the window, schedule and hard gates that all
    recipes here have by default instead of their late cubic one with revival, without
    their penalty, without their division by the layer's norm,
    which makes layers incomparable (normaliser=layer), and without the dense products
    that their code forms.
    """

    importance: Name = "norm"


@spec
class Squeeze(Adaptive):
    """Trains wide, and is cut to the budget by the singular values of all layers.

    LoRA-Squeeze (arXiv:2602.10993), which trains on after the cut, with PARA's one
    threshold for all layers: what is left is the nearest correction with so many
    components, all layers together (Eckart & Young 1936). With `begin` before `end` it
    is cut in stages, as their In-Squeeze. Exact where theirs is randomised. How many a
    layer keeps is decided by its last measurement, at most `measure_every` steps old;
    what they are, by the correction of the moment.
    """

    importance: Name = "spectrum"
    begin: int | float = 0.9
    end: int | float = 0.9
    mode: Mode = "squeezed"


@spec
class Random(Adaptive):
    """Prunes at random, on the same schedule: what pruning alone does, a control."""

    importance: Name = "random"


@spec
class EVA(Adaptive):
    """Ranks from the variance of inputs, before the first step (Paischer et al. 2024).

    arXiv:2410.07170. Each layer may have up to rho times its rank; the budget goes to
    the directions that explain most of their layer's inputs, and these directions are
    what `a` starts as, of length one. Departs from the code, where sites with equal
    inputs get ranks by their order: here equal inputs give equal importances, and such
    sites differ only in what is tied where the budget ends. The scale stays that of the
    rules, as PEFT's `adjust_scaling_factors` has it.

    Attributes:
      directions: Whether `a` starts as the directions; or as the delta has it, so that
        ranks and start can be told apart.
    """

    importance: Name = "variance"
    schedule: Shape = "linear"
    begin: int | float = 0
    end: int | float = 0
    rho: float | None = 2.0
    directions: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions and self.importance != "variance":
            raise BadInput(
                "ranks.directions = true starts `a` as the directions that "
                "ranks.importance = 'variance' finds, and the importance is "
                f"{self.importance!r}: set ranks.directions=false"
            )


@spec
class Growth(Adaptive):
    """Starts with half of the budget and adds where layers matter most.

    IncreLoRA (arXiv:2308.12043) with births that change no output, a scale that does
    not jump, and no step past the budget. Departs in what matters: the summed Fisher
    information of a layer's gates instead of |D dL/dD| entry by entry, which needs the
    dense gradient of every weight; in holding no reserve component; in starting with
    half of the budget and not with one component per layer (`start` says); and in
    correcting by A B with silent births where the paper has P Lambda Q kept
    orthogonal by a penalty (`delta=triplet penalty.orthogonality` adds both).
    """

    selector: Selector = "grow"
    schedule: Shape = "staircase"
    start: float | None = 0.5


@spec
class EffectiveRank(Adaptive):
    """Ranks in proportion to how many directions a layer's correction uses.

    r_l = kappa exp(entropy of its singular values), projected on the budget, where
    kappa cancels; with importance=stable_rank, sum s^2 / s_1^2 instead of the
    exponential. Knows nothing of which layer matters. Every event may move ranks both
    ways, with two exceptions: a layer with a rank of one cannot show that it needs two,
    and one of rank zero has nothing to show, and never returns. Minima of two
    (`ranks.bounds`) keep layers able to.
    """

    importance: Name = "effective_rank"
    selector: Selector = "proportional"
    schedule: Shape = "constant"
    start: float | None = 1.0

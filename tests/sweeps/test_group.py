"""Which trials share a pack, and how many of them."""

import dataclasses
import math

import pytest
from hydra import compose, initialize_config_dir

from lowrank.core import memory
from lowrank.core.errors import BadInput, gravest
from lowrank.run.door import CONF, resolve
from lowrank.run.settings import read
from lowrank.run.sweep import PACKABLE, SweepSpec
from lowrank.sweeps.group import (
    Trial,
    check_trials,
    deal,
    groups,
    halves,
    is_packable,
    labelled,
    pack_id,
    program,
    reasons_alone,
)
from lowrank.sweeps.width import GIB, width

#: One value for every packable leaf of today's config, other than its default.
OTHER = {
    "delta.rank": "4",
    "delta.alpha": "3.0",
    "delta.scaling": "rsqrt",
    "delta.dropout": "0.1",
    "optim.lr": "0.01",
    "optim.head_lr": "0.1",
    "optim.weight_decay": "0.1",
    "optim.b1": "0.8",
    "optim.b2": "0.9",
    "optim.eps": "1e-6",
    "optim.clip": "2.0",
    "optim.label_smoothing": "0.1",
    "optim.b_ratio": "16.0",
    "seed": "7",
}
#: The same for leaves of allocators that move ranks.
OF_RANKS = {
    "ranks.max_rank": "32",
    "ranks.schedule": "linear",
    "ranks.budget": "30",
    "ranks.start": "1.5",
    "ranks.begin": "5",
    "ranks.end": "0.5",
    "ranks.every": "10",
    "ranks.decay": "0.5",
    "ranks.deviation_decay": "0.5",
    "ranks.rho": "2.0",
    "ranks.add": "2",
    "ranks.at_once": "3",
    "ranks.moves": "2",
    "ranks.pool": "1",
    "ranks.threshold": "0.5",
}


@pytest.fixture(scope="module")
def trial():
    """Makes a trial from overrides; numbers count up."""
    numbers = iter(range(10**6))
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def make(*overrides):
            config = resolve(compose("config", overrides=list(overrides)))
            return Trial(next(numbers), read(config), overrides)

        yield make


@pytest.fixture(scope="module")
def many(trial):
    """Trials that differ in rank and seed, made without composing each."""
    first = trial()

    def make(ranks):
        found = []
        for number, rank in enumerate(ranks):
            config = {**first.settings.config, "seed": number}
            config["delta"] = {**config["delta"], "rank": rank}
            settings = dataclasses.replace(
                first.settings, config=config, delta=config["delta"], seed=number
            )
            found.append(Trial(number, settings, ()))
        return found

    return make


@pytest.mark.parametrize("name", OTHER)
def test_a_packable_leaf_is_no_part_of_the_static_key(trial, name):
    one, two = trial(), trial(f"{name}={OTHER[name]}")
    assert is_packable(name)
    assert one.id != two.id
    assert one.key == two.key


@pytest.mark.parametrize("name", OF_RANKS)
def test_a_number_of_an_allocator_is_none_either(trial, name):
    one, two = trial("ranks=norm"), trial("ranks=norm", f"{name}={OF_RANKS[name]}")
    assert one.id != two.id
    assert one.key == two.key


@pytest.mark.parametrize(
    "override",
    ["ranks=random", "ranks.selector=proportional", "ranks.unit=parameters",
     "ranks.mode=revivable", "ranks.measure_every=2", "ranks.normaliser=layer"],
)  # fmt: skip
def test_the_pieces_of_an_allocator_are(trial, override):
    assert trial("ranks=norm").key != trial("ranks=norm", override).key


def test_ranks_dealt_out_once_share_no_pack_with_others(trial):
    assert trial("ranks=ramp").key != trial("ranks=ramp", "delta.rank=4").key
    assert trial("ranks=ramp").key != trial("ranks=ramp", "ranks.budget=30").key
    assert trial("ranks=ramp").key == trial("ranks=ramp", "seed=1").key


@pytest.mark.parametrize(
    "override",
    [
        "optim.clip=null",
        "optim.schedule=cosine",
        "optim.epochs=3",
        "optim.accumulate=2",
        "data.batching.batch_size=16",
        "delta=head",
        "delta.targets='**/query/kernel'",
        "delta.ranks={\\*\\*/layer\\[0\\]/\\*\\*: 2}",
        "loop.patience=2",
        "base.dtype=bfloat16",
        "mesh=all",
        "non_finite.action=skip",
    ],
)
def test_what_changes_the_program_is_part_of_the_static_key(trial, override):
    assert trial().key != trial(override).key


def test_neither_the_sweep_nor_the_directory_is_part_of_it(trial):
    """The same pack in a dry run, at another width or in another place."""
    assert trial().key == trial("sweep.width=3", "run.directory=x").key
    assert trial().key == trial("sweep.dry_run=true").key


def test_every_packable_name_is_a_leaf_or_a_group_of_its_own(trial):
    known = {*OTHER, *OF_RANKS} | {"delta.rank_dropout", "penalty.*"}
    assert set(PACKABLE) == known, "a new one needs a row in OTHER"
    assert is_packable("penalty.anything")
    assert not is_packable("data.seed")


def test_the_order_of_given_ranks_counts(trial):
    ranks = [r"\*\*/a: 2", r"\*\*/b: 4"]
    line = lambda *pairs: "delta.ranks={" + ", ".join(pairs) + "}"
    assert trial(line(*ranks)).key != trial(line(*reversed(ranks))).key


@pytest.mark.parametrize("count", [1, 2, 5, 7, 9, 10, 12, 13, 24, 31])
@pytest.mark.parametrize("most", [1, 2, 4, 8, 32])
def test_packs_are_whole_narrow_enough_and_alike(many, count, most):
    ranks = [8 if number < math.ceil(count / 2) else 2 for number in range(count)]
    trials = many(ranks)
    packs = deal(trials, most)
    assert sorted(t.number for pack in packs for t in pack) == list(range(count))
    sizes = {len(pack) for pack in packs}
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    # At most two widths, and one rank, so at most two programs.
    if len(packs) <= math.ceil(count / 2):
        assert {program(pack)[2] for pack in packs} == {8}
    assert len(packs) <= 1.5 * math.ceil(count / most)


def test_an_uneven_last_pack_is_shared_out(many):
    packs = deal(many([4] * 9), 4)
    assert [len(pack) for pack in packs] == [3, 3, 3], "4 + 4 + 1 compiles twice"
    assert [len(half) for half in halves(many([4] * 8))] == [4, 4]
    assert len({program(pack) for pack in packs}) == 1


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 13, 24, 31])
@pytest.mark.parametrize("most", [4, 8, 16])
def test_packs_come_out_even_on_the_devices_that_share_them(many, count, most):
    share = 4
    ranks = [8 if number % 2 else 2 for number in range(count)]
    packs = deal(many(ranks), most, share)
    assert sorted(t.number for pack in packs for t in pack) == list(range(count))
    assert max(len(pack) for pack in packs) <= most
    uneven = [pack for pack in packs if len(pack) % share]
    assert len(uneven) == bool(count % share)
    for pack in uneven:
        assert len(pack) == count % share
        # Nobody else is kept waiting for a lower rank than theirs.
        others = [t.rank for other in packs if other is not pack for t in other]
        assert max(t.rank for t in pack) <= min(others, default=8)
    for pack in packs:
        if len(pack) > share:
            parts = halves(pack, share)
            assert all(len(part) % share == 0 for part in parts)
            assert max(map(len, parts)) < len(pack)
    assert [len(half) for half in halves(many([4] * share), share)] == [2, 2]


def test_a_packs_id_knows_its_order(many):
    trials = many([4, 4, 4])
    assert pack_id(trials) == pack_id(list(trials))
    assert pack_id(trials) != pack_id(trials[::-1])
    assert pack_id(trials) != pack_id(trials[:2])


def test_trials_say_what_tells_them_apart_and_why_they_are_alone(trial):
    trials = labelled(
        [
            trial("seed=1"),
            trial("seed=2"),
            trial("seed=2", "data.batching.batch_size=64"),
        ]
    )
    assert trials[2].label == "data.batching.batch_size=64 seed=2"
    assert [len(group) for group in groups(trials)] == [2, 1]
    (reason,) = reasons_alone(trials).values()
    assert "data.batching.batch_size=64" in reason
    assert "seed" not in reason
    assert reasons_alone(trials[:1]) == {}
    assert len(reasons_alone([trials[0], trials[2]])) == 2, "nothing is packable"


def test_the_same_trial_twice_is_refused(trial):
    twins = labelled([trial("seed=1"), trial("seed=1", "mesh=all")])
    with pytest.raises(BadInput, match=r"same trial.*only in mesh\.data"):
        check_trials(twins)
    with pytest.raises(BadInput, match="another seed"):
        check_trials(labelled([trial("seed=3"), trial("seed=3")]))
    mates = labelled([trial(f"seed={s}", "run.directory=here") for s in (1, 2)])
    with pytest.raises(BadInput, match=r"both live in .*here"):
        check_trials(mates)


class Needs:
    """Memory of a pack: `fixed` + `each` * width, and what was asked."""

    def __init__(self, fixed, each):
        self.fixed, self.each, self.asked = fixed, each, []

    def __call__(self, settings, widths):
        self.asked += widths
        return {w: int((self.fixed + self.each * w) * GIB) for w in widths}


@pytest.mark.parametrize(("fixed", "each"), [(1.0, 0.5), (0.0, 0.9), (3.9, 0.01)])
def test_the_width_is_the_largest_that_fits(many, fixed, each):
    trials, needs = many([4] * 30), Needs(fixed, each)
    found = width(trials, SweepSpec(memory_gib=4.0), needs)
    most = max(n for n in range(1, 31) if fixed + each * n <= 4.0)
    assert found == most
    assert len(needs.asked) <= 4, "each question is a compile"


def test_a_pack_that_fits_asks_once_and_a_single_trial_never(many):
    needs = Needs(0.1, 0.1)
    assert width(many([4] * 6), SweepSpec(memory_gib=4.0), needs) == 6
    assert needs.asked == [6]
    assert width(many([4]), SweepSpec(memory_gib=4.0), needs) == 1
    assert needs.asked == [6]


def test_a_width_beyond_memory_is_refused_with_the_one_that_fits(many):
    spec = SweepSpec(width=16, memory_gib=2.0)
    with pytest.raises(BadInput, match=r"16 trials need 8\.00 GiB.*at most 4"):
        width(many([4] * 20), spec, Needs(0.0, 0.5))
    assert width(many([4] * 20), SweepSpec(width=3), Needs(0.0, 1e-6)) == 3


def test_one_trial_beyond_memory_is_tried_all_the_same(many, caplog):
    assert width(many([4] * 3), SweepSpec(memory_gib=1.0), Needs(5.0, 1.0)) == 1
    assert "alone needs 6.00 GiB" in caplog.text


def test_the_memory_limit_is_the_least_of_all_control_groups(tmp_path):
    two = tmp_path / "two"
    (two / "a" / "b").mkdir(parents=True)
    (two / "a" / "memory.max").write_text("4096\n")
    (two / "a" / "b" / "memory.max").write_text("max\n")
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    assert memory.limit(two, own) == 4096
    one = tmp_path / "one"
    (one / "memory").mkdir(parents=True)
    (one / "memory" / "memory.limit_in_bytes").write_text("8192\n")
    own.write_text("5:cpu:/x\n4:memory:/docker/of/the/host\n")
    assert memory.limit(one, own) == 8192
    own.write_text("0::/\n")
    assert (memory.limit(one, own) or 2**40) > 2**20, "the machine's own"


def test_the_gravest_exit_code_tells():
    assert gravest([]) == 0
    assert gravest([0, 77, 0]) == 77
    assert gravest([77, 78, 2]) == 78
    assert gravest([78, 1]) == 1
    assert gravest([75, 77]) == 77
    assert gravest([78, 99]) == 99, "not ours: a bug"


def test_a_width_comes_out_even_on_the_devices_that_share_trials(trial):
    trials = [trial("mesh.trial=4", f"seed={n}") for n in range(30)]
    needs = Needs(0.0, 0.5)
    assert width(trials, SweepSpec(memory_gib=7.0), needs) == 12
    assert all(asked % 4 == 0 for asked in needs.asked)
    assert width(trials[:3], SweepSpec(memory_gib=0.1), needs) == 3
    assert width(trials[:7], SweepSpec(memory_gib=0.1), needs) == 4
    with pytest.raises(BadInput, match=r"sweep.width = 6 .* the 4 devices"):
        width(trials, SweepSpec(width=6), needs)
    with pytest.raises(BadInput, match=r"16 trials need 8\.00 GiB.*at most 12"):
        width(trials, SweepSpec(width=16, memory_gib=7.0), needs)

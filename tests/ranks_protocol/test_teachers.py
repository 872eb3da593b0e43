"""Teachers are what they say, and an oracle's ranks are those of their corrections."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import protocol

from experiments.ranks_protocol import teachers
from experiments.ranks_protocol.tasks import HELD, RANK, TASKS
from experiments.ranks_protocol.teachers import EQUAL, MIXED, WIDTH, Family
from experiments.ranks_protocol.training import slots_for
from lowrank.core.errors import BadInput

pytestmark = pytest.mark.long

FAMILIES = {name: task.family for name, task in TASKS.items()}


def drawn(family, seed=5, **more):
    given = {"rows": 64, "noise": 0.1, "test_rows": 32, **more}
    return teachers.draw(family, 0, seed, **given)


def by_hand(teacher, x, corrected=True):
    """The network, layer by layer and row by row."""
    depth, found = len(teacher.params), []
    for row in x.astype(np.float64):
        h = row
        for layer in range(depth):
            own = teacher.params[f"layer{layer}"]
            weight = own["kernel"] + (teacher.corrections[layer] if corrected else 0)
            out = np.tanh(sum(h[i] * weight[i] for i in range(WIDTH)))
            h = h + (out @ own["back"] if "back" in own else out) / depth**0.5
        found.append(h)
    return np.array(found)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_ranks_are_those_of_the_corrections(family):
    teacher = drawn(family)
    measured = [np.linalg.matrix_rank(one, tol=1e-8) for one in teacher.corrections]
    assert list(teacher.ranks.values()) == measured
    assert sorted(measured) == sorted(family.ranks)
    assert [*teacher.ranks] == [f"layer{n}/kernel" for n in range(len(measured))]
    for change, rank in zip(teacher.corrections, measured, strict=True):
        norm = np.linalg.norm(change)
        np.testing.assert_allclose(norm, family.amplitude * rank**0.5, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_targets_are_the_corrected_network_of_the_inputs(family):
    teacher = drawn(family)
    test, train = teacher.test, teacher.train
    np.testing.assert_allclose(test.y, by_hand(teacher, test.x), atol=1e-5)
    noise = train.y - by_hand(teacher, train.x)
    assert 0.09 < noise.std() < 0.11
    assert test.x.shape == (32, WIDTH)
    assert train.x.shape == (64, WIDTH)


@pytest.mark.parametrize("name", ["heterogeneous", "unequal"])
def test_the_student_starts_as_the_base_and_can_become_the_teacher(name):
    task, settings = TASKS[name], protocol_of(name)
    teacher = task.teacher(2000, settings)
    adapted = task.model(2000, settings)
    frozen, trained = adapted.init(jax.random.key(0))
    x = jnp.asarray(teacher.test.x)
    start = adapted.apply(frozen, trained, x)
    np.testing.assert_allclose(
        start, by_hand(teacher, teacher.test.x, corrected=False), atol=2e-5
    )
    for path, own in trained.items():
        layer = int(path.split("/")[0].removeprefix("layer"))
        u, s, v = np.linalg.svd(teacher.corrections[layer])
        rank = teacher.ranks[path]
        thin = (u[:, :rank] * s[:rank]).T
        own["a"] = jnp.zeros_like(own["a"]).at[:rank].set(thin)
        own["b"] = jnp.zeros_like(own["b"]).at[:rank].set(v[:rank])
    slots = slots_for(adapted)
    gates = slots.parts(slots.prefix(slots.from_names(teacher.ranks)))
    dials = {p: {**own, "gate": gates[p]} for p, own in adapted.dials().items()}
    found = adapted.apply(frozen, trained, x, dials=dials)
    np.testing.assert_allclose(found, teacher.test.y, atol=2e-5)


def protocol_of(name):
    return protocol(Path("unused"), tasks=[name])


@pytest.mark.parametrize("name", TASKS)
def test_the_budget_is_what_the_truth_counts(name):
    task, settings = TASKS[name], protocol_of(name)
    slots = slots_for(task.model(2000, settings))
    truth = task.truth(2000, settings)
    widths = [task.family.outputs(layer) for layer in range(8)]
    cost = {
        f"layer{layer}/kernel": 1 if task.unit == "components" else WIDTH + width
        for layer, width in enumerate(widths)
    }
    wanted = sum(cost[path] * rank for path, rank in truth.items())
    assert task.budget(2000, slots, settings) == wanted
    assert (slots.ranks == RANK).all()
    assert (slots.most == HELD).all()
    if task.unit == "components":
        assert wanted == RANK * 8, "uniform ranks have it too"


def test_seeds_differ_in_everything_but_the_base():
    one, two = drawn(Family(), 1), drawn(Family(), 2)
    for name, own in one.params.items():
        np.testing.assert_array_equal(own["kernel"], two.params[name]["kernel"])
    assert one.ranks != two.ranks
    assert not np.allclose(one.train.x, two.train.x)
    other = teachers.draw_base(Family(), 1)
    assert not np.allclose(other["layer0"]["kernel"], one.params["layer0"]["kernel"])


def test_more_rows_leave_the_teacher_as_it_is():
    few, many = drawn(Family()), drawn(Family(), rows=128, test_rows=64)
    assert few.ranks == many.ranks
    for one, two in zip(few.corrections, many.corrections, strict=True):
        np.testing.assert_array_equal(one, two)


def test_inputs_have_the_variances_that_are_asked_for():
    family = Family(anisotropy=1.0)
    teacher = drawn(family, rows=2**14)
    values = np.linalg.eigvalsh(np.cov(teacher.train.x.T))[::-1]
    wanted = (1.0 / np.arange(1, WIDTH + 1)) / np.mean(1.0 / np.arange(1, WIDTH + 1))
    np.testing.assert_allclose(values, wanted, rtol=0.1)
    flat = drawn(Family(), rows=2**14).train.x
    np.testing.assert_allclose(flat.std(axis=0), 1.0, rtol=0.05)


def test_a_decaying_spectrum_falls_as_it_says():
    values = teachers.spectrum(Family(decay=1.0, amplitude=2.0), 4)
    np.testing.assert_allclose(values / values[0], [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_allclose(np.sqrt((values**2).mean()), 2.0)


def test_the_null_has_equal_ranks_and_the_same_total():
    assert set(EQUAL) == {RANK}
    assert sum(EQUAL) == sum(MIXED)
    assert TASKS["homogeneous"].family.ranks == EQUAL


def test_a_rank_above_the_weight_is_refused():
    with pytest.raises(BadInput, match="rank 17, and its weight is 32 x 16"):
        drawn(Family(ranks=(17,), widths=(16,)))

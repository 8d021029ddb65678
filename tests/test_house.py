"""The numbers of the house on a generated package, whose lines, cycle and repeated names are known."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checks.house import as_table, entered, imported_names, static_numbers

FILES = {
    "setup.py": "x = 1\n",
    "tests/test_a.py": "x = [1,\n  2]\n",  # one line when formatted
    ".venv/hidden.py": "x = 1\n",
    "house/__init__.py": "def load():\n    from .room.plan import Plan\n\n    return Plan\n",
    "house/errors.py": "class Error(Exception):\n    pass\n",
    # A cycle through a package's __init__, closed by an import within a function
    "house/room/__init__.py": "from .plan import Plan\n",
    "house/room/plan.py": "class Plan:\n    def __init__(self, a, *, b, c=None):\n        from ..attic import draw\n",
    "house/attic/__init__.py": "from . import draw\n",
    "house/attic/draw.py": 'from house.room import Plan\n\n\ndef draw(x):\n    return x["instances"]\n',
    # No cycles: a module that imports a sibling, or its own submodule by its package
    "house/attic/plan.py": 'import os\n\nfrom . import draw  # "sem_seg" in a comment \nfrom ..errors import Error\n',
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "house"


@pytest.fixture(scope="module")
def numbers(package):
    return static_numbers(package)


def test_lines_are_those_of_the_formatted_files(numbers):
    own = {name: text.count("\n") for name, text in FILES.items() if name.startswith("house/")}
    assert numbers["lines_of_package"] == sum(own.values())
    assert numbers["lines_of_repository"] == sum(own.values()) + 2
    assert numbers["lines_by_folder"] == {"house/": sum(own.values()), "setup.py": 1, "tests/": 1}
    rooms = {"attic/": 10, "room/": 4, "__init__.py": 4, "errors.py": 2}
    assert numbers["lines_by_room"] == rooms and numbers["modules"] == 7 and numbers["modules_at_root"] == 1


def test_cycles_repeated_names_and_constructors(numbers):
    cycle = ["house.attic.__init__", "house.attic.draw", "house.room.__init__", "house.room.plan"]
    assert numbers["import_cycles"] == [cycle]
    assert numbers["module_names_used_twice"] == {"plan": ["house.attic.plan", "house.room.plan"]}
    assert numbers["constructor_arguments"] == {"house.room.plan.Plan": 3}
    assert numbers["modules_with_output_names"] == ["house.attic.draw"]
    assert "| import cycles | 1: " in as_table(numbers)


def test_imported_names():
    tree = ast.parse("import a.b, c\nfrom .. import d\nfrom ..e import f\nfrom . import g\n")
    names = [".".join(parts) for parts in imported_names("x.y.z", tree)]
    assert names == ["a.b", "c", "x.d", "x.e.f", "x.y.g"]


def test_entered_functions(package):
    """Calls are counted within the package only, without module bodies, classes and comprehensions."""
    code = f"""
from pathlib import Path
from checks.house import entered
import house.errors, house.room
draw = house.room.plan.Plan(1, b=2) and house.attic.draw.draw
numbers = entered(Path({str(package)!r}), lambda: [draw({{"instances": 1}}), house.load(), draw({{"instances": 2}})])
assert numbers == {{
    "files": 2, "functions": 2, "switches": 2, "names_of_files": ["attic/draw.py", "__init__.py"]
}}, numbers
"""
    paths = os.pathsep.join([str(package.parent), str(Path(__file__).parent.parent)])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})
    assert entered(package, lambda: sorted([2, 1])) == {"files": 0, "functions": 0, "switches": 0, "names_of_files": []}

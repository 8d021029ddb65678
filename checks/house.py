"""Measure the size and structure of the code: lines per folder, files that a run executes, import cycles.

    python -m checks.house [--package PATH] [--json FILE]

This prints a Markdown table for a package folder (default: knet_d2 of this repository), and writes the same numbers as
JSON. Lines are counted after ``ruff format`` at width 120. The package may be in another checkout; the tiny model is
that of the checkout's ``tests/helpers.py``. The exit code is 1 if there is an import cycle.
"""

import argparse
import ast
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networkx

OUTPUT_NAMES = ("instances", "panoptic_seg", "sem_seg")
TINY = {
    "MODEL.KNET.NUM_THING_CLASSES": 4,  # the classes of shapes
    "MODEL.KNET.NUM_STUFF_CLASSES": 3,
    "MODEL.KNET.THING_CATEGORY_IDS": [0, 1, 2, 3],
    "MODEL.KNET.STUFF_CATEGORY_IDS": [4, 5, 6],
    "DATASETS.TRAIN": ("shapes_panoptic_train",),
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "MODEL.KNET.TEST.THING_SCORE_THRESHOLD": 0.0,  # the scores of an untrained model are about 0.01
    "MODEL.KNET.TEST.OVERLAP_THRESHOLD": 0.0,
}

# ---- measured from the files -----------------------------------------------------------------------------------


def python_files(folder: Path) -> list[Path]:
    """Return all Python files outside hidden folders and build outputs."""
    files = (path.relative_to(folder) for path in folder.rglob("*.py"))
    left_out = {"build", "output", "shared"}
    return sorted(p for p in files if p.parts[0] not in left_out and not any(x.startswith(".") for x in p.parts))


def formatted_lines(folder: Path) -> dict[Path, int]:
    """Count the lines of each file after ``ruff format`` at width 120 (of a copy)."""
    files = python_files(folder)
    with tempfile.TemporaryDirectory() as copy:
        for path in files:
            target = Path(copy, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, target)
        command = [sys.executable, "-m", "ruff", "format", "--quiet", "--isolated", "--no-cache"]
        subprocess.run([*command, "--line-length=120", "--target-version=py311", copy], check=True)
        return {path: len(Path(copy, path).read_text().splitlines()) for path in files}


def lines_by_part(lines: dict[Path, int]) -> dict[str, int]:
    """Sum the lines by the first folder of each path; files without a folder are separate entries."""
    sums: Counter[str] = Counter()
    for path, count in lines.items():
        sums[path.parts[0] + ("/" if len(path.parts) > 1 else "")] += count
    return dict(sums.most_common())


def read_modules(package: Path) -> dict[str, ast.Module]:
    """Parse all modules; returns {dotted name (a.b.c, a.b.__init__): syntax tree}."""
    paths = python_files(package)
    return {".".join([package.name, *p.with_suffix("").parts]): ast.parse((package / p).read_text()) for p in paths}


def imported_names(name: str, tree: ast.Module) -> Iterator[list[str]]:
    """Yield the parts of every dotted name that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = name.split(".")[: -node.level] if node.level else []
            source += node.module.split(".") if node.module else []
            yield from ([*source, alias.name] for alias in node.names)


def import_graph(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return {module: modules of the package that its imports execute}.

    Importing a.b.c first executes the ``__init__`` of a and of a.b. The ``__init__`` of a folder that contains the
    importing module counts only if the module imports a name from it, because it always starts before the module.
    """
    graph = {}
    for name, tree in modules.items():
        graph[name] = targets = set()
        for parts in imported_names(name, tree):
            prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
            found = [x for prefix in prefixes for x in (prefix, f"{prefix}.__init__") if x in modules]
            targets.update(found[:1], (x for x in found if not name.startswith(x.removesuffix("__init__"))))
        targets.discard(name)
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one module, largest first."""
    components = networkx.strongly_connected_components(networkx.DiGraph(graph))
    return sorted((sorted(x) for x in components if len(x) > 1), key=len, reverse=True)


def constructor_arguments(modules: dict[str, ast.Module]) -> dict[str, int]:
    """Return {class: number of arguments of its ``__init__`` without self}, in descending order."""
    counts = {
        f"{name}.{node.name}": len(method.args.posonlyargs + method.args.args + method.args.kwonlyargs) - 1
        for name, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "__init__"
    }
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def has_output_name(tree: ast.Module) -> bool:
    """Return whether a string constant of the code is the name of an output of a model."""
    return any(isinstance(node, ast.Constant) and node.value in OUTPUT_NAMES for node in ast.walk(tree))


def static_numbers(package: Path) -> dict[str, Any]:
    """Measure everything that does not require running the code."""
    repository = formatted_lines(package.parent)
    own = {path.relative_to(package.name): n for path, n in repository.items() if path.parts[0] == package.name}
    modules = read_modules(package)
    by_stem = defaultdict(list)
    for name in modules:
        by_stem[name.removesuffix(".__init__").rpartition(".")[2]].append(name)
    arguments = constructor_arguments(modules)
    return {
        "lines_of_repository": sum(repository.values()),
        "lines_of_package": sum(own.values()),
        "lines_by_folder": lines_by_part(repository),
        "lines_by_room": lines_by_part(own),
        "modules": len(own),
        "modules_at_root": sum(len(path.parts) == 1 and path.name != "__init__.py" for path in own),
        "module_names_used_twice": {k: v for k, v in by_stem.items() if len(v) > 1 and not k.startswith("__")},
        "import_cycles": cycles(import_graph(modules)),
        "constructor_arguments": dict(list(arguments.items())[:5]),
        "constructor_arguments_of_KNet": next((n for k, n in arguments.items() if k.endswith(".KNet")), None),
        "modules_with_output_names": [name for name, tree in modules.items() if has_output_name(tree)],
    }


# ---- measured while the code runs ------------------------------------------------------------------------------


def entered(package: Path, action: Callable[[], object]) -> dict[str, Any]:
    """Count the files and functions of the package that ``action`` calls, and the calls that go to another file."""
    prefix, calls = str(package) + os.sep, []

    def profile(frame, event, arg):
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
        if event == "call" and is_function and code.co_filename.startswith(prefix):
            calls.append((code.co_filename.removeprefix(prefix), code.co_qualname))

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    files = [file for file, _ in calls]
    return {
        "files": len(set(files)),
        "functions": len(set(calls)),
        "switches": sum(a != b for a, b in zip(files, files[1:])),
        "names_of_files": list(dict.fromkeys(files)),
    }


def dynamic_numbers(package: Path) -> dict[str, Any]:
    """Count the functions that are called by the losses of a batch, a training step, an inference, and loading a file.

    The model is tiny and panoptic, on the CPU. Everything runs twice and the second run is counted, because the first
    one also imports modules and fills caches.
    """
    folder = tempfile.mkdtemp()
    os.environ["DETECTRON2_DATASETS"] = folder  # read when knet_d2.data is imported
    sys.path[:0] = [str(package.parent), str(package.parent / "tests")]
    import helpers
    import torch

    import knet_d2
    from knet_d2.data.shapes import SPLITS
    from knet_d2.engine import Trainer

    assert Path(knet_d2.__file__).parent == package, f"{knet_d2.__file__} was imported instead of {package}"
    numbers = {}

    class WatchedTrainer(Trainer):
        def run_step(self):
            batch = next(iter(self.data_loader))
            numbers["training_forward"] = entered(package, lambda: self.model(batch))
            numbers["training_step"] = entered(package, super().run_step)

    SPLITS["train"] = (2, 1)  # two images
    trainer = WatchedTrainer(helpers.tiny_config("panoptic", {**TINY, "OUTPUT_DIR": folder}))
    trainer.train()
    model, image = trainer.model.eval(), torch.zeros(3, 64, 80, dtype=torch.uint8)
    weights, file = f"{folder}/model_final.pth", next(Path(folder).rglob("images/*"))
    options = {"device": "cpu", "confidence_threshold": 0.0}
    with torch.no_grad():
        for _ in range(2):
            numbers["inference"] = entered(package, lambda: model([{"image": image}]))
            numbers["load_and_image"] = entered(package, lambda: knet_d2.load(weights, **options)(file))
    shutil.rmtree(folder)
    return numbers


def as_table(numbers: dict[str, Any]) -> str:
    """Format the numbers as a Markdown table; a dict gives one row per entry, a list its length and its entries."""
    rows = []
    for name, value in numbers.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in entries:
            if isinstance(entry, list):
                entry = f"{len(entry)}: {', '.join(map(str, entry))}"
            rows.append(f"| {name.replace('_', ' ')} {key}".rstrip() + f" | {entry} |")
    return "\n".join(["| what | number |", "|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=Path(__file__).resolve().parent.parent / "knet_d2")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    package = arguments.package.resolve()
    numbers = {"python": platform.python_version(), **static_numbers(package), **dynamic_numbers(package)}
    print(as_table(numbers))
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return int(bool(numbers["import_cycles"]))


if __name__ == "__main__":
    sys.exit(main())

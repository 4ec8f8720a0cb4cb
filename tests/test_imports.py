"""Check the structure of the code: imports run one way, folders and functions stay small.

Parses every module of launch, eval and astra; imports none of them. Imports inside functions and
under TYPE_CHECKING count like any other. No processes, no data; a second.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("launch", "eval", "astra")
# The rooms of launch from top to bottom. A module imports from its own room and from rooms below.
ROOMS = [
    "commands",
    "pipeline",
    "pages",
    "stages",
    "sweeps",
    "planning",
    "quickstart",
    "scoring",
    "calibration",
    "training",
    "data",
    "engines",
    "run",
    "cli",
    "config",
    "methods",
    "models",
    "runtime",
]
MAX_MODULES = 18  # in a folder
MAX_LINES = 60  # of a function of launch/pipeline.py and launch/stages/


@dataclass(frozen=True)
class Import:
    """A statement in `importer` that imports the module `imported`."""

    importer: str
    imported: str
    line: int


def list_modules(root: Path) -> dict[str, Path]:
    """Return the path of every module of the packages, by its dotted name."""
    modules = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = path
    return modules


def parse_module(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def list_imports(root: Path) -> list[Import]:
    """List every import of one module of the packages by another."""
    modules = list_modules(root)
    imports = []
    for importer, path in modules.items():
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for line, name in _find_imported_names(parse_module(path), package):
            imported = _find_module(name, modules)
            if imported is not None and imported != importer:
                imports.append(Import(importer, imported, line))
    return list(dict.fromkeys(imports))  # a statement may import several names of one module


def _find_imported_names(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything that a module imports, however deep it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:  # relative: each further dot is a package up
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"


def _find_module(name: str, modules: dict[str, Path]) -> str | None:
    """Return the module that holds `name`, which is a module's name or ends in a member's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def find_room(module: str) -> str:
    """Return the room of a module of launch. Raises ValueError if it has none in `ROOMS`."""
    parts = module.split(".")
    path = ROOT.joinpath(*parts)
    if len(parts) == 1:
        return "runtime"  # launch/__init__.py, which every other module imports
    if parts[1] in ROOMS:
        return parts[1]
    if len(parts) == 2 and not path.is_dir():
        return "commands"
    raise ValueError(f"{module}: its folder is not one of the rooms in tests/test_imports.py")


def find_upward_imports(imports: list[Import]) -> list[str]:
    """Describe the imports of a higher room, and those of another package by eval or astra."""
    faults = []
    for found in imports:
        importer, imported = (name.partition(".")[0] for name in (found.importer, found.imported))
        place = f"{found.importer}:{found.line} imports {found.imported}"
        if importer != "launch":
            if imported != importer:
                faults.append(f"{place}; {importer} may import nothing of launch, eval and astra")
        elif imported == "launch":
            rooms = [find_room(found.importer), find_room(found.imported)]
            if ROOMS.index(rooms[0]) > ROOMS.index(rooms[1]):
                faults.append(f"{place}; {rooms[0]} is below {rooms[1]}")
    return faults


def find_cycles(imports: list[Import]) -> list[list[str]]:
    """Return the groups of modules in which every module imports every other, directly or not.

    `from package import module` is an import of the module; a package's __init__ counts where a
    name that it defines is imported.
    """
    targets: dict[str, set[str]] = {}
    for found in imports:
        targets.setdefault(found.importer, set()).add(found.imported)
    reachable = {module: _find_reachable(module, targets) for module in targets}
    cycles: list[list[str]] = []
    for module, reached in reachable.items():
        if module not in reached or any(module in cycle for cycle in cycles):
            continue
        cycles.append(sorted(m for m in reached if module in reachable.get(m, ())))
    return cycles


def _find_reachable(module: str, targets: dict[str, set[str]]) -> set[str]:
    """Return the modules that `module` imports, directly or through others."""
    reached: set[str] = set()
    waiting = list(targets.get(module, ()))
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += targets.get(current, ())
    return reached


def report(title: str, faults: list[str]) -> str:
    """Return a failure message with a fault a line."""
    return f"{title} ({len(faults)}):\n  " + "\n  ".join(faults)


def test_imports_run_downwards() -> None:
    faults = find_upward_imports(list_imports(ROOT))
    assert not faults, report("imports that run upwards", faults)


def test_no_modules_import_each_other() -> None:
    cycles = [" <-> ".join(cycle) for cycle in find_cycles(list_imports(ROOT))]
    assert not cycles, report("cycles of imports", cycles)


def test_tests_share_code_through_their_support_folder_alone() -> None:
    faults = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for line, name in _find_imported_names(parse_module(path), "tests"):
            package = name.split(".")[0]
            shared = name.startswith("tests.support.")
            if package == "bench" or (package == "tests" and not shared):
                faults.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not faults, report("imports of test modules, workers or benchmarks", faults)


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name
        for name, path in list_modules(ROOT).items()
        if not ast.get_docstring(parse_module(path))
    ]
    assert not silent, report("modules without a docstring", silent)


def test_no_folder_is_crowded() -> None:
    folders: dict[Path, int] = {}
    for path in list_modules(ROOT).values():
        if path.name != "__init__.py":
            folders[path.parent] = folders.get(path.parent, 0) + 1
    crowded = [
        f"{folder.relative_to(ROOT)}: {count} modules, at most {MAX_MODULES}"
        for folder, count in folders.items()
        if count > MAX_MODULES
    ]
    assert not crowded, report("crowded folders", crowded)


def test_each_stage_of_the_pipeline_is_a_short_function() -> None:
    long = []
    for path in (ROOT / "launch" / "pipeline.py", *(ROOT / "launch" / "stages").glob("*.py")):
        for node in ast.walk(parse_module(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_LINES:
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                long.append(f"{place}: {lines} lines, at most {MAX_LINES}")
    assert not long, report("long functions", long)


@pytest.mark.parametrize(
    ("module", "text", "fault"),
    [
        ("launch.data.rows", "from launch.training import loop", "data is below training"),
        ("launch.data.rows", "def f():\n    import launch.training.loop", "data is below training"),
        ("launch.data.rows", "from ..training.loop import train", "data is below training"),
        ("launch.config.schema", "from launch import cli", "config is below cli"),
        ("eval.grading", "from launch.data import rows", "eval may import nothing of"),
        ("astra.inits", "import eval.grading", "astra may import nothing of"),
        ("launch.training.loop", "from launch.data import rows", None),
        ("launch.training.loop", "from astra import inits", None),
        ("launch.train", "from launch import cli, pipeline", None),
    ],
)
def test_the_check_finds_upward_imports(
    module: str, text: str, fault: str | None, tmp_path: Path
) -> None:
    others = ["launch.cli", "launch.pipeline", "launch.training.loop"]
    for name in [*others, "launch.data.rows", "eval.grading", "astra.inits", module]:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path.write_text(f'"""Doc."""\nif TYPE_CHECKING:\n    pass\n{text}\n')
    faults = find_upward_imports(list_imports(tmp_path))
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


def test_the_check_finds_cycles() -> None:
    names = [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("x", "y"), ("y", "x")]
    imports = [Import(importer, imported, 1) for importer, imported in names]
    assert find_cycles(imports) == [["a", "b", "c"], ["x", "y"]]

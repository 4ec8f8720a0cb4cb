"""The package's metadata agree with each other: pyproject.toml, the pinned requirements, ruff's hook.

Reads files only; a second.
"""

import re
import tomllib
from collections.abc import Iterable

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_namespace_packages

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def index_by_name(lines: Iterable[str]) -> dict[str, Requirement]:
    """Return requirements by their canonical name. Raises AssertionError if one is there twice."""
    requirements = {}
    for line in lines:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name not in requirements, f"{name} is there twice"
        requirements[name] = requirement
    return requirements


def read_pins(name: str) -> dict[str, str]:
    """Return package -> the exact version that the requirements file `name` pins."""
    lines = []
    for line in (ROOT / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text:
            lines.append(text)
    pins = {}
    for package, requirement in index_by_name(lines).items():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{name}: {package} is not pinned"
        pins[package] = specifier.version
    return pins


def find_disagreements(pins: dict[str, str], declared: dict[str, Requirement]) -> list[str]:
    """Return a line for each package that is pinned and not declared, or pinned out of its bounds."""
    faults = []
    for package, version in pins.items():
        if package not in declared:
            faults.append(f"{package} {version} is pinned, but not declared")
        elif not declared[package].specifier.contains(version):
            faults.append(f"{package} {version} is pinned, but {declared[package]} is declared")
    return faults


@pytest.mark.parametrize(
    ("file", "declarations"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"] + EXTRAS["dev"]),
        ("requirements-extras.txt", EXTRAS["tracking"]),
    ],
)
def test_what_is_pinned_is_declared_and_the_reverse(file: str, declarations: list[str]) -> None:
    pins, declared = read_pins(file), index_by_name(declarations)
    assert pins, "nothing is pinned, so nothing is checked"
    assert find_disagreements(pins, declared) == []
    assert set(declared) == set(pins)


def test_what_the_crosscheck_declares_is_pinned_within_its_bounds() -> None:
    pins, declared = read_pins("requirements-crosscheck.txt"), index_by_name(EXTRAS["crosscheck"])
    pinned_here = {package: pins[package] for package in declared}
    assert pinned_here
    assert find_disagreements(pinned_here, declared) == []


def test_the_check_finds_what_disagrees() -> None:
    declared = index_by_name(["Torch>=2.13", "numpy>=2.4"])
    assert find_disagreements({"torch": "2.13.0", "numpy": "2.4.6"}, declared) == []
    faults = find_disagreements({"torch": "2.12.1", "scipy": "1.17.1"}, declared)
    assert faults == [
        "torch 2.12.1 is pinned, but Torch>=2.13 is declared",
        "scipy 1.17.1 is pinned, but not declared",
    ]


def test_every_dependency_has_a_lower_bound() -> None:
    for requirement in index_by_name(PROJECT["project"]["dependencies"]).values():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators & {">=", "=="}, requirement


def test_packages_are_those_of_the_three_folders() -> None:
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = find_namespace_packages(str(ROOT), include=patterns)
    assert {name.partition(".")[0] for name in packages} == {"astra", "eval", "launch"}
    for folder in ("astra", "eval", "launch"):
        for module in (ROOT / folder).rglob("*.py"):
            name = ".".join(module.relative_to(ROOT).parent.parts)
            assert name in packages, f"{module} would not be installed"


def test_ruff_has_one_version() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    assert repository["rev"] == f"v{read_pins('requirements.txt')['ruff']}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


def test_licence_and_version_are_said_alike_everywhere() -> None:
    project = PROJECT["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    licence = (ROOT / "LICENSE").read_text()
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", licence)
    assert licence.rstrip().endswith("limitations under the License.")

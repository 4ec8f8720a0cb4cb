"""What a part is given, and what it hands back. Imports as little as can be."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Work:
    """What a part is given."""

    folder: Path  # for its files; gone when all parts are done
    tiny: bool
    real_model: Path | None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Report:
    """The figures and checks of a part."""

    def __init__(self, judges_speed: bool) -> None:
        self.judges_speed = judges_speed
        self.figures: dict = {}
        self.checks: list[dict] = []

    def check(self, check: str, passed: bool, found: object) -> None:
        """Add something that must hold on any device."""
        self.checks.append({"check": check, "passed": bool(passed), "found": str(found)})

    def goal(self, goal: str, passed: bool | None, found: object) -> None:
        """Add a goal of speed. None where it cannot be judged; none is on CPUs."""
        if passed is not None:
            passed = bool(passed) if self.judges_speed else None
        self.checks.append({"check": goal, "passed": passed, "found": str(found)})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"figures": self.figures, "checks": self.checks}))


def synchronise() -> None:
    """Wait until the GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

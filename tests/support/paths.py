"""Name the folders of the repository that tests use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "distributed" / "workers"
FIXTURES = ROOT / "tests" / "fixtures"

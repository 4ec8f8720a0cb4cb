"""One file for each benchmark: its rows, and `grade`."""

from types import ModuleType

from eval.tasks import gsm8k

TASKS: dict[str, ModuleType] = {"gsm8k": gsm8k}

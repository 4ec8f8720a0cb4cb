"""The adapters that a run exports: adapter/, astra_init/ and lora/.

astra_init/ holds A0 and B0 of any method that starts on a residual base, PiSSA for example.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from astra.adapter import Factors, save_adapter, to_plain_lora
from launch.runtime.files import write_json

RESIDUAL_WARNING = (
    "This adapter is valid only on the residual base W_res, which is rebuilt from the original "
    "base and ../astra_init. On the original base use ../lora instead."
)


def save_adapters(
    folder: Path,
    config: LoraConfig,
    base: dict,
    initial: Mapping[str, Factors],
    trained: Mapping[str, Factors],
    magnitudes: Mapping[str, Tensor],
) -> None:
    """Write the trained adapter in PEFT's format. Rank 0 calls it.

    adapter/ holds the trained factors. On a residual base, astra_init/ holds A0 and B0, and lora/
    the difference, valid on the original base. Otherwise lora/ is the trained adapter itself; DoRA
    has none, because no plain LoRA equals it.

    Args:
        base: name and weights_sha256 of the base model. They are kept beside each adapter, and
            checked when it is loaded.
        initial, trained: factors by module name.
        magnitudes: DoRA's by module name; empty for the others.
    """
    # By value: a method that starts on a residual may have found nothing but zeros.
    on_residual = any(factors.b.any() and factors.a.any() for factors in initial.values())
    exports: dict[str, Mapping[str, Factors]] = {"adapter": trained}
    if on_residual:
        exports["astra_init"] = initial
        exports["lora"] = to_plain_lora(trained, initial)
    elif not magnitudes:
        exports["lora"] = trained
    for name, factors in exports.items():
        save_adapter(folder / name, config, base["name"], factors, magnitudes)
        needs_residual = on_residual and name == "adapter"
        valid_on = {"on": "residual" if needs_residual else "original"}
        write_json(folder / name / "base.json", base | valid_on)
    if on_residual:
        (folder / "adapter" / "README.md").write_text(RESIDUAL_WARNING + "\n", encoding="utf-8")


def read_adapter_base(folder: Path) -> dict | None:
    """Read what `save_adapters` noted of an adapter's base; None for an adapter made elsewhere."""
    path = folder / "base.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_plain_rank(run: Path) -> int | None:
    """Read the rank of the run's lora/, the largest of its modules'; None where it has none."""
    path = run / "lora" / "adapter_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return max([config["r"], *config["rank_pattern"].values()])

"""The adapters that a run exports: adapter/, astra_init/, lora/ and, if asked for, lora_small/.

astra_init/ holds A0 and B0 of any method that starts on a residual base, PiSSA for example. The
LoRAs for the original base have one rank and scale 1 (astra.plain_lora).
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from astra.adapter import ADAPTER_CONFIG, Factors, save_adapter
from astra.plain_lora import get_scaling, save_plain_lora, to_plain_lora
from launch.models.files import locate_base
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
    head: Mapping[str, Tensor],
) -> None:
    """Write the trained adapter in PEFT's format. Rank 0 calls it.

    adapter/ holds the trained factors. On a residual base, astra_init/ holds A0 and B0. lora/ is
    the change of the original base; DoRA has none, because no plain LoRA equals it.

    Args:
        base: of launch.data.inputs.Inputs. It is kept beside each adapter, and checked when that is
            loaded.
        initial, trained: factors by module name.
        magnitudes: DoRA's by module name; empty for the others.
        head: the trained parameters of a new head, by name; empty without one.
    """
    on_residual = starts_on_residual(initial)
    config, name = name_base(config, base)
    save_adapter(folder / "adapter", config, name, trained, magnitudes, head)
    note_base(folder / "adapter", base, "residual" if on_residual else "original")
    if on_residual:
        save_adapter(folder / "astra_init", config, name, initial)
        note_base(folder / "astra_init", base, "original")
        (folder / "adapter" / "README.md").write_text(RESIDUAL_WARNING + "\n", encoding="utf-8")
    if not magnitudes:
        plain = to_plain_lora(trained, initial if on_residual else {}, get_scaling(config))
        save_plain_lora(folder / "lora", config, name, plain, head)
        note_base(folder / "lora", base, "original")


def name_base(config: LoraConfig, base: dict) -> tuple[LoraConfig, str]:
    """Return the config and the name by which PEFT finds an adapter's base from any folder.

    Args:
        config: its copy gets the base's commit on the hub.
        base: see `save_adapters`.
    """
    config = copy.copy(config)
    name, config.revision = locate_base(base["name"], base["revision"], base["revision_verified"])
    return config, name


def starts_on_residual(initial: Mapping[str, Factors]) -> bool:
    """Return whether B0 A0 is not zero.

    By value: a method that starts on a residual may have found nothing but zeros.
    """
    return any(factors.b.any() and factors.a.any() for factors in initial.values())


def note_base(folder: Path, base: dict, on: str) -> None:
    """Write beside an adapter what base it is for: the `original` one, or its `residual`."""
    write_json(folder / "base.json", base | {"on": on})


def read_adapter_base(folder: Path) -> dict | None:
    """Read what `save_adapters` noted of an adapter's base; None for an adapter made elsewhere."""
    path = folder / "base.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_plain_rank(run: Path) -> int | None:
    """Read the rank of the run's lora/; None where it has none.

    Those that earlier versions wrote may have modules of other ranks; it is then the largest.
    """
    path = run / "lora" / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return max([config["r"], *config["rank_pattern"].values()])

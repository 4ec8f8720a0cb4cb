"""The run folder's artefacts: calibration/, astra_init/, adapter/, lora/ and the model card."""

import json
from pathlib import Path

import torch
from peft import LoraConfig

from astra import adapter
from astra.adapter import Factors
from launch.files import write_json
from launch.recipe import Recipe
from launch.report import method

WARNING = (
    "This adapter is valid only on the residual base W_res, which is rebuilt from the original base and ../astra_init. "
    "On the original base use ../lora instead."
)


def save_adapters(
    folder: Path, config: LoraConfig, base: dict, initial: dict[str, Factors], trained: dict[str, Factors]
) -> None:
    """The trained adapter in PEFT's format, three ways (see the model card).

    Args:
        base: `name` and `weights_sha256` of the base model; kept beside the adapters, checked when they are loaded.
        initial, trained: factors by module name.
    """
    parts = {"adapter": trained, "lora": trained}
    on_residual = any(factors.b.any() and factors.a.any() for factors in initial.values())
    if on_residual:
        parts |= {"astra_init": initial, "lora": adapter.to_plain_lora(trained, initial)}
    for name, factors in parts.items():
        adapter.save(folder / name, config, base["name"], factors)
        on = "residual" if on_residual and name == "adapter" else "original"
        write_json(folder / name / "base.json", base | {"on": on})
    if on_residual:
        (folder / "adapter" / "README.md").write_text(WARNING + "\n")


def read_base(folder: Path) -> dict | None:
    """What save_adapters noted of the base of the adapter in `folder`; None for an adapter made elsewhere."""
    path = folder / "base.json"
    return json.loads(path.read_text()) if path.is_file() else None


def model_card(recipe: Recipe, results: dict) -> str:
    """README.md of a run: what it is, under which conditions, how to load it."""
    scores = "\n".join(
        f"| {suite} | {when} | {100 * score['accuracy']:.1f} | {100 * score['interval'][0]:.1f} to "
        f"{100 * score['interval'][1]:.1f} | {score['n']} |"
        for when, part in (("before", results.get("baseline", {})), ("after", results["scores"]))
        for suite, score in part.items()
    )
    table = (
        f"| suite | training | accuracy (%) | 95 % interval | n |\n|---|---|---|---|---|\n{scores}\n" if scores else ""
    )
    rounding = ""
    if results["dtype"] == "bfloat16":
        rounding = (
            f"\nThe frozen base is bfloat16: the residual is rounded, by at most {results['residual_rounding']:.1e} of "
            "a weight's norm, and `lora/` on the original base differs from the trained model by that rounding.\n"
        )
    residual = (
        "| `adapter/` | the trained factors, valid ONLY on the residual base `W_res = W - s B0 A0` |\n"
        "| `astra_init/` | the untrained factors A0, B0, from which W_res is rebuilt |\n"
        if results["on_residual"]
        else "| `adapter/` | the trained factors, on the original base |\n"
    )
    return f"""# {recipe.model.name}, fine-tuned: {method(results)}

Rank {recipe.adapter.rank}, alpha {recipe.adapter.alpha:g}, seed {recipe.train.seed}, {results["steps"]} steps of
{recipe.train.global_batch} rows of {recipe.data.path}. Final loss {results["final_loss"]:.4f} nats per answer token.
Largest relative change of the logits at step 0: {results["logit_drift"]:.1e}.

{table}
| folder | holds |
|---|---|
| `lora/` | a plain LoRA of rank {results["lora_rank"]} for the ORIGINAL base: load it with PEFT or a server |
{residual}
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{recipe.model.name}")
model = PeftModel.from_pretrained(model, "lora")
```
{rounding}
`recipe.yaml` makes this run again; `results.json` has the numbers with their conditions, `metrics.jsonl` every step.
Base weights: SHA-256 {results["base"]["weights_sha256"]}.
"""


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def plain_rank(folder: Path) -> int:
    """The rank of the run's lora/, the largest of its modules'."""
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    return max([config["r"], *config["rank_pattern"].values()])

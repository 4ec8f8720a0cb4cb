"""The run folder's artefacts: astra_init/, adapter/, lora/ or model/, and the model card."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from astra import adapter
from astra.adapter import Factors
from launch.config.schema import Recipe
from launch.data.inputs import Inputs
from launch.engines import Engine
from launch.report import method
from launch.runtime.distributed import on_rank0
from launch.runtime.files import write_json
from launch.runtime.model_files import FILES

WARNING = (
    "This adapter is valid only on the residual base W_res, which is rebuilt from the original base and ../astra_init. "
    "On the original base use ../lora instead."
)
CONTENTS = {  # of the folders that a run may export; the first that is there is the one to load
    "model": "the whole fine-tuned model, in transformers' format: it needs no base",
    "lora": "a plain LoRA of rank {rank} for the ORIGINAL base: load it with PEFT or a server",
    "adapter": "the trained adapter, on the original base",
    "astra_init": "the untrained factors A0, B0, from which W_res is rebuilt",
}
ON_RESIDUAL = "the trained factors, valid ONLY on the residual base `W_res = W - s B0 A0`"


def save_adapters(
    folder: Path,
    config: LoraConfig,
    base: dict,
    initial: dict[str, Factors],
    trained: dict[str, Factors],
    magnitudes: dict[str, Tensor],
) -> None:
    """The trained adapter in PEFT's format, three ways (see the model card); of DoRA, which no plain LoRA equals, one.

    Args:
        base: `name` and `weights_sha256` of the base model; kept beside the adapters, checked when they are loaded.
        initial, trained: factors by module name. magnitudes: DoRA's, by module name.
    """
    parts = {"adapter": trained} if magnitudes else {"adapter": trained, "lora": trained}
    on_residual = any(factors.b.any() and factors.a.any() for factors in initial.values())
    if on_residual:
        parts |= {"astra_init": initial, "lora": adapter.to_plain_lora(trained, initial)}
    for name, factors in parts.items():
        adapter.save(folder / name, config, base["name"], factors, magnitudes)
        on = "residual" if on_residual and name == "adapter" else "original"
        write_json(folder / name / "base.json", base | {"on": on})
    if on_residual:
        (folder / "adapter" / "README.md").write_text(WARNING + "\n")


def save_model(folder: Path, model: PreTrainedModel, engine: Engine, inputs: Inputs) -> None:
    """The whole trained model in transformers' format, with the base's tokenizer and other files. Collective.

    Weights are in the recipe's dtype, gathered one after the other into rank 0's CPU memory.
    """
    tensors = {}
    for name, parameter in model.named_parameters():  # a tied one once
        value = engine.read(parameter)
        if dist.get_rank() == 0:
            tensors[name] = torch.empty(value.shape, dtype=inputs.dtype).copy_(
                value
            )  # without FSDP2's padding
    kept = model.state_dict().keys()
    tensors |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in kept}

    def write() -> None:
        folder.mkdir(exist_ok=True)
        save_torch_state_dict(revert_weight_conversion(model, tensors), folder)
        for pattern in FILES:
            for path in inputs.model_path.glob(pattern):
                if ".safetensors" not in path.name:
                    shutil.copyfile(path, folder / path.name)
        config = json.loads((folder / "config.json").read_text())
        config.pop("torch_dtype", None)  # what older files call it
        write_json(folder / "config.json", config | {"dtype": dtype_name(inputs.dtype)})

    on_rank0(write)


def read_base(folder: Path) -> dict | None:
    """What save_adapters noted of the base of the adapter in `folder`; None for an adapter made elsewhere."""
    path = folder / "base.json"
    return json.loads(path.read_text()) if path.is_file() else None


def model_card(folder: Path, recipe: Recipe, results: dict) -> str:
    """README.md of the run in `folder`: what it is, under which conditions, how to load what it exported."""
    parts = [name for name in CONTENTS if (folder / name).is_dir()]
    scores = "\n".join(
        f"| {suite} | {when} | {100 * score['accuracy']:.1f} | {100 * score['interval'][0]:.1f} to "
        f"{100 * score['interval'][1]:.1f} | {score['n']} |"
        for when, part in (("before", results.get("baseline", {})), ("after", results["scores"]))
        for suite, score in part.items()
    )
    table = (
        f"| suite | training | accuracy (%) | 95 % interval | n |\n|---|---|---|---|---|\n{scores}\n"
        if scores
        else ""
    )
    trained = (
        f"Rank {results['rank']}, alpha {results['alpha']:g}"
        if results["rank"]
        else "All parameters trained"
    )
    rounding = ""
    if results["dtype"] == "bfloat16" and "astra_init" in parts:
        rounding = (
            f"\nThe frozen base is bfloat16: the residual is rounded, by at most {results['residual_rounding']:.1e} of "
            "a weight's norm, and `lora/` on the original base differs from the trained model by that rounding.\n"
        )
    return f"""# {recipe.model.name}, fine-tuned: {method(results)}

{trained}, seed {recipe.train.seed}, {results["steps"]} steps of
{recipe.train.global_batch} rows of {recipe.data.path}. Final loss {results["final_loss"]:.4f} nats per answer token.
Largest relative change of the logits at step 0: {results["logit_drift"]:.1e}.

{table}
{_contents(parts, recipe.model.name, results["lora_rank"])}
{rounding}
`recipe.yaml` makes this run again; `results.json` has the numbers with their conditions, `metrics.jsonl` every step.
Base weights: SHA-256 {results["base"]["weights_sha256"]}.
"""


def _contents(parts: list[str], base: str, rank: int | None) -> str:
    """What a run exported, and how to load the first of it."""
    texts = CONTENTS | ({"adapter": ON_RESIDUAL} if "astra_init" in parts else {})
    table = "\n".join(f"| `{name}/` | {texts[name].format(rank=rank)} |" for name in parts)
    load = f"""from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{"model" if "model" in parts else base}")"""
    if "model" not in parts:
        load = f'from peft import PeftModel\n{load}\nmodel = PeftModel.from_pretrained(model, "{parts[0]}")'
    return f"""| folder | holds |
|---|---|
{table}

```python
{load}
```"""


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def plain_rank(folder: Path) -> int | None:
    """The rank of the run's lora/, the largest of its modules'; None for a run that is no plain LoRA."""
    path = folder / "lora" / "adapter_config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text())
    return max([config["r"], *config["rank_pattern"].values()])

"""README.md of a run: what it is, under which conditions, and how to load what it exported."""

from pathlib import Path

from launch.config.schema import Recipe
from launch.run.results import RunResults, Score

# Of the folders that a run may export. The first that is there is the one to load.
CONTENTS = {
    "model": "the whole fine-tuned model, in transformers' format: it needs no base",
    "lora": "a plain LoRA of rank {rank} for the ORIGINAL base: load it with PEFT or a server",
    "adapter": "the trained adapter, on the original base",
    "astra_init": "the untrained factors A0, B0, from which W_res is rebuilt",
}
ON_RESIDUAL = "the trained factors, valid ONLY on the residual base `W_res = W - s B0 A0`"


def render_model_card(folder: Path, recipe: Recipe, results: RunResults) -> str:
    """Render the card of the run in `folder`."""
    exports = [name for name in CONTENTS if (folder / name).is_dir()]
    trained = "All parameters trained"
    if results.rank:
        trained = f"Rank {results.rank}, alpha {results.alpha:g}"
    return f"""# {recipe.model.name}, fine-tuned: {results.label}

{trained}, seed {recipe.train.seed}, {results.steps} steps of
{recipe.train.global_batch} rows of {recipe.data.path}. Final loss {results.final_loss:.4f} nats per answer token.
Largest relative change of the logits at step 0: {results.logit_drift:.1e}.

{_render_scores(results)}
{_render_contents(exports, recipe.model.name, results.lora_rank)}
{_render_rounding(exports, results)}
`recipe.yaml` makes this run again; `results.json` has the numbers with their conditions, `metrics.jsonl` every step.
Base weights: SHA-256 {results.base.weights_sha256}.
"""


def _render_scores(results: RunResults) -> str:
    """Render the scores before and after training as a Markdown table; empty if there are none."""
    rows = [_render_row(name, "before", score) for name, score in results.baseline.items()]
    rows += [_render_row(name, "after", score) for name, score in results.scores.items()]
    if not rows:
        return ""
    head = ["| suite | training | accuracy (%) | 95 % interval | n |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _render_row(suite: str, when: str, score: Score) -> str:
    low, high = score.interval
    accuracy = f"{100 * score.accuracy:.1f}"
    return f"| {suite} | {when} | {accuracy} | {100 * low:.1f} to {100 * high:.1f} | {score.n} |"


def _render_rounding(exports: list[str], results: RunResults) -> str:
    """Say by how much a bfloat16 residual is rounded; empty for other runs."""
    if results.dtype != "bfloat16" or "astra_init" not in exports:
        return ""
    return (
        "\nThe frozen base is bfloat16: the residual is rounded, by at most "
        f"{results.residual_rounding:.1e} of a weight's norm, and `lora/` on the original base "
        "differs from the trained model by that rounding.\n"
    )


def _render_contents(exports: list[str], base: str, lora_rank: int | None) -> str:
    """List what a run exported, and show how to load the first of it."""
    texts = dict(CONTENTS)
    if "astra_init" in exports:
        texts["adapter"] = ON_RESIDUAL
    table = "\n".join(f"| `{name}/` | {texts[name].format(rank=lora_rank)} |" for name in exports)
    loaded = "model" if "model" in exports else base
    code = [
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{loaded}")',
    ]
    if "model" not in exports:
        code.insert(0, "from peft import PeftModel")
        code.append(f'model = PeftModel.from_pretrained(model, "{exports[0]}")')
    lines = "\n".join(code)
    return f"""| folder | holds |
|---|---|
{table}

```python
{lines}
```"""

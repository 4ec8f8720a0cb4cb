"""README.md of a run: what it is, under which conditions, and how to load what it exported."""

import shlex
from pathlib import Path

from launch.config.schema import Export, Recipe
from launch.models.files import locate_base
from launch.run.results import (
    RunResults,
    Score,
    TaskScore,
    describe_data,
    describe_source,
    describe_task_score,
)
from launch.training.chat_files import CHAT_TEMPLATE, has_chat_files

# Of the folders that a run may export. The first that is there is the one to load.
CONTENTS = {
    "model": "the whole fine-tuned model, in transformers' format: it needs no base",
    "lora": "a plain LoRA of rank {rank} and scale 1 for the ORIGINAL base: load it with PEFT or a "
    "server",
    "lora_small": "`lora/` cut to rank {small.rank} by SVD; {small_figures}",
    "adapter": "the trained adapter, on the original base",
    "astra_init": "the untrained factors A0, B0, from which W_res is rebuilt",
    "merged": "the whole model with the adapter merged into it: it needs no base",
}
ON_RESIDUAL = "the trained factors, valid ONLY on the residual base `W_res = W - s B0 A0`"
# What --max-lora-rank may be. Source: vllm-project/vllm, vllm/config/lora.py, MaxLoRARanks.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def render_model_card(folder: Path, recipe: Recipe, results: RunResults) -> str:
    """Render the card of the run in `folder`."""
    exports = list_exports(folder, recipe.export)
    trained = "All parameters trained"
    if results.rank:
        trained = f"Rank {results.rank}, alpha {results.alpha:g}"
    return f"""{_render_header(exports, results)}# {recipe.model.name}, fine-tuned: {results.label}

{trained}, seed {recipe.train.seed}, {results.steps} steps of
{recipe.train.global_batch} rows of {recipe.data.label}. Final loss {results.final_loss:.4f}{_name_unit(results)}.
{_render_history(recipe, results)}Largest relative change of the logits at step 0: {results.logit_drift:.1e}.
{_render_data(results)}{_render_note(results)}
{_render_scores(results)}
{_render_contents(exports, results)}
{_render_rounding(exports, results)}{_render_prompt(recipe)}
{render_commands(exports, results, has_chat_files(folder / "lora"))}

`recipe.yaml` makes this run again; `results.json` has the numbers with their conditions, `metrics.jsonl` every step.
Base weights: SHA-256 {results.base.weights_sha256}.
"""


def _locate_base(results: RunResults) -> tuple[str, str | None]:
    """Return what `locate_base` does, of a run's base."""
    base = results.base
    return locate_base(base.name, base.revision, base.revision_verified)


def _render_header(exports: list[str], results: RunResults) -> str:
    """Render what the hub reads of a card; empty for a base that is not from there.

    Source: https://huggingface.co/docs/hub/model-cards
    """
    name, commit = _locate_base(results)
    if commit is None:
        return ""
    kind = "text-generation" if results.task is None else "text-classification"
    library = "transformers" if "model" in exports else "peft"
    return f"""---
base_model: {name}
library_name: {library}
pipeline_tag: {kind}
---

"""


def _render_prompt(recipe: Recipe) -> str:
    """Say how the model is to be asked; empty where rows have no prompt."""
    data = recipe.data
    are_text = [rows.text is not None for rows in data.sources.values()]
    if recipe.task.has_head or (are_text and all(are_text)):
        return ""
    if data.is_chat:
        return (
            "\nIt was trained on conversations: ask it by the chat template beside the weights, whose "
            "end of a turn `generation_config.json` there names.\n"
        )
    if data.has_messages or any(are_text):
        return "\nIt was trained on rows of several kinds; `recipe.yaml` has them.\n"
    return "\nIt was trained on Alpaca's prompt: ask it by that, as plain text, not as a chat.\n"


def _name_unit(results: RunResults) -> str:
    """Return the unit of the loss."""
    if results.task is None:
        return " nats per answer token"
    return ", the mean squared error" if results.task.kind == "regression" else " nats per row"


def list_exports(folder: Path, wanted: Export) -> list[str]:
    """Return the folders that a run with this `export` section has written, that to load first."""
    asked = {"lora_small": wanted.rank is not None, "merged": wanted.merged}
    return [name for name in CONTENTS if (folder / name).is_dir() and asked.get(name, True)]


def _render_history(recipe: Recipe, results: RunResults) -> str:
    """Say why the run ended, which step is exported, and what its initial factors were made from.

    Left out are an end and an export after the last planned step, and what is not known.
    """
    lines = []
    if results.planned_steps is not None:
        lines.append(f"Stopped by train.patience, of {results.planned_steps} planned steps.\n")
    if results.exported_step is not None:
        best = recipe.train.keep_best
        lines.append(f"Exported and scored: step {results.exported_step}, the best by {best}.\n")
    if results.rank is not None and "calibration_data" in results.model_fields_set:
        lines.append(f"Initial factors from {describe_source(results.calibration_data)}.\n")
    return "".join(lines)


def _render_data(results: RunResults) -> str:
    """Render what `describe_data` says as a Markdown list; empty where that is nothing."""
    lines = [f"- {subject}: {line}\n" for subject, line in describe_data(results.data)]
    return "".join(["\n", *lines]) if lines else ""


def _render_note(results: RunResults) -> str:
    """Render the recipe's note as a paragraph of its own; empty without one."""
    return f"\nNote: {results.note}\n" if results.note else ""


def _render_scores(results: RunResults) -> str:
    """Render the scores before and after training as a Markdown table; empty if there are none."""
    rows = [_render_row(name, "before", score) for name, score in results.baseline.items()]
    of_tasks = []
    for name, score in results.scores.items():
        if isinstance(score, TaskScore):
            of_tasks.append(
                f"Development rows {name}: {describe_task_score(score, results.exported_step)}.\n"
            )
        else:
            rows.append(_render_row(name, "after", score))
    if of_tasks:
        return "\n".join(of_tasks)
    if not rows:
        return ""
    head = ["| benchmark | training | accuracy (%) | 95 % interval | n |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _render_row(benchmark: str, when: str, score: Score) -> str:
    low, high = score.interval
    accuracy = f"{100 * score.accuracy:.1f}"
    return (
        f"| {benchmark} | {when} | {accuracy} | {100 * low:.1f} to {100 * high:.1f} | {score.n} |"
    )


def _render_rounding(exports: list[str], results: RunResults) -> str:
    """Say by how much a bfloat16 residual is rounded; empty for other runs."""
    if results.dtype != "bfloat16" or "astra_init" not in exports:
        return ""
    return (
        "\nThe frozen base is bfloat16: the residual is rounded, by at most "
        f"{results.residual_rounding:.1e} of a weight's norm, and `lora/` on the original base "
        "differs from the trained model by that rounding.\n"
    )


def _render_contents(exports: list[str], results: RunResults) -> str:
    """List what a run exported, and show how to load the first of it."""
    texts = dict(CONTENTS)
    if "astra_init" in exports:
        texts["adapter"] = ON_RESIDUAL
    values = {
        "rank": results.lora_rank,
        "small": results.small,
        "small_figures": _render_small(results),
    }
    table = "\n".join(f"| `{name}/` | {texts[name].format(**values)} |" for name in exports)
    loaded, options = "model", ""
    if "model" not in exports:
        # By default transformers takes the dtype of the base's files; the scores are of this one. A new
        # head is fp32 on any base, and PEFT gives it the dtype of the base.
        dtype = results.dtype if results.task is None else "float32"
        loaded, commit = _locate_base(results)
        options = f', dtype="{dtype}"'
        if commit is not None:
            options += f', revision="{commit}"'
    kind = "AutoModelForCausalLM"
    if results.task is not None:
        kind = "AutoModelForSequenceClassification"
        if "model" not in exports:
            # Without the labels' names, transformers calls them LABEL_0, LABEL_1.
            names = dict(enumerate(results.task.labels))
            options += f", id2label={names}" if names else ", num_labels=1"
            if results.task.pad_token is not None:
                options += f", pad_token_id={results.task.pad_token}"
    code = [
        f"from transformers import {kind}",
        f'model = {kind}.from_pretrained("{loaded}"{options})',
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


def _render_small(results: RunResults) -> str:
    """Say how far lora_small/ is from lora/; empty for runs without it."""
    small = results.small
    if small is None:
        return ""
    error = (
        f"relative error of the change {small.error:.1e} (Frobenius norm; worst module "
        f"{small.worst_error:.1e}, {small.worst_module})"
    )
    if small.held_out is None or results.held_out is None:
        return f"{error}; its held-out loss was not measured, as data.held_out is 0"
    exact = results.held_out.after.loss
    return f"{error}; held-out loss {small.held_out.loss:.4f}, `lora/` has {exact:.4f}"


def find_vllm_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank of vLLM that takes a LoRA of `rank`; None if none does."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)


def list_vllm_words(
    results: RunResults,
    model: str | None = None,
    lora: str | None = None,
    max_rank: int | None = None,
    has_files: bool = False,
) -> list[str]:
    """Return the words of vLLM's command that serves a model as the run was scored.

    Without its options the defaults of requests are those of the model's generation_config.json,
    and the dtype follows from that of the base's files; fp32 is rounded to 16 bits. Sources:
    vllm-project/vllm, vllm/config/model.py, get_diff_sampling_param and _get_and_verify_dtype;
    vllm/lora/ops/triton_ops/lora_shrink_op.py, which takes 16 bits alone.

    Args:
        model: folder of a whole model; the base when None.
        lora: folder of an adapter on it. After a run in fp32 that is served in bf16, `merged/` in fp32.
        max_rank: of `lora`, from `find_vllm_rank`.
        has_files: whether `lora` has those of launch.training.chat_files. Its generation_config.json
            then says where answers end, and nothing else.
    """
    dtype = "bfloat16" if lora is not None and results.dtype == "float32" else results.dtype
    base, commit = _locate_base(results)
    words = ["vllm", "serve", model or base]
    if model is None and commit is not None:
        words += ["--revision", commit]
    has_files = lora is not None and has_files
    words += ["--generation-config", lora if has_files else "vllm", "--dtype", dtype]
    if has_files:
        words += ["--chat-template", f"{lora}/{CHAT_TEMPLATE}"]
    if lora is not None:
        words += ["--enable-lora", "--max-lora-rank", str(max_rank)]
        words += ["--lora-modules", f"tuned={lora}"]
    return words


def render_commands(exports: list[str], results: RunResults, has_files: bool) -> str:
    """Show how to serve what was exported, convert it and upload it; paths are in the run folder.

    Args:
        has_files: see `list_vllm_words`.
    """
    upload = f"hf upload USER/NAME {exports[0]} .\nhf upload USER/NAME README.md"
    base, _ = _locate_base(results)
    is_local = Path(base).is_absolute()
    note = f"\n\nOn the hub the files of `{exports[0]}/` are at the top: load them by `USER/NAME`."
    if is_local and "model" not in exports:
        note += (
            " The base is a local folder: before you upload, put its id on the hub into "
            f"`{exports[0]}/adapter_config.json` (`base_model_name_or_path`)."
        )
    loras = {"lora": results.lora_rank}
    if results.small is not None:
        loras["lora_small"] = results.small.rank
    lines = []
    if results.task is not None:  # servers of text have no use for it
        return f"""Upload it, from this folder:

```bash
{upload}
```{note}"""
    for name, rank in loras.items():
        limit = find_vllm_rank(rank) if name in exports else None
        if limit is not None:
            lines.append(shlex.join(list_vllm_words(results, None, name, limit, has_files)))
    for name in ("model", "merged"):
        if name in exports:
            lines.append(shlex.join(list_vllm_words(results, f"./{name}")))
    if "lora" in exports:
        # llama.cpp reads the config of a base on the hub by the adapter's own name for it.
        option = f"--base {shlex.quote(base)} " if is_local else ""
        lines.append(
            f"python convert_lora_to_gguf.py {option}--outfile lora.gguf lora  # llama.cpp's"
        )
    text = "\n".join([*lines, upload])
    return f"""Serve, convert or upload it, from this folder:

```bash
{text}
```{note}"""

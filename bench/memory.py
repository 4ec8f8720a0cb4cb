"""Measure every rank's peak memory at load, calibration and training, beside what plan.py says.

    python bench/memory.py

By engine and number of ranks, for a random Llama of 122 M parameters in fp32 on CPUs: real launches, the functions of
the main path. Of each stage the table gives, for the rank that has most, the bytes of the base that it holds (what
sharding divides) and the peak of its anonymous memory above what it had before the base was loaded, less the same for
a model of 0.1 M parameters: what the libraries load and keep. File pages mapped by safetensors are the page cache's
and not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from astra.calibrate import Solution
    from launch.config.schema import Recipe
    from launch.data.token_set import TokenSet
    from launch.engines.base import Engine

ENGINES, RANKS = ("single", "fsdp", "zero3", "zero2"), (1, 2, 4)
STAGES = ("load", "calibration", "initialisation", "training")
LENGTH = 256  # tokens of a row
MIB = 2**20
# Freed blocks go back to the system at once, so that a peak is of what is in use.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def read_anonymous_bytes() -> int:
    """Read how many bytes of this process's resident memory are anonymous."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Sample `read_anonymous_bytes` every few milliseconds."""

    def __init__(self) -> None:
        self.highest, self.lock = 0, threading.Lock()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            with self.lock:
                self.highest = max(self.highest, read_anonymous_bytes())
            time.sleep(0.003)

    def take(self) -> int:
        """Return the peak since the last call, in bytes."""
        with self.lock:
            highest, self.highest = max(self.highest, read_anonymous_bytes()), 0
        return highest


SIZES = {  # of the model measured, and of the one that shows what the libraries take
    "model": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "vocab_size": 6000,
    },
    "tiny": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300},
}


def make_inputs(folder: Path, size: dict) -> int:
    """Write a base with its tokenizer, and rows to train on, to `folder`.

    Args:
        size: fields of LlamaConfig.

    Returns:
        the number of the base's parameters.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {
        "<s>": 0,
        "</s>": 1,
        **{c: i + 2 for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())},
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        **size,
        num_attention_heads=12,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size="100MB")
    rows = [
        {"query": f"What is {i} plus {i}?", "response": "We add the numbers. " * 20}
        for i in range(8)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sum(parameter.numel() for parameter in model.parameters())


def make_recipe(folder: Path, engine: str) -> "Recipe":
    """Make the recipe whose stages are measured."""
    from launch.config.loading import validate_recipe

    return validate_recipe(
        {
            "model": {"name": str(folder / "base")},
            "data": {"path": str(folder / "train.jsonl"), "max_length": LENGTH},
            "adapter": {"rank": 8, "alpha": 8},
            "calibration": {"samples": 8},
            "train": {"global_batch": 8, "micro_batch": 2, "max_steps": 2},
            "engine": engine,
        }
    )


def count_held_bytes(model: "nn.Module") -> int:
    """Count the bytes of the base that this rank holds: what sharding divides."""
    held = 0
    for parameter in model.parameters():
        if parameter.requires_grad:  # an adapter's
            continue
        # A shard of FSDP2's DTensor, or ZeRO-3's, or else the whole.
        shard = (
            parameter.to_local()
            if hasattr(parameter, "to_local")
            else getattr(parameter, "ds_tensor", parameter)
        )
        held += shard.numel() * shard.element_size()
    return held


def run_worker(folder: Path, engine_name: str) -> None:
    """Run the stages of launch/pipeline.py on one rank, measured; write rank<i>.json."""
    import torch.distributed as dist
    from torch import Tensor

    from astra import adapter, inits
    from launch.data.inputs import prepare_inputs
    from launch.data.order import plan_steps
    from launch.engines import make_engine
    from launch.runtime.distributed import start_process_group, stop_process_group
    from launch.training.loop import make_train_state, train

    recipe = make_recipe(folder, engine_name)
    device = start_process_group()
    inputs = prepare_inputs(recipe, device)
    engine = make_engine(recipe.engine, device, inputs.dtype)
    before, peak, found = read_anonymous_bytes(), Peak(), {}

    def record_stage(stage: str) -> None:
        found[stage] = {"base": count_held_bytes(model), "peak": peak.take() - before}

    base = engine.load_model(inputs.model)
    model = adapter.attach_adapters(
        base, recipe.adapter.targets, recipe.adapter.rank, recipe.adapter.alpha, 0.0
    )
    layers = adapter.get_lora_layers(model)
    linears = adapter.get_base_layers(layers)
    engine.materialize(model)
    with engine.inference_mode(model), model.disable_adapter():
        record_stage("load")
        modules = calibrate_model(
            model, linears, inputs.tokens, recipe.adapter.rank, engine, device
        )
        record_stage("calibration")

    def make_factors(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        vectors, values = (modules[name][key].to(device) for key in ("vectors", "values"))
        return inits.init_astra(weight, vectors, values)

    adapter.initialise_layers(layers, make_factors, engine)
    modules.clear()
    record_stage("initialisation")
    steps = list(plan_steps(len(inputs.tokens), 8, 2, 2, 0))
    state = make_train_state(engine, model, recipe.train)
    list(train(state, inputs.tokens, steps, recipe.train, device))
    record_stage("training")
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    stop_process_group()


def calibrate_model(
    model: "nn.Module",
    linears: "dict[str, nn.Linear]",
    tokens: "TokenSet",
    lora_rank: int,
    engine: "Engine",
    device: "torch.device",
) -> "dict[str, Solution]":
    """Calibrate on four examples a rank, in one window.

    Args:
        linears: module name -> module.

    Returns:
        module name -> its solution.
    """
    import torch.distributed as dist

    from astra.calibrate import calibrate_modules, solve_subspace
    from astra.moments import find_groups
    from astra.windows import make_plan
    from launch.data.batches import collate_examples

    batches = [collate_examples(tokens, [(dist.get_rank() + i) % 8], device)[0] for i in range(4)]
    groups = find_groups(model, linears, batches[0])
    plan = make_plan(model, linears, groups, tokens=LENGTH)
    (modules,) = calibrate_modules(
        model,
        linears,
        [batches],
        engine,
        plan,
        lambda problem: solve_subspace(problem, "largest", 0),
        lora_ranks=dict.fromkeys(linears, lora_rank),
        solve_device=device,
    )
    return modules


def measure(folder: Path, engine: str, ranks: int) -> dict:
    """Launch the ranks of one run and measure them.

    Returns:
        stage -> "base" and "peak" -> bytes on the rank that has most.

    Raises:
        RuntimeError: a rank failed; with the end of what it printed.
    """
    for old in folder.glob("rank*.json"):
        old.unlink()
    launcher = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc_per_node",
        str(ranks),
    ]
    line = [*launcher, __file__, "--worker", engine, "--folder", str(folder)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {
        stage: {kind: max(rank[stage][kind] for rank in found) for kind in ("base", "peak")}
        for stage in STAGES
    }


def plan_stages(folder: Path, engine: str, ranks: int) -> dict:
    """Plan the same run as launch/plan.py does.

    Returns:
        stage -> what needs memory -> bytes on a rank.
    """
    import torch
    from transformers import AutoConfig

    from launch.planning.estimate import estimate_run
    from launch.planning.machine import make_machine

    config = AutoConfig.from_pretrained(folder / "base")
    found = estimate_run(
        config,
        make_recipe(folder, engine),
        make_machine(None, ranks),
        dtype=torch.float32,
        checkpointing=False,
        steps=2,
    )
    memory = {stage: getattr(found, stage).memory for stage in STAGES[1:]}
    # On CPUs these two map the files, and copy a page when it is written.
    if engine in ("single", "zero2"):
        memory["calibration"]["base"] = 0
    return memory


def render_table(records: list[dict]) -> str:
    """Render the records as a Markdown table, in MiB."""
    head = ["engine", "ranks", "base held", "libraries", "load"]
    head += [f"{stage}: measured, planned" for stage in STAGES[1:]]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for record in records:
        cells = [record["engine"], str(record["ranks"])]
        numbers = [
            record["training"]["base"],
            record["tiny"]["training"]["peak"],
            subtract_libraries(record, "load"),
        ]
        cells += [f"{number / MIB:.0f}" for number in numbers]
        for stage in STAGES[1:]:
            measured = subtract_libraries(record, stage)
            plan = sum(record["planned"][stage].values())
            cells.append(f"{measured / MIB:.0f}, {plan / MIB:.0f} ({plan / measured - 1:+.0%})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def subtract_libraries(record: dict, stage: str) -> int:
    """Return the peak of a stage less what the libraries take, in bytes."""
    return record[stage]["peak"] - record["tiny"][stage]["peak"]


def main() -> None:
    """Measure the engines of the command line and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "results" / "memory.json",
        help="default bench/results/memory.json",
    )
    parser.add_argument(
        "--engines", nargs="+", default=ENGINES, choices=ENGINES, help="default all"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        from launch.runtime.entry import run_command

        run_command(lambda: run_worker(arguments.folder, arguments.worker))
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in SIZES}
        for name, folder in folders.items():
            folder.mkdir()
            parameters = make_inputs(folder, SIZES[name])
            if name == "model":
                total = parameters
        records = []
        for engine in arguments.engines:
            for ranks in (1,) if engine == "single" else RANKS:
                measured = {
                    name: measure(folder, engine, ranks) for name, folder in folders.items()
                }
                records.append(
                    {
                        "engine": engine,
                        "ranks": ranks,
                        "tiny": measured["tiny"],
                        **measured["model"],
                    }
                )
                records[-1]["planned"] = plan_stages(folders["model"], engine, ranks)
                print(render_table(records[-1:]).splitlines()[-1], flush=True)
    print(f"\n{total / 1e6:.0f} M parameters, {4 * total / MIB:.0f} MiB in fp32; MiB a rank:\n")
    print(render_table(records))
    arguments.output.write_text(
        json.dumps({"parameters": total, "records": records}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()

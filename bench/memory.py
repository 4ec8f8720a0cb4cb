"""Peak memory of every rank at load, calibration and training, by engine and number of ranks.

    python bench/memory.py

A random Llama of 122 M parameters in fp32 on CPUs: real launches, the functions of the main path. Of each stage the
table gives, for the rank that has most, the bytes of the base that it holds (what sharding divides) and the peak of
its anonymous memory above what it had before the base was loaded. File pages mapped by safetensors are the page
cache's and not counted.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

ENGINES, RANKS = ("zero3", "fsdp"), (1, 2, 4)
STAGES = ("load", "calibration", "training")
MIB = 2**20
# Freed blocks go back to the system at once, so that a peak is of what is in use.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def anonymous() -> int:
    """Bytes of this process's anonymous resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Samples `anonymous` every few milliseconds."""

    def __init__(self) -> None:
        self.highest = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.highest = max(self.highest, anonymous())
            time.sleep(0.003)

    def take(self) -> int:
        """The peak since the last call."""
        highest, self.highest = self.highest, 0
        return highest


def make_inputs(folder: Path) -> int:
    """A base with its tokenizer, and rows to train on, in `folder`; the base's parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size="100MB")
    rows = [{"query": f"What is {i} plus {i}?", "response": f"The answer is: {2 * i}"} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sum(parameter.numel() for parameter in model.parameters())


def worker(folder: Path, engine_name: str) -> None:
    """One rank: the stages of launch/pipeline.py, measured; writes rank<i>.json."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from astra import adapter
    from astra.calibrate import second_moments, solve_all
    from launch import calibration
    from launch.data import collate, step_rows
    from launch.distributed import start, stop
    from launch.engines import make_engine
    from launch.inputs import prepare
    from launch.loop import make_stepper, train
    from launch.recipe import validate

    recipe = validate(
        {
            "model": {"name": str(folder / "base")},
            "data": {"path": str(folder / "train.jsonl"), "max_length": 256},
            "adapter": {"rank": 8, "alpha": 8},
            "train": {"global_batch": 4, "max_steps": 2},
            "engine": engine_name,
        }
    )
    device = start()
    inputs = prepare(recipe, device)
    engine = make_engine(recipe.engine, device, inputs.dtype)
    before, peak, found = anonymous(), Peak(), {}

    def end_of(stage: str) -> None:
        held = 0
        for parameter in (p for p in model.parameters() if not p.requires_grad):
            shard = (
                parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
            )
            held += shard.numel() * shard.element_size()
        found[stage] = {"base": held, "peak": peak.take() - before}

    base = engine.load(str(inputs.model_path))
    model = adapter.attach(base, recipe.adapter.targets, recipe.adapter.rank, recipe.adapter.alpha, 0.0)
    layers = adapter.lora_layers(model)
    linears = adapter.base_layers(layers)
    with engine.inference(model), model.disable_adapter():
        end_of("load")  # FSDP2 loads here
        batches = [collate(inputs.tokens, [dist.get_rank() % 8], device)[0]]
        statistics = second_moments(model, linears, batches)
        found["statistics"] = sum(statistic.moment.outer.nbytes for statistic in statistics)
        subspaces = solve_all(statistics, linears, engine, rank=recipe.adapter.rank, select="smallest", seed=0)
    del statistics
    adapter.initialise(layers, calibration.factors(recipe, subspaces), engine)
    end_of("calibration")
    steps = list(step_rows(len(inputs.tokens), 4, 1, 2, 0))
    list(train(make_stepper(engine, model, recipe.train), inputs.tokens, steps, recipe.train, device))
    end_of("training")
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    stop()


def measure(folder: Path, engine: str, ranks: int) -> dict:
    """The largest figure of any rank, in bytes, by stage; and rank 0's at load, which differs under ZeRO-3."""
    for old in folder.glob("rank*.json"):
        old.unlink()
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(ranks)]
    line = [*launcher, __file__, "--worker", engine, "--folder", str(folder)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    result = {"engine": engine, "ranks": ranks, "statistics": found[0]["statistics"]}
    for stage in STAGES:
        result[stage] = {kind: max(rank[stage][kind] for rank in found) for kind in ("base", "peak")}
    result["load"]["peak_of_others"] = max((rank["load"]["peak"] for rank in found[1:]), default=None)
    return result


def table(records: list[dict]) -> str:
    """Markdown, in MiB."""
    head = ["engine", "ranks", "base held", "peak: load (rank 0 / others)", "peak: calibration", "peak: training"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for record in records:
        others = record["load"]["peak_of_others"]
        cells = [
            record["engine"],
            str(record["ranks"]),
            f"{record['training']['base'] / MIB:.0f}",
            f"{record['load']['peak'] / MIB:.0f}" + ("" if others is None else f" / {others / MIB:.0f}"),
            f"{record['calibration']['peak'] / MIB:.0f}",
            f"{record['training']['peak'] / MIB:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "memory.json", help="default bench/memory.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        from launch.errors import run

        run(lambda: worker(arguments.folder, arguments.worker))
    with tempfile.TemporaryDirectory() as scratch:
        parameters = make_inputs(Path(scratch))
        records = []
        for engine in ENGINES:
            for ranks in RANKS:
                records.append(measure(Path(scratch), engine, ranks))
                print(json.dumps(records[-1]), flush=True)
    print(f"\n{parameters / 1e6:.0f} M parameters, {4 * parameters / MIB:.0f} MiB in fp32; MiB a rank:\n")
    print(table(records))
    print(f"\nOf the calibration's peak, the fp64 statistics on every rank: {records[0]['statistics'] / MIB:.0f} MiB")
    arguments.output.write_text(json.dumps({"parameters": parameters, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()

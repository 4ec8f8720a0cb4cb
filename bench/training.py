"""Measure training speed and memory as ratios of one run: against HF Trainer, DDP, LoRA, and with techniques off.

    python bench/training.py                                  # all parts, into bench/results/training.json
    python bench/training.py --part hf --rows 32 --micro-batch 8   # a rank's share of metamath's batch on 4 GPUs
    python bench/training.py --part astra --rows 4 --pairs 21      # short steps, many turns: noise averages out

A random Llama of 100 M parameters in fp32 on CPUs (bf16 and 1.6 B on a GPU), rows as ragged as MetaMathQA's, the same
adapters, micro batch and rows for all. What is compared runs in turns within one process, step by step, so that other
load on the machine meets all alike; a ratio is the median over the turns, with the smallest and largest beside it.

    hf        one process: HF Trainer with PEFT's LoRA, its own loss and collator
    sharded   two processes: ZeRO-3 and FSDP2 against DistributedDataParallel with the same loss and batches
    astra     one process: Astra's adapters on the residual base against plain LoRA's
    ablation  one process: each technique the other way round
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from astra import adapter, inits
from astra.eigen import make_generator
from bench.memory import ENVIRONMENT, MIB, Peak, count_held_bytes, read_anonymous_bytes
from launch.config.schema import Adapter, Train
from launch.data.order import Packing, plan_micro_batches
from launch.data.token_set import TokenSet
from launch.engines import make_engine
from launch.engines.single import TorchTrainState
from launch.models.check import check_model
from launch.runtime.distributed import start_process_group, stop_process_group
from launch.training import kernels, loop
from launch.training import loss as objective

PARTS = {"hf": 1, "sharded": 2, "astra": 1, "ablation": 1}  # and their processes
VOCABULARY, LENGTH, RANK, SEED = 32000, 512, 16, 0
GPU = torch.cuda.is_available()
SHAPES = {  # layers, width, inner width, heads, key-value heads
    "100M": (12, 640, 1728, 10, 5),
    "1.6B": (24, 2048, 8192, 16, 8),
    "tiny": (2, 64, 172, 4, 2),
}
TARGETS = Adapter().targets
Turn = Callable[[list[int]], None]  # one optimiser step on these rows


def make_base(folder: Path, size: str) -> None:
    """Write a random Llama as files that the engines load."""
    layers, width, inner, heads, kv_heads = SHAPES[size]
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        dtype="bfloat16" if GPU else "float32",
    )
    LlamaForCausalLM(config).to(torch.bfloat16 if GPU else torch.float32).save_pretrained(folder)


def make_rows(count: int) -> TokenSet:
    """Draw random tokens with lengths like MetaMathQA's rows in the Alpaca prompt.

    Lengths are log-normal, by a fit to 3000 rows.
    """
    draw = torch.Generator().manual_seed(SEED)
    questions = (torch.randn(count, generator=draw) * 0.58).exp() * 50
    answers = (torch.randn(count, generator=draw) * 0.65).exp() * 70
    starts = (35 + questions).round().long().clamp(max=LENGTH - 100)
    lengths = (starts + answers.round().long().clamp(min=8)).clamp(max=LENGTH)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(3, VOCABULARY, (int(offsets[-1]),), generator=draw, dtype=torch.int32)
    return TokenSet(ids, offsets, starts, 0, 0)


def make_lora_factors(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Make LoRA's factors of a module."""
    return inits.init_lora(weight, RANK, SEED, name)


def make_astra_factors(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Make Astra's factors of random orthonormal vectors: which ones does not change a step's cost."""
    draw = make_generator(SEED, name)
    vectors = torch.linalg.qr(torch.randn(len(weight), RANK, generator=draw, dtype=torch.float64))[
        0
    ].to(weight.device)
    return vectors.T @ weight.double(), vectors


INITIALISERS = {"lora": make_lora_factors, "astra": make_astra_factors}


class Bench:
    """Hold the rows; take and time the turns of several trainings on the same ones."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.device = start_process_group()
        self.dtype = torch.bfloat16 if GPU else torch.float32
        self.settings = Train(
            global_batch=arguments.rows, micro_batch=arguments.micro_batch, checkpoint_every=1
        )
        self.tokens = make_rows(arguments.rows * (arguments.pairs + 1))
        self.peak = None if GPU else Peak()

    def make_engine_turn(self, name: str, method: str = "lora", held: dict | None = None) -> Turn:
        """Make a training by the functions of the main path; return its turn.

        Args:
            held: is given the bytes of the base that this rank holds, under the engine's name.
        """
        engine = make_engine(name, self.device, self.dtype)
        base = engine.load_model(check_model(self.folder))
        model = adapter.attach_adapters(base, TARGETS, RANK, RANK, 0.0)
        engine.materialize(model)
        adapter.initialise_layers(adapter.get_lora_layers(model), INITIALISERS[method], engine)
        state = loop.make_train_state(engine, model, self.settings)
        if held is not None:
            held[name] = count_held_bytes(model)
        return lambda rows: self.step(state, rows)

    def step(self, state: loop.TrainState, rows: list[int], packing: Packing | None = None) -> None:
        """Take one optimiser step on these rows."""
        next(loop.train(state, self.tokens, [rows], self.settings, self.device, packing=packing))

    def compare(self, turns: dict[str, Turn]) -> dict[str, dict]:
        """Take every turn on the same rows, round after round, the first of which warms up.

        Returns:
            name -> its rate, its memory and its seconds of every round but the first.
        """
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        added = dict.fromkeys(turns, 0)
        answers, size = [], self.arguments.rows
        for number in range(self.arguments.pairs + 1):
            rows = list(range(number * size, (number + 1) * size))
            order = list(turns) if number % 2 else list(turns)[::-1]
            for name in order:
                began, before = time.perf_counter(), self.restart_peak()
                turns[name](rows)
                if GPU:
                    torch.cuda.synchronize()
                if number:
                    seconds[name].append(time.perf_counter() - began)
                    added[name] = max(added[name], self.read_peak() - before)
            answers.append(self.tokens.count_answer_tokens(rows))
        if dist.get_rank() == 0:
            print(
                {name: [round(second, 2) for second in values] for name, values in seconds.items()},
                flush=True,
            )
        return {
            name: {
                "answer_tokens_per_second": round(sum(answers[1:]) / sum(values), 1),
                "median_seconds": round(statistics.median(values), 3),
                "memory_added_mib": round(added[name] / MIB, 1),
                "seconds": values,
            }
            for name, values in seconds.items()
        }

    def restart_peak(self) -> int:
        """Start a new peak; return the bytes held now."""
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        self.peak.take()
        return read_anonymous_bytes()

    def read_peak(self) -> int:
        """Return the peak since `restart_peak`, in bytes."""
        return torch.cuda.max_memory_allocated() if GPU else self.peak.take()


def compute_speedup(found: dict[str, dict], ours: str, theirs: str) -> dict:
    """Compute how many times faster `ours` is than `theirs`, turn by turn."""
    ratios = [b / a for a, b in zip(found[ours]["seconds"], found[theirs]["seconds"], strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "all": [round(value, 3) for value in sorted(ratios)],
    }


def compare_hf_trainer(bench: Bench) -> dict:
    """Compare the main path with the HF Trainer and PEFT's LoRA."""
    ours = bench.make_engine_turn("single")
    with start_trainer(bench) as theirs:
        found = bench.compare({"astra recipes": ours, "hf trainer": theirs})
    speedup = compute_speedup(found, "astra recipes", "hf trainer")
    return {"runs": found, "speed_of_hf_trainer": speedup}


class InOrder(Trainer):
    """Train on the rows in their order."""

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Rows(Dataset):
    """Give a TokenSet's rows as HF Trainer takes them, over again until there are `count`."""

    def __init__(self, tokens: TokenSet, count: int) -> None:
        self.tokens, self.count = tokens, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict:
        row = number % len(self.tokens)
        start, end = self.tokens.offsets[row], self.tokens.offsets[row + 1]
        ids = self.tokens.tokens[start:end].tolist()
        begin = int(self.tokens.prompt_lengths[row])
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [-100] * begin + ids[begin:],
        }


def make_trainer(
    folder: Path,
    tokens: TokenSet,
    dtype: torch.dtype,
    rank: int,
    micro_batch: int,
    accumulation: int,
    steps: int,
    callback: TrainerCallback,
) -> Trainer:
    """Make HF Trainer with PEFT's LoRA on the rows in their order.

    Takes the variables of the ranks out of the environment, else it would wrap its model in
    DistributedDataParallel.
    """
    base = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    trainer = InOrder(
        model,
        TrainingArguments(
            output_dir=folder / "trainer",
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            bf16=dtype == torch.bfloat16,
            use_cpu=not GPU,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=GPU,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"),
        train_dataset=Rows(tokens, steps * accumulation * micro_batch),
        callbacks=[callback],
    )
    assert trainer.accelerator.distributed_type == "NO" and trainer.args.n_gpu <= 1
    return trainer


@contextmanager
def start_trainer(bench: Bench) -> Iterator[Turn]:
    """Start HF Trainer with PEFT's LoRA on the same rows, in a thread that waits between steps.

    Yields the turn that lets it take a step.
    """
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class InTurns(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            done.release()
            go.acquire()

    trainer = make_trainer(
        bench.folder,
        bench.tokens,
        bench.dtype,
        RANK,
        bench.arguments.micro_batch,
        bench.arguments.rows // bench.arguments.micro_batch,
        bench.arguments.pairs + 1,
        InTurns(),
    )

    def run_trainer() -> None:
        go.acquire()
        trainer.train()

    thread = threading.Thread(target=run_trainer, daemon=True)
    thread.start()

    def take_turn(_: list[int]) -> None:
        go.release()
        while not done.acquire(timeout=1):
            if not thread.is_alive():
                raise RuntimeError("HF Trainer stopped")

    yield take_turn
    go.release()  # after the last step
    thread.join()


def compare_sharded(bench: Bench) -> dict:
    """Compare ZeRO-3 and FSDP2 with DistributedDataParallel, all in the same two processes.

    What they hold of the base is what one of the processes holds.
    """
    held: dict[str, int] = {}
    base = (
        LlamaForCausalLM.from_pretrained(bench.folder, dtype=bench.dtype)
        .to(bench.device)
        .requires_grad_(False)
    )
    model = adapter.attach_adapters(base, TARGETS, RANK, RANK, 0.0)
    held["ddp"] = count_held_bytes(model)
    wrapped = nn.parallel.DistributedDataParallel(objective.AnswerLoss(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    group = {"params": parameters, "lr_factor": 1.0}
    plain = TorchTrainState(wrapped, torch.optim.AdamW([group], lr=bench.settings.lr), 1.0)
    turns = {"ddp": lambda rows: bench.step(plain, rows)}
    for name in ("fsdp", "zero3"):
        turns[name] = bench.make_engine_turn(name, held=held)
    found = bench.compare(turns)
    for name in found:
        found[name]["base_held_mib"] = round(held[name] / MIB, 1)
    return {"runs": found} | {
        f"speed_of_ddp.{name}": compute_speedup(found, name, "ddp") for name in ("fsdp", "zero3")
    }


def compare_methods(bench: Bench) -> dict:
    """Compare Astra's adapters on the residual base with plain LoRA's."""
    turns = {method: bench.make_engine_turn("single", method) for method in ("astra", "lora")}
    found = bench.compare(turns)
    return {"runs": found, "speed_of_lora": compute_speedup(found, "astra", "lora")}


def sum_whole_logits(
    loss: objective.AnswerLoss, ids: Tensor, positions: Tensor, targets: Tensor, places: Tensor
) -> Tensor:
    """Sum the cross-entropy over logits of every position, where AnswerLoss has the answers' alone."""
    logits = loss.model(input_ids=ids, position_ids=places, use_cache=False).logits
    labels = torch.full_like(ids, -100).flatten().index_put((positions,), targets)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=-100, reduction="sum")


def plan_unsorted(rows: list[int], lengths: Tensor, *rest: object) -> list:
    """Plan micro batches as the loop does, but in the rows' order: all count as equally long."""
    return plan_micro_batches(rows, torch.zeros_like(lengths), *rest)


def compare_ablations(bench: Bench) -> dict:
    """Compare one model's step as it is by default with the same step with one thing changed."""
    engine = make_engine("single", bench.device, bench.dtype)
    base = engine.load_model(check_model(bench.folder))
    model = adapter.attach_adapters(base, TARGETS, RANK, RANK, 0.0)
    state = loop.make_train_state(engine, model, bench.settings)

    def make_patched_turn(target: str, replacement: object) -> Turn:
        def take_turn(rows: list[int]) -> None:
            with mock.patch(target, replacement):
                bench.step(state, rows)

        return take_turn

    def step_checkpointed(rows: list[int]) -> None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        bench.step(state, rows)
        model.gradient_checkpointing_disable()
        base.disable_input_require_grads()

    def step_eager(rows: list[int]) -> None:
        base.set_attn_implementation("eager")
        bench.step(state, rows)
        base.set_attn_implementation("sdpa")

    def step_compiled(rows: list[int]) -> None:
        layers = kernels.compile_layers(base)
        bench.step(state, rows)
        kernels.uncompile_layers(layers)

    turns: dict[str, Turn] = {
        "default": lambda rows: bench.step(state, rows),
        "whole logits": make_patched_turn(
            "launch.training.loss.AnswerLoss.forward", sum_whole_logits
        ),
        "rows not by length": make_patched_turn(
            "launch.training.loop.plan_micro_batches", plan_unsorted
        ),
        "batches not ahead": make_patched_turn(
            "launch.training.loop.prefetch", lambda items, _device: items
        ),
        "packed": lambda rows: bench.step(state, rows, Packing(LENGTH, flat=False)),
        "eager attention": step_eager,
        "gradient checkpointing": step_checkpointed,
    }
    if bench.arguments.compile:
        turns["compiled"] = step_compiled
    found = bench.compare(turns)
    return {"runs": found} | {
        f"default_against.{name}": compute_speedup(found, "default", name) for name in turns
    }


def run_worker(arguments: argparse.Namespace) -> None:
    """Run one rank of a part; rank 0 writes what is found to found.json."""
    compare = {
        "hf": compare_hf_trainer,
        "sharded": compare_sharded,
        "astra": compare_methods,
        "ablation": compare_ablations,
    }
    found = compare[arguments.worker](Bench(arguments, arguments.folder))
    for run in found["runs"].values():
        del run["seconds"]
    if dist.get_rank() == 0:
        (arguments.folder / "found.json").write_text(json.dumps(found))
    stop_process_group()


def measure(part: str, arguments: argparse.Namespace, folder: Path) -> dict:
    """Measure one part in processes of its own.

    On CPUs memory is measured in further ones, whose allocator gives back what is freed.
    """
    began = time.perf_counter()
    found = launch_ranks(part, arguments, folder, arguments.pairs, os.environ)
    if not GPU:
        for name, run in launch_ranks(part, arguments, folder, 1, ENVIRONMENT)["runs"].items():
            found["runs"][name]["memory_added_mib"] = run["memory_added_mib"]
    return found | {"seconds": round(time.perf_counter() - began)}


def launch_ranks(
    part: str,
    arguments: argparse.Namespace,
    folder: Path,
    pairs: int,
    environment: Mapping[str, str],
) -> dict:
    """Run the ranks of one part as workers; return what they found."""
    ranks = PARTS[part]
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    options = [
        f"--rows={arguments.rows}",
        f"--micro-batch={arguments.micro_batch}",
        f"--pairs={pairs}",
    ]
    options += ["--compile"] if arguments.compile else []
    launcher = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc_per_node",
        str(ranks),
    ]
    line = [*launcher, __file__, "--worker", part, "--folder", str(folder), *options]
    environment = dict(environment) | {"OMP_NUM_THREADS": str(threads)}
    if ranks == 1:  # HF Trainer would spread its batches over every GPU that it sees
        visible = environment.get("CUDA_VISIBLE_DEVICES", "0")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    subprocess.run(line, env=environment, check=True)
    return json.loads((folder / "found.json").read_text()) | {
        "processes": ranks,
        "threads_each": threads,
    }


def main() -> None:
    """Measure the parts of the command line and write each one's results as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; repeatable")
    parser.add_argument(
        "--size", choices=SHAPES, default="1.6B" if GPU else "100M", help="default %(default)s"
    )
    parser.add_argument(
        "--rows", type=int, default=8, help="of an optimiser step (default %(default)s)"
    )
    parser.add_argument("--micro-batch", type=int, default=4, help="default %(default)s")
    parser.add_argument(
        "--pairs",
        type=int,
        default=5,
        help="turns of each, after one to warm up (default %(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="ablation: also torch.compile")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "results" / "training.json",
        help="default %(default)s",
    )
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(arguments)
        return
    record = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_base(folder, arguments.size)
        write_tokenizer(folder)
        for part in arguments.part or PARTS:
            settings = {
                name: getattr(arguments, name) for name in ("size", "rows", "micro_batch", "pairs")
            }
            device = (
                torch.cuda.get_device_name()
                if GPU
                else f"cpu, {len(os.sched_getaffinity(0))} cores"
            )
            if part == "ablation":  # many turns to a round
                arguments.pairs = settings["pairs"] = min(arguments.pairs, 3)
            found = {
                "device": device,
                "dtype": "bfloat16" if GPU else "float32",
                "torch": torch.__version__,
            }
            record[part] = found | settings | measure(part, arguments, folder)
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
            print(json.dumps({part: record[part]}, indent=1), flush=True)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that pads, for HF Trainer's collator."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0} | {f"t{i}": i for i in range(1, 10)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)


if __name__ == "__main__":
    main()

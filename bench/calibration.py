"""Measure a calibration against the straightforward one: full fp32 output moments, `eigh` of each.

    python bench/calibration.py                  all parts, into bench/results/calibration.json
    python bench/calibration.py --parts layer    one part; the others' results in the file stay

Parts (all together 15 minutes on two CPU cores):

    counted    numbers, bytes and operations of one layer of two large models, from their shapes
    layer      one random layer of LLaMA2-7B's shape, on a GPU if there is one
    ranks      two processes of one core each against one process on one core
    reduction  the sums of one layer of LLaMA2-7B on two processes: all-reduced, and to owners
    windows    peak memory of a calibration in one window, and in several within budgets

Every part runs the functions of the main path (astra.calibrate and what it imports); the baseline
is in this file. Ratios are of one run on one machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from astra.calibrate import (
    ModuleProblem,
    Solution,
    assign_owners,
    calibrate_modules,
    solve_subspace,
    solve_window,
    sum_second_moments,
)
from astra.eigen import solve_eigenproblem
from astra.flops import count_forming_flops, count_sum_flops
from astra.moments import Batch, Group, Moment, find_groups, run_forward
from astra.output_moment import Basis, form_output_moment
from astra.reduction import Reduction, reduce_sums
from astra.weights import TorchWeights
from astra.windows import FP64_BYTES, count_moment_bytes, make_plan
from bench.memory import ENVIRONMENT, MIB, Peak, read_anonymous_bytes
from launch.data.order import shard_batches
from launch.runtime.distributed import all_reduce_sum, start_process_group, stop_process_group

SHAPES = {  # hidden, intermediate, heads, key-value heads
    "LLaMA2-7B": (4096, 11008, 32, 32),
    "LLaMA3-8B": (4096, 14336, 32, 8),
}
RANK = 128
TOKENS = 256 * 512  # of a calibration in the published settings
VOCABULARY, LENGTH = 32000, 512
PAIRS = 5
SMALL_SIZE = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
SMALL_VOCABULARY, SMALL_LENGTH, SMALL_RANK = 1000, 256, 32
BUDGETS = (0, 80, 50)  # MiB; 0: no limit
FP32 = 4  # bytes


def make_layer(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model of one random decoder layer.

    The norms' weights fall over 3.5 decades, so that moments are as ill-conditioned as real ones
    (1e7).
    """
    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.copy_(torch.logspace(0, -3.5, hidden)[torch.randperm(hidden)])
    return model


def make_small_model(num_layers: int) -> nn.Module:
    """Return a random Llama of width 512."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=SMALL_VOCABULARY, num_hidden_layers=num_layers, **SMALL_SIZE)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def find_projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the seven linear layers of every decoder layer, by name."""
    return {name: m for name, m in model.named_modules() if name.endswith("_proj")}


def make_batch(ids: Tensor) -> Batch:
    """Return a batch of which every token counts."""
    return Batch(input_ids=ids, token_mask=torch.ones_like(ids, dtype=torch.bool))


def count_costs(shape: str) -> dict[str, Any]:
    """Return the baseline's numbers, bytes and operations for one layer, as multiples of ours."""
    model = make_layer(shape, torch.device("cpu"), torch.float32)
    linears = find_projections(model)
    groups = find_groups(model, linears, make_batch(torch.zeros(1, 4, dtype=torch.long)))
    base_numbers = sum(linear.out_features**2 for linear in linears.values())
    base_sums = 2 * base_numbers * TOKENS
    numbers = sum(count_moment_bytes(group.size) for group in groups) // FP64_BYTES
    sums = sum(count_sum_flops(group, linears) for group in groups) * TOKENS
    products = forming = 0
    for group in groups:
        # W x of a group that sums outputs. The model's forward pass computes it too, in its own
        # dtype.
        if group.statistic == "output":
            products += 2 * linears[group.modules[0]].in_features * group.size * TOKENS
        for name in group.modules:
            forming += count_forming_flops(group.statistic, linears[name])
    triangle = sums - products
    return {
        "groups": [
            [group.statistic, group.size, [name.rsplit(".", 1)[-1] for name in group.modules]]
            for group in groups
        ],
        "numbers": base_numbers / numbers,
        "bytes": base_numbers * FP32 / (numbers * FP64_BYTES),
        "sums": base_sums / triangle,
        "sums, with products W x": base_sums / sums,
        "sums and forming": base_sums / (triangle + forming),
        "everything": base_sums / (sums + forming),
    }


def measure_layer(shape: str, num_rows: int) -> dict[str, Any]:
    """Return the seconds of one layer's stages and the tails' energies, ours and the baseline's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_layer(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    linears = find_projections(model)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(num_rows):
        ids = torch.randint(VOCABULARY, (1, LENGTH), generator=generator)
        batches.append(make_batch(ids.to(device)))
    groups = find_groups(model, linears, batches[0])
    plan = make_plan(model, linears, groups, tokens=LENGTH)
    states = [None] * num_rows
    with torch.no_grad():
        run_forward(model, batches[0], linears)  # warms up
        floor, _ = time_call(
            device, lambda: [run_forward(model, batch, linears) for batch in batches]
        )
        ours, moments = time_call(
            device,
            lambda: sum_second_moments(model, linears, batches, plan.windows[0], plan, states),
        )
        theirs, full = time_call(device, lambda: sum_baseline_moments(model, linears, batches))
    seconds = {"forward": floor, "sums": ours - floor, "baseline sums": theirs - floor}
    solving, energies = _measure_eigenproblems(linears, groups, moments, full)
    seconds |= solving
    cores = f"{os.cpu_count()} CPU cores"
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cores,
        "tokens": num_rows * LENGTH,
        "seconds": seconds,
        "sums": seconds["baseline sums"] / seconds["sums"],
        "eigenproblems": seconds["baseline eigh"] / seconds["solving"],
        "eigenproblems and forming": seconds["baseline eigh"]
        / (seconds["solving"] + seconds["forming"]),
        "energy over the fp64 minimum": energies,
    }


def _measure_eigenproblems(
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Group],
    moments: Sequence[Moment],
    full: dict[str, Tensor],
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return seconds of forming and solving, summed over modules, and energies by kind of module.

    Args:
        full: the baseline's moments by name; emptied.
    """
    seconds = dict.fromkeys(("forming", "solving", "baseline eigh"), 0.0)
    energies = {}
    for group, moment in zip(groups, moments, strict=True):
        for name in group.modules:
            weight, device = linears[name].weight, linears[name].weight.device
            forming, (basis, core) = time_call(
                device, form_output_moment, group.statistic, moment, weight, None
            )
            solving, subspace = time_call(
                device, solve_eigenproblem, basis, core, RANK, "smallest", 0, name
            )
            dense, (_, vectors) = time_call(device, torch.linalg.eigh, full[name])
            seconds["forming"] += forming
            seconds["solving"] += solving
            seconds["baseline eigh"] += dense
            energies[name.rsplit(".", 1)[-1]] = compare_energies(
                basis, core, subspace.vectors, vectors[:, :RANK].double()
            )
            print(f"  {name}: eigenproblem {solving:.2f} s, baseline {dense:.2f} s", flush=True)
            del dense, vectors, full[name]
    return seconds, energies


def time_call(device: torch.device, function: Callable, *arguments: object) -> tuple[float, Any]:
    """Return the seconds that a call takes, work on the device included, and its result."""
    _synchronise(device)
    start = time.perf_counter()
    result = function(*arguments)
    _synchronise(device)
    return time.perf_counter() - start, result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def sum_baseline_moments(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Return fp32 sums of y y^T of every module's actual output, (d_out, d_out), by name."""
    device = batches[0]["input_ids"].device
    full = {}
    for name, linear in linears.items():
        full[name] = torch.zeros(linear.out_features, linear.out_features, device=device)

    def make_hook(name: str) -> Callable:
        def add(module: nn.Linear, inputs: tuple, output: Tensor) -> None:
            rows = output.flatten(0, 1).float()
            full[name].addmm_(rows.T, rows)

        return add

    hooks = [linear.register_forward_hook(make_hook(name)) for name, linear in linears.items()]
    for batch in batches:
        model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return full


def compare_energies(
    basis: Basis | None, core: Tensor, ours: Tensor, theirs: Tensor
) -> dict[str, float]:
    """Return the energy `tr(V^T C V)` of our V and the baseline's, over the least possible.

    Where the least is 0, over the trace of C. `C = Q core Q^T`, see astra.output_moment.
    """

    def compute_energy(vectors: Tensor) -> float:
        inside = vectors if basis is None else basis.multiply_transposed(vectors)
        return ((core @ inside) * inside).sum().item()

    num_outside = 0 if basis is None else basis.codimension
    least = 0.0
    if num_outside < RANK:
        least = torch.linalg.eigvalsh(core)[: RANK - num_outside].clamp(min=0).sum().item()
    trace = core.diagonal().sum().item()
    if least == 0:
        return {
            "ours, share of trace": compute_energy(ours) / trace,
            "baseline, share of trace": compute_energy(theirs) / trace,
        }
    return {"ours": compute_energy(ours) / least, "baseline": compute_energy(theirs) / least}


def run_rank(output: Path) -> None:
    """Be one rank of `ranks`: write the seconds of a whole calibration and of its stages."""
    start_process_group()
    model = make_small_model(num_layers=4)
    linears = find_projections(model)
    ids = torch.randint(
        SMALL_VOCABULARY, (48, SMALL_LENGTH), generator=torch.Generator().manual_seed(1)
    )
    shard = shard_batches(list(range(48)), dist.get_rank(), dist.get_world_size(), 1)
    batches = [make_batch(ids[rows]) for rows in shard]
    for _ in range(2):  # the first warms up
        clock = _time_stages(model, linears, batches)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(clock))
    stop_process_group()


def _time_stages(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[Batch]
) -> dict[str, float]:
    """Return the seconds of each stage of a calibration, between barriers."""
    groups = find_groups(model, linears, batches[0])
    plan = make_plan(model, linears, groups, tokens=SMALL_LENGTH)
    lora_ranks = dict.fromkeys(linears, SMALL_RANK)
    owners = assign_owners(groups, linears, lora_ranks, plan.decomposition, "cpu")
    states, weights = [None] * len(batches), TorchWeights()
    clock: dict[str, float] = {}

    def run_stage(name: str, function: Callable, *arguments: object) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = function(*arguments)
        dist.barrier()
        clock[name] = time.perf_counter() - start
        return result

    with torch.no_grad():
        run_stage("forward", lambda: [run_forward(model, batch, linears) for batch in batches])
    window = plan.windows[0]
    sums = run_stage(
        "forward and sums", sum_second_moments, model, linears, batches, window, plan, states
    )
    run_stage("reduction", reduce_sums, sums, owners)
    solving = (groups, [sums], owners, linears, weights, solve_tail, lora_ranks)
    run_stage("solving", lambda: solve_window(*solving, solve_device=torch.device("cpu")))
    clock["total"] = clock["forward and sums"] + clock["reduction"] + clock["solving"]
    return clock


def solve_tail(problem: ModuleProblem) -> Solution:
    """Solve a module for its smallest eigenvectors."""
    return solve_subspace(problem, "smallest", 0)


def compare_ranks() -> dict[str, Any]:
    """Return one rank's seconds over two ranks', the median of interleaved pairs.

    Each rank has one core.
    """
    runs: dict[int, list[dict]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "clock.json"
        for pair in range(PAIRS):
            for number in runs:
                _launch_ranks(number, output)
                runs[number].append(json.loads(output.read_text()))
            one, two = runs[1][-1]["total"], runs[2][-1]["total"]
            print(f"  pair {pair + 1}: {one:.2f} s, {two:.2f} s", flush=True)
    ratios = [one["total"] / two["total"] for one, two in zip(*runs.values(), strict=True)]
    seconds, relative = {}, {}
    for number, clocks in runs.items():
        medians = {name: statistics.median(clock[name] for clock in clocks) for name in clocks[0]}
        seconds[number] = medians
        relative[number] = {name: value / medians["forward"] for name, value in medians.items()}
    return {
        "speedup": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "seconds": seconds,
        "of the forward passes": relative,
    }


def run_reductions(output: Path) -> None:
    """Be one rank of `reduction`: write the seconds, bytes and memory of each way to reduce."""
    device = start_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hidden = SHAPES["LLaMA2-7B"][0]
    sums = [Moment.zeros(hidden, device) for _ in range(4)]
    owners = [i % world_size for i in range(len(sums))]
    found: dict[str, dict[str, float]] = {}
    peak = Peak()
    for attempt in range(PAIRS + 1):
        for reduction in get_args(Reduction):
            seconds = _time_reduction(sums, owners, reduction, peak)
            known = found.setdefault(reduction, seconds)
            if attempt:  # the first warms up
                found[reduction] = {key: min(known[key], seconds[key]) for key in seconds}
            else:
                del found[reduction]
    if rank == 0:
        output.write_text(json.dumps(found))
    stop_process_group()


def _time_reduction(
    sums: Sequence[Moment], owners: Sequence[int], reduction: Reduction, peak: Peak
) -> dict[str, float]:
    """Return what one reduction takes: seconds, of the CPU on both ranks too, MiB sent and added.

    Other processes of the machine may send over its loopback too; the least of several counts.
    """
    for moment in sums:
        for tensor in moment.tensors():
            tensor.fill_(1.0 + dist.get_rank())
    dist.barrier()
    sent, before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, read_anonymous_bytes()
    peak.take()
    start, cpu = time.perf_counter(), time.process_time()
    reduce_sums(sums, owners, reduction)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    added = (peak.take() - before) / MIB
    dist.barrier()
    sent = (psutil.net_io_counters(pernic=True)["lo"].bytes_sent - sent) / MIB
    whole = sum(tensor.nbytes for moment in sums for tensor in moment.tensors()) / MIB
    (cpu,) = all_reduce_sum([cpu], sums[0].total.device)
    return {"seconds": seconds, "cpu": cpu, "sent_mib": sent, "added_mib": added, "sums_mib": whole}


def compare_reductions() -> dict[str, Any]:
    """Return what an all-reduce takes on two ranks, what a reduce to owners does, and the ratios."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "found.json"
        _launch_ranks(2, output, "--reductions")
        found = json.loads(output.read_text())
    ratios = {
        key: found["all"][key] / found["owner"][key] for key in ("seconds", "cpu", "sent_mib")
    }
    return found | {"all over owner": ratios}


def _launch_ranks(number: int, output: Path, *options: str) -> None:
    """Run `number` ranks of this file as workers, on as many cores.

    Raises:
        RuntimeError: a rank failed; with the end of what it printed.
    """
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    cores = ["taskset", "-c", ",".join(map(str, range(number)))]
    line = [torchrun, "--standalone", "--nproc_per_node", str(number), __file__]
    done = subprocess.run(
        [*cores, *line, "--worker", str(output), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def run_within_budget(budget: float, output: Path) -> None:
    """Calibrate 16 layers within `budget` MiB (0: no limit); write peak memory and the vectors."""
    model = make_small_model(num_layers=16)
    linears = find_projections(model)
    ids = torch.randint(
        SMALL_VOCABULARY, (8, SMALL_LENGTH), generator=torch.Generator().manual_seed(1)
    )
    batches = [make_batch(row[None]) for row in ids]
    groups = find_groups(model, linears, batches[0])
    lora_ranks = dict.fromkeys(linears, SMALL_RANK)
    torch.linalg.eigh(torch.eye(300, dtype=torch.float64))  # loads what it needs
    plan = make_plan(model, linears, groups, tokens=SMALL_LENGTH, memory=budget * MIB or None)
    before, peak = read_anonymous_bytes(), Peak()
    windows = calibrate_modules(
        model,
        linears,
        [batches],
        TorchWeights(),
        plan,
        lambda problem: solve_subspace(problem, "largest", 0),
        lora_ranks=lora_ranks,
        solve_device=torch.device("cpu"),
    )
    for number, solutions in enumerate(windows):  # kept on disk, as a run keeps them
        vectors = {name: solution["vectors"] for name, solution in solutions.items()}
        save_file(vectors, output.with_suffix(f".{number}.safetensors"))
    # Hidden states between windows are on the CPU, outside of the budget. Here they are in the
    # peak.
    hidden = ids.numel() * SMALL_SIZE["hidden_size"] * FP32 / MIB if plan.layers is not None else 0
    found = {"peak_mib": (peak.take() - before) / MIB, "hidden_mib": hidden}
    found |= {"windows": len(plan.windows), "planned_mib": plan.peak_bytes / MIB}
    output.write_text(json.dumps(found))


def compare_windows() -> dict[str, Any]:
    """Return peak memory in one window and within budgets, and how far the vectors are apart."""
    runs, first = [], None
    with tempfile.TemporaryDirectory() as scratch:
        for budget in BUDGETS:
            output = Path(scratch) / f"{budget}.json"
            line = [sys.executable, __file__, "--worker", str(output), "--budget", str(budget)]
            subprocess.run(line, env=ENVIRONMENT, check=True)
            vectors = {}
            for file in Path(scratch).glob(f"{budget}.*.safetensors"):
                vectors |= load_file(file)
            first = first or vectors
            furthest = max((vectors[name] - first[name]).abs().max().item() for name in first)
            found = {"budget_mib": budget or None} | json.loads(output.read_text())
            runs.append(found | {"furthest": furthest})
            print(f"  {runs[-1]}", flush=True)
    return {"runs": runs}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = ["counted", "layer", "ranks", "reduction", "windows"]
    parser.add_argument(
        "--parts", nargs="+", choices=everything, default=everything, help="default all"
    )
    parser.add_argument(
        "--rows", type=int, default=16, help="of 512 tokens, for the layer (default %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "results" / "calibration.json",
        help="default bench/results/calibration.json",
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--reductions", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the parts and write their results, each as soon as it is there."""
    arguments = parse_arguments()
    if arguments.worker:
        if arguments.reductions:
            run_reductions(arguments.worker)
        elif arguments.budget is None:
            run_rank(arguments.worker)
        else:
            run_within_budget(arguments.budget, arguments.worker)
        return
    measure = {
        "counted": lambda: {shape: count_costs(shape) for shape in SHAPES},
        "layer": lambda: measure_layer("LLaMA2-7B", arguments.rows),
        "ranks": compare_ranks,
        "reduction": compare_reductions,
        "windows": compare_windows,
    }
    output = arguments.output
    found = json.loads(output.read_text()) if output.is_file() else {}
    for part in arguments.parts:
        print(f"{part}:", flush=True)
        found[part] = measure[part]()
        print(json.dumps(found[part], indent=1), flush=True)
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

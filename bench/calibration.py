"""What calibration costs against the straightforward way: full fp32 output moments of every module, `eigh` of each.

    python bench/calibration.py               counted, one 7B layer measured, and two ranks against one (15 minutes)
    python bench/calibration.py --parts layer

Ratios are of one run on one machine. Every part runs the functions of the main path (astra.calibrate and below); the
baseline is in this file. On a GPU, where there is one, `layer` runs there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

SHAPES = {  # hidden, intermediate, heads, key-value heads
    "LLaMA2-7B": (4096, 11008, 32, 32),
    "LLaMA3-8B": (4096, 14336, 32, 8),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 128
TOKENS = 256 * 512  # of a calibration in the published settings
PAIRS = 5
VOCABULARY = 32000


def make_layer(shape: str, device, dtype):  # noqa: ANN001, ANN201 (torch is imported late)
    """A model of one random decoder layer. Norm weights fall by 3.5 decades, so moments are as ill-conditioned as real
    ones (1e7)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    for norm in (
        model.model.layers[0].input_layernorm,
        model.model.layers[0].post_attention_layernorm,
    ):
        norm.weight.copy_(torch.logspace(0, -3.5, hidden)[torch.randperm(hidden)])
    return model


def linears_of(model) -> dict:  # noqa: ANN001
    return {name: m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in TARGETS}


def counted(shape: str) -> dict:
    """Numbers held, bytes and arithmetic of one layer, ours over the baseline's, from the shapes alone."""
    import torch

    from astra.flops import forming_flops, sum_flops
    from astra.moments import find_groups
    from astra.windows import FP64, moment_bytes

    model = make_layer(shape, "cpu", torch.float32)
    linears = linears_of(model)
    groups = find_groups(model, linears, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    outputs = [linear.out_features for linear in linears.values()]
    base = {"numbers": sum(d**2 for d in outputs), "sums": 2 * sum(d**2 for d in outputs) * TOKENS}
    ours = {
        "numbers": sum(moment_bytes(group.size) for group in groups) // FP64,
        # W x of a group that sums outputs: the model's own forward pass makes it too, in its own dtype.
        "products": sum(
            2 * linears[g.modules[0]].in_features * g.size * TOKENS
            for g in groups
            if g.of == "output"
        ),
        "sums": sum(sum_flops(group, linears) for group in groups) * TOKENS,
        "forming": sum(
            forming_flops(group.of, linears[name]) for group in groups for name in group.modules
        ),
    }
    triangle = ours["sums"] - ours["products"]
    return {
        "groups": [
            [group.of, group.size, [name.rsplit(".", 1)[-1] for name in group.modules]]
            for group in groups
        ],
        "numbers": base["numbers"] / ours["numbers"],
        "bytes": base["numbers"] * 4 / (ours["numbers"] * FP64),
        "sums": base["sums"] / triangle,
        "sums, with products W x": base["sums"] / ours["sums"],
        "sums and forming": base["sums"] / (triangle + ours["forming"]),
        "everything": base["sums"] / (ours["sums"] + ours["forming"]),
    }


def layer(shape: str, rows: int) -> dict:
    """One layer measured: seconds of each part, ours and the baseline's, and the energies of the tails."""
    import torch

    from astra.calibrate import second_moments
    from astra.eigen import solve
    from astra.moments import find_groups, forward
    from astra.output_moment import output_moment
    from astra.windows import make_plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_layer(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    linears = linears_of(model)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(rows):
        ids = torch.randint(VOCABULARY, (1, 512), generator=generator).to(device)
        batches.append({"input_ids": ids, "counted": torch.ones_like(ids, dtype=torch.bool)})

    def timed(work: Callable) -> tuple[float, object]:
        _synchronise(device)
        start = time.perf_counter()
        result = work()
        _synchronise(device)
        return time.perf_counter() - start, result

    groups = find_groups(model, linears, batches[0])
    plan = make_plan(model, linears, groups, tokens=512)
    seconds, energies = {}, {}
    with torch.no_grad():
        forward(model, batches[0])
        floor, _ = timed(lambda: [forward(model, batch) for batch in batches])
        ours, moments = timed(
            lambda: second_moments(
                model, linears, batches, plan.windows[0], plan, [None] * len(batches)
            )
        )
        theirs, full = timed(lambda: baseline_moments(model, linears, batches))
    seconds |= {"forward": floor, "sums": ours - floor, "baseline sums": theirs - floor}
    seconds |= dict.fromkeys(("forming", "solving", "baseline eigh"), 0.0)
    for group, moment in zip(groups, moments, strict=True):
        for name in group.modules:
            weight = linears[name].weight
            forming, (basis, small) = timed(
                lambda w=weight, g=group, m=moment: output_moment(g.of, m, w, None)
            )
            solving, mine = timed(
                lambda b=basis, s=small, n=name: solve(b, s, RANK, "smallest", 0, n)
            )
            dense, (_, vectors) = timed(lambda n=name: torch.linalg.eigh(full[n]))
            seconds["forming"] += forming
            seconds["solving"] += solving
            seconds["baseline eigh"] += dense
            energies[name.rsplit(".", 1)[-1]] = _energies(
                basis, small, mine.vectors, vectors[:, :RANK].double()
            )
            print(f"  {name}: eigenproblem {solving:.2f} s, baseline {dense:.2f} s", flush=True)
            del dense, vectors, full[name]
    return {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{os.cpu_count()} CPU cores",
        "tokens": rows * 512,
        "seconds": seconds,
        "sums": seconds["baseline sums"] / seconds["sums"],
        "eigenproblems": seconds["baseline eigh"] / seconds["solving"],
        "eigenproblems and forming": seconds["baseline eigh"]
        / (seconds["solving"] + seconds["forming"]),
        "energy over the fp64 minimum": energies,
    }


def baseline_moments(model, linears: dict, batches: list) -> dict:  # noqa: ANN001
    """fp32 sums of y y^T of every module's actual output, all held at once: name -> (d_out, d_out)."""
    import torch

    device = batches[0]["input_ids"].device
    full = {
        name: torch.zeros(m.out_features, m.out_features, device=device)
        for name, m in linears.items()
    }

    def add(name: str, output) -> None:  # noqa: ANN001
        rows = output.flatten(0, 1).float()
        full[name].addmm_(rows.T, rows)

    hooks = [
        m.register_forward_hook(lambda _m, _i, out, name=name: add(name, out))
        for name, m in linears.items()
    ]
    for batch in batches:
        model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return full


def _energies(basis, small, mine, theirs) -> dict[str, float]:  # noqa: ANN001
    """tr(V^T C V) in fp64 over the least possible, of our V and the baseline's; both as they are where that is 0."""
    import torch

    def energy(vectors) -> float:  # noqa: ANN001
        inside = vectors if basis is None else basis.transposed_times(vectors)
        return ((small @ inside) * inside).sum().item()

    outside = 0 if basis is None else basis.codimension
    least = (
        torch.linalg.eigvalsh(small)[: RANK - outside].clamp(min=0).sum().item()
        if outside < RANK
        else 0.0
    )
    trace = small.diagonal().sum().item()
    if least == 0:
        return {
            "ours, share of trace": energy(mine) / trace,
            "baseline, share of trace": energy(theirs) / trace,
        }
    return {"ours": energy(mine) / least, "baseline": energy(theirs) / least}


def _synchronise(device) -> None:  # noqa: ANN001
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def worker(output: Path) -> None:
    """One rank of `ranks`: seconds of a whole calibration and of its parts."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from astra import moments
    from astra.calibrate import find_subspace, reduce, second_moments, share_out, solve_window
    from astra.weights import TorchWeights
    from astra.windows import make_plan
    from launch.data.tokenize import deal
    from launch.runtime.distributed import start, stop

    start()
    torch.manual_seed(0)
    size = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **size)).eval().requires_grad_(False)
    linears = linears_of(model)
    ids = torch.randint(1000, (48, 256), generator=torch.Generator().manual_seed(1))
    share = deal(list(range(48)), dist.get_rank(), dist.get_world_size(), 1)
    batches = [
        {"input_ids": ids[rows], "counted": torch.ones(1, 256, dtype=torch.bool)} for rows in share
    ]
    groups = moments.find_groups(model, linears, batches[0])
    plan = make_plan(model, linears, groups, tokens=256)
    ranks = dict.fromkeys(linears, 32)
    owners = share_out(groups, linears, ranks)
    for _ in range(2):  # the first warms up
        clock = {}

        def part(name: str, work: Callable, clock: dict = clock) -> object:
            dist.barrier()
            began = time.perf_counter()
            result = work()
            dist.barrier()
            clock[name] = time.perf_counter() - began
            return result

        with torch.no_grad():
            part("forward", lambda: [moments.forward(model, batch) for batch in batches])
        found = part(
            "forward and sums",
            lambda: second_moments(
                model, linears, batches, plan.windows[0], plan, [None] * len(batches)
            ),
        )
        part("reduction", lambda found=found: reduce(found, owners))
        part(
            "solving",
            lambda found=found: solve_window(
                groups,
                [found],
                owners,
                linears,
                TorchWeights(),
                lambda problem: find_subspace(problem, "smallest", 0),
                ranks=ranks,
            ),
        )
        clock["total"] = clock["forward and sums"] + clock["reduction"] + clock["solving"]
    if dist.get_rank() == 0:
        output.write_text(json.dumps(clock))
    stop()


def ranks() -> dict:
    """Two ranks of one core each against one rank on one core: medians of interleaved pairs."""
    runs: dict[int, list[dict]] = {1: [], 2: []}
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "clock.json"
        for pair in range(PAIRS):
            for number in runs:
                line = [
                    torchrun,
                    "--standalone",
                    "--nproc_per_node",
                    str(number),
                    __file__,
                    "--worker",
                    str(output),
                ]
                cores = ["taskset", "-c", ",".join(map(str, range(number)))]
                done = subprocess.run(
                    cores + line,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    raise RuntimeError(done.stderr[-3000:])
                runs[number].append(json.loads(output.read_text()))
            print(
                f"  pair {pair + 1}: {runs[1][-1]['total']:.2f} s, {runs[2][-1]['total']:.2f} s",
                flush=True,
            )
    ratios = [one["total"] / two["total"] for one, two in zip(*runs.values(), strict=True)]
    parts = {
        number: {name: statistics.median(run[name] for run in of) for name in of[0]}
        for number, of in runs.items()
    }
    return {
        "speedup": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "seconds": parts,
        "of the forward passes": {
            number: {name: value / part["forward"] for name, value in part.items()}
            for number, part in parts.items()
        },
    }


def window_worker(budget: float, output: Path) -> None:
    """Calibrate 16 layers within `budget` MiB (0: all at once); the peak of memory that it added, and what it found."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from astra import moments
    from astra.calibrate import calibrate, find_subspace
    from astra.weights import TorchWeights
    from astra.windows import make_plan
    from bench.memory import MIB, Peak, anonymous

    torch.manual_seed(0)
    size = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **size)).eval().requires_grad_(False)
    linears = linears_of(model)
    ids = torch.randint(1000, (8, 256), generator=torch.Generator().manual_seed(1))
    batches = [
        {"input_ids": row[None], "counted": torch.ones(1, 256, dtype=torch.bool)} for row in ids
    ]
    groups = moments.find_groups(model, linears, batches[0])
    ranks = dict.fromkeys(linears, 32)
    torch.linalg.eigh(torch.eye(300, dtype=torch.float64))  # loads what it needs
    plan = make_plan(model, linears, groups, tokens=256, memory=budget * MIB or None)
    before, peak = anonymous(), Peak()
    parts = calibrate(
        model,
        linears,
        [batches],
        TorchWeights(),
        plan,
        lambda p: find_subspace(p, "largest", 0),
        ranks=ranks,
    )
    for number, part in enumerate(parts):  # kept on disk, as a run keeps them
        vectors = {name: of["vectors"] for name, of in part.items()}
        save_file(vectors, output.with_suffix(f".{number}.safetensors"))
    # Hidden states between windows are on the CPU, outside of the budget: here they are in the peak too.
    hidden = ids.numel() * size["hidden_size"] * 4 / MIB if plan.layers is not None else 0
    found = {"peak_mib": (peak.take() - before) / MIB, "hidden_mib": hidden}
    found |= {"windows": len(plan.windows), "planned_mib": plan.peak / MIB}
    output.write_text(json.dumps(found))


def windows() -> dict:
    """Peak memory of a calibration in one window and within budgets, and how far what it finds is from the first."""
    from safetensors.torch import load_file

    from bench.memory import ENVIRONMENT

    found, first = [], None
    with tempfile.TemporaryDirectory() as scratch:
        for budget in (0, 80, 50):
            output = Path(scratch) / f"{budget}.json"
            line = [sys.executable, __file__, "--worker", str(output), "--budget", str(budget)]
            subprocess.run(line, env=ENVIRONMENT, check=True)
            files = Path(scratch).glob(f"{budget}.*.safetensors")
            vectors = {name: value for file in files for name, value in load_file(file).items()}
            first = first or vectors
            furthest = max((vectors[name] - first[name]).abs().max().item() for name in first)
            found.append(
                {"budget_mib": budget or None}
                | json.loads(output.read_text())
                | {"furthest": furthest}
            )
            print(f"  {found[-1]}", flush=True)
    return {"runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = ["counted", "layer", "ranks", "windows"]
    parser.add_argument(
        "--parts", nargs="+", choices=everything, default=everything, help="default all"
    )
    parser.add_argument(
        "--rows", type=int, default=16, help="of 512 tokens, for the layer (default %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "calibration.json",
        help="default %(default)s",
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        if arguments.budget is None:
            worker(arguments.worker)
        else:
            window_worker(arguments.budget, arguments.worker)
        return
    found = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    for part in arguments.parts:
        print(f"{part}:", flush=True)
        if part == "counted":
            found[part] = {shape: counted(shape) for shape in SHAPES}
        else:
            parts = {
                "layer": lambda: layer("LLaMA2-7B", arguments.rows),
                "ranks": ranks,
                "windows": windows,
            }
            found[part] = parts[part]()
        print(json.dumps(found[part], indent=1), flush=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

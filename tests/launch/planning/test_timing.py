"""launch.planning.timing, communication and memory against values worked out by hand.

Llama-2-7b's config on H100s: 6,738,415,616 weights, 319,815,680 in adapters of rank 128 on all seven
projections, 32 layers. Only the layers' bytes are made, on the meta device; half a minute with the
one test that runs its layers.
"""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from astra.moments import Group
from launch.calibration.solvers import GPU_EIGH_RATE, estimate_solve_seconds
from launch.config.loading import validate_recipe
from launch.config.schema import Recipe
from launch.planning.communication import count_communication, time_collective, time_micro_batch
from launch.planning.counting import CountingMode, Operation
from launch.planning.machine import count_usable_bytes, describe_machine, make_machine
from launch.planning.memory import count_held_bytes
from launch.planning.model import ModelRun, Pass, make_fake_model, run_without_numbers
from launch.planning.timing import SAME_HOST_TIME, StepTime, time_host, time_operations, time_step
from launch.runtime.compat.torch_parts import make_fake_mode
from launch.runtime.units import GIB
from tests.support.paths import ROOT

SEVEN_B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
W, T = 2 * 6_738_415_616, 4 * 319_815_680  # bytes of the bf16 base and of the fp32 adapters
ENGINES = ("single", "zero2", "fsdp", "zero3", "zero3_offload")
BF16 = torch.bfloat16
H100 = make_machine("NVIDIA H100 80GB HBM3", 8)


def make_recipe(**train: object) -> Recipe:
    return validate_recipe(
        {
            "model": {"name": "m"},
            "data": {"path": "d"},
            "adapter": {"method": "lora"},
            "train": {"global_batch": 128, "micro_batch": 8} | train,
        }
    )


@pytest.fixture(scope="module")
def run() -> ModelRun:
    """The model of 7B, with a micro batch of 1e14 bf16 operations and 0.2 TB of traffic."""
    work = Counter({Operation(10**12, 0, True): 100, Operation(0, 10**9, False): 200})
    fake = make_fake_model(SEVEN_B, make_recipe(), BF16)
    return ModelRun(fake, None, 8, 2, {True: Pass(0, work)})


def test_a_roofline_takes_the_longer_of_arithmetic_and_traffic() -> None:
    one = {
        Operation(989_400_000_000, 0, True): 0.001,  # a ms at the peak of bf16
        Operation(989_400_000_000, 0, False): 0.002,  # in TF32, which is half as fast
        Operation(0, 3_350_000_000, False): 0.001,  # a ms of the memory's bandwidth
        Operation(1, 3_350_000_000, True): 0.001,
    }
    for operation, seconds in one.items():
        found = time_operations(Counter([operation, operation]), H100, BF16)
        assert found == pytest.approx(2 * seconds / 0.6)
    fp32 = Counter([Operation(67_000_000_000, 0, False)])
    assert time_operations(fp32, H100, torch.float32) == pytest.approx(0.001 / 0.6)
    volta = make_machine("Tesla V100-SXM2-32GB", 1)  # no bf16: at its fp32 rate, 15.7 TFLOP/s
    bf16 = Counter([Operation(15_700_000_000, 0, True)])
    assert time_operations(bf16, volta, BF16) == pytest.approx(0.001 / 0.6)


def test_operations_are_counted_with_what_they_read_and_write() -> None:
    with make_fake_mode(), CountingMode() as counted:
        a, b = torch.zeros(64, 32, dtype=BF16), torch.zeros(32, 16, dtype=BF16)
        counted.operations.clear()
        (a @ b).t().view(16, 64)  # views move nothing
        a.add_(1)
        (a + torch.empty(32, dtype=BF16).expand(64, 32)).float()
    product = Operation(2 * 64 * 32 * 16, 2 * (64 * 32 + 32 * 16 + 64 * 16), True)
    in_place = Operation(0, 2 * 2 * 64 * 32, True)
    # The expanded tensor has 32 numbers.
    total, cast = (Operation(0, 2 * (2 * 64 * 32 + 32), True), Operation(0, 6 * 64 * 32, False))
    assert counted.operations == Counter([product, in_place, total, cast])


@pytest.mark.parametrize(
    ("engine", "held"),
    [
        # Base and adapters; AdamW's gradient and two moments of a shard.
        ("single", W + T + 3 * T),
        ("fsdp", (W + T + 3 * T) / 8),
        # DeepSpeed: a copy of what it steps besides, and a buffer of 5e7 gradients.
        ("zero2", W + T + 4 * T / 8 + 4 * 50_000_000),
        ("zero3", (W + T + 4 * T) / 8 + 4 * 50_000_000),
        ("zero3_offload", 4 * 50_000_000),
    ],
)
def test_what_is_held_of_7b(engine: str, held: float, run: ModelRun) -> None:
    found = count_held_bytes(engine, run.fake, 1 if engine == "single" else 8)
    parts = ("base", "adapters", "gradients and optimiser")
    assert sum(found[part] for part in parts) == pytest.approx(held, abs=8)


def test_what_is_held_of_7b_where_each_of_two_nodes_holds_the_base(run: ModelRun) -> None:
    parts = ("base", "adapters", "gradients and optimiser")
    fsdp = count_held_bytes("fsdp", run.fake, 16, node_size=8)
    assert sum(fsdp[part] for part in parts) == pytest.approx((W + T + 3 * T) / 8, abs=8)
    # ZeRO-3 steps what it does without: shards of all ranks, beside a copy of all weights a node.
    zero3 = count_held_bytes("zero3", run.fake, 16, node_size=8)
    held = (W + T + 4 * T) / 16 + (W + T) / 8 + 4 * 50_000_000
    assert sum(zero3[part] for part in parts) == pytest.approx(held, abs=8)


def test_the_reserve_of_an_h100() -> None:
    assert count_usable_bytes(80, 8) == pytest.approx((80 - 0.5 - 1) * 0.9 * GIB)
    assert count_usable_bytes(80, 1) == pytest.approx((80 - 0.5) * 0.9 * GIB)
    assert H100.usable == count_usable_bytes(80, 8)
    assert count_usable_bytes(1, 8) == 0
    assert "reserve: 9.35 of 80 GiB (CUDA 0.5, NCCL 1, and 10% of the rest" in describe_machine(
        H100
    )


def test_communication_of_7b_by_engine() -> None:
    found = {name: count_communication(name, W // 2, W, T, False) for name in ENGINES}
    assert {name: (one.gathered, one.scattered, one.reduced) for name, one in found.items()} == {
        "single": (0, 0, 0),
        "zero2": (0, 0, T),
        "fsdp": (2 * (W + T), T, 0),
        "zero3": (2 * (W + T), T, 0),
        "zero3_offload": (2 * (W + T), T, 0),
    }
    assert {name: one.step_gathered for name, one in found.items() if one.step_gathered} == {
        "zero2": T
    }
    # A small model stays gathered from the forward to the backward pass.
    assert count_communication("zero3", 10**9, 2 * 10**9, T, False).gathered == 2 * 10**9 + T
    # All parameters: bf16 weights are gathered, fp32 gradients are summed.
    full = count_communication("fsdp", W // 2, W, 2 * W, True)
    assert (full.gathered, full.scattered) == (2 * W, 2 * W)


def test_links_and_networks() -> None:
    # 8 GPUs of a node: 7 / 8 of the bytes over 450 GB/s. 2 nodes: half of them over 50 GB/s.
    assert time_collective(4.5e11, H100) == pytest.approx(7 / 8 / 0.6)
    two_nodes = make_machine("H100", 16)
    assert time_collective(5e10, two_nodes) == pytest.approx(0.5 / 0.6)
    fast = make_machine("H100", 16, network=1e6)
    assert time_collective(4.5e11, fast) == pytest.approx(15 / 16 / 0.6)
    assert time_collective(1e12, make_machine("H100", 1)) == 0
    bridge = make_machine("NVIDIA H100 NVL", 8)  # through PCIe
    assert time_collective(6.4e10, bridge) == pytest.approx(7 / 8 / 0.6)
    # An all-reduce is two collectives.
    zero2 = count_communication("zero2", W // 2, W, T, False)
    assert time_micro_batch(zero2, H100) == pytest.approx(2 * time_collective(T, H100))


def test_nodes_that_hold_the_base_gather_it_over_their_links_alone() -> None:
    slow = make_machine("H100", 16, network=1.0)
    within = 7 / 8 / (450e9 * 0.6)  # seconds of a byte that 8 GPUs gather
    between = 1 / 2 / (1e9 * 0.6)  # of one that two nodes gather
    fsdp = count_communication("fsdp", W // 2, W, T, False, in_nodes=True)
    gathered = 2 * (W + T) * within
    # T is summed within nodes; half of it then goes to the other node and half comes back.
    assert time_micro_batch(fsdp, slow) == pytest.approx(gathered + T * within + 2 * T * between)
    # Through PCIe each GPU sums an eighth of T with the other node's, and all eight at once.
    bridge = make_machine("NVIDIA H100 NVL", 16, network=400.0)
    share = (2 * (W + T) + T) * 7 / 8 / 64e9 / 0.6
    between_fast = T / 400e9 / 0.6
    assert time_micro_batch(fsdp, bridge) == pytest.approx(share + between_fast)
    zero3 = count_communication("zero3", W // 2, W, T, False, in_nodes=True)
    assert time_micro_batch(zero3, slow) == pytest.approx(gathered + T * between)
    assert zero3.step_gathered == T
    # Without it all weights cross the network.
    everywhere = count_communication("fsdp", W // 2, W, T, False)
    assert time_micro_batch(everywhere, slow) == pytest.approx((2 * (W + T) + T) * between)


def test_host_time_is_the_benchs() -> None:
    record = json.loads((ROOT / "bench" / "results" / "host.json").read_text())
    assert record["layers"] == 32
    for engine in ENGINES:
        measured = record["milliseconds"][SAME_HOST_TIME.get(engine, engine)] / 1000
        assert time_host(engine, 32, checkpointing=True) == pytest.approx(measured)
        assert time_host(engine, 16, checkpointing=False) == pytest.approx(measured * 0.375)


def test_a_step_of_7b_on_eight_h100(run: ModelRun) -> None:
    """0.101 s of arithmetic and 0.060 s of traffic at the peaks, 2 micro batches."""
    gpu = (1e14 / 989.4e12 + 200e9 / 3350e9) / 0.6
    host = json.loads((ROOT / "bench" / "results" / "host.json").read_text())["milliseconds"]
    zero2 = time_step(run, "zero2", True, H100)
    assert zero2.micro_batch["GPU"] == pytest.approx(gpu)
    assert zero2.micro_batch["host"] == pytest.approx(host["zero2"] / 1000)
    assert zero2.bound == "GPU"
    after = 28 * T / 4 / 8 / 3350e9 / 0.6 + T * 7 / 8 / 450e9 / 0.6  # AdamW, and what it stepped
    assert zero2.seconds == pytest.approx(2 * gpu + after)
    zero3 = time_step(run, "zero3", True, H100)
    # 29.5 GB are gathered, written, and copied.
    assert zero3.micro_batch["GPU"] == pytest.approx(gpu + 3 * 2 * (W + T) / 3350e9 / 0.6)
    assert zero3.micro_batch["links"] == pytest.approx((2 * W + 3 * T) * 7 / 8 / 450e9 / 0.6)
    offload = time_step(run, "zero3_offload", True, H100)
    assert offload.micro_batch["PCIe"] == pytest.approx((2 * W + 3 * T) / 8 / 64e9 / 0.6)
    slow = time_step(run, "fsdp", True, make_machine("H100", 16, network=12.5))
    assert slow.bound == "network"
    assert slow.micro_batch["network"] == pytest.approx((2 * W + 3 * T) / 2 / 12.5e9 / 0.6)


def test_a_step_takes_at_least_the_hosts_time() -> None:
    step = StepTime({"GPU": 0.01, "host": 0.3, "links": 0.02}, 4, 0.1)
    assert (step.seconds, step.bound) == (pytest.approx(1.3), "host")


def test_eigenproblems_by_gpu() -> None:
    """One module of 4,096 outputs, whose eigenvectors are all computed on a GPU."""
    with torch.device("meta"):
        linears = {"m": torch.nn.Linear(4096, 4096), "n": torch.nn.Linear(28672, 8192)}
    problem = ([Group(("m",), "output", 4096)], linears, {"m": 128, "n": 128}, "output")
    eigh = (14 / 3) * 4096**3
    assert eigh / GPU_EIGH_RATE == pytest.approx(1.5)
    checks = 2 * 4096**2 * 128 + 4 * 4096 * 128**2
    hopper, turing = make_machine("H100", 1).gpu, make_machine("T4", 1).gpu
    seconds, where = estimate_solve_seconds(*problem, hopper, 64, 1)
    assert seconds == pytest.approx(1.5 + checks / (0.4 * 67e12))
    assert where == "on the GPU"
    # On a T4 at 0.4 of 0.25 TFLOP/s; 64 cores are sooner.
    seconds, where = estimate_solve_seconds(*problem, turing, 1, 1)
    assert seconds == pytest.approx((eigh + checks) / 1e11)
    seconds, where = estimate_solve_seconds(*problem, turing, 64, 1)
    assert where == "on 64 CPU cores a GPU, which are sooner than a GPU this slow in fp64"
    on_cpu = 4 / 3 * 4096**3 + 2 * 4096**2 * 128 + checks
    assert seconds == pytest.approx(on_cpu / 13e9 / 64)
    # Inputs of 28,672 are more than cuSOLVER can do.
    large = ([Group(("n",), "input", 28672)], *problem[1:3], "input")
    _, where = estimate_solve_seconds(*large, hopper, 64, 1)
    assert where == "on the GPU, above 23,000 rows on 64 CPU cores a GPU"


@pytest.mark.slow
def test_the_arithmetic_of_a_micro_batch_of_7b() -> None:
    """4 operations a frozen weight and token, 6 a trained one, and attention, once or twice.

    Less the gradient of the first layer's input, which nothing needs without checkpointing.
    """
    recipe = make_recipe(global_batch=8, micro_batch=1)
    layers = 4
    config = LlamaConfig(**(SEVEN_B.to_diff_dict() | {"num_hidden_layers": layers}))
    run = run_without_numbers(config, recipe, BF16, 8, [False, True])
    assert (run.micro_batch, run.num_micro_batches) == (1, 1)
    tokens, targets = 512, layers * (4 * 4096**2 + 3 * 4096 * 11008)
    head = 4 * 32000 * 4096 * (tokens - 1)
    forward = 2 * tokens * (targets + run.fake.num_trained)
    wanted = 2 * forward + 2 * tokens * run.fake.num_trained + head
    attention = layers * 2 * 2 * tokens**2 * 4096 * 3.5  # backward is 2.5 times forward
    plain, again = run.training[False], run.training[True]
    first_input = 3 * 2 * tokens * 4096 * (4096 + 128)  # through q, k and v, and their A
    assert plain.flops == pytest.approx(wanted + attention - first_input, rel=1e-3)
    recomputed = forward + attention / 3.5
    assert again.flops == pytest.approx(plain.flops + first_input + recomputed, rel=1e-3)
    assert again.peak < 0.6 * plain.peak


def test_an_unknown_gpu_is_said_and_has_an_h100s_rates() -> None:
    machine = make_machine("NVIDIA H10O", 4)
    assert machine.gpu == H100.gpu
    assert (machine.memory, machine.usable) == (None, None)
    said = describe_machine(machine)
    assert "NVIDIA H10O is not in the table of launch/runtime/gpus.py" in said
    assert "what no option gives is an H100's" in said
    assert "its memory is not given" in said
    assert replace(machine, name="NVIDIA H100").is_known
    by_hand = make_machine("Something New", 1, memory=30, bf16_tflops=1.0, nvlink=7.0)
    assert (by_hand.gpu.bf16_tflops, by_hand.gpu.link, by_hand.memory) == (1.0, 7.0, 30)

"""Training under ZeRO and FSDP2 in 1 to 4 real processes: the losses of plain PyTorch, and exports that mean the same.

The oracle is an independent loop: plain transformers and PEFT, one process, one row at a time.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from astra import adapter
from astra.weights import TorchWeights
from launch.config.schema import read
from launch.report import table
from launch.training.loop import Metrics
from tests.support.plain import load_base, logits, plain_training

pytestmark = pytest.mark.xdist_group("train")

# (ranks, settings): every engine on 1, 2 and 4 ranks, micro batches with accumulation and without, gradient
# checkpointing, packing. The global batch is 10.
LAUNCHES = [
    (1, ("train.micro_batch=3", "engine=zero3")),
    (2, ("train.micro_batch=2", "train.gradient_checkpointing=true", "engine=zero3")),
    (4, ("train.micro_batch=1", "engine=zero3")),
    (2, ("train.micro_batch=5", "engine=zero2")),
    (2, ("train.micro_batch=2", "train.gradient_checkpointing=true", "engine=fsdp")),
    (3, ("train.micro_batch=1", "engine=fsdp")),  # shards of unequal size
    (1, ("train.micro_batch=4", "engine=single", "train.gradient_checkpointing=true")),
    (2, ("train.micro_batch=5", "engine=zero3", "eval.suites=[]", "data.packing=true")),
    (1, ("train.micro_batch=10", "engine=fsdp", "eval.suites=[]")),
    (2, ("train.micro_batch=1", "engine=fsdp", "eval.suites=[]", "data.packing=true")),
    (4, ("train.micro_batch=3", "engine=fsdp", "eval.suites=[]")),
    (1, ("train.micro_batch=10", "engine=zero2", "eval.suites=[]")),
    (4, ("train.micro_batch=1", "engine=zero2", "eval.suites=[]", "data.packing=true")),
    (1, ("train.micro_batch=3", "engine=zero3_offload", "eval.suites=[]")),
    (2, ("train.micro_batch=5", "engine=zero3_offload")),
    (4, ("train.micro_batch=1", "engine=zero3_offload", "eval.suites=[]")),
]
BF16 = (2, ("model.dtype=bfloat16", "eval.suites=[]"))
FSDP_BF16 = (2, ("model.dtype=bfloat16", "eval.suites=[]", "engine=fsdp"))
LORA = (2, ("adapter.method=lora", "eval.suites=[]"))
# Launched as a user would, a command for each; the others share a launch for each number of ranks.
# ZeRO-3 under `deepspeed`: test_quickstart.py, test_faults.py.
ALONE = {
    LAUNCHES[0]: "python",
    LAUNCHES[1]: "torchrun",
    LAUNCHES[4]: "torchrun",
    LAUNCHES[5]: "deepspeed",
}
# Saved by the first, gone on with as the second says: other world sizes, other engines, other micro batches.
MOVES = [
    (LAUNCHES[1], LAUNCHES[10]),
    (LAUNCHES[1], LAUNCHES[6]),
    (LAUNCHES[4], LAUNCHES[0]),
    (LAUNCHES[4], LAUNCHES[14]),
    (LAUNCHES[6], LAUNCHES[3]),
]


def run_of(trained: Callable[..., Path], case: tuple) -> Path:
    ranks, settings = case
    if case in ALONE:
        return trained(ranks, *settings, launcher=ALONE[case])
    shared = [
        other
        for other in (*LAUNCHES, BF16, FSDP_BF16, LORA)
        if other not in ALONE and other[0] == ranks
    ]
    return trained(ranks, *settings, along=[other[1] for other in shared])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def updates(run: Path) -> dict[str, torch.Tensor]:
    """Module name -> its dW = s B A of the run's lora/, which the factors' signs and order do not change."""
    factors, scaling = adapter.load(run / "lora")
    return {name: scaling * b.double() @ a.double() for name, (a, b) in factors.items()}


def with_factors(
    path: Path, base: Path, folder: Path, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """Plain PEFT: the residual base, rebuilt from the run's astra_init, with the factors in `folder`."""
    model = load_base(base, dtype)
    adapter.subtract(model, *adapter.load(path / "astra_init"), TorchWeights())
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def oracle(run: Path, base: Path, rows: list[dict]) -> tuple[list[float], list[float], PeftModel]:
    """Losses, gradient norms and model of a plain loop from the run's astra_init."""
    model = with_factors(run, base, run / "astra_init")
    return *plain_training(model, read(str(run / "recipe.yaml"), []), rows), model


@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_losses_gradients_and_weights_equal_plain_pytorch(
    case: tuple, trained: Callable[..., Path], base: Path, rows: list[dict]
) -> None:
    run = run_of(trained, case)
    losses, norms, model = oracle(run, base, rows)
    steps = metrics(run)
    assert [step["step"] for step in steps] == list(range(1, 8))
    assert losses[-1] < 0.8 * losses[0]
    # 1e-4: contract 1, for fp32 and other orders of its sums.
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-4)
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-3)
    reached = logits(model, base, rows)
    exported = logits(PeftModel.from_pretrained(load_base(base), run / "lora"), base, rows)
    moved = (reached - logits(load_base(base), base, rows)).abs().max()
    assert moved > 0.5
    assert (exported - reached).abs().max() < 1e-2 * moved


def test_loss_curves_and_exports_of_all_launches_agree(
    trained: Callable[..., Path], base: Path, rows: list[dict]
) -> None:
    first, *others = [run_of(trained, case) for case in LAUNCHES]
    exported = updates(first)
    for other in others:
        for key, tolerance in (("loss", 1e-4), ("tokens", 0), ("lr", 0)):
            wanted = [step[key] for step in metrics(first)]
            assert [step[key] for step in metrics(other)] == pytest.approx(
                wanted, rel=tolerance, abs=0
            )
        a, b = (
            load_file(run / "astra_init" / "adapter_model.safetensors") for run in (first, other)
        )
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-5)
        found = updates(other)
        assert found.keys() == exported.keys()
        for name, update in exported.items():
            # At most 8e-7 in the 15 launches: fp32's rounding. The last three of the seven steps are 0.2 of an update.
            assert (found[name] - update).norm() < 1e-5 * update.norm(), name


@pytest.mark.parametrize(("saved", "other"), MOVES, ids=str)
def test_a_checkpoint_goes_on_elsewhere(
    saved: tuple,
    other: tuple,
    trained: Callable[..., Path],
    launch: Callable,
    recipe: Path,
    tmp_path: Path,
) -> None:
    whole = run_of(trained, saved)
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000007")
    ranks, settings = other
    options = [option for setting in (*settings, "eval.suites=[]") for option in ("--set", setting)]
    line = ["--recipe", recipe, *options, "--output", tmp_path / "run"]
    assert "going on after step 4 of 7" in launch("launch/train.py", *line, ranks=ranks).stdout
    wanted = [step["loss"] for step in metrics(whole)]
    assert [step["loss"] for step in metrics(tmp_path / "run")] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("case", [*LAUNCHES[:3], LAUNCHES[5], BF16, FSDP_BF16], ids=str)
def test_the_three_exports_are_one_model_in_plain_peft(
    case: tuple, trained: Callable[..., Path], base: Path, rows: list[dict]
) -> None:
    run = run_of(trained, case)
    dtype = torch.bfloat16 if case in (BF16, FSDP_BF16) else torch.float32
    original = logits(load_base(base), base, rows)
    on_residual = logits(with_factors(run, base, run / "adapter", dtype).float(), base, rows)
    plain = logits(
        PeftModel.from_pretrained(load_base(base, dtype), run / "lora").float(), base, rows
    )
    merged = PeftModel.from_pretrained(
        load_base(base, dtype).float(), run / "lora"
    ).merge_and_unload()
    # fp32: 1e-5 of the logits. bf16: the residual's rounding, 2^-8 of each weight, through two layers.
    tolerance = (1e-5 if dtype == torch.float32 else 0.05) * original.abs().max()
    assert (plain - original).abs().max() > (100 if dtype == torch.float32 else 5) * tolerance
    assert (plain - on_residual).abs().max() < tolerance
    assert (plain - logits(merged, base, rows)).abs().max() < tolerance


@pytest.mark.parametrize("case", [*LAUNCHES, BF16, FSDP_BF16], ids=str)
def test_nothing_moves_at_step_0(case: tuple, trained: Callable[..., Path]) -> None:
    results = json.loads((run_of(trained, case) / "results.json").read_text())
    if case in (BF16, FSDP_BF16):
        assert 0 < results["residual_rounding"] <= 2**-8
    else:
        assert 0 < results["logit_drift"] < 1e-5
        assert 0 < results["residual_rounding"] < 1e-6


def test_the_exported_initial_factors_follow_from_the_subspaces(
    trained: Callable[..., Path], base: Path
) -> None:
    run = run_of(trained, LAUNCHES[1])
    found = load_file(run / "calibration" / "window-0000.safetensors")
    initial, scaling = adapter.load(run / "astra_init")
    model = load_base(base)
    assert scaling == 1.5
    assert len(initial) == 14
    for name, (a0, b0) in initial.items():
        vectors, values = found[f"{name}.vectors"], found[f"{name}.values"]
        assert vectors.dtype == values.dtype == torch.float64
        torch.testing.assert_close(b0, vectors.float(), rtol=0, atol=0)
        wanted = vectors.T @ model.get_submodule(name).weight.double()
        wanted[values == 0] = 0
        torch.testing.assert_close(a0, wanted.float(), rtol=0, atol=1e-6)


def test_the_run_folder_holds_what_the_readme_names(
    trained: Callable[..., Path], data: Path
) -> None:
    run = run_of(trained, LAUNCHES[1])
    for name in ("loss.png", "grad_norm.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    step = metrics(run)[0]
    assert step.keys() == Metrics.__annotations__.keys()
    manifest = json.loads((run / "calibration" / "manifest.json").read_text())
    assert len(manifest["sample_ids"]) == len(set(manifest["sample_ids"])) == 11
    assert (manifest["eigen_select"], manifest["rank"], manifest["dtype"]) == (
        "smallest",
        4,
        "float32",
    )
    generations = [
        json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()
    ]
    problems = [json.loads(line) for line in (data / "gsm8k_test.jsonl").read_text().splitlines()]
    assert [row["question"] for row in generations] == [row["question"] for row in problems]
    results = json.loads((run / "results.json").read_text())
    score = results["scores"]["gsm8k"]
    assert score["n"] == 7
    assert score["correct"] == sum(row["strict"] for row in generations)
    assert results["conditions"]["world_size"] == 2
    assert "smallest" in (run / "README.md").read_text()
    assert "| astra smallest | 4 |" in table([run])
    assert "residual" in (run / "adapter" / "README.md").read_text()


def test_generations_do_not_depend_on_the_engine_or_world_size(
    trained: Callable[..., Path],
) -> None:
    texts = []
    for case in (case for case in LAUNCHES if "eval.suites=[]" not in case[1]):
        lines = (run_of(trained, case) / "generations.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["output"] for line in lines])
    assert (len(texts), len(texts[0])) == (8, 7)
    for other in texts[1:]:
        assert other == texts[0]


def test_the_resolved_recipe_gives_the_same_run_and_a_finished_run_is_left_alone(
    trained: Callable[..., Path], launch: Callable, tmp_path: Path
) -> None:
    run = run_of(trained, LAUNCHES[0])
    again = launch(
        "launch/train.py", "--recipe", run / "recipe.yaml", "--output", tmp_path / "again"
    )
    assert "Traceback" not in again.stderr
    wanted = [step["loss"] for step in metrics(run)]
    assert [
        step["loss"] for step in metrics(tmp_path / "again")
    ] == wanted  # bit for bit: one rank, one thread
    before = (run / "results.json").stat().st_mtime_ns
    done = launch("launch/train.py", "--recipe", run / "recipe.yaml", "--output", run)
    assert "finished" in done.stdout
    assert (run / "results.json").stat().st_mtime_ns == before


def test_plain_lora_starts_with_b_zero_and_exports_rank_r(trained: Callable[..., Path]) -> None:
    run = run_of(trained, LORA)
    results = json.loads((run / "results.json").read_text())
    assert (results["lora_rank"], results["eigen_select"], results["logit_drift"]) == (4, None, 0)
    assert not (run / "astra_init").exists()
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]


def test_evaluate_scores_both_adapters_alike_and_refuses_another_base(
    trained: Callable[..., Path], launch: Callable, base: Path, data: Path, tmp_path: Path
) -> None:
    run = run_of(trained, LAUNCHES[1])
    common = ["--data-dir", data, "--max-new-tokens", "12"]
    outputs = []
    for name, ranks, engine in (
        ("lora", 2, "single"),
        ("adapter", 2, "zero3"),
        ("adapter", 3, "fsdp"),
    ):
        options = [
            "--model",
            base,
            "--adapter",
            run / name,
            "--engine",
            engine,
            "--output",
            tmp_path / engine,
        ]
        launch("launch/evaluate.py", *options, *common, ranks=ranks)
        lines = (tmp_path / engine / "generations.jsonl").read_text().splitlines()
        outputs.append([json.loads(line)["output"] for line in lines])
    trained_outputs = [
        json.loads(line)["output"] for line in (run / "generations.jsonl").read_text().splitlines()
    ]
    assert outputs == [trained_outputs] * 3

    other = tmp_path / "other"
    model = load_base(base)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    options = ["--model", other, "--adapter", run / "lora", "--output", tmp_path / "refused"]
    refused = launch("launch/evaluate.py", *options, *common, check=False)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("error: --adapter:")
    assert "Traceback" not in refused.stderr


def test_prepared_tokens_train_alike_without_their_rows(
    trained: Callable[..., Path], launch: Callable, recipe: Path, data: Path, tmp_path: Path
) -> None:
    rows = shutil.copy(data / "train.jsonl", tmp_path / "rows.jsonl")
    line = ["--recipe", recipe, "--set", f"data.path={rows}"]
    launch("launch/prepare.py", *line, "--output", tmp_path / "prepared")
    rows.unlink()
    ranks, settings = LAUNCHES[6]
    options = [f"data.prepared={tmp_path / 'prepared'}", *settings, "eval.suites=[]"]
    line += [word for option in options for word in ("--set", option)]
    launch("launch/train.py", *line, "--output", tmp_path / "run", ranks=ranks)
    wanted = [step["loss"] for step in metrics(run_of(trained, LAUNCHES[6]))]
    assert [step["loss"] for step in metrics(tmp_path / "run")] == pytest.approx(wanted, rel=1e-6)

"""Train under every engine in 1 to 4 real processes and compare with plain PyTorch and PEFT.

Proves that losses, gradient norms and exported weights are those of an independent loop
(tests/support/plain.py), that nothing moves at step 0, that the three exports are one model, and
that a checkpoint resumes under another engine, world size and micro batch.
Needs nothing but the tiny model of conftest.py. About 2 minutes on 2 cores; `make test-full` adds
the further cells of the matrix in tests/support/cases.py, another 30 s.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from astra import adapter
from astra.weights import TorchWeights
from launch.config.loading import read_recipe
from launch.run.metrics import Metrics
from launch.run.results import render_runs
from tests.support.cases import (
    BF16,
    FSDP_2,
    FSDP_3,
    FSDP_4,
    FSDP_BF16,
    LAUNCHES,
    LORA,
    NO_SCORES,
    OFFLOAD_2,
    SINGLE,
    ZERO2_2,
    ZERO3_1,
    ZERO3_2,
    ZERO3_4,
    LaunchCase,
    make_params,
    train_case,
)
from tests.support.plain import compute_logits, load_base, train_plainly
from tests.support.processes import make_set_options
from tests.support.runs import read_generations, read_losses, read_metrics, read_results

pytestmark = pytest.mark.xdist_group("train")

# The case that saves the checkpoint, and the case with whose settings it resumes: another world
# size, engine or micro batch.
MOVES = [
    (ZERO3_2, FSDP_4),
    (ZERO3_2, SINGLE),
    (FSDP_2, ZERO3_1),
    (FSDP_2, OFFLOAD_2),
    (SINGLE, ZERO2_2),
]


def read_updates(run: Path) -> dict[str, Tensor]:
    """Return dW = s B A of the run's lora/, by module.

    The signs and the order of the factors' columns do not change it.
    """
    factors, scaling = adapter.load_adapter(run / "lora")
    return {name: scaling * b.double() @ a.double() for name, (a, b) in factors.items()}


def load_on_residual(
    run: Path, base: Path, factors: Path, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """Load the adapter in the folder `factors` with plain PEFT on the run's residual base."""
    model = load_base(base, dtype)
    adapter.subtract_initial(model, *adapter.load_adapter(run / "astra_init"), TorchWeights())
    return PeftModel.from_pretrained(model, factors, is_trainable=True)


@pytest.mark.parametrize("case", make_params(LAUNCHES))
def test_losses_gradients_and_weights_equal_plain_pytorch(
    case: LaunchCase, trained: Callable[..., Path], base: Path, rows: list[dict]
) -> None:
    run = train_case(trained, case)
    model = load_on_residual(run, base, run / "astra_init")
    losses, norms = train_plainly(model, read_recipe(str(run / "recipe.yaml"), []), rows)
    steps = read_metrics(run)
    assert [step["step"] for step in steps] == list(range(1, 8))
    assert losses[-1] < 0.8 * losses[0]
    # 1e-4: for fp32 and other orders of its sums.
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-4)
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-3)
    reached = compute_logits(model, base, rows)
    plain_lora = PeftModel.from_pretrained(load_base(base), run / "lora")
    exported = compute_logits(plain_lora, base, rows)
    moved = (reached - compute_logits(load_base(base), base, rows)).abs().max()
    assert moved > 0.5
    assert (exported - reached).abs().max() < 1e-2 * moved


@pytest.mark.parametrize("case", make_params([case for case in LAUNCHES if case is not ZERO3_1]))
def test_loss_curve_and_exports_equal_those_of_one_rank(
    case: LaunchCase, trained: Callable[..., Path]
) -> None:
    first, other = train_case(trained, ZERO3_1), train_case(trained, case)
    for key, tolerance in (("loss", 1e-4), ("tokens", 0), ("lr", 0)):
        wanted = [step[key] for step in read_metrics(first)]
        found = [step[key] for step in read_metrics(other)]
        assert found == pytest.approx(wanted, rel=tolerance, abs=0)
    initial, other_initial = (
        load_file(run / "astra_init" / "adapter_model.safetensors") for run in (first, other)
    )
    assert other_initial.keys() == initial.keys()
    for key, value in initial.items():
        torch.testing.assert_close(value, other_initial[key], rtol=0, atol=1e-5)
    updates, other_updates = read_updates(first), read_updates(other)
    assert other_updates.keys() == updates.keys()
    for name, update in updates.items():
        # fp32's rounding was at most 8e-7 in the 15 launches; the last three of the seven steps
        # make 0.2 of an update.
        assert (other_updates[name] - update).norm() < 1e-5 * update.norm(), name


@pytest.mark.parametrize(("saved", "resumed"), MOVES, ids=str)
def test_a_checkpoint_resumes_elsewhere(
    saved: LaunchCase,
    resumed: LaunchCase,
    trained: Callable[..., Path],
    launch: Callable,
    recipe: Path,
    tmp_path: Path,
) -> None:
    whole, run = train_case(trained, saved), tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-0000007")
    options = make_set_options([*resumed.settings, NO_SCORES])
    line = ["--recipe", recipe, *options, "--output", run]
    done = launch("launch/train.py", *line, ranks=resumed.world_size)
    assert "resuming after step 4 of 7" in done.stdout
    assert read_losses(run) == pytest.approx(read_losses(whole), rel=1e-4)


@pytest.mark.parametrize("case", make_params([ZERO3_1, ZERO3_2, ZERO3_4, FSDP_3, BF16, FSDP_BF16]))
def test_the_three_exports_are_one_model_in_plain_peft(
    case: LaunchCase, trained: Callable[..., Path], base: Path, rows: list[dict]
) -> None:
    run = train_case(trained, case)
    dtype = torch.bfloat16 if case in (BF16, FSDP_BF16) else torch.float32
    models = {
        "original": load_base(base),
        "residual": load_on_residual(run, base, run / "adapter", dtype).float(),
        "lora": PeftModel.from_pretrained(load_base(base, dtype), run / "lora").float(),
        "merged": PeftModel.from_pretrained(
            load_base(base, dtype).float(), run / "lora"
        ).merge_and_unload(),
    }
    logits = {name: compute_logits(model, base, rows) for name, model in models.items()}
    # fp32: 1e-5 of the logits. bf16: the residual's rounding, 2^-8 of each weight, in two layers.
    tolerance = (1e-5 if dtype == torch.float32 else 0.05) * logits["original"].abs().max()
    moved = (logits["lora"] - logits["original"]).abs().max()
    assert moved > (100 if dtype == torch.float32 else 5) * tolerance
    assert (logits["lora"] - logits["residual"]).abs().max() < tolerance
    assert (logits["lora"] - logits["merged"]).abs().max() < tolerance


@pytest.mark.parametrize("case", make_params([*LAUNCHES, BF16, FSDP_BF16]))
def test_nothing_moves_at_step_0(case: LaunchCase, trained: Callable[..., Path]) -> None:
    results = read_results(train_case(trained, case))
    if case in (BF16, FSDP_BF16):
        assert 0 < results["residual_rounding"] <= 2**-8
    else:
        assert 0 < results["logit_drift"] < 1e-5
        assert 0 < results["residual_rounding"] < 1e-6


def test_the_exported_initial_factors_follow_from_the_subspaces(
    trained: Callable[..., Path], base: Path
) -> None:
    run = train_case(trained, ZERO3_2)
    calibration = load_file(run / "calibration" / "window-0000.safetensors")
    initial, scaling = adapter.load_adapter(run / "astra_init")
    model = load_base(base)
    assert scaling == 1.5
    assert len(initial) == 14
    for name, (a0, b0) in initial.items():
        vectors, values = calibration[f"{name}.vectors"], calibration[f"{name}.values"]
        assert vectors.dtype == values.dtype == torch.float64
        torch.testing.assert_close(b0, vectors.float(), rtol=0, atol=0)
        wanted = vectors.T @ model.get_submodule(name).weight.double()
        wanted[values == 0] = 0
        torch.testing.assert_close(a0, wanted.float(), rtol=0, atol=1e-6)


def test_the_run_folder_holds_what_the_readme_names(
    trained: Callable[..., Path], data: Path
) -> None:
    run = train_case(trained, ZERO3_2)
    for name in ("loss.png", "grad_norm.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert read_metrics(run)[0].keys() == Metrics.__required_keys__
    manifest = json.loads((run / "calibration" / "manifest.json").read_text())
    assert len(manifest["sample_ids"]) == len(set(manifest["sample_ids"])) == 11
    settings = (manifest["eigen_select"], manifest["rank"], manifest["dtype"])
    assert settings == ("smallest", 4, "float32")
    generations = read_generations(run)
    problems = [json.loads(line) for line in (data / "gsm8k_test.jsonl").read_text().splitlines()]
    assert [row["question"] for row in generations] == [row["question"] for row in problems]
    results = read_results(run)
    score = results["scores"]["gsm8k"]
    assert score["n"] == 7
    assert score["correct"] == sum(row["strict"] for row in generations)
    conditions = results["conditions"]
    assert (conditions["world_size"], conditions["nodes"]) == (2, 1)
    assert "smallest" in (run / "README.md").read_text()
    assert "| astra smallest | 4 |" in render_runs([run])
    assert "residual" in (run / "adapter" / "README.md").read_text()


def test_generations_do_not_depend_on_the_engine_or_world_size(
    trained: Callable[..., Path],
) -> None:
    cases = [case for case in LAUNCHES if NO_SCORES not in case.settings]
    outputs = []
    for case in cases:
        rows = read_generations(train_case(trained, case))
        outputs.append([row["output"] for row in rows])
    assert (len(outputs), len(outputs[0])) == (8, 7)
    assert all(other == outputs[0] for other in outputs[1:])


def test_the_resolved_recipe_gives_the_same_run_and_a_finished_run_is_left_alone(
    trained: Callable[..., Path], launch: Callable, tmp_path: Path
) -> None:
    run, again = train_case(trained, ZERO3_1), tmp_path / "again"
    done = launch("launch/train.py", "--recipe", run / "recipe.yaml", "--output", again)
    assert "Traceback" not in done.stderr
    assert read_losses(again) == read_losses(run)  # bit for bit: one rank, one thread
    before = (run / "results.json").stat().st_mtime_ns
    done = launch("launch/train.py", "--recipe", run / "recipe.yaml", "--output", run)
    assert "finished" in done.stdout
    assert (run / "results.json").stat().st_mtime_ns == before


def test_plain_lora_starts_with_b_zero_and_exports_rank_r(trained: Callable[..., Path]) -> None:
    run = train_case(trained, LORA)
    results = read_results(run)
    assert (results["lora_rank"], results["eigen_select"], results["logit_drift"]) == (4, None, 0)
    assert not (run / "astra_init").exists()
    losses = read_losses(run)
    assert losses[-1] < losses[0]


def test_evaluate_scores_both_adapters_alike_and_refuses_another_base(
    trained: Callable[..., Path], launch: Callable, base: Path, data: Path, tmp_path: Path
) -> None:
    run = train_case(trained, ZERO3_2)
    common = ["--data-dir", data, "--max-new-tokens", "12"]
    wanted = [row["output"] for row in read_generations(run)]
    for name, ranks, engine in (
        ("lora", 2, "single"),
        ("adapter", 2, "zero3"),
        ("adapter", 3, "fsdp"),
    ):
        options = ["--model", base, "--adapter", run / name, "--engine", engine]
        folder = tmp_path / engine
        launch("launch/evaluate.py", *options, "--output", folder, *common, ranks=ranks)
        assert [row["output"] for row in read_generations(folder)] == wanted

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
    settings = [f"data.prepared={tmp_path / 'prepared'}", *SINGLE.settings, NO_SCORES]
    line += [*make_set_options(settings), "--output", tmp_path / "run"]
    launch("launch/train.py", *line, ranks=SINGLE.world_size)
    wanted = read_losses(train_case(trained, SINGLE))
    assert read_losses(tmp_path / "run") == pytest.approx(wanted, rel=1e-6)

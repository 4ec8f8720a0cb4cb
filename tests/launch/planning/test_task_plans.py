"""Plans of tasks with a head: encoders and a decoder, against the arithmetic and tensors of real ones.

The bases are tiny and random (tests.support.classifiers). About 6 s.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from astra.errors import AstraError
from launch.config.schema import Recipe
from launch.data.batches import RowBatch
from launch.models.check import check_model, make_meta_model
from launch.models.head import Head, find_outer_names
from launch.planning import budget, printout
from launch.planning.budget import FIELD, decide_memory
from launch.planning.estimate import Estimate, estimate_run
from launch.planning.machine import make_machine
from launch.planning.options import PlanOptions
from launch.planning.printout import print_plan
from launch.runtime.errors import UserError
from launch.training.row_loss import RowLoss
from launch.training.trainable import attach_trainable
from tests.support.classifiers import (
    LABELS,
    MAX_LENGTH,
    SIZES,
    TARGETS,
    load_plain_base,
    load_recipe,
    make_recipe,
)

FP32 = torch.float32
HEAD = Head(tuple(LABELS), pad_token=0)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    return {kind: make_recipe(folder / kind, kind) for kind in TARGETS}


def plan(recipe: Recipe, usable: float | None = None, dropout: float = 0.0) -> Estimate:
    """Estimate three steps of a recipe with its base in fp32, with dropout in its attention."""
    config = AutoConfig.from_pretrained(recipe.model.name)
    config.attention_probs_dropout_prob = dropout
    HEAD.fill_config(config)
    machine = replace(make_machine(None, 1), usable=usable)
    head = find_outer_names(make_meta_model(config))
    return estimate_run(
        config, recipe, machine, dtype=FP32, checkpointing=False, steps=3, head=head
    )


def make_model(recipe: Recipe) -> nn.Module:
    """Make the model that is trained, with values."""
    base = load_plain_base(recipe).requires_grad_(False)
    return attach_trainable(base, recipe.adapter, head=find_outer_names(base))


def make_rows(size: int) -> RowBatch:
    """Make rows of MAX_LENGTH tokens, one of them shorter, so that the mask is needed."""
    mask = torch.ones(size, MAX_LENGTH, dtype=torch.long)
    mask[0, -1] = 0
    return RowBatch(
        input_ids=torch.ones_like(mask),
        attention_mask=mask,
        token_type_ids=None,
        labels=torch.zeros(size, dtype=torch.long),
        weights=torch.ones(size, dtype=torch.float64),
    )


def test_dropout_in_attention_keeps_no_scores(recipes: dict[str, Path]) -> None:
    recipe = load_recipe(recipes["bert"])
    assert plan(recipe, dropout=0.1) == plan(recipe)


@pytest.mark.parametrize("kind", TARGETS)
def test_activations_are_what_backward_keeps(kind: str, recipes: dict[str, Path]) -> None:
    recipe = load_recipe(recipes[kind])
    model = make_model(recipe)
    sizes = {}  # address of a storage -> its bytes

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        RowLoss(model.train())(*make_rows(recipe.train.micro_batch).arguments())
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = sum(size for address, size in sizes.items() if address not in weights)
    estimate = plan(recipe)
    assert kept <= estimate.training.memory["activations"] <= 1.6 * kept
    # What is trained is the adapters and the head, and a checkpoint has no initial values of it.
    trained = [p for p in model.parameters() if p.requires_grad]
    assert estimate.trainable == sum(p.numel() for p in trained)
    num_head = sum(p.numel() for p in trained) - sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )
    assert num_head > 0
    assert list(estimate.files.values())[:2] == [
        4 * (4 * estimate.trainable - num_head),
        4 * (4 * estimate.trainable - 2 * num_head),
    ]


def test_arithmetic_of_an_encoders_calibration_is_that_of_its_products(
    recipes: dict[str, Path],
) -> None:
    recipe = load_recipe(recipes["bert"])
    size, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    layer = 2 * MAX_LENGTH * (4 * size**2 + 2 * size * inner) + 2 * 2 * MAX_LENGTH**2 * size
    head = 2 * size * (size + len(LABELS))  # pooler and classifier, of [CLS] alone
    per_row = SIZES["num_hidden_layers"] * layer + head
    estimate = plan(recipe)
    assert estimate.calibration.flops == recipe.calibration.samples * per_row
    gradients = plan(load_recipe(recipes["bert"], "adapter.method=lora_ga"))
    assert 1.9 < gradients.calibration.flops / estimate.calibration.flops < 2.5


def test_windows_of_an_encoder_follow_the_limit_unless_it_cannot_be_split(
    recipes: dict[str, Path],
) -> None:
    limits = {}
    for kind in ("bert", "deberta"):
        whole = plan(load_recipe(recipes[kind])).windows
        room = 0.6 * whole.windows[0].sums_bytes + whole.working_bytes
        limits[kind] = f"calibration.memory_gib={room / 2**30}"
    halved = plan(load_recipe(recipes["bert"], limits["bert"]))
    assert [list(one.layers) for one in halved.windows.windows] == [[0], [1]]
    with pytest.raises(AstraError, match="layers do not pass on one tensor; set no limit"):
        plan(load_recipe(recipes["deberta"], limits["deberta"]))
    # With `auto` such a base has one window, which fits or not.
    assert len(plan(load_recipe(recipes["deberta"]), usable=1.0).windows.windows) == 1


def test_auto_is_no_limit_for_a_base_that_cannot_be_split(
    recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed: list[str] = []
    monkeypatch.setattr(budget, "measure_free_memory", lambda _: 2**30)
    monkeypatch.setattr(budget, "all_reduce_max", lambda value, _: value)
    monkeypatch.setattr(budget, "run_on_rank0", lambda function: function())
    monkeypatch.setattr(budget, "print_rank0", printed.append)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    limits = {}
    for kind in ("bert", "deberta"):
        recipe = load_recipe(recipes[kind])
        path = Path(recipe.model.name)
        model = check_model(path, head=HEAD)
        inputs = SimpleNamespace(model_path=path, head=HEAD, model=model, dtype=FP32)
        decided, _ = decide_memory(recipe, inputs, torch.device("cpu"), tmp_path)
        limits[kind] = decided.calibration.memory_gib
    assert 0.8 < limits["bert"] < 0.9  # GiB: what is free less a tenth and a tiny model
    assert limits["deberta"] is None
    assert printed[1] == f"{FIELD}: auto is no limit, as this model cannot run in windows"


@pytest.mark.parametrize("kind", TARGETS)
def test_the_plan_names_the_new_head(
    kind: str, recipes: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    recipe = load_recipe(recipes[kind], "adapter.method=lora")
    assert print_plan(recipe, PlanOptions(make_machine("H100", 1), num_rows=60))
    printed = capsys.readouterr().out
    head = {"llama": "score.weight", "deberta": "pooler.dense.weight"}.get(kind, "classifier.")
    assert f"\nnew head: {head}" in printed
    assert "single fits: " in printed


def test_a_model_that_does_not_run_without_values_is_one_line(
    recipes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no fake kernel\nfor this")

    monkeypatch.setattr(printout, "run_without_numbers", fail)
    recipe = load_recipe(recipes["llama"])
    with pytest.raises(UserError) as caught:
        print_plan(recipe, PlanOptions(make_machine(None, 1), num_rows=60))
    assert str(caught.value) == (
        f"model.name: {recipe.model.name} cannot be planned, as its LlamaForSequenceClassification "
        "does not run without values: NotImplementedError: no fake kernel for this; train.py needs "
        "no plan"
    )
    assert capsys.readouterr().out == ""

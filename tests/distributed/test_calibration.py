"""Calibrate under ZeRO-3 on 1, 2 and 4 ranks, and under FSDP2 on 2.

Proves that world size and windows change nothing, that the subspaces are those named, against an
oracle with all activations, and that each rank holds its share of the base.
One launch a world size (workers/calibration.py, workers/fsdp.py). About 15 s.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from astra.eigen import select_indices
from launch.config.loading import read_recipe
from launch.data.prompts import format_prompt
from tests.support.paths import WORKERS

pytestmark = pytest.mark.xdist_group("calibration")

SELECTS = ("smallest", "largest", "middle", "random")
WORLD_SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def calibrated(
    launch: Callable, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict]]:
    """Calibrate at each world size; what each rank saved."""
    saved = {}
    for ranks in WORLD_SIZES:
        folder = tmp_path_factory.mktemp(f"world{ranks}")
        launch(WORKERS / "calibration.py", recipe, folder, ranks=ranks)
        saved[ranks] = [load_file(folder / f"rank{rank}.safetensors") for rank in range(ranks)]
    return saved


@pytest.fixture(scope="module")
def outputs(recipe: Path) -> dict[str, Tensor]:
    """Compute every target's output W x + b in fp64 at every real token, row by row: the oracle."""
    settings = read_recipe(str(recipe), [])
    model = AutoModelForCausalLM.from_pretrained(settings.model.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings.model.name)
    rows = [json.loads(line) for line in Path(settings.data.path).read_text().splitlines()]
    generator = torch.Generator().manual_seed(settings.calibration.seed)
    ids = torch.randperm(len(rows), generator=generator)[: settings.calibration.samples]
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(module: torch.nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            y = args[0][0].double() @ module.weight.double().T + module.bias.double()
            kept.setdefault(name, []).append(y)

        return hook

    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in settings.adapter.targets:
            module.register_forward_hook(keep(name))
    for i in ids.tolist():
        text = format_prompt(rows[i]["query"]) + rows[i]["response"] + "\n"
        ids_of_row = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            model(input_ids=torch.tensor([ids_of_row]))
    return {name: torch.cat(parts) for name, parts in kept.items()}


def select_moments(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a rank saved of its moments."""
    return {key: value for key, value in saved.items() if key.startswith("moment.")}


def test_moments_agree_between_world_sizes_to_the_order_of_fp64_sums(calibrated: dict) -> None:
    reference = select_moments(calibrated[1][0])
    # 2 layers; the inputs of qkv, o and gate+up, and the output of down; 3 tensors each.
    assert len(reference) == 2 * 4 * 3
    for ranks in WORLD_SIZES:
        for saved in calibrated[ranks]:
            for key, value in select_moments(saved).items():
                wanted = reference[key]
                atol = 1e-10 * wanted.abs().max()
                torch.testing.assert_close(value, wanted, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_an_all_reduce_gives_every_rank_the_same_bits_and_the_owners_alone_the_same_sums(
    ranks: int, calibrated: dict
) -> None:
    on_first = select_moments(calibrated[ranks][0])
    seen = set()
    for saved in calibrated[ranks]:
        for key, value in select_moments(saved).items():
            assert torch.equal(value, on_first[key]), key
        for key, value in saved.items():
            if not key.startswith("owned."):
                continue
            seen.add(key)
            wanted = on_first[key.replace("owned.", "moment.")]
            if ranks <= 2:  # a + b = b + a
                assert torch.equal(value, wanted), key
            atol = 1e-13 * wanted.abs().max()
            torch.testing.assert_close(value, wanted, rtol=1e-13, atol=atol, msg=key)
    assert len(seen) == len(on_first)


def test_every_real_token_is_counted_once(calibrated: dict, outputs: dict) -> None:
    counts = {
        value.item()
        for key, value in select_moments(calibrated[4][0]).items()
        if key.endswith(".count")
    }
    assert counts == {len(next(iter(outputs.values())))}


def test_subspaces_are_the_same_on_every_rank_and_between_world_sizes(calibrated: dict) -> None:
    for ranks in WORLD_SIZES:
        for saved in calibrated[ranks]:
            for key, vectors in saved.items():
                if not key.endswith(".vectors"):
                    continue
                assert torch.equal(vectors, calibrated[ranks][0][key])
                # Principal angles follow from the moments' differences over the gaps, tiny here.
                singular = torch.linalg.svdvals(vectors.T @ calibrated[1][0][key])
                assert singular.min() > 1 - 1e-8, (ranks, key, singular.min())


@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_windows_of_one_layer_under_zero3_give_the_same_bits(ranks: int, calibrated: dict) -> None:
    for saved in calibrated[ranks]:
        by_layer = {key: value for key, value in saved.items() if key.startswith("by_layer.")}
        assert len(by_layer) == 2 * 2 * 7
        for key, value in by_layer.items():
            assert torch.equal(value, saved[key.replace("by_layer.", "middle.")]), key


@pytest.mark.parametrize("select", SELECTS)
def test_subspace_is_the_one_named_against_an_oracle_with_all_activations(
    select: str, calibrated: dict, outputs: dict
) -> None:
    eps = torch.finfo(torch.float64).eps
    assert len(outputs) == 2 * 7
    for name, y in outputs.items():
        vectors, values = (
            calibrated[2][1][f"{select}.{name}.{part}"] for part in ("vectors", "values")
        )
        size, rank = vectors.shape
        second = y.T @ y / len(y)
        spectrum = torch.linalg.eigvalsh(second)
        slack = 10 * size * eps * second.trace()
        energy = (vectors.T @ second @ vectors).trace()
        torch.testing.assert_close(
            vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10
        )
        assert (values.diff() >= 0).all()
        if select == "smallest":
            assert energy <= 1.01 * spectrum[:rank].sum() + slack
        elif select == "largest":
            assert energy >= 0.99 * spectrum[-rank:].sum()
        elif select == "middle":
            wanted = spectrum[select_indices("middle", size, rank, torch.Generator())]
            # 1e-5: the fp32 forward of a row alone and of a padded batch differ by rounding.
            torch.testing.assert_close(
                values, wanted.clamp(min=0), rtol=1e-4, atol=1e-5 * second.trace()
            )
        else:
            distance = (values[:, None] - spectrum.clamp(min=0)).abs().min(1).values
            assert (distance <= 1e-5 * second.trace()).all()


@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_each_rank_holds_its_share_of_every_base_parameter(ranks: int, calibrated: dict) -> None:
    for saved in calibrated[ranks]:
        held = {key: value.tolist() for key, value in saved.items() if key.startswith("held.")}
        assert len(held) > 20
        for key, (mine, whole, loaded, after) in held.items():
            assert mine == -(-whole // ranks), key
            assert loaded == after == 0, f"{key}: whole outside of its own forward pass"


@pytest.fixture(scope="module")
def calibrated_by_fsdp(
    launch: Callable, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict]:
    """Calibrate and initialise under FSDP2; what each rank saved."""
    folder = tmp_path_factory.mktemp("fsdp")
    launch(WORKERS / "fsdp.py", recipe, folder, ranks=2)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


def test_each_fsdp_rank_holds_nothing_and_then_its_rows_of_every_base_parameter(
    calibrated_by_fsdp: list[dict],
) -> None:
    for saved in calibrated_by_fsdp:
        held = {key: value.tolist() for key, value in saved.items() if key.startswith("held.")}
        assert len(held) > 20
        for key, (whole, loaded, sharded, after) in held.items():
            assert loaded == 0, f"{key}: in memory before it is sharded"
            # Every parameter here has an even number of rows.
            assert sharded == after == whole / 2, key


def test_an_fsdp_model_gives_the_same_subspaces_and_does_not_move(
    calibrated: dict, calibrated_by_fsdp: list[dict], recipe: Path
) -> None:
    settings = read_recipe(str(recipe), [])
    base = AutoModelForCausalLM.from_pretrained(settings.model.name, dtype=torch.float32)
    scaling = settings.adapter.alpha / settings.adapter.rank
    for saved in calibrated_by_fsdp:
        assert 0 < saved["moved"] < 1e-5
        for key, vectors in saved.items():
            if not key.startswith("largest."):
                continue
            # Windows of one layer give the same bits.
            assert torch.equal(saved[key.replace("largest.", "by_layer.")], vectors)
            # Sums and solver are those of ZeRO-3, on the same rows, in another order of additions.
            torch.testing.assert_close(vectors, calibrated[2][0][key], rtol=0, atol=1e-7)
            name = key.removeprefix("largest.").removesuffix(".vectors")
            weight = base.get_submodule(name).weight.detach().double()
            b0 = vectors.float().double()
            residual = weight - scaling * b0 @ (vectors.T @ weight).float().double()
            found = saved[f"residual.{name}"]
            torch.testing.assert_close(found, residual.float(), rtol=0, atol=1e-6)

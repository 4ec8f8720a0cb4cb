"""Train classifiers on BERT and Llama with every method: two steps each, in one process.

Proves that initialisation moves no output, and that what is exported predicts the same in plain
transformers and PEFT. With the full tests also under every sharded engine, with the losses and
predictions of one process. One launch an engine. About 15 s, and 100 s more with the full tests.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch.config.schema import Recipe
from launch.data.order import sample_examples
from tests.support.classifiers import (
    MAX_LENGTH,
    load_plain_base,
    load_recipe,
    make_recipe,
    make_rows,
    predict_plainly,
    read_predictions,
)
from tests.support.paths import WORKERS
from tests.support.runs import read_calibration, read_losses, read_results

pytestmark = pytest.mark.xdist_group("task_methods")

COMMON = ["train.max_steps=2", "train.lr=0.02", "train.warmup_ratio=0"]
METHODS = {
    "lora": ["adapter.method=lora"],
    "lora-plus": ["adapter.method=lora", "train.lr_ratio=4"],
    "rslora": ["adapter.method=rslora"],
    "dora": ["adapter.method=dora"],
    "pissa": ["adapter.method=pissa"],
    "milora": ["adapter.method=milora"],
    "olora": ["adapter.method=olora"],
    "corda-ipm": ["adapter.method=corda"],
    "corda-kpm": ["adapter.method=corda", "adapter.corda_mode=kpm"],
    "eva": ["adapter.method=eva"],
    "lora_ga": ["adapter.method=lora_ga"],
    "largest": ["adapter.eigen_select=largest"],
    "haar": ["adapter.eigen_select=haar"],
    "smallest-zero": ["adapter.start=zero"],
    "full": ["adapter.method=full", "train.lr=0.001"],
}
ENGINES = ("zero2", "zero3", "zero3_offload", "fsdp")
# On Llama one of the methods that differ in numbers alone; the gradients of DeBERTa also pass through
# its embeddings of relative positions.
CASES = [
    *(("bert", method) for method in METHODS),
    *(("llama", method) for method in ("lora", "dora", "olora", "corda-ipm", "largest", "full")),
    *((base, "lora_ga") for base in ("llama", "deberta")),
]
# Calibrated on other data than the training rows, in one process and on two ranks of FSDP2.
OTHER_DATA = {
    "training-rows": "{path: BASE/train.jsonl}",
    "rows": "{path: BASE/dev.jsonl, sentence1: right}",
    "text": "{path: BASE/dev.jsonl, text: left}",
}
SHARDED = [
    *(
        ("bert", method)
        for method in ("lora-plus", "dora", "pissa", "corda-kpm", "largest", "full")
    ),
    *(("llama", method) for method in ("lora", "largest", "lora_ga")),
    ("deberta", "lora_ga"),
]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    return {base: make_recipe(folder / base, base) for base in ("bert", "llama", "deberta")}


@pytest.fixture(scope="module")
def run_all(
    launch: Callable, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[tuple[str, str], Path]]:
    """Run every method on every base with one engine in one launch; return the folders."""
    done: dict[str, dict[tuple[str, str], Path]] = {}

    def run(engine: str, ranks: int = 1) -> dict[tuple[str, str], Path]:
        if engine not in done:
            output = tmp_path_factory.mktemp(engine)
            words: list[object] = []
            cases = CASES if engine == "single" else SHARDED
            cases = [*cases, *((base, name) for base in ("bert", "llama") for name in OTHER_DATA)]
            for base, name in cases:
                settings = METHODS.get(name, ["adapter.eigen_select=largest"])
                if name in OTHER_DATA:
                    data = OTHER_DATA[name].replace("BASE", str(recipes[base].parent))
                    settings = [*settings, f"calibration.data={data}"]
                words += ["--"] if words else []
                words += [recipes[base], f"engine={engine}", *COMMON, *settings]
            launch(WORKERS / "tasks.py", output, *words, ranks=ranks)
            done[engine] = {case: output / str(i) for i, case in enumerate(cases)}
        return done[engine]

    return run


def read_outputs(run: Path) -> Tensor:
    """Return the head's outputs that a run kept of its development rows."""
    return torch.tensor([row["outputs"] for row in read_predictions(run)], dtype=torch.float64)


@pytest.mark.parametrize(("base", "method"), CASES)
def test_nothing_moves_at_step_0_and_plain_peft_predicts_the_same(
    base: str, method: str, run_all: Callable, recipes: dict[str, Path]
) -> None:
    run = run_all("single")[base, method]
    recipe, rows = load_recipe(recipes[base]), make_rows(21, 2)
    assert len(read_losses(run)) == 2
    starts_on_base = method in ("lora", "lora-plus", "rslora", "eva", "smallest-zero", "full")
    drift = read_results(run)["logit_drift"]
    assert drift == 0 if starts_on_base else drift < 1e-5
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(run / "model")
        model.get_base_model = lambda: model
        assert list(model.config.id2label.values()) == recipe.task.labels
    else:
        folder = run / ("adapter" if method == "dora" else "lora")
        model = PeftModel.from_pretrained(load_plain_base(recipe), str(folder))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_CLS"
    kept = read_outputs(run)
    torch.testing.assert_close(kept, predict_plainly(model, recipe, rows), rtol=0, atol=1e-4)
    if method != "full":
        with model.disable_adapter():  # the head stays as it was trained
            untrained = predict_plainly(model, recipe, rows)
        assert (kept - untrained).abs().max() > 1e-2


@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("base", "method"), SHARDED)
def test_sharded_engines_train_alike(
    base: str, method: str, engine: str, run_all: Callable
) -> None:
    alone, run = run_all("single")[base, method], run_all(engine, 2)[base, method]
    assert read_losses(run) == pytest.approx(read_losses(alone), rel=1e-4)
    torch.testing.assert_close(read_outputs(run), read_outputs(alone), rtol=0, atol=1e-3)
    assert read_results(run)["logit_drift"] < 1e-5


def compute_spectra(
    model: nn.Module, recipe: Recipe, inputs: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Compute the eigenvalues of the outputs' second moments by plain PyTorch, in fp64."""
    base = model.double().eval()
    outputs: dict[str, list[Tensor]] = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in recipe.adapter.targets and "pooler" not in name:
            rows = outputs.setdefault(name, [])
            module.register_forward_hook(lambda _m, _i, y, rows=rows: rows.append(y[0]))
    with torch.no_grad():
        for one in inputs:
            base(**one)
    spectra = {}
    for name, rows in outputs.items():
        y = torch.cat(rows)
        spectra[name] = torch.linalg.eigvalsh(y.T @ y / len(y))
    return spectra


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_a_calibration_on_other_data_is_that_of_its_rows(
    base: str, run_all: Callable, recipes: dict[str, Path]
) -> None:
    runs, recipe = run_all("single"), load_recipe(recipes[base])
    own, same = (
        read_calibration(runs[base, n] / "calibration") for n in ("largest", "training-rows")
    )
    assert own.keys() == same.keys() and all(torch.equal(own[key], same[key]) for key in own)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    rows, options = make_rows(21, 2), {"max_length": MAX_LENGTH, "truncation": True}
    single = [tokenizer(row["right"], return_tensors="pt", **options) for row in rows]
    text = "\n\n".join(row["left"] for row in rows)
    blocks = tokenizer(text, return_overflowing_tokens=True, **options).input_ids
    texts = [{"input_ids": torch.tensor([ids])} for ids in blocks]
    for name, examples in {"rows": single, "text": texts}.items():
        count = min(recipe.calibration.samples, len(examples))
        chosen = sample_examples(len(examples), count, recipe.calibration.seed)
        inputs = [{"input_ids": examples[i]["input_ids"]} for i in chosen]
        found = read_calibration(runs[base, name] / "calibration")
        for module, spectrum in compute_spectra(load_plain_base(recipe), recipe, inputs).items():
            atol = 1e-6 * spectrum.max().item()  # its forward passes are fp32's
            torch.testing.assert_close(found[f"{module}.spectrum"], spectrum, rtol=0, atol=atol)


@pytest.mark.parametrize(("base", "method"), [("bert", "pissa"), ("llama", "full")])
def test_effective_ranks_after_training_are_those_of_plain_models(
    base: str,
    method: str,
    launch: Callable,
    run_all: Callable,
    recipes: dict[str, Path],
    tmp_path: Path,
) -> None:
    run = shutil.copytree(run_all("single")[base, method], tmp_path / "run")
    recipe = load_recipe(recipes[base], *COMMON, *METHODS[method])
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))  # as train.py does
    launch("launch/calibrate.py", "--after", run, "--engine", "single")
    found = json.loads((run / "after" / "effective_rank.json").read_text())
    if method == "full":
        trained = AutoModelForSequenceClassification.from_pretrained(run / "model")
    else:
        trained = PeftModel.from_pretrained(load_plain_base(recipe), str(run / "lora"))
        trained = trained.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    rows, options = make_rows(60, 1), {"max_length": MAX_LENGTH, "truncation": "longest_first"}
    inputs = []
    for i in sample_examples(60, recipe.calibration.samples, recipe.calibration.seed):
        encoded = tokenizer(rows[i]["left"], rows[i]["right"], return_tensors="pt", **options)
        inputs.append({k: v for k, v in encoded.items() if base == "bert" or k == "input_ids"})
    wanted = {}
    for when, model in (("before", load_plain_base(recipe)), ("after", trained)):
        for name, spectrum in compute_spectra(model, recipe, inputs).items():
            shares = spectrum.clamp(min=0) / spectrum.sum()
            entropy = -torch.special.xlogy(shares, shares).sum()
            wanted.setdefault(name, {})[when] = entropy.exp().item()
    assert found.keys() == wanted.keys()
    for name, ranks in wanted.items():
        for when, rank in ranks.items():
            assert found[name][when] == pytest.approx(rank, rel=1e-4)
    assert max(abs(ranks["after"] / ranks["before"] - 1) for ranks in wanted.values()) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("name", OTHER_DATA)
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_a_calibration_on_other_data_is_the_unsharded_one(
    base: str, name: str, run_all: Callable
) -> None:
    alone, sharded = (
        read_calibration(run[base, name] / "calibration")
        for run in (run_all("single"), run_all("fsdp", 2))
    )
    for key, value in alone.items():
        if key.endswith((".spectrum", ".values")):
            atol = 1e-9 * value.abs().max().item()
            torch.testing.assert_close(sharded[key], value, rtol=0, atol=atol, msg=key)

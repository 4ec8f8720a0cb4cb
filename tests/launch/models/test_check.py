"""What a run loads is checked: each way in which files and config.json may disagree is refused.

Proves that whole models of ten architectures pass, in one file or in shards, that files beside
those are not read, and that every fault below is one line that names what is wrong. Needs nothing.
About 6 s.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from launch.models.check import (
    check_max_length,
    check_model,
    check_token_ids,
    draw_weight,
    get_num_positions,
    read_config,
    refuse_quantised,
)
from launch.runtime.compat.transformers_parts import convert_tensors, make_meta_model, plan_reading
from launch.runtime.errors import UserError
from tests.support.architectures import CONFIGS, VOCABULARY, make_model

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a whole model, which tests leave as it is."""
    parent = tmp_path_factory.mktemp("models")

    def find(name: str) -> Path:
        if not (parent / name).is_dir():
            make_model(name).save_pretrained(parent / name)
        return parent / name

    return find


@pytest.fixture
def copy(models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a whole model, to be damaged."""
    return lambda name="llama": shutil.copytree(models(name), tmp_path / name)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change a model's weights, which are in one file."""
    weights = load_file(folder / WHOLE)
    change(weights)
    save_file(weights, folder / WHOLE, {"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split(folder: Path) -> None:
    """Put a model's weights into two shards with an index."""
    weights = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    names = sorted(weights)
    parts = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    write_index(folder, places)


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def add_to(folder: Path, file: str, name: str, value: Tensor) -> None:
    save_file(load_file(folder / file) | {name: value}, folder / file, {"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_model_passes(name: str, models: Callable[[str], Path]) -> None:
    folder = models(name)
    checked = check_model(folder)
    assert (checked.folder, checked.files) == (folder, (folder / WHOLE,))
    assert (checked.new_weights, checked.num_embeddings) == ((), VOCABULARY)
    assert checked.dtypes == {"F32"}


def test_files_that_the_index_does_not_name_are_not_read(copy: Callable) -> None:
    folder = copy()
    split(folder)
    for stray in ("consolidated.safetensors", "model-00001-of-00009.safetensors"):
        save_file({"w": torch.zeros(1)}, folder / stray)
    assert check_model(folder).files == (folder / FIRST, folder / SECOND)
    # transformers takes the single file before the index.
    save_file(load_file(folder / FIRST) | load_file(folder / SECOND), folder / WHOLE)
    assert check_model(folder).files == (folder / WHOLE,)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}),
        ("deepseek_v3", {"model.layers.61.eh_proj.weight": (8, 8)}),
        ("gpt2", {"h.0.attn.bias": (1, 1, 512, 512), "h.1.attn.bias": (1, 1, 512, 512)}),
    ],
)
def test_what_transformers_ignores_may_be_left_over(
    architecture: str, more: dict[str, tuple[int, ...]], copy: Callable
) -> None:
    folder = copy(architecture)
    ignored = {name: torch.zeros(shape) for name, shape in more.items()}
    change_weights(folder, lambda weights: weights.update(ignored))
    check_model(folder)


def cut_file(folder: Path) -> None:
    with (folder / WHOLE).open("r+b") as file:
        file.truncate(9000)


def append_bytes(folder: Path) -> None:
    with (folder / WHOLE).open("ab") as file:
        file.write(b"\0" * 64)


def write_lfs_pointer(folder: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1055000\n"
    (folder / WHOLE).write_text(text)


def change_header(folder: Path, old: bytes, new: bytes) -> None:
    """Change a file's header within its length."""
    content = (folder / WHOLE).read_bytes()
    assert len(old) == len(new)
    assert old in content
    (folder / WHOLE).write_bytes(content.replace(old, new, 1))


def write_bin_only(folder: Path) -> None:
    torch.save(load_file(folder / WHOLE), folder / "pytorch_model.bin")
    (folder / WHOLE).unlink()


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut_file, f"{WHOLE} is no whole safetensors file (9000 bytes; "),
    "longer": (append_bytes, f"{WHOLE} is no whole safetensors file"),
    "empty": (lambda folder: (folder / WHOLE).write_bytes(b""), "no whole safetensors file (0 byt"),
    "html": (lambda folder: (folder / WHOLE).write_text("<html>" * 99), "no whole safetensors"),
    "lfs": (
        write_lfs_pointer,
        f"{WHOLE} is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "wrong bytes": (
        lambda folder: change_header(folder, b'"dtype":"F32"', b'"dtype":"I16"'),
        f"{WHOLE} is no whole safetensors file",
    ),
    "wrong offsets": (
        lambda folder: change_header(folder, b'"data_offsets":[0,', b'"data_offsets":[4,'),
        f"{WHOLE} is no whole safetensors file",
    ),
    "no weights": (
        lambda folder: (folder / WHOLE).unlink(),
        f"has no {WHOLE} and no {INDEX}",
    ),
    "bin only": (write_bin_only, "has weights as pytorch_model.bin only, not as safetensors"),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "also holds an adapter (adapter_config.json)",
    ),
    "distributed": (
        lambda folder: shutil.copy(
            folder / WHOLE, folder / "shard-00000-model-00001-of-00001.safetensors"
        ),
        "files of a distributed checkpoint, shard-*-model-*, come before it",
    ),
    "no config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "cannot use the config.json",
    ),
    "unknown model": (
        lambda folder: change_config(folder, model_type="llamma"),
        "cannot use the config.json",
    ),
    "no causal model": (
        lambda folder: change_config(folder, model_type="siglip_vision_model"),
        "cannot make a causal language model of this config.json",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_files_that_cannot_be_read_are_named(fault: str, copy: Callable) -> None:
    damage, message = FILE_FAULTS[fault]
    folder = copy()
    damage(folder)
    require_refusal(folder, message)


def require_refusal(folder: Path, message: str, **options: object) -> None:
    """Check that the model is refused with one line that begins with the field."""
    with pytest.raises(UserError) as caught:
        check_model(folder, **options)
    text = str(caught.value)
    assert re.match(r"(model\.name|model\.new_weights|--model): ", text), text
    assert message in text
    assert "\n" not in text
    assert len(text) < 600


INDEX_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda folder: (folder / SECOND).unlink(),
        f"{SECOND} is missing (1 of the 2 files",
    ),
    "shard without a weight": (
        lambda folder: write_index(folder, read_index(folder) | {"model.more": SECOND}),
        f"the index says that model.more is in {SECOND}, but it is not there",
    ),
    "weight in another shard": (
        lambda folder: write_index(folder, read_index(folder) | {HEAD: SECOND, NORM: FIRST}),
        "but it is not there",
    ),
    "weight outside of the index": (
        lambda folder: write_index(
            folder, {name: file for name, file in read_index(folder).items() if name != HEAD}
        ),
        f"holds {HEAD}, which the index does not name",
    ),
    "weight in two shards": (
        lambda folder: add_to(folder, SECOND, HEAD, torch.zeros(VOCABULARY, 32)),
        f"{HEAD} is in {FIRST} and in",
    ),
    "outside of the folder": (
        lambda folder: write_index(
            folder, dict.fromkeys(read_index(folder), "../elsewhere.safetensors")
        ),
        "which is in another folder",
    ),
    "bin shards": (
        lambda folder: write_index(folder, dict.fromkeys(read_index(folder), "model.bin")),
        "has no",
    ),
    "no map": (
        lambda folder: (folder / INDEX).write_text("{}"),
        "cannot read the index of the weights",
    ),
    "no json": (
        lambda folder: (folder / INDEX).write_text("{"),
        "cannot read the index of the weights",
    ),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_is_wrong_is_refused(fault: str, copy: Callable) -> None:
    damage, message = INDEX_FAULTS[fault]
    folder = copy()
    split(folder)
    damage(folder)
    require_refusal(folder, message)


def rename(weights: dict[str, Tensor], old: str, new: str) -> None:
    weights[new] = weights.pop(old)


def drop_expert(weights: dict[str, Tensor], number: int) -> None:
    for part in ("w1", "w2", "w3"):
        del weights[EXPERT.replace("2.w1", f"{number}.{part}")]


def renumber_expert(weights: dict[str, Tensor]) -> None:
    """Give the experts the numbers 0, 1, 3, 4."""
    for part in ("w1", "w2", "w3"):
        for number in (3, 2):
            old = EXPERT.replace("2.w1", f"{number}.{part}")
            rename(weights, old, EXPERT.replace("2.w1", f"{number + 1}.{part}"))


WEIGHT_FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "no head": ("llama", lambda w: w.pop(HEAD), f"the files lack {HEAD}; get the whole model, or"),
    "no norm": ("llama", lambda w: w.pop(NORM), f"the files lack {NORM}"),
    "no matrix": ("llama", lambda w: w.pop(QUERY), f"the files lack {QUERY}"),
    "no bias": ("qwen2", lambda w: w.pop(QUERY.replace("weight", "bias")), "the files lack"),
    "no buffer": (
        "deepseek_v3",
        lambda w: w.pop("model.layers.1.mlp.gate.e_score_correction_bias"),
        "the files lack model.layers.1.mlp.gate.e_score_correction_bias",
    ),
    "no embedding, tied": ("qwen2", lambda w: w.pop(EMBEDDING), "the files lack"),
    "no tower": (
        "gemma3",
        lambda w: [w.pop(name) for name in list(w) if "vision_tower" in name],
        "the files lack model.vision_tower",
    ),
    "another name": (
        "llama",
        lambda w: rename(w, QUERY, QUERY.replace("q_proj", "query")),
        f"the files lack {QUERY} and hold",
    ),
    "layer too many": (
        "llama",
        lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}),
        "the files hold model.layers.2.mlp.up_proj.weight, for which LlamaForCausalLM",
    ),
    "bias too many": (
        "llama",
        lambda w: w.update({QUERY.replace("weight", "bias"): torch.zeros(32)}),
        "has no place",
    ),
    "other shape": (
        "llama",
        lambda w: w.update({QUERY: torch.zeros(16, 32)}),
        f"{QUERY} has the shape (16, 32) in the files, and (32, 32) by config.json",
    ),
    "vocabulary": (
        "llama",
        lambda w: w.update({EMBEDDING: torch.zeros(321, 32)}),
        f"{EMBEDDING} has the shape (321, 32) in the files",
    ),
    "fp8": (
        "llama",
        lambda w: w.update({QUERY: torch.zeros(32, 32).to(torch.float8_e4m3fn)}),
        f"{QUERY} is stored as F8_E4M3, a quantised form",
    ),
    "int8": (
        "llama",
        lambda w: w.update({QUERY: torch.zeros(32, 32, dtype=torch.int8)}),
        f"{QUERY} is stored as I8, a quantised form",
    ),
    "packed": (
        "llama",
        lambda w: w.update({QUERY: torch.zeros(16, 32, dtype=torch.uint8)}),
        f"{QUERY} is stored as U8, a quantised form",
    ),
    "no expert's matrix": ("mixtral", lambda w: w.pop(EXPERT), "do not fit together"),
    "no last expert": ("mixtral", lambda w: drop_expert(w, 3), "has the shape (3, "),
    "numbers with a gap": (
        "mixtral",
        renumber_expert,
        "the files lack number 2 of the tensors that are stacked into model.layers.0.mlp.experts.",
    ),
    "two heads": (
        "qwen2",
        lambda w: w.update({HEAD: w[EMBEDDING] + 1e-3}),
        f"config.json ties {HEAD} to {EMBEDDING}, but the files hold both",
    ),
    "two heads, last row": (
        "qwen2",
        lambda w: w.update({HEAD: torch.cat([w[EMBEDDING][:-1], torch.zeros(1, 32)])}),
        "set tie_word_embeddings to false",
    ),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_that_are_not_the_models_are_refused(fault: str, copy: Callable) -> None:
    architecture, damage, message = WEIGHT_FAULTS[fault]
    folder = copy(architecture)
    change_weights(folder, damage)
    require_refusal(folder, message)


def test_fewer_layers_in_the_config_are_refused(copy: Callable) -> None:
    folder = copy()
    change_config(folder, num_hidden_layers=1)
    require_refusal(folder, "the files hold model.layers.1.")


@pytest.mark.parametrize("name", [HEAD, EMBEDDING])
def test_tied_matrices_may_be_stored_under_one_name_or_equal_under_both(
    name: str, copy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.models.check.ROWS", 100)  # the rows are four parts
    folder = copy("qwen2")
    change_weights(folder, lambda w: w.update({HEAD: w[EMBEDDING].clone()}))
    check_model(folder)
    change_weights(folder, lambda w: w.pop(name))
    check_model(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
    ids=["fp8", "gptq", "nested", "old name"],
)
def test_quantised_bases_are_refused(values: dict, copy: Callable) -> None:
    folder = copy("gemma3" if "text_config" in values else "llama")
    if "text_config" in values:
        old = json.loads((folder / "config.json").read_text())["text_config"]
        values = {"text_config": old | values["text_config"]}
    change_config(folder, **values)
    require_refusal(folder, "the base is quantised (")
    with pytest.raises(UserError, match=r"^--model: the base is quantised"):
        read_config(folder, "--model")


def test_new_weights_may_be_missing_and_are_drawn_alike(copy: Callable) -> None:
    folder = copy()
    change_weights(folder, lambda w: w.pop(HEAD))
    assert check_model(folder, new_weights=[HEAD]).new_weights == (HEAD,)
    before = torch.get_rng_state()
    first, again, other = (draw_weight(folder, HEAD, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype) == ((VOCABULARY, 32), torch.float32)
    assert first.std().item() == pytest.approx(0.2, rel=0.05)  # initializer_range
    assert torch.equal(draw_weight(folder, NORM, 1), torch.ones(32))


@pytest.mark.parametrize(
    ("architecture", "name", "message"),
    [
        ("llama", HEAD, f"model.new_weights: {HEAD} is in the model's files"),
        ("qwen2", HEAD, f"model.new_weights: {HEAD} is in the model's files, or tied"),
        ("llama", "lm_head", "model.new_weights: lm_head is no parameter of LlamaForCausalLM"),
        ("llama", "score.weight", "model.new_weights: score.weight is no parameter"),
    ],
)
def test_new_weights_must_be_missing_parameters(
    architecture: str, name: str, message: str, models: Callable[[str], Path]
) -> None:
    require_refusal(models(architecture), message, new_weights=[name])


def test_other_weights_than_the_new_ones_must_be_there(copy: Callable) -> None:
    folder = copy()
    change_weights(folder, lambda w: [w.pop(HEAD), w.pop(NORM)])
    require_refusal(folder, f"the files lack {NORM};", new_weights=[HEAD])


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama"])
def test_positions_are_those_of_the_text(name: str) -> None:
    config = CONFIGS[name]()
    assert get_num_positions(config) == 512
    check_max_length(512, config, "base")
    with pytest.raises(UserError, match=r"^data.max_length: 513 is above the 512 positions of b"):
        check_max_length(513, config, "base")


def test_a_config_without_positions_has_no_limit() -> None:
    assert get_num_positions(PretrainedConfig()) is None


def test_a_token_beyond_the_embedding_is_named() -> None:
    class Tokens:
        def convert_ids_to_tokens(self, number: int) -> str:
            return {320: "<think>"}[number]

    check_token_ids(319, 320, Tokens())
    message = r"^model.name: the tokenizer gives token 320 \('<think>'\), but the embedding has 320"
    with pytest.raises(UserError, match=message):
        check_token_ids(320, 320, Tokens())


def test_a_config_of_a_plain_model_passes() -> None:
    refuse_quantised(CONFIGS["mixtral"]())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt2", "gemma3"])
def test_the_reading_steps_make_what_transformers_loads(
    name: str, models: Callable[[str], Path]
) -> None:
    folder = models(name)
    weights = load_file(folder / WHOLE)
    model = make_meta_model(read_config(folder))
    made = {}
    for step in plan_reading(model, weights):
        made |= convert_tensors(step, model, weights.__getitem__)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert made.keys() <= loaded.keys()
    for key, value in made.items():
        assert torch.equal(value, loaded[key]), key

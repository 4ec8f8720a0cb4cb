"""What is new on a base for sequence classification, and which bases are refused.

Needs nothing. Takes 4 s.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, RobertaConfig

from astra.targets import match_targets
from launch.models.check import (
    check_model,
    draw_weight,
    get_num_positions,
    make_meta_model,
    read_config,
)
from launch.models.files import load_tokenizer
from launch.models.head import Head, find_padding
from launch.runtime.errors import UserError
from tests.support.classifiers import TARGETS, make_base

HEAD = Head(("no", "maybe", "yes"), pad_token=0)
NEW = {
    "bert": ["classifier.weight", "classifier.bias"],
    "roberta": [
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ],
    "deberta": [
        "pooler.dense.weight",
        "pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ],
    "llama": ["score.weight"],
}


@pytest.mark.parametrize("kind", TARGETS)
def test_exactly_the_head_is_new_and_gets_no_adapter(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", kind)
    checked = check_model(base, head=HEAD)
    assert list(checked.new_weights) == NEW[kind]
    assert {name.split(".")[0] for name in checked.unused} == {
        "bert": set(),
        "roberta": {"lm_head"},
        "deberta": set(),
        "llama": {"lm_head"},
    }[kind]
    model = make_meta_model(read_config(base, head=HEAD))
    match = match_targets(model, ["all-linear"])
    new_modules = {name.rpartition(".")[0] for name in checked.new_weights}
    assert new_modules | ({"bert.pooler.dense"} if kind == "bert" else set()) == set(match.skipped)
    assert all("head or pooler" in reason for reason in match.skipped.values())
    assert match.linears and not new_modules & match.linears.keys()
    drawn = [draw_weight(base, checked.new_weights[0], seed, HEAD) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == model.get_parameter(checked.new_weights[0]).shape


def test_a_pooler_that_the_files_lack_is_new(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    masked = BertForMaskedLM.from_pretrained(base)
    masked.save_pretrained(tmp_path / "masked")
    checked = check_model(tmp_path / "masked", head=HEAD)
    assert set(checked.new_weights) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        *NEW["bert"],
    }
    assert {name.split(".")[0] for name in checked.unused} == {"cls"}


def test_a_base_that_is_not_whole_or_has_a_head_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    with pytest.raises(UserError, match=r"model\.name: bert is an encoder[^\n]*task\.kind"):
        check_model(base)
    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match=r"the files hold classifier\.\w+, a head"):
        check_model(tmp_path / "whole", head=HEAD)
    tensors = load_file(base / "model.safetensors")
    layer = next(name for name in tensors if "layer.1." in name)
    lacking = {name: value for name, value in tensors.items() if name != layer}
    save_file(lacking, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"the files lack bert\.{layer}"):
        check_model(base, head=HEAD)
    save_file({**tensors, "encoder.layer.7.x": tensors[layer].clone()}, base / "model.safetensors")
    with pytest.raises(UserError, match=r"the files hold .*layer\.7\.x"):
        check_model(base, head=HEAD)


def test_padding_and_positions(tmp_path: Path) -> None:
    config = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert get_num_positions(config) == 512  # they are counted from behind the padding token's id
    llama = make_base(tmp_path / "llama", "llama")
    tokenizer = load_tokenizer(llama, needs_end=False)
    assert find_padding(tokenizer, read_config(llama)) == tokenizer.eos_token_id
    bert = make_base(tmp_path / "bert", "bert")
    tokenizer = load_tokenizer(bert, needs_end=False)
    assert find_padding(tokenizer, read_config(bert)) == 0
    config = read_config(bert)
    config.vocab_size = 1
    assert find_padding(tokenizer, config) == 0
    config.vocab_size = 0
    with pytest.raises(UserError, match=r"^model\.name: .* '\[PAD\]' is token 0, .* has 0 rows"):
        find_padding(tokenizer, config)
    tokenizer.pad_token = None
    with pytest.raises(UserError, match=r"^model\.name: the tokenizer has no padding token"):
        find_padding(tokenizer, read_config(bert))

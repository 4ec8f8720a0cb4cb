"""What decides responses besides weights is hashed, and records compare what both of them have."""

import json
from pathlib import Path

import pytest

from launch.models.identity import (
    hash_adapter_config,
    hash_config,
    hash_tokenizer,
    records_agree,
)

CONFIG = {"rope_theta": 10000, "rope_scaling": {"factor": 2.0}, "dtype": "float32"}


def hash_values(folder: Path, values: dict, name: str = "config.json") -> str:
    (folder / name).write_text(json.dumps(values))
    return hash_config(folder) if name == "config.json" else hash_adapter_config(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10001},
        {"rope_scaling": {"factor": 4.0}},
        {"rope_scaling": None},
        {"rms_norm_eps": 1e-5},
        {"tie_word_embeddings": True},
    ],
)
def test_a_config_that_computes_something_else_has_another_hash(
    change: dict, tmp_path: Path
) -> None:
    assert hash_values(tmp_path, CONFIG) != hash_values(tmp_path, CONFIG | change)


def test_notes_order_and_form_of_a_config_do_not_count(tmp_path: Path) -> None:
    notes = {"transformers_version": "9", "use_cache": False, "_name_or_path": "x"}
    nested = {"rope_scaling": {"dtype": "bfloat16", "factor": 2}, "rope_theta": 10000.0}
    assert hash_values(tmp_path, CONFIG) == hash_values(tmp_path, notes | nested)


def test_an_adapters_scale_counts_and_who_saved_it_does_not(tmp_path: Path) -> None:
    values, name = {"r": 4, "lora_alpha": 8}, "adapter_config.json"
    first = hash_values(tmp_path, values, name)
    assert hash_values(tmp_path, values | {"peft_version": "9", "revision": None}, name) == first
    assert hash_values(tmp_path, values | {"lora_alpha": 9}, name) != first


def test_a_tokenizers_files_count_and_the_config_does_not(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    first = hash_tokenizer(tmp_path, with_config=False)
    (tmp_path / "config.json").write_text("{}")
    assert hash_tokenizer(tmp_path, with_config=False) == first
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert hash_tokenizer(tmp_path, with_config=False) != first


@pytest.mark.parametrize(
    ("found", "wanted", "agree"),
    [
        ({"base": {"name": "m"}}, {"base": {"name": "m", "config_sha256": "1"}}, True),
        ({"base": {"config_sha256": "1"}}, {"base": {"config_sha256": "2"}}, False),
        ({"astra_init_sha256": None}, {"astra_init_sha256": "1"}, False),
        ({"seed": 0}, {}, False),
        ({"base": {"config_sha256": "1"}, "seed": 0}, {"base": {}, "seed": 1}, False),
    ],
)
def test_only_keys_that_earlier_versions_lack_may_be_missing(
    found: dict, wanted: dict, agree: bool
) -> None:
    assert records_agree(found, wanted) == records_agree(wanted, found) == agree

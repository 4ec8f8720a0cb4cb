"""A model of conversations is exported with its template and the end of its answers.

Needs nothing. Takes 3 s.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from launch.data.chat.template import load_template
from launch.training.chat_files import write_chat_files
from tests.support.chat import CASES, make_chat_tokenizer


@pytest.mark.parametrize("ends", [None, 2, [2, 1]])
def test_an_adapter_gets_the_tokens_and_no_other_defaults(
    ends: int | list[int] | None, tmp_path: Path
) -> None:
    tokenizer = make_chat_tokenizer(CASES["chatml"])
    base, folder = tmp_path / "base", tmp_path / "lora"
    folder.mkdir()
    tokenizer.save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 0}))
    if ends is not None:
        own = {"eos_token_id": ends, "temperature": 0.6, "do_sample": True, "pad_token_id": 2}
        (base / "generation_config.json").write_text(json.dumps(own))
    template = load_template(None, tokenizer)
    end = template.end_token
    write_chat_files(folder, base, template)
    config = GenerationConfig.from_pretrained(folder)
    assert config.eos_token_id == ([2, 1] if ends == [2, 1] and end == 1 else [2, end])
    assert config.bos_token_id == 0
    written = json.loads((folder / "generation_config.json").read_text())
    assert not {"temperature", "do_sample"} & written.keys()
    assert (folder / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_a_whole_model_keeps_its_settings_and_speaks_the_template_that_it_learnt(
    tmp_path: Path,
) -> None:
    tokenizer = make_chat_tokenizer(CASES["chatml"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    (tmp_path / "mine.jinja").write_text(
        CASES["llama3"].template.replace("<|eot_id|>", "<|im_end|>")
    )
    template = load_template(str(tmp_path / "mine.jinja"), tokenizer)
    write_chat_files(tmp_path, tmp_path, template)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == template.text != tokenizer.chat_template
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert config.temperature == 0.6

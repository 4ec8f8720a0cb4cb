"""Files that tell servers how a model of conversations is prompted, and where its answers end.

A base's own files may name another end: answers of a model that learnt `<|im_end|>` would run on until
the server stops them. Sources: transformers, generation/configuration_utils.py and
tokenization_utils_base.py, where chat_template.jinja comes before tokenizer_config.json;
vllm-project/vllm, vllm/config/model.py, try_get_generation_config.
"""

import json
from pathlib import Path

from launch.data.chat.template import ChatTemplate
from launch.runtime.files import write_json, write_text

GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENS = ("bos_token_id", "pad_token_id")


def write_chat_files(folder: Path, base: Path, template: ChatTemplate) -> None:
    """Write the template that was learnt and the ends of an answer into an exported folder.

    What the folder has of a whole model's generation_config.json is kept. An adapter's gets no more
    than tokens, so that a server which is pointed to it takes no other defaults from it.

    Args:
        folder: of a model or an adapter.
        base: folder of the base.
    """
    config = _read_json(base / "config.json")
    own = config | _read_json(base / GENERATION_CONFIG)
    ends = own.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    settings = _read_json(folder / GENERATION_CONFIG)
    settings = {name: own[name] for name in TOKENS if own.get(name) is not None} | settings
    settings["eos_token_id"] = [end for end in ends if end not in (None, template.end_token)]
    settings["eos_token_id"].append(template.end_token)
    write_json(folder / GENERATION_CONFIG, settings)
    write_text(folder / CHAT_TEMPLATE, template.text)


def has_chat_files(folder: Path) -> bool:
    """Return whether an exported folder has these files; those of earlier versions have none."""
    return (folder / CHAT_TEMPLATE).is_file()


def _read_json(path: Path) -> dict:
    """Read a JSON file; an empty mapping where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

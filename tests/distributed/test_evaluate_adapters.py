"""Evaluate adapters that plain PEFT saved, on shared and on sharded weights, by the command itself.

Proves that the texts are plain PEFT's, or that the command ends with one line and code 2. What each
field of PEFT's config does is in tests/astra/test_saved_adapter.py. About 30 s.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from launch.data.prompts import format_prompt
from tests.support.paths import WORKERS
from tests.support.plain import load_base
from tests.support.runs import read_generations

pytestmark = [pytest.mark.xdist_group("evaluate"), pytest.mark.full]

QUESTIONS = ["What is 3 plus 4?", "What is 61 plus 8?", "What is 5 plus 5?", "What is 9?"]
NEW_TOKENS = 12
# What sharded engines support, all at once, and what only a whole model can have.
FIELDS = {
    "sharded": {
        "use_dora": True,
        "bias": "all",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
    },
    "whole": {
        "init_lora_weights": "pissa",
        "modules_to_save": ["norm"],
        "layer_replication": [[0, 2], [1, 2]],
        "target_modules": ["q_proj"],
    },
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problems")
    rows = [json.dumps({"question": text, "answer": "#### 1"}) + "\n" for text in QUESTIONS]
    (folder / "gsm8k_test.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of each adapter, everything that it trains moved."""
    folders = {}
    for name, fields in FIELDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields)
        model = get_peft_model(load_base(base), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folders[name])
    return folders


def generate_plainly(base: Path, adapter: Path | None) -> list[str]:
    """Return the greedy responses of plain transformers and PEFT, one prompt at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), load_base(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    texts = []
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer(format_prompt(question)).input_ids])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        made = model.eval().generate(input_ids=ids, max_new_tokens=NEW_TOKENS, **options)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize(
    ("name", "engine"),
    [("whole", "single"), ("sharded", "single"), ("sharded", "zero3"), ("sharded", "fsdp")],
)
def test_texts_are_plain_pefts(
    name: str,
    engine: str,
    launch: Callable,
    base: Path,
    adapters: dict[str, Path],
    problems: Path,
    tmp_path: Path,
) -> None:
    line = ["--model", base, "--adapter", adapters[name], "--suite", "gsm8k", "--engine", engine]
    line += ["--data-dir", problems, "--max-new-tokens", NEW_TOKENS, "--output", tmp_path]
    launch("launch/evaluate.py", *line, ranks=1 if engine == "single" else 2)
    texts = [row["output"] for row in read_generations(tmp_path)]
    wanted = generate_plainly(base, adapters[name])
    assert texts == wanted
    assert wanted != generate_plainly(base, None)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_what_needs_whole_weights_is_refused_by_sharded_engines(
    engine: str,
    launch: Callable,
    base: Path,
    adapters: dict[str, Path],
    problems: Path,
    tmp_path: Path,
) -> None:
    line = ["--model", base, "--adapter", adapters["whole"], "--suite", "gsm8k"]
    line += ["--engine", engine, "--data-dir", problems, "--output", tmp_path]
    done = launch("launch/evaluate.py", *line, ranks=2, check=False)
    assert done.returncode == 2
    lines = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: --adapter: ")
    assert lines[0].endswith("on sharded weights; use --engine single")
    assert "Traceback" not in done.stderr


def test_each_node_checks_its_own_copy(
    launch: Callable, base: Path, adapters: dict[str, Path], problems: Path, tmp_path: Path
) -> None:
    for node in ("0", "1"):
        shutil.copytree(adapters["sharded"], tmp_path / node / "lora")
    line = [tmp_path, "--model", base, "--adapter", "lora", "--suite", "gsm8k", "--stall", 60]
    line += ["--data-dir", problems, "--max-new-tokens", 2, "--output", tmp_path / "scores"]
    launch(WORKERS / "node.py", *line, ranks=2)
    config = tmp_path / "1" / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 7}))
    stale = launch(WORKERS / "node.py", *line, ranks=2, check=False)
    shutil.rmtree(tmp_path / "1" / "lora")
    missing = launch(WORKERS / "node.py", *line, ranks=2, check=False)
    for done, message in ((stale, "differs between the nodes"), (missing, "has no adapter_config")):
        assert done.returncode == 2
        assert f"error: --adapter: lora {message}" in done.stderr.replace(
            " or its ../astra_init", ""
        )

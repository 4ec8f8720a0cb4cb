"""A tiny model and data set on disk, and launches of real processes whose results tests share."""

import json
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support import forked
from tests.support.paths import ROOT, WORKERS
from tests.support.processes import (
    ENGINES,
    Run,
    make_command,
    make_environment,
    make_set_options,
)

COMMAND_LIMIT = 540  # seconds that a launch may take
FAULT_SETTINGS = [
    "train.max_steps=12",
    "train.checkpoint_every=3",
    "train.keep=9",
    "adapter.dropout=0.1",
    "eval.suites=[]",
    "train.micro_batch=3",
]
Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run a script of the repository in `ranks` real processes and return the finished command.

    Without a launcher the processes are forks that need not import the libraries (forked.py). The
    working folder is `folder`, or else a new one. With `check`, the default, a failure fails the
    test.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (make_environment() | {"PYTHONPATH": str(ROOT)}).items():
            patch.setenv(name, value)
        forked.start_server()

    def run(
        script: str | Path,
        *arguments: object,
        ranks: int = 1,
        launcher: str | None = None,
        check: bool = True,
        folder: Path | None = None,
    ) -> subprocess.CompletedProcess:
        words = [str(argument) for argument in arguments]
        output = tmp_path_factory.mktemp("launch")
        if launcher is None:
            done = forked.launch(ROOT / script, words, ranks, folder or output, output)
        else:
            done = subprocess.run(
                make_command(launcher, ranks, *words, script=ROOT / script),
                cwd=folder or output,
                env=make_environment(),
                capture_output=True,
                text=True,
                timeout=COMMAND_LIMIT,
            )
        if check and done.returncode:
            printed = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            pytest.fail(f"{done.args} exited with {done.returncode}\n{printed}")
        return done

    return run


@pytest.fixture
def start_run() -> Iterator[Callable[..., Run]]:
    """Start a command as a `Run`; whatever is left of it at the end of the test is killed."""
    runs = []

    def start(command: Sequence[str], log: Path) -> Run:
        runs.append(Run(command, log))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Return 60 questions and answers of ragged length in MetaMathQA's fields."""
    draw = random.Random(7)
    made = []
    for _ in range(60):
        a, b = draw.randrange(100), draw.randrange(100)
        why = " ".join(["We add the numbers."] * draw.randrange(4))
        made.append(
            {
                "query": f"What is {a} plus {b}?",
                "response": f"{why} {a} + {b} = {a + b}.\nThe answer is: {a + b}",
            }
        )
    return made


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> Path:
    """Make a random Llama with biases, grouped-query attention and a tied head; its folder.

    The tokenizer is trained on the rows.
    """
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["query"] + row["response"] for row in rows], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> Path:
    """Write train.jsonl, gsm8k_test.jsonl and other.jsonl; their folder.

    The benchmark has 7 problems, a number that no world size of these tests divides.
    """
    folder = tmp_path_factory.mktemp("data")
    problems = [
        {"question": row["query"], "answer": "#### " + row["response"].split()[-1]}
        for row in rows[:7]
    ]
    texts = [{"text": f"{number} " * (number + 1)} for number in range(19)]
    files = {"train": rows, "gsm8k_test": problems, "other": texts}
    for name, records in files.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def recipe(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small recipe with s = alpha / r = 1.5.

    Neither 2 nor 4 divides its numbers of samples, batches and steps.
    """
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(f"""
model: {{name: {base}}}
data: {{path: {data}/train.jsonl, max_length: 300}}
adapter: {{rank: 4, alpha: 6}}
calibration: {{samples: 11, batch_size: 2}}
train: {{global_batch: 10, micro_batch: 2, max_steps: 7, lr: 0.02, checkpoint_every: 4, keep: 9}}
eval:
  {{suites: [gsm8k], data_dir: {data}, other_text: {data}/other.jsonl, max_new_tokens: 12, batch_size: 2}}
""")
    return path


@pytest.fixture(scope="session")
def trained(
    launch: Launch, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Train with some settings, once for each set of arguments, and return the run folder.

    `along` lists settings, these among them, that are all run in one launch (workers/train.py).
    """
    folders: dict[tuple, Path] = {}

    def run(
        ranks: int,
        *settings: str,
        launcher: str | None = None,
        along: Sequence[Sequence[str]] | None = None,
    ) -> Path:
        key = (ranks, settings, launcher)
        if key in folders:
            return folders[key]
        if along is None:
            folder = tmp_path_factory.mktemp("run")
            line = ["--recipe", recipe, *make_set_options(settings), "--output", folder]
            launch("launch/train.py", *line, ranks=ranks, launcher=launcher)
            folders[key] = folder
        else:
            cases = [(list(other), str(tmp_path_factory.mktemp("run"))) for other in along]
            path = tmp_path_factory.mktemp("cases") / "cases.json"
            path.write_text(json.dumps(cases))
            launch(WORKERS / "train.py", recipe, path, ranks=ranks, launcher=launcher)
            for other, case_folder in cases:
                folders[ranks, tuple(other), launcher] = Path(case_folder)
        return folders[key]

    return run


@pytest.fixture(scope="session")
def arguments(recipe: Path) -> list[object]:
    """Return the options of the run that the fault tests interrupt: 12 steps, 4 checkpoints."""
    return ["--recipe", recipe, *make_set_options(FAULT_SETTINGS)]


@pytest.fixture(scope="session")
def undisturbed(
    launch: Launch, arguments: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Train with `arguments`, undisturbed, once for each engine, and return the run folder."""
    folders: dict[str, Path] = {}

    def run(engine: str) -> Path:
        if engine not in folders:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            line = [*arguments, "--engine", engine, "--output", folder]
            launch("launch/train.py", *line, ranks=ENGINES[engine][1])
            folders[engine] = folder
        return folders[engine]

    return run

"""A tiny model and data set on disk, and real launches of 1, 2 and 4 processes that several tests look at."""

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.faults import ENGINES, Run, command
from tests.support import forked

ROOT = Path(__file__).resolve().parents[2]
FAULT_SETTINGS = [
    "train.max_steps=12",
    "train.checkpoint_every=3",
    "train.keep=9",
    "adapter.dropout=0.1",
    "eval.suites=[]",
    "train.micro_batch=3",
]
Launch = Callable[..., subprocess.CompletedProcess]


def environment() -> dict[str, str]:
    """One thread a rank (results depend on it), no hub, and no proxy of this shell's settings for the launchers."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run a script of the repository in `ranks` real processes, in an empty folder; the finished process.

    Without a launcher the processes are forks that need not import the libraries (forked.py).
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment() | {"PYTHONPATH": str(ROOT)}).items():
            patch.setenv(name, value)
        forked.start_server()

    def run(
        script: str | Path,
        *arguments: object,
        ranks: int = 1,
        launcher: str | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess:
        words, folder = [str(argument) for argument in arguments], tmp_path_factory.mktemp("cwd")
        if launcher is None:
            done = forked.launch(ROOT / script, words, ranks, folder)
        else:
            line = command(launcher, ranks, *words, script=ROOT / script)
            done = subprocess.run(
                line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=540
            )
        if check and done.returncode:
            pytest.fail(
                f"{done.args} exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done

    return run


@pytest.fixture
def start_run() -> Iterator[Callable[..., Run]]:
    """Start a command as a `Run`; what is left of it is killed at the end of the test, however that ends."""
    runs = []

    def start(command: Sequence[str], log: Path) -> Run:
        runs.append(Run(command, log))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """60 questions and answers of ragged length in MetaMathQA's fields."""
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
    """A random Llama with biases, grouped-query attention and a tied head, with its tokenizer."""
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
    """train.jsonl, gsm8k_test.jsonl with 7 problems (a number that no world size here divides), and other text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [
        {"question": row["query"], "answer": "#### " + row["response"].split()[-1]}
        for row in rows[:7]
    ]
    (folder / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    texts = [{"text": f"{number} " * (number + 1)} for number in range(19)]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


@pytest.fixture(scope="session")
def recipe(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe: sample counts, batches and steps that do not divide by 2 or 4, and s = alpha / rank = 1.5."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(f"""
model: {{name: {base}}}
data: {{path: {data}/train.jsonl, max_length: 300}}
adapter: {{rank: 4, alpha: 6}}
calibration: {{samples: 11, batch_size: 2}}
train: {{global_batch: 10, micro_batch: 2, max_steps: 7, lr: 0.02, checkpoint_every: 4, keep: 9}}
eval: {{suites: [gsm8k], data_dir: {data}, other_text: {data}/other.jsonl, max_new_tokens: 12, batch_size: 2}}
""")
    return path


@pytest.fixture(scope="session")
def trained(
    launch: Launch, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The run folder of a launch of train.py; launched once for each set of arguments.

    With `along`, lists of settings of which this is one: all of them are run in one launch (workers/train.py).
    """
    made: dict[tuple, Path] = {}

    def run(
        ranks: int,
        *settings: str,
        launcher: str | None = None,
        along: Sequence[Sequence[str]] | None = None,
    ) -> Path:
        key = (ranks, settings, launcher)
        if key not in made and along is None:
            made[key] = tmp_path_factory.mktemp("run")
            options = [option for setting in settings for option in ("--set", setting)]
            launch(
                "launch/train.py",
                "--recipe",
                recipe,
                *options,
                "--output",
                made[key],
                ranks=ranks,
                launcher=launcher,
            )
        elif key not in made:
            cases = [(list(other), str(tmp_path_factory.mktemp("run"))) for other in along]
            made.update({(ranks, tuple(other), launcher): Path(folder) for other, folder in cases})
            path = tmp_path_factory.mktemp("cases") / "cases.json"
            path.write_text(json.dumps(cases))
            launch(
                "tests/distributed/workers/train.py", recipe, path, ranks=ranks, launcher=launcher
            )
        return made[key]

    return run


@pytest.fixture(scope="session")
def arguments(recipe: Path) -> list[object]:
    return [
        "--recipe",
        recipe,
        *(word for setting in FAULT_SETTINGS for word in ("--set", setting)),
    ]


@pytest.fixture(scope="session")
def undisturbed(
    launch: Launch, arguments: list[object], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a run that nothing disturbed, by engine."""
    made: dict[str, Path] = {}

    def run(engine: str) -> Path:
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp("undisturbed") / "run"
            line = [*arguments, "--engine", engine, "--output", made[engine]]
            launch("launch/train.py", *line, ranks=ENGINES[engine][1])
        return made[engine]

    return run

"""Preparing rows, and starting a training on them: time, CPU time and memory at two numbers of rows.

    python bench/prepare.py                   10,000 and 100,000 rows (some minutes)
    python bench/prepare.py --rows 1000 2000

The rows are generated in MetaMathQA's schema; the numbers of words of questions and answers are drawn as real ones are
distributed. The tokenizer is of Llama 2's kind: BPE of the whole text with byte fallback, 32,000 tokens, trained on the
rows. Real commands, each a process of its own: `prepare` is launch/prepare.py from nothing; `first start` and `second
start` are launch/train.py on 2 ranks under FSDP, without and with the tokens in the cache. What is timed of a start is
from the launch of the processes until the tokens are mapped and the steps are known (the line "N rows ..."): Python's
imports and the process group are in it, the model, which is tiny here, is not yet loaded. Memory is the largest
anonymous memory of a rank up to the end of 12 training steps, and its peak with the mapped files' pages; CPU time that
of all processes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = (
    "an ber con da el fi gra ho in ka lo mer na ost per qua ri sta ter ul ven wa xi yo ze".split()
)
VOCABULARY = 32000
MIB = 2**20
# Threads of the ranks as on the machine of a test; freed blocks go back at once, so that a peak is of what is in use.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def write_rows(path: Path, count: int) -> None:
    """`count` rows in MetaMathQA's fields."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(20000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]  # Zipf's law

    def text(log_mean: float, log_deviation: float) -> str:
        length = max(3, round(draw.lognormvariate(log_mean, log_deviation)))
        parts = draw.choices(words, weights, k=length)
        for i in range(0, length, 5):  # mathematics is full of numbers
            parts[i] = draw.choice(
                ["{a} + {b} = {c}", "${a}", "{a}", "\\frac{{{a}}}{{{b}}}", "{c}."]
            ).format(a=draw.randrange(100), b=draw.randrange(1, 100), c=draw.randrange(10000))
        return " ".join(parts)

    with path.open("w") as file:
        for _ in range(count):
            question = text(
                3.55, 0.63
            )  # of the logarithms of numbers of words, in 3,000 real questions and answers
            response = f"{text(4.01, 0.60)}\nThe answer is: {draw.randrange(1000)}"
            row = {
                "query": question,
                "response": response,
                "type": "GSM_made",
                "original_question": question,
            }
            file.write(json.dumps(row) + "\n")


def make_base(folder: Path, rows: Path) -> None:
    """A tiny Llama, with a tokenizer of Llama 2's kind trained on the first rows."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with rows.open() as file:
        texts = [
            " ".join(json.loads(line).values()) for line, _ in zip(file, range(5000), strict=False)
        ]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Watched:
    """A command, its processes sampled from outside while it runs."""

    def __init__(self, command: list[object], cache: Path) -> None:
        self.anonymous: dict[int, int] = {}  # pid -> largest anonymous memory, bytes
        self.peak: dict[int, int] = {}  # pid -> largest resident memory, as the kernel kept it
        self.cpu: dict[int, float] = {}  # pid -> seconds, user and system
        self.ready: tuple[float, float] | None = (
            None  # wall and CPU seconds until the line about the rows
        )
        began = time.perf_counter()
        environment = ENVIRONMENT | {
            "ASTRA_CACHE": str(cache),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
        }
        process = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        sampler = threading.Thread(target=self._sample, args=(psutil.Process(process.pid),))
        sampler.start()
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " rows (" in line and self.ready is None:
                self.ready = (time.perf_counter() - began, sum(self.cpu.values()))
        sampler.join()
        self.wall = time.perf_counter() - began
        if process.wait():
            sys.exit(f"{command} failed:\n{''.join(lines)[-3000:]}")

    def _sample(self, parent: psutil.Process) -> None:
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            for process in [parent, *parent.children(recursive=True)]:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    times = process.cpu_times()
                except (OSError, psutil.Error):
                    continue  # it ended just now
                sizes = {
                    line.split(":")[0]: line.split()[1]
                    for line in status.splitlines()
                    if line.endswith(" kB")
                }
                anonymous = int(sizes.get("RssAnon", 0)) * 1024
                self.anonymous[process.pid] = max(anonymous, self.anonymous.get(process.pid, 0))
                self.peak[process.pid] = max(
                    int(sizes.get("VmHWM", 0)) * 1024, self.peak.get(process.pid, 0)
                )
                self.cpu[process.pid] = times.user + times.system
            time.sleep(0.2)


def measure(count: int, folder: Path) -> dict[str, dict[str, float]]:
    """The three commands on `count` rows."""
    rows, base, cache = folder / f"rows-{count}.jsonl", folder / "base", folder / f"cache-{count}"
    write_rows(rows, count)
    if not base.is_dir():
        make_base(base, rows)
    recipe = folder / f"recipe-{count}.yaml"
    recipe.write_text(f"""
model: {{name: {base}, dtype: float32}}
data: {{path: {rows}, max_length: 512, on_bad_row: drop}}
adapter: {{rank: 2, alpha: 2}}
calibration: {{samples: 8}}
train: {{global_batch: 16, max_steps: 12, checkpoint_every: 100}}
engine: fsdp
""")
    prepare = [
        sys.executable,
        ROOT / "launch" / "prepare.py",
        "--recipe",
        recipe,
        "--output",
        folder / f"made-{count}",
    ]
    ran = Watched(prepare, cache / "prepare")
    found = {
        "prepare": {
            "wall_s": ran.wall,
            "cpu_s": sum(ran.cpu.values()),
            "peak_mib": max(ran.peak.values()) / MIB,
        }
    }
    found["prepare"]["anonymous_mib"] = max(ran.anonymous.values()) / MIB
    for name in ("first start", "second start"):
        torchrun = Path(sys.executable).with_name("torchrun")
        output = folder / f"{name}-{count}"
        train = [
            torchrun,
            "--nproc_per_node",
            2,
            ROOT / "launch" / "train.py",
            "--recipe",
            recipe,
            "--output",
            output,
        ]
        ran = Watched(train, cache)
        found[name] = {
            "wall_s": ran.ready[0],
            "cpu_s": ran.ready[1],
            "peak_mib": max(ran.peak.values()) / MIB,
            "anonymous_mib": max(ran.anonymous.values()) / MIB,
        }
    manifest = json.loads((folder / f"made-{count}" / "manifest.json").read_text())
    found["tokens"] = {
        key: manifest[key] for key in ("kept", "cut", "dropped", "tokens", "answer_tokens")
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 100_000], help="default %(default)s"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "bench" / "results" / "prepare.json",
        help="default %(default)s",
    )
    arguments = parser.parse_args()
    found: dict = {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "rows": {},
    }
    columns = {
        "wall_s": "wall s",
        "cpu_s": "CPU s",
        "anonymous_mib": "anonymous MiB",
        "peak_mib": "with files MiB",
    }
    print(
        f"| rows | | {' | '.join(columns.values())} |\n|---|---|{'---|' * len(columns)}", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.rows:
            found["rows"][count] = measured = measure(count, Path(folder))
            for name in ("prepare", "first start", "second start"):
                cells = " | ".join(f"{measured[name][column]:.1f}" for column in columns)
                print(f"| {count} | {name} | {cells} |", flush=True)
            print(f"{count} rows: {json.dumps(measured['tokens'])}", flush=True)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

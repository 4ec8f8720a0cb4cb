"""Runs that start side by side make the quickstart's base once."""

import contextlib
import hashlib
import json
import threading
from pathlib import Path

from launch.config.loading import ADDED_FIELDS
from launch.quickstart import base as quickstart
from launch.quickstart.data import NUM_DOCUMENTS, SEED, generate_documents, generate_problems
from launch.runtime.distributed import start_process_group, stop_process_group


def test_the_second_run_waits_and_finds_it_made(tmp_path: Path) -> None:
    folder, made = tmp_path / "cache" / "base", []
    both_inside = threading.Barrier(2)

    def ensure() -> None:
        with quickstart.make_alone(folder):
            if not (folder / quickstart.MANIFEST).is_file():
                with contextlib.suppress(threading.BrokenBarrierError):
                    both_inside.wait(0.3)  # for the other run, which only a lock keeps outside
                folder.mkdir(exist_ok=True)
                (folder / quickstart.MANIFEST).touch()
                made.append(folder)

    start_process_group()
    threads = [threading.Thread(target=ensure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop_process_group()
    assert made == [folder]


def test_what_decides_the_base_has_not_changed_since_its_version() -> None:
    """A failure means that VERSION is to be raised, with this sum: the cache would else hold another base."""
    # Without fields that came later, as in the hashes of recipes: at their defaults they change nothing.
    later = {name.removeprefix("train.") for name in ADDED_FIELDS}
    pretraining = quickstart.PRETRAINING.model_dump(exclude=later)
    assert type(quickstart.PRETRAINING)(**pretraining) == quickstart.PRETRAINING
    settings = (quickstart.make_config().to_dict(), pretraining, quickstart.ROW)
    kept = {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    }
    decides = [
        list(generate_documents(500, SEED)),
        generate_problems(),
        {key: settings[0][key] for key in sorted(kept)},
        *settings[1:],
        (quickstart.VOCABULARY, NUM_DOCUMENTS, quickstart.STEPS),
    ]
    found = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    assert (quickstart.VERSION, found) == (1, "9a1ec3faa31f")

"""Runs that start side by side make the quickstart's base once."""

import threading
import time
from pathlib import Path

from launch import quickstart
from launch.distributed import start, stop


def test_the_second_run_waits_and_finds_it_made(tmp_path: Path) -> None:
    folder, made = tmp_path / "cache" / "base", []

    def ensure() -> None:
        with quickstart.alone(folder):
            if not (folder / quickstart.MANIFEST).is_file():
                time.sleep(0.3)
                folder.mkdir()
                (folder / quickstart.MANIFEST).touch()
                made.append(folder)

    start()
    threads = [threading.Thread(target=ensure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop()
    assert made == [folder]

"""Prepared tokens: those of a plain loop over the rows, whole after a kill, refused when they are another recipe's."""

import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eval.tasks import BENCHMARKS
from launch.config.loading import read_recipe
from launch.config.schema import Data
from launch.data import overlap, rows
from launch.data import token_cache as prepared
from launch.data.batches import collate_sequences
from launch.data.manifest import CUT, MANIFEST, TOO_LONG, make_once
from launch.data.order import Packing, plan_micro_batches, plan_steps
from launch.data.preparation import prepare_tokens, render_report
from launch.data.prompts import ALPACA_INPUT_PROMPT, format_prompt
from launch.data.token_set import TokenSet
from launch.data.tokenize import tokenize_rows
from launch.models.files import find_commit
from launch.runtime.errors import UserError
from tests.support.paths import ROOT
from tests.support.rows import make_byte_tokenizer

GOOD = [
    {"query": f"q{i}", "response": f"a{i}", "type": "GSM_a" if i % 2 else "MATH_b"}
    for i in range(9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of one token a character (a byte-level alphabet without merges)."""
    folder = tmp_path_factory.mktemp("model")
    make_byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 4096}')
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


def write(path: Path, values: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return path


def texts(tokens: TokenSet, model: Path) -> list[tuple[str, str]]:
    """Prompt and answer of each row, decoded."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for i in range(len(tokens)):
        ids, start = (
            tokens.tokens[tokens.offsets[i] : tokens.offsets[i + 1]].tolist(),
            int(tokens.prompt_lengths[i]),
        )
        found.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])))
    return found


def plainly(
    data: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], int]]:
    """Tokens and start of the answer of every row that keeps an answer token, one row at a time."""
    found = []
    for row in data:
        begin = tokenizer(format_prompt(row["query"])).input_ids
        whole = tokenizer(format_prompt(row["query"]) + row["response"] + "\n").input_ids
        begin, whole = (
            ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in (begin, whole)
        )
        whole = [*whole, tokenizer.eos_token_id]
        start = 0
        while start < min(len(begin), len(whole)) and begin[start] == whole[start]:
            start += 1
        if start < min(len(whole), max_length):
            found.append((whole[:max_length], start))
    return found


def as_lists(tokens: TokenSet) -> list[tuple[list[int], int]]:
    bounds, starts = tokens.offsets.tolist(), tokens.prompt_lengths.tolist()
    return [
        (tokens.tokens[a:b].tolist(), start)
        for a, b, start in zip(bounds[:-1], bounds[1:], starts, strict=True)
    ]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab \n.é7", min_size=1), st.text("ab \n.é7", min_size=1)),
        min_size=1,
        max_size=6,
    )
)
def test_tokens_are_those_of_a_plain_loop(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> None:
    values = [{"query": query, "response": response} for query, response in pairs]
    good = [rows.Row(i, query, "", response) for i, (query, response) in enumerate(pairs, start=1)]
    assert list(tokenize_rows(good, tokenizer)) == plainly(values, tokenizer, 10**6)


def test_real_rows_with_a_real_tokenizer_are_those_of_a_plain_loop(
    shared: Path, tmp_path: Path
) -> None:
    """More rows than a chunk, a limit within one, cut rows and rows without an answer."""
    base, path = shared / "models" / "stories260K", shared / "data" / "metamath_like_3000.jsonl"
    data = Data(path=str(path), limit=rows.CHUNK + 100, max_length=200, on_bad_row="drop")
    tokens = prepared.obtain_tokens(data, base).open_tokens()
    values = [json.loads(line) for line in path.read_text().splitlines()[: data.limit]]
    wanted = plainly(values, AutoTokenizer.from_pretrained(base), 200)
    assert as_lists(tokens) == wanted
    assert tokens.num_dropped == data.limit - len(wanted) > 0
    assert tokens.num_truncated == sum(len(ids) == 200 and ids[-1] != 2 for ids, _ in wanted) > 0


def test_every_kind_of_file_and_folder_holds_the_same_rows(model: Path, tmp_path: Path) -> None:
    import datasets

    lines = "".join(json.dumps(row) + "\n" for row in GOOD)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.json").write_text(json.dumps(GOOD))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    datasets.Dataset.from_list(GOOD).to_parquet(tmp_path / "rows.parquet")
    plain, nested, named = (tmp_path / name / "data" for name in ("plain", "nested", "named"))
    for folder in (plain, nested, named):
        folder.mkdir(parents=True)
    datasets.Dataset.from_list(GOOD).to_parquet(plain / "train-00000-of-00001.parquet")
    (nested / "train-0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (nested / "test-0.jsonl.gz").write_bytes(
        gzip.compress(b'{"query": "not", "response": "these"}\n')
    )
    write(named / "one.jsonl", GOOD)
    write(named / "two.jsonl", [{"query": "not", "response": "these"}])
    (named.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: [{split: train, path: data/one.jsonl}]\n"
        "- config_name: two\n  data_files: [{split: train, path: data/two.jsonl}]\n---\n"
    )
    hashes = {}
    for name in (
        "rows.jsonl",
        "rows.json",
        "rows.jsonl.gz",
        "rows.parquet",
        "plain",
        "nested",
        "named",
    ):
        data = Data(path=str(tmp_path / name), config="one" if name == "named" else None)
        hashes[name] = prepared.obtain_tokens(data, model).manifest["tokens_sha256"]
    assert len(set(hashes.values())) == 1, hashes
    with pytest.raises(UserError, match=r"data\.path: cannot load .*Config name is missing"):
        prepared.obtain_tokens(Data(path=str(tmp_path / "named")), model)


def test_hub_files_are_taken_from_the_hubs_cache_with_their_commit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789" * 4
    cached = tmp_path / "hub" / "datasets--someone--sums"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    write(cached / "snapshots" / commit / "train.jsonl", GOOD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    found = prepared.obtain_tokens(Data(path="someone/sums"), model)
    assert found.manifest["made_from"]["source"] == {
        "commit": commit,
        "split_files": ["train.jsonl"],
    }
    assert found.manifest["kept"] == len(GOOD)


def test_rows_are_kept_by_text_list_and_pattern_and_the_first_of_them(
    model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [*GOOD, {"query": "q", "response": "a", "type": None}])

    def questions(**fields: object) -> list[str]:
        found = prepared.obtain_tokens(Data(path=str(path), **fields), model)
        return re.findall(
            r"Instruction:\n(.*)\n",
            "".join(begin for begin, _ in texts(found.open_tokens(), model)),
        )

    assert questions(filter={"type": "GSM_*"}, limit=3) == ["q1", "q3", "q5"]
    assert questions(filter={"type": ["MATH_b", "none"]}) == ["q0", "q2", "q4", "q6", "q8"]
    assert questions(filter={"type": ["GSM_*", "MATH_*"]}) == [row["query"] for row in GOOD]
    with pytest.raises(UserError, match=r"nothing to train on .* no row has \{'type': 'gsm_\*'\}"):
        questions(filter={"type": "gsm_*"})
    with pytest.raises(UserError, match=r"data\.filter: no field 'typ'.* did you mean type"):
        questions(filter={"typ": "GSM_*"})


def test_an_input_that_is_not_empty_gets_alpacas_prompt(model: Path, tmp_path: Path) -> None:
    values = [{"query": "Add.", "input": more, "response": "3"} for more in ("1 and 2", "", None)]
    data = Data(path=str(write(tmp_path / "rows.jsonl", values)), input="input")
    begins = [begin for begin, _ in texts(prepared.obtain_tokens(data, model).open_tokens(), model)]
    assert begins == [
        ALPACA_INPUT_PROMPT.format(instruction="Add.", input="1 and 2"),
        format_prompt("Add."),
        format_prompt("Add."),
    ]


def test_parts_of_an_instruction_that_are_not_read_are_counted(model: Path, tmp_path: Path) -> None:
    values = [
        row | {"input": "in" if i > 6 else "", "history": [], "id": i} for i, row in enumerate(GOOD)
    ]
    values[3] |= {"system": "be brief"}
    values[4] |= {"history": "[]"}
    values[5] |= {"history": " {}\n"}
    path = write(tmp_path / "rows.jsonl", values)
    data = Data(path=str(path))
    told = {
        "input": f"data.input: 2 of 9 rows of {path} have a field 'input', which is not read; set "
        "data.input=input",
        "system": f"data.instruction: 1 of 9 rows of {path} have a field 'system', which is not "
        "read; answers are learnt without what it says",
    }
    manifest = prepared.obtain_tokens(data, model).manifest
    assert manifest["unread"] == {"system": 1, "input": 2}
    assert manifest["notes"] == [told["system"], told["input"]]
    assert f"\n{told['input']}.\n" in render_report(data, "model", manifest, {})
    reading = data.model_copy(update={"input": "input"})
    assert prepared.obtain_tokens(reading, model).manifest["notes"] == [told["system"]]
    filtered = data.model_copy(update={"filter": {"type": "MATH_*"}})  # of the rows that pass it
    assert prepared.obtain_tokens(filtered, model).manifest["unread"] == {"input": 1}


def test_bad_rows_are_counted_and_refused_or_left_out(model: Path, tmp_path: Path) -> None:
    room = len(format_prompt("q0")) + 4  # an answer of two letters, the newline and EOS
    bad = [{"query": "q", "response": value} for value in ("", "  ", None, 7)]
    long = [{"query": "q" * 99, "response": "a"}, {"query": "q0", "response": "abcd"}]
    path = write(tmp_path / "rows.jsonl", [GOOD[0], *bad, *long, GOOD[1]])
    data = Data(path=str(path), max_length=room)
    with pytest.raises(UserError) as refused:
        prepared.obtain_tokens(data, model)
    assert str(refused.value).startswith(
        f"data.path: row 2 of {path}: field 'response' is '', empty; in all "
    )
    assert "2 empty, 1 no answer token within max_length, 2 not text, of 8 rows" in str(
        refused.value
    )
    found = prepared.obtain_tokens(data.model_copy(update={"on_bad_row": "drop"}), model)
    assert found.manifest["dropped"] == {rows.EMPTY: 2, rows.NOT_TEXT: 2, TOO_LONG: 1}
    tokens = found.open_tokens()
    assert (len(tokens), tokens.num_truncated, tokens.num_dropped) == (3, 1, 5)
    assert [end for _, end in texts(tokens, model)] == ["a0\n</s>", "abcd", "a1\n</s>"]
    cut = data.model_copy(update={"on_bad_row": "drop", "on_cut": "drop"})
    assert prepared.obtain_tokens(cut, model).manifest["dropped"][CUT] == 1
    with pytest.raises(
        UserError, match=r"data\.max_length: row 7 of .*its answer is cut, .*data\.on_cut=keep"
    ):
        prepared.obtain_tokens(cut.model_copy(update={"on_cut": "refuse"}), model)
    with pytest.raises(UserError, match=r"data\.max_length: no row has an answer token within it"):
        prepared.obtain_tokens(cut.model_copy(update={"max_length": 5}), model)


def test_a_prepared_folder_needs_no_rows_and_is_refused_for_another_recipe(
    model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    data = Data(path=str(path))
    made = prepared.make_tokens(tmp_path / "made", data, model, path)
    path.unlink()
    wanted = data.model_copy(update={"prepared": str(tmp_path / "made")})
    found = prepared.obtain_tokens(wanted, model)
    assert found.manifest == made.manifest
    for field, value in {
        "max_length": 100,
        "limit": 3,
        "answer": "type",
        "filter": {"type": "GSM_*"},
    }.items():
        with pytest.raises(
            UserError, match=rf"data\.prepared: .* made with another data\.{field} \(.*, now "
        ):
            prepared.obtain_tokens(wanted.model_copy(update={field: value}), model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 7}))
    with pytest.raises(UserError, match="made with another tokenizer"):
        prepared.obtain_tokens(wanted, other)
    with pytest.raises(UserError, match=r"data\.prepared: .* is not there"):
        prepared.obtain_tokens(
            wanted.model_copy(update={"prepared": str(tmp_path / "nothing")}), model
        )


def test_damage_is_named_truncation_at_once_and_any_byte_when_preparing_again(
    model: Path, tmp_path: Path
) -> None:
    path, folder = write(tmp_path / "rows.jsonl", GOOD), tmp_path / "made [v2] *?"
    data = Data(path=str(path))
    prepared.make_tokens(folder, data, model, path)
    wanted = data.model_copy(update={"prepared": str(folder)})
    content = bytearray((folder / "tokens.bin").read_bytes())
    content[50] ^= 1
    (folder / "tokens.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"tokens\.bin: damaged, its hash"):
        prepared.make_tokens(folder, data, model, path, verify=True)
    (folder / "tokens.bin").write_bytes(content[:-4])
    for start in (
        lambda: prepared.obtain_tokens(wanted, model),
        lambda: prepared.make_tokens(folder, data, model, path),
    ):
        with pytest.raises(
            UserError,
            match=rf"tokens\.bin: damaged \({len(content) - 4} bytes, not {len(content)}\)",
        ):
            start()
    (folder / "manifest.json").write_text('{"made')
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        prepared.obtain_tokens(wanted, model)


def test_other_rows_are_made_anew_in_the_cache_and_refused_in_a_folder(
    model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    data = Data(path=str(path))
    first = prepared.obtain_tokens(data, model)
    assert prepared.obtain_tokens(data, model).folder == first.folder
    prepared.make_tokens(tmp_path / "made", data, model, path)
    write(path, GOOD[:4])
    assert prepared.obtain_tokens(data, model).manifest["kept"] == 4
    with pytest.raises(UserError, match=r"--output: .* made with another source\.files"):
        prepared.make_tokens(tmp_path / "made", data, model, path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"--output: .* holds other files \(thesis\.tex\)"):
        prepared.make_tokens(tmp_path / "used", data, model, path)


@pytest.fixture(scope="module")
def command(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """launch/prepare.py on many rows, two of them copied from GSM8K and one with 13 of its words in a row."""
    folder = tmp_path_factory.mktemp("command")
    made = [
        {"query": f"question {i} " + "word " * 5, "response": f"answer {i}"} for i in range(12_000)
    ]
    question = (
        "Ann has three red apples and gives two of them to her old friend Ben. How many are left?"
    )
    made[5] = {"query": question.upper().replace(",", ""), "response": "1"}
    made[7] = {
        "query": "Another one",
        "response": "so " + " ".join(question.split()[2:16]) + " then",
    }
    made[9] = {"query": "And", "response": " ".join(question.split()[2:14])}  # only 12 words
    write(folder / "rows.jsonl", made)
    filler = [
        {"question": f"problem {i} of something else altogether", "answer": "#### 1"}
        for i in range(20)
    ]
    write(folder / "gsm8k_test.jsonl", [*filler, {"question": question, "answer": "#### 1"}])
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {model}}}\ndata: {{path: {folder}/rows.jsonl}}\neval: {{data_dir: {folder}}}\n"
    )

    def line(*options: object) -> list[str]:
        words = [
            sys.executable,
            ROOT / "launch" / "prepare.py",
            "--recipe",
            folder / "recipe.yaml",
            *options,
        ]
        return [str(word) for word in words]

    return line


@pytest.mark.slow
def test_a_killed_preparation_resumes_to_the_same_bytes_and_the_overlap_is_reported(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    started = subprocess.Popen(
        command("--output", folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (folder / "progress.json").is_file():
        assert started.poll() is None
        time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert not (folder / "manifest.json").is_file(), (
        "finished before it was killed: more rows are needed"
    )
    done = json.loads((folder / "progress.json").read_text())["read"]
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"half a row")  # what a kill between two writes leaves
    before = (folder / "tokens.bin").read_bytes()[
        : 4 * json.loads((folder / "progress.json").read_text())["tokens"]
    ]
    again = subprocess.run(
        command("--output", folder, "--check-overlap", "gsm8k"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert 0 < done < 12_000
    recipe = read_recipe(command()[3], [])
    path = Path(recipe.data.path)
    whole = prepared.make_tokens(
        tmp_path / "whole", recipe.data, Path(recipe.model.name), path
    ).manifest
    resumed = json.loads((folder / "manifest.json").read_text())
    assert resumed["files"] == whole["files"]
    assert resumed["kept"] == 12_000
    assert (folder / "tokens.bin").read_bytes().startswith(before)

    overlap = json.loads((folder / "overlap.json").read_text())["gsm8k"]
    assert {key: overlap[key] for key in ("rows", "question", "13-gram", "problems", "of")} == {
        "rows": 12_000,
        "question": 1,
        "13-gram": 1,
        "problems": 1,
        "of": 21,
    }
    assert [(of["row"], of["problem"], of["shares"]) for of in overlap["examples"]] == [
        (6, "gsm8k/20", "question"),
        (8, "gsm8k/20", "13-gram"),
    ]
    report = (folder / "report.md").read_text()
    assert "| kept | 12000 |" in report
    assert "| gsm8k | 12000 | 1 | 1 | 1 of 21 |" in report
    assert report.strip() in again.stdout


@pytest.mark.parametrize("packing", [None, Packing(400, flat=False)])
def test_the_same_tokens_reach_1_2_and_4_ranks_in_the_same_order(
    packing: Packing | None, model: Path, tmp_path: Path
) -> None:
    long = [{"query": f"q{i}", "response": "a" * (7 * i % 90 + 1)} for i in range(29)]
    tokens = prepared.obtain_tokens(
        Data(path=str(write(tmp_path / "rows.jsonl", long))), model
    ).open_tokens()
    seen: dict[tuple, list] = {}
    for world, micro_batch in itertools.product((1, 2, 4), (1, 2, 3)):
        steps = seen[world, micro_batch] = []
        for rows_of_step in plan_steps(len(tokens), 10, 2, None, 0):
            shares = [
                plan_micro_batches(
                    rows_of_step, tokens.lengths(), rank, world, micro_batch, packing
                )
                for rank in range(world)
            ]
            dealt = [batch for batches in zip(*shares, strict=True) for batch in batches]
            sequences = [rows_of for batch in dealt for rows_of in batch if rows_of is not None]
            assert sorted(itertools.chain(*sequences)) == sorted(rows_of_step)
            counted = torch.cat(
                [collate_sequences(tokens, batch, packing).targets for batch in dealt]
            )
            steps.append((sequences, counted.tolist()))
    assert all(steps == seen[1, 1] for steps in seen.values())
    assert sum(len(counted) for _, counted in seen[1, 1]) == 2 * tokens.count_answer_tokens(
        range(len(tokens))
    )


def test_a_file_of_another_kind_in_the_folder_is_not_taken_for_the_same_rows(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for count in (3, 7):
        lines = [f"q{i},a{i}" for i in range(count)]
        (folder / "train.csv").write_text("\n".join(["query,response", *lines]) + "\n")
        assert prepared.obtain_tokens(Data(path=str(folder)), model).manifest["kept"] == count


def test_only_a_folder_named_by_a_commit_is_one(tmp_path: Path) -> None:
    assert find_commit(tmp_path / "snapshots" / ("0f" * 20)) == "0f" * 20
    assert find_commit(tmp_path / "snapshots" / "2024-01") is None
    assert find_commit(tmp_path / ("0f" * 20)) is None


def test_a_folder_that_another_node_has_just_made_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS may answer for a while that the manifest is not there, and lists the folder as it is."""
    (tmp_path / MANIFEST).touch()
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    make_once(tmp_path, lambda: pytest.fail("it was made again"))


def test_tokens_that_two_processes_wrote_at_once_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    select = prepared.select_rows

    def disturbed(*arguments: object) -> Iterator[rows.Chunk]:
        for chunk in select(*arguments):
            yield chunk
            with (tmp_path / "made" / "tokens.bin").open("ab") as file:
                file.write(b"1234")

    monkeypatch.setattr(prepared, "select_rows", disturbed)
    with pytest.raises(
        UserError, match=r"tokens\.bin is not as long as what was written: another process"
    ):
        prepared.make_tokens(tmp_path / "made", Data(path=str(path)), model, path)
    assert not (tmp_path / "made" / "manifest.json").exists()


def test_a_task_of_code_is_met_without_what_its_prompt_adds(tmp_path: Path) -> None:
    names = [f"thing_{i}" for i in range(30)]
    texts = [f"Write a python function to find the {name}." for name in names]
    problems = [
        {
            "task_id": 11 + i,
            "text": text,
            "code": f"def f{i}(x):\n    return x",
            "test_list": [f"assert f{i}(1) == 1"],
        }
        for i, text in enumerate(texts)
    ]
    write(tmp_path / "mbpp.jsonl", problems)
    suite = overlap.index_benchmark(BENCHMARKS["mbpp"].read_problems(tmp_path, None))
    assert [suite.questions[overlap.normalise_text(text)] for text in texts] == [
        {i} for i in range(30)
    ]
    long = {
        "task_id": 50,
        "text": texts[0] + " Its sum is taken over all of them.",
        "code": problems[0]["code"],
    }
    write(tmp_path / "mbpp.jsonl", [*problems, long | {"test_list": problems[0]["test_list"]}])
    suite = overlap.index_benchmark(BENCHMARKS["mbpp"].read_problems(tmp_path, None))
    around = overlap.normalise_text(f"Please help me. {long['text']} Thank you.")
    assert set.union(*(suite.grams.get(gram, set()) for gram in overlap.split_grams(around))) == {
        30
    }


def test_the_report_says_what_was_dropped_and_why(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*GOOD, {"query": "q", "response": ""}])
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {model}}}\ndata: {{path: {path}, on_bad_row: drop}}\n"
    )
    recipe = read_recipe(str(tmp_path / "recipe.yaml"), [])
    manifest = prepared.make_tokens(tmp_path / "made", recipe.data, model, path).manifest
    report = render_report(recipe.data, recipe.model.name, manifest, {})
    assert "| dropped: empty | 1 |" in report
    assert "- row 10: field 'response' is '', empty" in report
    assert "revision main, unverified" in report


def test_suites_that_are_compared_later_come_beside_the_earlier_ones(
    model: Path, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "rows.jsonl", [*GOOD, {"query": "What is one and one?", "response": "2"}]
    )
    write(tmp_path / "gsm8k_test.jsonl", [{"question": "What is one and one?", "answer": "#### 2"}])
    task = {
        "task_id": 11,
        "text": "Write q3",
        "code": "def f():\n    return 1",
        "test_list": ["assert f() == 1"],
    }
    write(tmp_path / "mbpp.jsonl", [task])
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: {model}}}\ndata: {{path: {path}}}\neval: {{data_dir: {tmp_path}}}\n"
    )
    recipe = read_recipe(str(tmp_path / "recipe.yaml"), [])
    for suites in (["gsm8k"], ["mbpp"], []):
        prepare_tokens(recipe, tmp_path / "made", suites)
    report = (tmp_path / "made" / "report.md").read_text()
    assert "| gsm8k | 10 | 1 | 0 | 1 of 1 |" in report
    assert "| mbpp | 10 | 0 | 0 | 0 of 1 |" in report

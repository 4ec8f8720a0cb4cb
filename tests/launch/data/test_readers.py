"""Prove that rows arrive to the letter from every format, or are refused by place and reason.

Random and nasty texts are written in every format and read back; their tokens are those of the
original strings. What is no text is refused alike wherever it stands. Needs nothing; 10 s.
"""

import gzip
import json
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from launch.config.schema import Data
from launch.data.prompts import format_prompt
from launch.data.readers import (
    UnreadableError,
    find_reader,
    read_arrow,
    read_json_rows,
    read_parquet,
)
from launch.data.rows import BadRow, Row, fetch_source, load_split, select_rows
from launch.data.tokenize import tokenize_rows
from launch.runtime.errors import UserError
from tests.support.rows import WRITERS, make_byte_tokenizer, write_lines

# Texts that readers like to take for something else.
NASTY = [
    *(
        "2024-05-01",
        "2024-05-01T10:00:00Z",
        "10:30",
        "1",
        "3.0",
        "-0",
        "1e5",
        "007",
        "0x10",
        "1_000",
    ),
    *("true", "False", "null", "None", "NaN", "nan", "N/A", "NA", "-inf", "Infinity", "#N/A"),
    *(
        '""',
        "[1, 2]",
        '{"a": 1}',
        "a,b;c\td",
        '"quoted"',
        'say "x", then',
        "it's",
        "\\",
        "\\n",
        "\\u0041",
    ),
    *(
        "two\nlines",
        "cr\rlf\r\nend",
        "\n first",
        "last \n",
        "a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1d\x1ee",
    ),
    *("\x00nul\x00", "\ufeffmark", "\u200b\u200d", "\ufffe\uffff", "\ud7ff\ue000", "e\u0301 é ﬁ Å"),
    *(
        "日本語",
        "👩‍👩‍👧",
        "\U0010ffff",
        " leading",
        "trailing ",
        "\t\ttabs\t",
        "=1+1",
        "@x",
        "# comment",
    ),
    *(
        "</s>",
        "<s>",
        "<unk>",
        "<|im_end|>",
        "<0x0A>",
        "[MASK]",
        "{instruction}",
        "{0}",
        "%s",
        "--- ",
    ),
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
answers = (texts | st.sampled_from(NASTY)).filter(str.strip)
TOKENIZER = make_byte_tokenizer()


def read(path: Path, **fields: object) -> tuple[list[Row], list[BadRow]]:
    """Return the good and the bad rows that a recipe's `data` section selects."""
    data = Data(path=str(path), **fields)
    good, bad = [], []
    for chunk in select_rows(load_split(data, fetch_source(data)), data):
        good += chunk.rows
        bad += chunk.bad
    return good, bad


@pytest.mark.parametrize("name", WRITERS)
@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.lists(st.tuples(answers, answers), min_size=1, max_size=8))
@example([(text, text) for text in NASTY])
@example([("Which day?", f"2024-05-{day:02d}") for day in range(1, 21)])
@example([(str(i), f"{i}.0") for i in range(20)])
def test_rows_and_tokens_are_those_of_the_original_strings(
    name: str, pairs: list[tuple[str, str]]
) -> None:
    rows = [{"query": query, "response": response} for query, response in pairs]
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[name](Path(folder) / name, rows)
        good, bad = read(Path(folder) / name)
    assert not bad
    assert [(row.instruction, row.answer) for row in good] == pairs
    for (query, response), (ids, _) in zip(pairs, tokenize_rows(good, TOKENIZER), strict=True):
        # A token a byte, by an alphabet of its own: the original text is what they spell.
        assert TOKENIZER.decode(ids[:-1]) == f"{format_prompt(query)}{response}\n"
        assert (ids[-1], 0 in ids[:-1]) == (TOKENIZER.eos_token_id, False)


@pytest.mark.parametrize("value", [3.0, 7, True, {"a": "b"}, ["x"], None, float("nan"), ...])
def test_what_is_not_text_is_not_text_wherever_it_stands(value: object, tmp_path: Path) -> None:
    odd: dict = {"query": "q", "other": "x"}
    if value is not ...:  # else the field is absent
        odd["response"] = value
    plain = [{"query": "q", "response": f"a{i}"} for i in range(2500)]  # more than a chunk
    shown = "None" if value is ... else str(value)
    places = {
        "alone.jsonl": ([odd, plain[0]], 1),
        "after.jsonl": ([plain[0], odd], 2),
        "later.jsonl": ([*plain, odd], 2501),
    }
    for name, (rows, number) in places.items():
        good, bad = read(write_lines(tmp_path / name, rows))
        assert bad == [BadRow(number, "not text", f"field 'response' is {shown}, not text")]
        assert len(good) == len(rows) - 1
    write_lines(tmp_path / "folder" / "a.jsonl", plain[:3])
    write_lines(tmp_path / "folder" / "b.jsonl", [odd, plain[0]])
    good, bad = read(tmp_path / "folder")
    assert [row.number for row in bad] == [4]
    assert [row.number for row in good] == [1, 2, 3, 5]


def test_columns_of_other_types_are_not_text(tmp_path: Path) -> None:
    import datetime

    columns = {
        "number": pa.array([1, None]),
        "date": pa.array([datetime.datetime(2024, 5, 1)] * 2),
        "bytes": pa.array([b"x", b"y"]),
        "document": pa.array(['"x"', "1"], pa.json_()),
        "list": pa.array([["x"], []]),
        "null": pa.nulls(2),
    }
    for name, column in columns.items():
        write_table(pa.table({"query": ["q", "r"], "response": column}), tmp_path / "a.parquet")
        good, bad = read(tmp_path / "a.parquet")
        assert not good, name
        assert [row.reason for row in bad] == ["not text", "not text"], name
    damaged = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffa")
    )
    write_table(pa.table({"query": ["q", "r"], "response": damaged}), tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert [row.number for row in bad] == [1]
    assert [row.answer for row in good] == ["a"]


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_objects_have_the_keys_of_their_own_row_alone(form: str, tmp_path: Path) -> None:
    arguments = [{"city": "Paris"}, {"a": 1, "b": {"deep": [{"c": 2}, {"d": 3}]}}, {}]
    rows = []
    for one in arguments:
        call = {"type": "function", "function": {"name": "f", "arguments": one}}
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
        rows.append({"chat": messages, "list": ["x", None]})
    table = pa.Table.from_pylist(rows)
    assert table["chat"][0].as_py() != rows[0]["chat"]  # Arrow adds the keys of the others
    if form == "parquet":
        path, reader = tmp_path / "a.parquet", read_parquet
        write_table(table, path)
    else:
        path, reader = tmp_path / "a.arrow", read_arrow
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    assert list(reader(path)) == rows


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "response": "a"}\n{"query": "\\ud83d", "response": "b"}\n')
    good, bad = read(path)
    assert bad == [BadRow(2, "not valid Unicode", "field 'query' is '\\ud83d', not valid Unicode")]
    assert [row.answer for row in good] == ["a"]
    path.write_text('{"query": "q", "response": "a", "input": "\\udc00"}\n')
    assert [row.reason for row in read(path, input="input")[1]] == ["not valid Unicode"]
    path.write_text('{"query": "\\ud83d\\ude00", "response": "a"}\n')  # both halves
    assert read(path)[0][0].instruction == "\U0001f600"


def test_a_field_may_be_absent_in_some_rows_but_not_in_all(tmp_path: Path) -> None:
    rows = [{"query": "q", "response": "a"}] * 3000
    rows.append({"query": "q", "response": "b", "input": "more"})
    good, bad = read(write_lines(tmp_path / "a.jsonl", rows), input="input")
    assert not bad
    assert [row.input for row in good] == [""] * 3000 + ["more"]
    with pytest.raises(UserError, match=r"data\.input: no field 'inputs'.* did you mean input"):
        read(tmp_path / "a.jsonl", input="inputs")


ROW = b'{"query": "q", "response": "a"}\n'
BROKEN = {
    "utf-16": ("a.jsonl", ROW.decode().encode("utf-16"), "is UTF-16 or UTF-32"),
    "utf-16 without a mark": ("a.json", ROW.decode().encode("utf-16-le"), "is UTF-16 or UTF-32"),
    "utf-32": ("a.csv", "query,response\nq,a\n".encode("utf-32"), "is UTF-16 or UTF-32"),
    "latin-1": ("a.jsonl", ROW + b'{"query": "\xe9"}\n', "line 2 of .*0xe9 is not UTF-8"),
    "latin-1 list": ("a.json", b'[{"query": "\xe9"}]', "row 1 of .*0xe9 is not UTF-8"),
    "latin-1 csv": ("a.csv", b"query,response\nq,\xe9\n", "line 2 of .*0xe9 is not UTF-8"),
    "field twice": (
        "a.jsonl",
        ROW + b'{"query": "q", "response": "a", "response": "b"}\n',
        "line 2 of .*'response' is there twice",
    ),
    "not an object": ("a.jsonl", ROW + b'["q", "a"]\n', "line 2 of .*is not an object"),
    "null": ("a.jsonl", ROW + b"null\n", "line 2 of .*None is not an object"),
    "list of texts": ("a.json", b'["q", "a"]', "row 1 of .*'q' is not an object"),
    "two objects a line": ("a.jsonl", ROW.strip() + ROW, "line 1 of .*Extra data"),
    "raw newline": ("a.jsonl", b'{"query": "a\nb"}\n', "line 1 of .*is not JSON"),
    "cut list": ("a.json", b"[" + ROW + b",", "row 2 of .*is not JSON"),
    "no bracket": ("a.json", b"[" + ROW, "row 1 of .*followed by the end of the file"),
    "no comma": ("a.json", b"[" + ROW + ROW + b"]", "row 1 of .*followed by '{'"),
    "two lists": ("a.json", b"[" + ROW + b"][" + ROW + b"]", "its list is followed by more text"),
    "comma at the end": ("a.json", b"[" + ROW + b",]", "row 2 of .*is not JSON"),
    "nested": ("a.jsonl", b"[" * 1 + b'{"a":' + b"[" * 100_000, "row 1 of .*nested too deeply"),
    "gz cut": ("a.jsonl.gz", gzip.compress(ROW * 1000)[:-20], "cannot be read"),
    "not gz": ("a.jsonl.gz", ROW, "cannot be read: Not a gzipped file"),
    "gz unsaid": ("a.jsonl", gzip.compress(ROW), "not UTF-8|is not JSON"),
    "not parquet": ("a.parquet", ROW, "is not whole Parquet"),
    "blank": ("a.jsonl", b" \n\n", "is empty"),
    "blank gz": ("a.json.gz", gzip.compress(b""), "is empty"),
    "csv too wide": (
        "a.csv",
        b"query,response\nq,a,b\n",
        "line 2 of .*3 values, but the header has 2",
    ),
    "csv too narrow": ("a.csv", b"query,response\nq\n", "line 2 of .*1 values"),
    "csv names twice": ("a.csv", b"query,response,query\nq,a,b\n", "'query' is there twice"),
    "csv open quote": ("a.csv", b'query,response\nq,"a\n', "is not CSV"),
    "csv of old Macs": ("a.csv", b"query,response\rq,a\r", "is not CSV|is empty"),
    "pointer": ("a.json", b"version https://git-lfs.github.com/spec/v1\n", "line 1 of .*not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_place_and_reason(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    for path in (tmp_path / name, tmp_path / "folder" / name):  # alone, and in a folder
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    for given_path in (tmp_path / name, tmp_path / "folder"):
        with pytest.raises(UserError, match=message) as error:
            read(given_path)
        assert str(error.value).startswith("data.path: cannot load "), error.value
        assert "\n" not in str(error.value)


def test_csv_values_are_text_and_empty_ones_are_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'query,response,input\r\n1,"two\r\nlines",\r\n\r\nNA,,3\r\n')
    good, bad = read(tmp_path / "a.csv", input="input")
    assert good == [Row(1, "1", "", "two\r\nlines")]
    assert bad == [BadRow(2, "empty", "field 'response' is '', empty")]
    (tmp_path / "b.csv").write_text("query,response\n" + f"q,{'long ' * 50_000}\n")
    assert len(read(tmp_path / "b.csv")[0][0].answer) == 250_000


@pytest.mark.parametrize("name", ["a.tsv", "a.txt", "a.parquet.gz", "a.jsonl.zst", "a"])
def test_a_file_of_another_format_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(ROW)
    assert find_reader(tmp_path / name) is None
    with pytest.raises(UserError, match=r"data\.path: .* is none of \.json, \.jsonl, \.parquet, "):
        read(tmp_path / name)


def test_a_long_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"query": "é" * i, "response": "\U0001f600" * (i % 7)} for i in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    for size in (1, 2, 3, 64, 1000):  # bytes of a character, and rows, are cut everywhere
        monkeypatch.setattr("launch.data.readers.BLOCK", size)
        assert list(read_json_rows(tmp_path / "a.json")) == rows
    (tmp_path / "a.json").write_text("[]")
    assert list(read_json_rows(tmp_path / "a.json")) == []


def test_an_unreadable_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"gone\.jsonl cannot be read"):
        list(read_json_rows(tmp_path / "gone.jsonl"))


def test_paths_are_not_patterns(tmp_path: Path) -> None:
    row = [{"query": "q", "response": "right"}]
    wrong = [{"query": "q", "response": "wrong"}]
    for decoy in ("train1", "trainx", "train", "tran", "trin", "y"):
        write_lines(tmp_path / f"{decoy}.jsonl", wrong)
        write_lines(tmp_path / decoy / "train.jsonl", wrong)
    for name in ("train[1]", "train*", "train?", "tr{a,b}in", "a b", "[!x]", "a::b", "é%20#"):
        path = write_lines(tmp_path / f"{name}.jsonl", row)
        folder = write_lines(tmp_path / name / "train.jsonl", row).parent
        inside = write_lines(tmp_path / "in" / f"{name}.jsonl", row).parent
        for given_path in (path, folder, inside):
            assert [found.answer for found in read(given_path)[0]] == ["right"], given_path
        shutil.rmtree(inside)

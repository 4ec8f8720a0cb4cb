"""GLUE's own TSV files give the rows that the hub has: no text changed, no line lost in silence.

Small files in the archive's form for each task, the hub's layout, and the real files of five tasks,
which need the shared data. A few seconds.
"""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from eval.glue import GLUE
from launch.data.layout import Split, find_split
from launch.data.readers import UnreadableError

# Two lines of a file of each task in the archive's form, and the rows that they are on the hub.
# A quote that is not closed, U+2028 and a byte-order mark are what other readers trip over.
HEADERS = {
    "cola": None,
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}
FIRST, SECOND = 'He said "go .', "2024-01-01\u2028it ends "
LINES = {
    "cola": [f"gj04\t1\t\t{FIRST}", f"gj04\t0\t*\t{SECOND}"],
    "sst2": [f"{FIRST}\t1", f"{SECOND}\t0"],
    "mrpc": [f"1\t70\t71\t{FIRST}\t{SECOND}", f"0\t80\t81\t{SECOND}\t{FIRST}"],
    "stsb": [
        f"0\tg\tf\t2012\t1\tn\tn\t{FIRST}\t{SECOND}\t5.000",
        f"1\tg\tf\t2012\t2\tn\tn\t{SECOND}\t{FIRST}\t3.8",
    ],
    "qqp": [f"1\t2\t3\t{FIRST}\t{SECOND}\t1", f"4\t5\t6\t{SECOND}\t{FIRST}\t0"],
    "mnli": [
        f"0\tp\tp\tg\tb\tb\tq\tq\t{FIRST}\t{SECOND}\tneutral\tneutral",
        f"1\tp\tp\tg\tb\tb\tq\tq\t{SECOND}\t{FIRST}\tneutral\tentailment",
    ],
    "qnli": [f"0\t{FIRST}\t{SECOND}\tnot_entailment", f"1\t{SECOND}\t{FIRST}\tentailment"],
    "rte": [f"0\t{FIRST}\t{SECOND}\tnot_entailment", f"1\t{SECOND}\t{FIRST}\tentailment"],
    "wnli": [f"0\t{FIRST}\t{SECOND}\t1", f"1\t{SECOND}\t{FIRST}\t0"],
}
LABELS = {"stsb": (5.0, 3.8)}  # of the others 1 and 0


def write_tsv(file: Path, task: str, lines: list[str], end: str = "\n") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = [] if HEADERS[task] is None else [HEADERS[task]]
    file.write_text("".join(line + end for line in [*header, *lines]), encoding="utf-8", newline="")
    return file


def make_rows(task: str) -> list[dict[str, object]]:
    facts = GLUE[task]
    rows = []
    labels = LABELS.get(task, (1, 0))
    for label, texts in zip(labels, ((FIRST, SECOND), (SECOND, FIRST)), strict=True):
        row: dict[str, object] = {facts.sentence1: texts[0], "label": label}
        if facts.sentence2 is not None:
            row[facts.sentence2] = texts[1]
        rows.append(row)
    return rows


def list_rows(split: Split) -> list[dict[str, object]]:
    return list(split.iterate_rows())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("task", GLUE)
def test_rows_are_the_hubs(task: str, end: str, tmp_path: Path) -> None:
    folder = tmp_path / GLUE[task].folder
    files = {"validation": "dev.tsv", "validation_matched": "dev_matched.tsv"}
    files |= {"train": "train.tsv", "validation_mismatched": "dev_mismatched.tsv"}
    for name in GLUE[task].rows:
        write_tsv(folder / files[name], task, LINES[task], end)
        for path in (folder, tmp_path):  # the task's folder, or the one of all tasks
            assert list_rows(find_split(path, name, task)) == make_rows(task)
    assert list_rows(find_split(folder, "train[1:]", task)) == make_rows(task)[1:]


def test_a_size_that_is_not_the_official_one_is_noted(tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", "sst2", LINES["sst2"])
    note = "split train of sst2 has 2 rows; GLUE's has 67349"
    assert find_split(tmp_path, "train", "sst2").note == note
    assert find_split(tmp_path, "train[:1]", "sst2").note == note  # of the whole split
    write_tsv(tmp_path / "dev.tsv", "sst2", LINES["sst2"] * 436)
    assert find_split(tmp_path, "validation", "sst2").note is None


@pytest.mark.parametrize(
    ("task", "line", "shown"),
    [
        ("cola", "gj04\t1\tno mark", "line 3 of train.tsv: 3 columns, not 4"),
        ("cola", "gj04\t2\t\ttext", "line 3 of train.tsv: label '2'"),
        ("cola", "gj04\t-1\t\ttext", "line 3 of train.tsv: label '-1'"),
        ("mrpc", "1\t90\t91\tone\ttwo\tthree", "line 4 of train.tsv: 6 columns, not 5"),
        ("mrpc", "\t90\t91\tone\ttwo", "line 4 of train.tsv: label ''"),
        ("rte", "2\tone\ttwo\tneutral", "line 4 of train.tsv: label 'neutral'"),
        ("stsb", "2\tg\tf\ty\to\tn\tn\tone\ttwo\tnan", "line 4 of train.tsv: label 'nan'"),
        ("stsb", "2\tg\tf\ty\to\tn\tn\tone\ttwo\thigh", "line 4 of train.tsv: label 'high'"),
    ],
)
def test_a_bad_line_is_a_row_that_names_it(
    task: str, line: str, shown: str, tmp_path: Path
) -> None:
    # A row whose fields are no text is refused, or dropped and counted, by data.on_bad_row.
    write_tsv(tmp_path / "train.tsv", task, [*LINES[task], line, "", LINES[task][0]])
    rows = list_rows(find_split(tmp_path, "train", task))
    assert len(rows) == 4  # the empty line is none
    assert rows[:2] == make_rows(task)
    assert rows[3] == rows[0]
    assert str(rows[2]["label"]) == shown
    assert not isinstance(rows[2]["label"], str | int | float)


def test_microsofts_pairs_are_dealt_by_glues_list(tmp_path: Path) -> None:
    write_tsv(tmp_path / "msr_paraphrase_train.txt", "mrpc", LINES["mrpc"])
    with pytest.raises(UnreadableError, match=r"msr_paraphrase_train\.txt: .*dev_ids\.tsv"):
        find_split(tmp_path, "train", "mrpc")
    (tmp_path / "dev_ids.tsv").write_text("#1 ID\t#2 ID\n80\t81\n", encoding="utf-8")
    assert list_rows(find_split(tmp_path, "train", "mrpc")) == make_rows("mrpc")[:1]
    assert list_rows(find_split(tmp_path, "validation", "mrpc")) == make_rows("mrpc")[1:]
    # train.tsv and dev.tsv go before them
    write_tsv(tmp_path / "train.tsv", "mrpc", LINES["mrpc"])
    assert len(list_rows(find_split(tmp_path, "train", "mrpc"))) == 2


@pytest.mark.parametrize(
    ("split", "task", "fault"),
    [
        ("test", "mrpc", r"GLUE's mrpc, whose test rows have no labels\) has no split 'test'"),
        ("train", "rte", r"train\.tsv: its first line has no column 'sentence1'"),
        (
            "train",
            None,
            r"train\.tsv is among the files .* set task\.name or data\.config to the task",
        ),
        ("train", "mrcp", "no configuration 'mrcp'"),
    ],
)
def test_what_is_not_there_is_refused(
    split: str, task: str | None, fault: str, tmp_path: Path
) -> None:
    write_tsv(tmp_path / "train.tsv", "mrpc", LINES["mrpc"])
    with pytest.raises(UnreadableError, match=fault):
        list_rows(find_split(tmp_path, split, task))


def test_a_single_tsv_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "train.tsv", "mrpc", LINES["mrpc"])
    with pytest.raises(UnreadableError, match=r"Of GLUE's own files give the folder"):
        find_split(file, "train", "mrpc")


def test_a_folder_without_the_task_is_refused(tmp_path: Path) -> None:
    write_tsv(tmp_path / "MRPC" / "train.tsv", "mrpc", LINES["mrpc"])
    with pytest.raises(UnreadableError, match=r"none of GLUE's files for qqp \(train\.tsv, dev"):
        find_split(tmp_path, "train", "qqp")


def test_a_line_that_is_not_utf8_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "train.tsv", "sst2", LINES["sst2"])
    file.write_bytes(file.read_bytes() + b"caf\xe9\t1\n")
    with pytest.raises(UnreadableError, match=r"line 4 of .*train\.tsv: byte 0xe9 is not UTF-8"):
        list_rows(find_split(tmp_path, "train", "sst2"))
    file.write_bytes(b"")
    with pytest.raises(UnreadableError, match=r"train\.tsv is empty"):
        find_split(tmp_path, "train", "sst2")


def test_the_hubs_layout_gives_the_same_rows(tmp_path: Path) -> None:
    # The header of nyu-mll/glue's README.md, for one of its configurations.
    names = {"names": {"0": "not_equivalent", "1": "equivalent"}}
    fields = [{"name": "sentence1", "dtype": "string"}, {"name": "sentence2", "dtype": "string"}]
    fields += [
        {"name": "label", "dtype": {"class_label": names}},
        {"name": "idx", "dtype": "int32"},
    ]
    info = {"config_name": "mrpc", "features": fields}
    info["splits"] = [{"name": "train", "num_examples": 2}, {"name": "test", "num_examples": 2}]
    data_files = [{"split": s, "path": f"mrpc/{s}-*"} for s in ("train", "test")]
    header = {
        "dataset_info": [info],
        "configs": [{"config_name": "mrpc", "data_files": data_files}],
    }
    # JSON is YAML too.
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n", encoding="utf-8")
    rows = [row | {"idx": i} for i, row in enumerate(make_rows("mrpc"))]
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(GLUE["mrpc"].labels)),
            "idx": datasets.Value("int32"),
        }
    )
    (tmp_path / "mrpc").mkdir()
    for name in ("train", "test"):
        of_split = rows if name == "train" else [row | {"label": -1} for row in rows]
        table = datasets.Dataset.from_list(of_split, features=features)
        table.to_parquet(tmp_path / "mrpc" / f"{name}-00000-of-00001.parquet")
    assert list_rows(find_split(tmp_path, "train", "mrpc")) == rows
    test = list_rows(find_split(tmp_path, "test", "mrpc"))
    assert [row["label"] for row in test] == [-1, -1]  # which no task has; see launch.data


@pytest.mark.parametrize(
    ("task", "counts"),
    [
        # of the hub's rows; one positive row of MRPC is missing in these files
        ("cola", {0: 2528, 1: 6023}),
        ("mrpc", {0: 1194, 1: 2473}),
        ("rte", {0: 1249, 1: 1241}),
        ("sst2", {0: 29780, 1: 37569}),
    ],
)
def test_the_real_files_have_the_official_rows(
    task: str, counts: dict[int, int], shared: Path
) -> None:
    for name, official in GLUE[task].rows.items():
        split = find_split(shared / "data" / "glue", name, task)
        rows = list_rows(split)
        missing = 1 if (task, name) == ("mrpc", "train") else 0
        assert len(rows) == official - missing
        assert (split.note is None) == (missing == 0)
        if name == "train":
            assert Counter(row["label"] for row in rows) == counts

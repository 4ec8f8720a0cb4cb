"""The tokens of a mix: those of its sources, bit for bit, and never those of another mix.

Needs nothing; a few seconds.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.tasks.base import Problem
from launch.config.loading import read_recipe
from launch.config.schema import Data
from launch.data import overlap
from launch.data.mix import tokens as mix
from launch.data.order import plan_micro_batches, plan_steps
from launch.data.preparation import prepare_tokens
from launch.data.token_cache import obtain_tokens
from launch.data.token_set import TokenSet, split_held_out
from launch.runtime.errors import UserError
from tests.support.chat import CASES, make_chat_tokenizer
from tests.support.mixes import find_refused_fields
from tests.support.rows import write_lines


class Questions:
    """A benchmark of one problem, whose question is a user's message in chats.jsonl."""

    def read_problems(self, data_dir: Path | None, limit: int | None) -> list[Problem]:
        return [Problem(id="p", question="What is 2?", reference="")]


Example = tuple[tuple[int, ...], tuple[int, ...]]  # tokens, and places that the loss counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model's tokenizer and the files of three sources, and a cache of its own."""
    folder = tmp_path_factory.mktemp("mix")
    make_chat_tokenizer(CASES["chatml"]).save_pretrained(folder / "model")
    config = '{"model_type": "llama", "vocab_size": 400, "max_position_embeddings": 512}'
    (folder / "model" / "config.json").write_text(config)
    chats = []
    for i in range(9):
        turns = [("user", f"what is {i}?"), ("assistant", "a" * i + "b")]
        chats.append({"chat": [{"role": role, "content": text} for role, text in turns]})
    write_lines(folder / "chats.jsonl", chats)
    write_lines(folder / "sums.jsonl", [{"q": f"{i} + 1?", "a": "x" * i} for i in range(1, 21)])
    write_lines(folder / "text.jsonl", [{"text": f"line {i} of words"} for i in range(60)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASTRA_CACHE", str(folder / "cache"))
        yield folder


def make_data(folder: Path, amounts: dict[str, dict], **fields: object) -> Data:
    """Return a mix of the sources that `amounts` names: a weight or a count, and other fields."""
    given = {
        "chats": {"messages": "chat"},
        "sums": {"instruction": "q", "answer": "a"},
        "text": {"text": "text"},
    }
    sources = {}
    for name, amount in amounts.items():
        sources[name] = {"path": str(folder / f"{name}.jsonl")} | given.get(name, {}) | amount
    return Data(sources=sources, **fields)


def list_examples(tokens: TokenSet) -> list[Example]:
    """Return every example's tokens, and the places that the loss counts."""
    found = []
    for i in range(len(tokens)):
        ids = tokens.tokens[tokens.offsets[i] : tokens.offsets[i + 1]].tolist()
        found.append((tuple(ids), tuple(tokens.find_trained(i).tolist())))
    return found


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(
        st.sampled_from(["chats", "sums", "text"]), st.integers(1, 7), min_size=1, max_size=3
    ),
    st.booleans(),
    st.integers(1, 2),
    st.integers(0, 4),
)
def test_a_mix_holds_its_sources_examples_as_often_as_it_says(
    folder: Path, amounts: dict[str, int], is_counted: bool, repeats: int, held_out: int
) -> None:
    amount = {"repeats": repeats}
    wanted = {
        name: amount | {"count" if is_counted else "weight": number}
        for name, number in amounts.items()
    }
    data = make_data(folder, wanted, held_out=held_out)
    examples = {}
    for name, source in data.list_sources().items():
        examples[name] = list_examples(obtain_tokens(source, folder / "model").open_tokens())
    sizes = {name: len(own) for name, own in examples.items()}
    refused = find_refused_fields(sizes, data.sources, held_out)
    try:
        found = mix.obtain_mix(data, folder / "model")
    except UserError as error:
        assert str(error).split(":")[0] in refused
        return
    assert not refused
    tokens = found.open_tokens()
    training, rest = split_held_out(tokens, held_out)
    trained = list_examples(training)
    measured = [] if rest is None else list_examples(rest)
    shares, position = found.manifest["shares"], 0
    assert list(shares) == sorted(amounts)
    for name, own in sorted(examples.items()):
        share = shares[name]
        assert not is_counted or share["rows"] == amounts[name]
        block = Counter(trained[position : position + share["rows"]])
        position += share["rows"]
        available = Counter(own[: share["available"]])
        assert sum(block.values()) == share["rows"]
        assert not block.keys() - available.keys()
        assert all(count <= repeats * available[example] for example, count in block.items())
        # The source's last examples, in order, and never trained on.
        last, measured = measured[: share["held_out"]], measured[share["held_out"] :]
        assert last == own[share["available"] :]
    assert position == len(trained) and not measured
    count = sum(len(places) for _, places in [*trained, *list_examples(tokens)[len(trained) :]])
    assert found.manifest["answer_tokens"] == count
    assert tokens.count_answer_tokens(range(len(tokens))) == count


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))
def test_the_order_depends_on_neither_ranks_nor_micro_batches(
    folder: Path, seed: int, global_batch: int, world_size: int, micro_batch: int
) -> None:
    data = make_data(folder, {"chats": {"weight": 1}, "sums": {"weight": 2}})
    tokens = mix.obtain_mix(data, folder / "model").open_tokens()
    steps = list(plan_steps(len(tokens), global_batch, 2, None, seed))
    # Two epochs: every example of the mix twice, whatever the steps.
    assert Counter(i for step in steps for i in step) == Counter([*range(len(tokens))] * 2)
    lengths = tokens.lengths()
    for step in steps:
        alone = plan_micro_batches(step, lengths, 0, 1, 1, packing=None)
        shares = []
        for rank in range(world_size):
            shares.append(
                plan_micro_batches(step, lengths, rank, world_size, micro_batch, packing=None)
            )
        dealt = []  # in the order of time, and at one time in the order of ranks
        for batch in itertools.chain(*zip(*shares, strict=True)):
            dealt += [sequence for sequence in batch if sequence is not None]
        assert dealt == list(itertools.chain(*alone))
        assert sorted(i for (i,) in dealt) == sorted(step)


def test_two_mixes_never_share_a_folder_and_one_mix_has_one(folder: Path) -> None:
    amounts = {"chats": {"weight": 1}, "sums": {"weight": 2}}
    variants = [
        make_data(folder, amounts),
        make_data(folder, amounts, held_out=2),
        make_data(folder, amounts, max_length=200),
        make_data(folder, amounts | {"sums": {"weight": 3}}),
        make_data(folder, amounts | {"sums": {"weight": 2, "repeats": 2}}),
        make_data(folder, amounts | {"sums": {"weight": 2, "limit": 15}}),
        make_data(folder, amounts | {"text": {"weight": 1}}),
        make_data(folder, {"chats": {"count": 5}, "sums": {"count": 10}}),
    ]
    folders = [mix.obtain_mix(data, folder / "model").folder for data in variants]
    assert len(set(folders)) == len(variants)
    # The order of the names, micro-batch settings and what is done with bad rows change nothing.
    turned = make_data(folder, dict(reversed(amounts.items())), packing=True, on_bad_row="drop")
    assert mix.obtain_mix(turned, folder / "model").folder == folders[0]
    # Other rows in the same file are another mix.
    with (folder / "sums.jsonl").open("a") as file:
        file.write('{"q": "?", "a": "!"}\n')
    assert mix.obtain_mix(variants[0], folder / "model").folder not in folders


def test_what_is_cut_is_counted_among_the_rows_that_are_taken(folder: Path, tmp_path: Path) -> None:
    rows = [{"q": "?", "a": "x" * number} for number in range(1, 31)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    source = {"path": str(path), "instruction": "q", "answer": "a"}
    lengths = obtain_tokens(Data(**source), folder / "model").open_tokens().lengths().tolist()
    chosen = [*mix.choose_examples("rows", 27, 17).tolist(), 27, 28, 29]
    longest = lengths[chosen[8]]  # so this row fits exactly, and is not cut
    data = Data(sources={"rows": source | {"count": 17}}, max_length=longest, held_out=3)
    found = mix.obtain_mix(data, folder / "model")
    num_cut = sum(lengths[i] > longest for i in chosen)
    assert found.open_tokens().num_truncated == num_cut > 0


def test_errors_name_the_source_the_file_and_the_row(folder: Path, tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [{"q": "1?", "a": "2"}, {"q": "3?", "a": " "}])
    source = {"path": str(bad), "instruction": "q", "answer": "a", "weight": 1}
    data = make_data(folder, {"chats": {"weight": 1}, "bad": source})
    where = f"data.sources.bad.path: row 2 of {bad}: field 'a' is ' ', empty; in all 1 empty, of 2"
    with pytest.raises(UserError, match=f"^{where}") as caught:
        mix.obtain_mix(data, folder / "model")
    assert "set data.on_bad_row=drop" in str(caught.value)
    dropped = mix.obtain_mix(data.model_copy(update={"on_bad_row": "drop"}), folder / "model")
    assert dropped.manifest["dropped"] == {"empty": 1}
    with pytest.raises(UserError, match=r"^data.max_length: .*\(data.sources.chats\)$"):
        short = make_data(folder, {"chats": {"weight": 1}}, max_length=4)
        mix.obtain_mix(short, folder / "model")
    for change, message in [
        ({"answer": "b"}, "data.sources.bad.answer: no field 'b' in the rows of .*bad.jsonl"),
        ({"split": "dev"}, "data.sources.bad.path: .* set data.sources.bad.split to train"),
        ({"path": "nowhere.jsonl"}, "data.sources.bad.path: no file or folder nowhere.jsonl"),
    ]:
        data = make_data(folder, {"chats": {"weight": 1}, "bad": source | change})
        with pytest.raises(UserError, match=f"^{message}"):
            mix.obtain_mix(data, folder / "model")


def test_held_out_rows_that_another_source_trains_on_are_counted(
    folder: Path, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "sums.jsonl", [{"q": f"{i}?", "a": "b"} for i in range(8)])
    source = {"path": str(path), "instruction": "q", "answer": "a", "weight": 1}
    halves = {"all": source, "late": source | {"split": "train[4:]"}}
    found = mix.obtain_mix(Data(sources=halves, held_out=4), folder / "model")
    # Both hold out rows 7 and 8. `late` has 2 rows left; of `all` 2 of 6 are taken.
    assert found.manifest["held_out_trained"] == 0
    halves["late"] = source | {"split": "train[6:]+train[:4]"}
    found = mix.obtain_mix(Data(sources=halves, held_out=4), folder / "model")
    # `late` trains on rows 7 and 8, which `all` holds out, and all of its 4 rows are taken.
    assert found.manifest["held_out_trained"] >= 2


def test_a_mix_is_prepared_checked_and_taken_without_its_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_path = tmp_path / "recipe.yaml"
    sources = make_data(folder, {"chats": {"weight": 1}, "sums": {"weight": 2}}, held_out=3)
    fields = sources.model_dump(exclude_defaults=True, exclude={"path"})
    values = {"model": {"name": str(folder / "model")}, "data": fields}
    recipe_path.write_text(json.dumps(values))
    recipe = read_recipe(str(recipe_path), [])
    monkeypatch.setattr(overlap, "BENCHMARKS", {"gsm8k": Questions()})
    made = tmp_path / "made"
    write_manifest, killed = mix.describe_files, []

    def die(*arguments: object) -> dict:
        killed.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(mix, "describe_files", die)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens(recipe, made, [])
    monkeypatch.setattr(mix, "describe_files", write_manifest)
    prepare_tokens(recipe, made, ["gsm8k"])
    report = capsys.readouterr().out
    assert "# Tokens of a mix of chats, sums" in report
    assert "| chats | 1 |  | 8 | 8 | 1 | 1 |" in report
    assert "data.sources: the mix is as large as the rows of chats allow; raise" in report
    assert f"## sums: {folder / 'sums.jsonl'}" in report
    assert "- row 3 of chats and p share a question: what is 2" in report
    prepared = recipe.data.model_copy(update={"prepared": str(made)})
    found = mix.obtain_mix(prepared, folder / "model")
    assert found.folder == made
    own = mix.obtain_mix(recipe.data, folder / "model")
    assert own.manifest["tokens_sha256"] == found.manifest["tokens_sha256"]
    fewer = recipe.data.sources["sums"].model_copy(update={"limit": 9})
    for change, message in [
        ({"held_out": 2}, r"data.held_out \(3, now 2\)"),
        (
            {"sources": recipe.data.sources | {"sums": fewer}},
            r"data.sources.sums.limit \(null, now",
        ),
        ({"sources": {"chats": recipe.data.sources["chats"]}}, r"data.sources \("),
    ]:
        with pytest.raises(UserError, match=f"^data.prepared: .* made with another {message}"):
            mix.obtain_mix(prepared.model_copy(update=change), folder / "model")
    alone = recipe.data.list_sources()["sums"].model_copy(update={"prepared": str(made)})
    with pytest.raises(UserError, match=r"^data.prepared: .* made with another "):
        obtain_tokens(alone, folder / "model")
    with (made / "tokens.bin").open("r+b") as file:
        file.write(b"\0\0\0\7")
    with pytest.raises(UserError, match="damaged"):
        prepare_tokens(recipe, made, [])

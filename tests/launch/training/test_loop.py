"""Proves what the training loop does in one process: its metrics, resuming, refusals and trackers.

Needs nothing; tensorboard and wandb are tried where they are installed. Takes 15 seconds.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from astra.adapter import attach_adapters
from launch.config.loading import validate_recipe
from launch.config.schema import Recipe, Train
from launch.data.order import Packing, plan_steps
from launch.data.token_set import TokenSet
from launch.engines.single import SingleEngine
from launch.run.metrics import Metrics
from launch.runtime.errors import UserError
from launch.training import kernels, loop, trackers
from launch.training.flops import count_training_flops
from launch.training.loop import (
    describe_low_rates,
    describe_unused_epochs,
    make_train_state,
    train,
)
from launch.training.loss import AnswerLoss
from launch.training.metrics_log import format_speed, log_steps
from launch.training.profiling import TABLE, TRACE, profile_steps
from launch.training.trainable import group_parameters
from tests.support.waits import record_waits

CPU = torch.device("cpu")
SETTINGS = Train(global_batch=6, micro_batch=2, lr=0.01, checkpoint_every=4)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    """20 rows of 6 to 25 tokens."""
    torch.manual_seed(1)
    lengths = torch.arange(6, 26)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(50, (int(offsets[-1]),), dtype=torch.int32)
    return TokenSet(ids, offsets, lengths // 2, 0, 0)


def steps_of(tokens: TokenSet, epochs: float = 2) -> list[list[int]]:
    return list(plan_steps(len(tokens), SETTINGS.global_batch, epochs, None, seed=3))


def attach(base: LlamaForCausalLM) -> PeftModel:
    """Attach small adapters to a frozen base."""
    return attach_adapters(base.requires_grad_(False), ["q_proj", "down_proj"], 2, 4, 0.0)


@pytest.fixture
def start(
    make_llama: Callable[..., LlamaForCausalLM], tokens: TokenSet
) -> Callable[..., Iterator[Metrics]]:
    """A training of adapters on a tiny Llama."""

    def run(
        steps: list[list[int]],
        done: tuple = (),
        model: PeftModel | None = None,
        **options: object,
    ) -> Iterator[Metrics]:
        model = model or attach(make_llama())
        state = make_train_state(SingleEngine(CPU, torch.float32), model, SETTINGS)
        return train(state, tokens, steps, SETTINGS, CPU, done, **options)

    return run


def test_metrics_say_what_a_step_did(
    start: Callable, tokens: TokenSet, make_llama: Callable
) -> None:
    steps = steps_of(tokens)
    flop_counts = count_training_flops(make_llama())
    found = list(start(steps, flop_counts=flop_counts, peak_flops=2e12))
    assert [step["step"] for step in found] == list(range(1, 8))
    assert found[-1]["loss"] < found[0]["loss"]
    for step, rows in zip(found, steps, strict=True):
        assert step.keys() == Metrics.__required_keys__
        assert step["tokens"] == tokens.count_answer_tokens(rows)
        assert step["all_tokens"] == sum(6 + row for row in rows)
        assert step["all_tokens_per_second"] / step["tokens_per_second"] == pytest.approx(
            step["all_tokens"] / step["tokens"]
        )
        assert step["utilisation"] == pytest.approx(step["tflops"] / 2)
        assert 0.05 < step["peak_memory_gib"] < 64
        assert 0 <= step["data_wait"] < step["seconds"]
    assert found[-1]["seconds_left"] == 0
    assert found[2]["seconds_left"] == pytest.approx(found[2]["seconds"] / 3 * 4)
    seconds = found[1]["seconds"] - found[0]["seconds"]
    rows = steps[1]
    lengths = torch.tensor([6 + row for row in rows])
    flops = flop_counts.count_step(lengths, tokens.count_answer_tokens(rows))
    assert found[1]["tflops"] == pytest.approx(flops / seconds / 1e12)
    assert "% of the device's 2)" in format_speed(found[0])
    unknown = next(start(steps))
    assert (unknown["tflops"], unknown["utilisation"]) == (None, None)


def test_what_a_step_waits_for_is_named(start: Callable, tokens: TokenSet) -> None:
    """A read that is new here may wait for a GPU in every step, or in every micro batch.

    `tests/support/waits.py` simulates the GPU: it sees every read of a tensor's values.
    """
    training = start(steps_of(tokens))
    next(training)
    with record_waits() as seen:
        next(training)
    of_the_host = {  # lengths and tokens, which are never on a GPU
        "__int__ token_set.py:count_answer_tokens",
        "__int__ token_set.py:find_trained",
        "tolist token_set.py:find_trained",
        "__index__ batches.py:_get_example",
        "__int__ batches.py:_find_loss_indices",
        "tolist order.py:plan_micro_batches",
        "__int__ loop.py:finish_step",
    }
    of_cpus = {"item optimizer.py:_get_value"}  # AdamW is fused on GPUs, and counts there
    waits = {place: count for place, count in seen.items() if place not in of_the_host | of_cpus}
    # The numbers of a step, of 3 micro batches; on a GPU those of the step before.
    assert waits == {"tolist loop.py:finish_step": 1}


def test_packed_steps_lose_what_padded_ones_lose(start: Callable, tokens: TokenSet) -> None:
    runs = [
        list(start(steps_of(tokens), packing=packing)) for packing in (None, Packing(40, False))
    ]
    for key in ("loss", "grad_norm"):
        padded, packed = ([step[key] for step in run] for run in runs)
        assert packed == pytest.approx(padded, rel=1e-4)


def test_a_resumed_epoch_continues_with_the_next_row(
    start: Callable, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    collate = loop.collate_sequences

    def spy(tokens: TokenSet, sequences: list, packing: None) -> object:
        seen.extend(rows for rows in sequences if rows is not None)
        return collate(tokens, sequences, packing)

    monkeypatch.setattr(loop, "collate_sequences", spy)
    steps = steps_of(tokens)
    whole = list(start(steps))
    undisturbed, seen[:] = list(seen), []
    assert len(undisturbed) == 40  # two epochs
    list(start(steps, done=tuple(whole[:2])))  # within the first epoch
    assert seen == undisturbed[12:]


def test_numbers_that_are_not_finite_end_the_run_before_they_can_be_saved(
    start: Callable, tokens: TokenSet, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    model = attach(make_llama())
    training = start(steps_of(tokens), model=model)
    next(training)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        parameters[0].fill_(float("nan"))
    with pytest.raises(
        UserError, match=r"step 2: loss nan, gradient norm nan: not finite; lower train\.lr"
    ):
        next(training)


@pytest.mark.parametrize("more", [[], ["lm_head"]])
def test_work_is_that_of_the_matrix_products(
    more: list[str], make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    base = make_llama(tied=False).requires_grad_(False)
    base.set_attn_implementation("eager")  # whose products are counted too, over the whole square
    model = attach_adapters(base, ["q_proj", "k_proj", "v_proj", "up_proj", *more], 2, 4, 0.0)
    ids, counted = torch.arange(24)[None], torch.arange(10, 23)
    with FlopCounterMode(display=False) as counter:
        AnswerLoss(model)(ids, counted, ids[0, 1:][counted]).backward()
    width, rank, kv_width = 16, 2, 8
    never = (
        2 * 24 * (width * (width + 2 * kv_width) + 3 * width * rank)
    )  # the gradient into the first layer
    upper_triangle = 6 * 2 * width * 24 * 24
    found = count_training_flops(base).count_step(torch.tensor([24]), len(counted))
    assert counter.get_total_flops() == found - never + upper_triangle


def test_a_profile_has_a_trace_and_the_costliest_operations(
    start: Callable, tokens: TokenSet, tmp_path: Path
) -> None:
    steps = steps_of(tokens)
    assert len(list(profile_steps(start(steps), len(steps), tmp_path, rank=0))) == len(steps)
    names = [
        event.get("name") for event in json.loads((tmp_path / TRACE).read_text())["traceEvents"]
    ]
    assert names.count("Optimizer.step#AdamW.step") == 3  # steps 4 to 6 of 7
    _, titles, _, *rows = [
        re.split(r"\s{2,}", line.strip()) for line in (tmp_path / TABLE).read_text().splitlines()
    ]
    operations = rows[: next(i for i, row in enumerate(rows) if row[0].startswith("---"))]
    shares = [float(row[titles.index("Self CPU %")].rstrip("%")) for row in operations]
    assert len(operations) == 10
    assert shares == sorted(shares, reverse=True)
    assert not any(row[0].startswith(("Optimizer.", "ProfilerStep")) for row in operations)


def test_a_disk_that_is_full_is_an_error_of_every_rank(
    start: Callable, tokens: TokenSet, tmp_path: Path
) -> None:
    def log(_: Metrics) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    steps = steps_of(tokens)
    with pytest.raises(UserError, match=r"metrics\.jsonl: No space left"):
        list(log_steps(start(steps), [], len(steps), tmp_path, 0, log))


def recipe(**sections: dict) -> Recipe:
    return validate_recipe(
        {"model": {"name": "m"}, "data": {"path": "d"}, "engine": "single"} | sections
    )


def test_what_is_not_installed_is_named_before_anything_starts() -> None:
    for sections, words in (
        (
            {"model": {"name": "m", "attention": "flash_attention_2"}},
            r"model\.attention: .* and a GPU of",
        ),
        ({"train": {"liger": True}}, r"train\.liger: its kernels need a GPU"),
    ):
        with pytest.raises(UserError, match=words):
            kernels.require_kernels(recipe(**sections), CPU, torch.float32)
    with pytest.raises(UserError, match=r"tracking: no_such_package is not installed; pip install"):
        trackers.require_trackers(["no_such_package"])
    with pytest.raises(UserError, match=r"train\.compile: zero3 gathers"):
        recipe(train={"compile": True}, engine="zero3")


def test_compiled_layers_train_alike_and_run_as_written_again(
    start: Callable,
    tokens: TokenSet,
    make_llama: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a backend that runs a graph as it was captured: inductor takes a minute."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = list(start(steps_of(tokens)))
    base = make_llama().requires_grad_(False)
    model = attach(base)
    compiled = kernels.compile_layers(base)
    assert [type(layer).__name__ for layer in compiled] == ["LlamaDecoderLayer"] * 2
    state = make_train_state(SingleEngine(CPU, torch.float32), model, SETTINGS)
    found = list(train(state, tokens, steps_of(tokens), SETTINGS, CPU))
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in found] == pytest.approx(
            [step[key] for step in plain], rel=1e-4
        )
    assert graphs
    kernels.uncompile_layers(compiled)
    before = len(graphs)
    torch._dynamo.reset()
    base(input_ids=torch.arange(7)[None])
    assert len(graphs) == before


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_continues_where_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed (requirements-extras.txt)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first in (1, 3):  # killed after step 3 and gone on with after step 2
        with trackers.open_trackers(recipe(tracking=[name]), tmp_path, first - 1) as log:
            for step in range(first, first + 3):
                log(
                    dict.fromkeys(Metrics.__required_keys__, float(step))
                    | {"step": step, "utilisation": None}
                )
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [(of.step, of.value) for of in events.Scalars("train/loss")] == [
            (i, float(i)) for i in range(1, 6)
        ]
        assert "train/utilisation" not in events.Tags()["scalars"]
    else:
        runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
        assert len(runs) == 2
        assert {run.rsplit("-", 1)[1] for run in runs} == {(tmp_path / "wandb_id").read_text()}


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, ("api.wandb.ai", 443)),
        ({"WANDB_BASE_URL": "http://wandb.local"}, ("wandb.local", 80)),
        ({"WANDB_BASE_URL": "http://wandb.local:8080"}, ("wandb.local", 8080)),
        ({"https_proxy": "http://proxy:3128"}, None),
        ({"http_proxy": "http://proxy:3128"}, ("api.wandb.ai", 443)),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "wandb.ai"}, ("api.wandb.ai", 443)),
    ],
    ids=str,
)
def test_wandb_is_offline_where_its_server_is_not_reached_and_that_is_said(
    variables: dict[str, str],
    address: tuple[str, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tried = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        tried.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(trackers.socket, "create_connection", refuse)
    mode, said = trackers._choose_wandb_mode(), capsys.readouterr().out
    if address is None:
        assert (mode, tried, said) == ("online", [], "")
    else:
        assert (mode, tried) == ("offline", [address])
        assert said.startswith(f"tracking: wandb: offline, as {address[0]}:{address[1]} cannot be ")


def test_packing_is_refused_where_attention_does_not_keep_examples_apart(
    make_llama: Callable,
) -> None:
    engine = SingleEngine(CPU, torch.float32)
    kernels.require_packing(engine, make_llama())
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=20,
        word_embed_proj_dim=16,
    )
    with pytest.raises(
        UserError, match=r"data\.packing: an example's loss moves by .*set data\.packing=false"
    ):
        kernels.require_packing(engine, OPTForCausalLM(config))


@torch.no_grad()
def test_rows_that_would_change_the_frequencies_of_others_are_refused(tmp_path: Path) -> None:
    frequencies = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    config = Phi3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4} | frequencies,
    )
    torch.manual_seed(0)
    model, ids = Phi3ForCausalLM(config).eval(), torch.randint(50, (2, 17))
    alone = model(ids[:1, :16]).logits
    torch.testing.assert_close(model(ids[:, :16]).logits[:1], alone, rtol=0, atol=1e-6)
    assert (alone - model(ids).logits[:1, :16]).abs().max() > 1e-4  # for the other row is longer

    config.save_pretrained(tmp_path)

    def refuse(longest: int, *measured: str, **sections: dict) -> None:
        tokens = SimpleNamespace(lengths=lambda: torch.tensor([3, longest]))
        rows = {"tokens": tokens, "calibration": SimpleNamespace(tokens=tokens), "dev": {}}
        inputs = SimpleNamespace(model_path=tmp_path, head=None, **rows)
        alone = {"data": {"path": "d"}, "train": {"micro_batch": 1}}
        one = recipe(**alone | sections)
        kernels.refuse_mixed_lengths(one, inputs, dict.fromkeys(measured, tokens))

    batched = {
        "train.micro_batch": {"train": {"micro_batch": 2}},
        "data.packing": {"data": {"path": "d", "packing": True}},
        "calibration.batch_size": {"calibration": {"batch_size": 2}},
    }
    refuse(17)
    for name, sections in batched.items():
        refuse(16, **sections)
        with pytest.raises(UserError, match=rf"^{name}: .*17 tokens.*{name}=.*max_length=16$"):
            refuse(17, **sections)
    for name, field in (("held_out", r"data\.held_out"), ("other_text", r"eval\.other_text")):
        refuse(16, name)
        with pytest.raises(UserError, match=rf"^{field}: .*17 tokens.*max_length=16$"):
            refuse(17, name)
    LlamaConfig().save_pretrained(tmp_path)
    refuse(17, "held_out", **batched["train.micro_batch"])


def test_attention_is_the_recipes(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama()
    kernels.apply_kernels(model, recipe(model={"name": "m", "attention": "eager"}))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("steps", "warmup_ratio", "words"),
    [
        (1, 0.03, "nothing is trained"),
        (1, 0.0, None),
        (2, 0.03, None),
        (2, 0.9, "the learning rate reaches 1.00e-02 and not train.lr, 2.00e-02"),
        (100, 0.995, "all 100 steps are warmup"),
        (100, 0.03, None),
    ],
)
def test_a_rate_that_is_never_reached_is_said(
    steps: int, warmup_ratio: float, words: str | None
) -> None:
    line = describe_low_rates(steps, Train(lr=0.02, warmup_ratio=warmup_ratio))
    assert line is None if words is None else words in line


def test_epochs_that_max_steps_overrides_are_said() -> None:
    settings = {"global_batch": 8, "max_steps": 20}
    assert describe_unused_epochs(200, Train(**settings)) is None
    assert describe_unused_epochs(200, Train(global_batch=8, epochs=3)) is None
    assert describe_unused_epochs(200, Train(**settings, epochs=3)) == (
        "train.max_steps=20 ends the run after 0.8 epochs; train.epochs is not used"
    )


def test_each_trained_parameter_is_in_one_group_in_the_models_order(make_llama: Callable) -> None:
    model = attach_adapters(
        make_llama().requires_grad_(False), ["q_proj", "down_proj"], 2, 4, 0.0, dora=True
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    (group,) = group_parameters(model, SETTINGS)
    assert group.lr_factor == 1
    # With one rate, the list that earlier versions gave to AdamW.
    assert [*map(id, group.parameters)] == [*map(id, trained)]
    others, of_b = group_parameters(model, SETTINGS.model_copy(update={"lr_ratio": 3.0}))
    assert (others.lr_factor, of_b.lr_factor) == (1, 3)
    assert {p.shape for p in of_b.parameters} == {(16, 2)}
    assert {*map(id, others.parameters)} | {*map(id, of_b.parameters)} == {*map(id, trained)}
    assert len(others.parameters) + len(of_b.parameters) == len(trained)


def test_a_tracker_that_fails_is_left_out_and_the_next_step_goes_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tried, logged = [], []

    @contextlib.contextmanager
    def open_failing(*_: object) -> Iterator[Callable[[dict], None]]:
        def log(step: dict) -> None:
            tried.append(step["step"])
            raise ValueError("no space")

        yield log
        raise OSError("not flushed")

    @contextlib.contextmanager
    def open_other(*_: object) -> Iterator[Callable[[dict], None]]:
        yield lambda step: logged.append(step["step"])

    monkeypatch.setattr(trackers, "_open_tensorboard", open_failing)
    monkeypatch.setattr(trackers, "_open_wandb", open_other)
    with trackers.open_trackers(recipe(tracking=["tensorboard", "wandb"]), tmp_path, 0) as log:
        for step in (1, 2):
            log({"step": step})
    assert (tried, logged) == ([1], [1, 2])
    assert capsys.readouterr().out.splitlines() == [
        "warning: tracking: tensorboard is left out from now on: ValueError('no space')",
        "warning: tracking: tensorboard could not be closed: OSError('not flushed')",
    ]

"""The private parts of torch, DeepSpeed and transformers are there and do what compat relies on.

Needs nothing. Takes 10 s, of which DeepSpeed's import is the most. What the engines do with them on
several ranks is in tests/distributed.
"""

import ast
import importlib.metadata
import re
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaForCausalLM

from launch.runtime.compat import deepspeed_parts, torch_parts, transformers_parts, versions
from launch.runtime.errors import RankError
from tests.support.paths import ROOT

REQUIREMENTS = ROOT / "requirements.txt"
# Public names of the standard library that begin with an underscore.
PUBLIC = {"_asdict", "_fields", "_replace", "_exit", "_current_frames"}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _never_warned() -> None:
    versions.warn_on_other_versions.cache_clear()


def test_the_tested_versions_are_those_of_the_requirements() -> None:
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)", REQUIREMENTS.read_text(), re.MULTILINE))
    assert {package: pinned[package] for package in versions.TESTED} == versions.TESTED


def test_other_versions_are_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    installed = versions.TESTED | {"torch": "2.13.0+cu130", "deepspeed": "0.20.0"}
    monkeypatch.setattr(importlib.metadata, "version", installed.__getitem__)
    versions.warn_on_other_versions()
    versions.warn_on_other_versions()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("may differ: deepspeed 0.20.0 (tested: 0.19.8)")


def test_tested_and_missing_packages_are_no_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def find_version(package: str) -> str:
        if package == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(package)
        return versions.TESTED[package]

    monkeypatch.setattr(importlib.metadata, "version", find_version)
    versions.warn_on_other_versions()
    assert capsys.readouterr().out == ""


def test_other_ranks_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0")
    versions.warn_on_other_versions()
    assert capsys.readouterr().out == ""


@pytest.fixture
def gloo_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # Registered to be put back after the test.
    monkeypatch.setattr(dist.ProcessGroupGloo, "__init__", dist.ProcessGroupGloo.__init__)
    torch_parts.run_gloo_in_one_thread(timedelta(days=3))


@pytest.mark.usefixtures("gloo_in_one_thread")
def test_gloo_groups_have_one_thread_and_the_timeout() -> None:
    options = dist.ProcessGroupGloo(dist.HashStore(), 0, 1).options
    assert (options._threads, options._timeout) == (1, timedelta(days=3))


@pytest.mark.usefixtures("gloo_in_one_thread")
def test_a_network_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,wire7")
    with pytest.raises(
        RankError, match=r"rank 0: GLOO_SOCKET_IFNAME: .* has no network lo,wire7 with an address"
    ):
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1)


def test_a_groups_timeout_is_set() -> None:
    group = dist.new_group()
    torch_parts.set_group_timeout(group, timedelta(days=2))
    options = group._get_backend(torch.device("cpu")).options
    assert options._timeout == timedelta(days=2)


def test_a_module_is_compiled_and_then_no_more() -> None:
    def count_calls(graph: torch.fx.GraphModule, _: list) -> Callable:
        calls.append(graph)
        return graph.forward

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    calls: list = []
    module = Twice()
    module.compile(backend=count_calls, dynamic=False)
    module(torch.ones(2))
    torch_parts.undo_compile(module)
    assert module(torch.ones(3)).tolist() == [2, 2, 2]  # another shape would be compiled again
    assert len(calls) == 1
    torch._dynamo.reset()


def test_fake_tensors_take_no_memory_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(10**6, 10**6), nn.Linear(10**6, 10**6)
            self.second.weight = self.first.weight
            self.second.requires_grad_(False)
            self.register_buffer("buffer", torch.ones(3))
            self.register_buffer("nothing", None)

    class Recording(torch_parts.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    seen: list = []
    with torch.device("meta"):
        model = Tied()
    with torch_parts.make_fake_mode():
        torch_parts.replace_tensors(model)
        assert model.first.weight is model.second.weight
        assert model.first.weight.device == model.buffer.device == torch.device("cpu")
        assert not model.second.bias.requires_grad
        with Recording():
            view = model.first(torch.ones(1, 10**6)).view(-1)
        assert view.shape == (10**6,)
        assert torch_parts.identify_storage(view) == torch_parts.identify_storage(view[3:])
        assert torch_parts.identify_storage(view) != torch_parts.identify_storage(view + 0)
    assert torch.ops.aten.addmm in seen
    assert (
        torch_parts.FLOPS[torch.ops.aten.addmm](
            *(torch.empty(size, device="meta") for size in ((5,), (2, 3), (3, 5)))
        )
        == 2 * 2 * 3 * 5
    )


def test_attention_on_cpus_is_counted() -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    query = torch.empty(1, 12, 64, 64, device="meta")  # as in pytorch/pytorch#195460
    assert torch_parts.FLOPS[attention](query, query, query) == 12_582_912


def test_tensors_are_found_in_nested_values() -> None:
    a, b = torch.ones(1), torch.ones(2)
    assert torch_parts.find_tensors((a, 3), {"x": [b, None]}) == [a, b]


def test_what_a_model_says_of_itself(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama()
    assert list(transformers_parts.list_layer_classes(model)) == ["LlamaDecoderLayer"]
    model.set_attn_implementation("eager")
    assert transformers_parts.read_attention(model.config) == "eager"


def test_deepspeeds_switches_are_there() -> None:
    from deepspeed.ops import __compatible_ops__ as compatible_ops
    from deepspeed.utils import nvtx

    assert nvtx.enable_nvtx in (True, False)
    deepspeed_parts.forbid_compiled_collective()
    deepspeed_parts.switch_off_nvtx()
    assert compatible_ops["deepspeed_shm_comm"] is False
    assert nvtx.enable_nvtx is False


def test_what_an_engine_left_of_a_model_is_removed() -> None:
    from deepspeed.runtime.zero import parameter_offload

    model = nn.Sequential(nn.Linear(2, 2))
    parameter_offload.FWD_MODULE_STACK.append(model)
    model[0].pre_bwd_fn = model[0].applied_pre_backward_ref_cnt = 1
    deepspeed_parts.remove_deepspeed_hooks(model)
    assert not hasattr(model[0], "pre_bwd_fn")
    assert not hasattr(model[0], "applied_pre_backward_ref_cnt")
    assert not parameter_offload.FWD_MODULE_STACK


def test_a_whole_parameter_is_no_zero_parameter() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    assert not deepspeed_parts.is_zero_parameter(parameter)
    assert deepspeed_parts.get_full_shape(parameter) == (2, 3)
    assert deepspeed_parts.count_elements(parameter) == 6


def find_private_names(tree: ast.Module) -> list[str]:
    """Return the underscored names that a module takes from other modules or objects."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if is_own else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        else:
            continue
        found += [name for name in names if name.startswith("_") and not name.startswith("__")]
    return found


def test_no_other_module_touches_private_parts() -> None:
    source = "import a\nfrom a._b import c\na._d = self._e = c._asdict()"
    assert find_private_names(ast.parse(source)) == ["_b", "_d", "_asdict"]
    for path in sorted((ROOT / "launch").rglob("*.py")):
        if path.parent.name == "compat":
            continue
        found = find_private_names(ast.parse(path.read_text(encoding="utf-8")))
        assert set(found) <= PUBLIC, path

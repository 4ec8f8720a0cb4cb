"""What an adapter method is to the rest of the project."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs only the methods' names
    from torch import Tensor

    from astra.calibrate import ModuleProblem, Solution
    from astra.flops import Decomposition
    from astra.moments import Statistic

    # (module name, its whole weight, lora_rank, settings, its solution or None where nothing is
    # calibrated) -> (A0, B0)
    MakeFactors = Callable[
        [str, Tensor, int, "MethodSettings", Solution | None], tuple[Tensor, Tensor]
    ]


class MethodSettings(NamedTuple):
    """The fields of a recipe that a method may depend on."""

    scaling: float  # s, alike for every module: Adapter.scaling
    eigen_select: Literal["smallest", "largest", "middle", "random", "haar"]
    corda_mode: Literal["ipm", "kpm"]
    calibration_seed: int  # of null-space directions, random choices and haar's basis
    train_seed: int  # of factors that are drawn
    start: Literal["projection", "zero"]  # astra's A0: V^T W or 0


@dataclass(frozen=True, kw_only=True)
class Method:
    """One value of `adapter.method`.

    The frozen weight W becomes W_res = W - s B0 A0, whatever A0 and B0 are.
    """

    # Makes A0 (lora_rank, d_in) and B0 (d_out, lora_rank) of one module, fp64; see `MakeFactors`.
    # None: there are no adapters.
    make_factors: "MakeFactors | None" = None
    # What a calibration sums for each module. None: the method needs no calibration.
    statistic: "Statistic | None" = None
    # What is decomposed: the outputs' moment, the inputs' moment, or a matrix of the weight's shape.
    decomposition: "Decomposition | None" = None
    # Solves one module on its owner rank.
    solve: "Callable[[ModuleProblem, MethodSettings], Solution] | None" = None
    # What `solve` finds: eigenvectors with their spectrum, or A0 and B0 themselves.
    solution: Literal["subspace", "factors"] | None = None
    # The recipe field that the method's name leaves open; it stands beside the name in results.
    variant: Literal["eigen_select", "corda_mode"] | None = None
    # Values of that field which need another record than this.
    by_variant: "Mapping[str, Method]" = field(default_factory=dict)
    # Whether the solution depends on s.
    depends_on_scaling: bool = False
    # Whether B0 A0 is not zero, so that training begins on W_res and not on W.
    starts_on_residual: bool = False
    # Whether a solution of a larger rank does not hold that of a smaller one.
    needs_exact_rank: bool = False
    # Singular vectors that a module must have for each unit of rank.
    vectors_per_rank: int = 1
    # Whether all parameters are trained, and there are no adapters.
    trains_all: bool = False
    # Variants of PEFT's layers.
    use_rslora: bool = False  # s = alpha / sqrt(rank)
    use_dora: bool = False  # trained magnitudes, which no plain LoRA equals

    @property
    def is_calibrated(self) -> bool:
        """Whether the method needs a calibration."""
        return self.statistic is not None


def crop_solution(
    solution: "Solution", method: Method, lora_rank: int, settings: MethodSettings
) -> "Solution":
    """Return the part of a calibration's solution of one module that a smaller rank takes."""
    if method.solution == "factors":
        return {"a0": solution["a0"][:lora_rank], "b0": solution["b0"][:, :lora_rank]}
    size = len(solution["spectrum"])
    num_kept = solution["vectors"].shape[1]
    # Columns ascend by eigenvalue. The kept ones of "middle" begin at index (size - num_kept) // 2.
    start = {
        "smallest": 0,
        "largest": num_kept - lora_rank,
        "random": 0,
        "middle": (size - lora_rank) // 2 - (size - num_kept) // 2,
    }[settings.eigen_select]
    columns = slice(start, start + lora_rank)
    return {
        "vectors": solution["vectors"][:, columns],
        "values": solution["values"][columns],
    }


def read_solved_factors(
    _name: str,
    _weight: "Tensor",
    _lora_rank: int,
    _settings: MethodSettings,
    solution: "Solution",
) -> "tuple[Tensor, Tensor]":
    """Return A0 and B0 of a solution that consists of them: `make_factors` of many methods."""
    return solution["a0"], solution["b0"]

"""What works together: engine, devices, number formats, quantisation and method, as tests show it.

The table in docs/training.md is generated from here: `python -m fedllm.config.support`.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

State = Literal["tested", "refused", "untested"]
Cell = Mapping[str, str]

VALUES: Mapping[str, tuple[str, ...]] = {
    "engine": ("plain", "together", "zero below stage 3", "zero stage 3"),
    "devices": ("1 CPU process", "several CPU processes", "1 GPU", "several GPUs"),
    "precision": ("float32", "bfloat16", "float16"),
    "quantisation": ("none", "8-bit", "4-bit (NF4)"),
    "method": ("that keeps the base", "that changes the base", "one's own"),
}
"""The dimensions. `together` is `training.clients_per_batch` above 1; `precision` is
`training.precision` and of `model.dtype`; `quantisation` is `model.quantization`. With one process
stage 3 is stage 2."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule for some cells: the first that holds for a cell tells its state.

    Attributes:
        where: dimension -> the values for which it holds; a dimension that is absent: all.
        state: whether a test trains so, it is refused, or neither.
        tests: the tests that show it, as file::function below tests/.
        message: what the refusal says.
        refused: options of a run that are refused so; empty: it is not a matter of options.
    """

    where: Mapping[str, tuple[str, ...]]
    state: State
    tests: tuple[str, ...] = ()
    message: str = ""
    refused: tuple[str, ...] = ()

    def holds(self, cell: Cell) -> bool:
        """Return whether the rule holds for a cell: dimension -> value."""
        return all(cell[name] in values for name, values in self.where.items())


_ONE_RANK = "clients.tiers.large.ranks=2"
_GPUS = ("1 GPU", "several GPUs")
_SEVERAL = ("several CPU processes", "several GPUs")
_IN_BITS = ("8-bit", "4-bit (NF4)")
_QUANTISED = "inputs/test_quantised.py"
_ZERO = ("zero below stage 3", "zero stage 3")
_EVERY_METHOD = "rounds/test_method_engines.py::test_every_method_trains_alike_on_every_engine"
_ZERO_TEST = "training/test_zero.py::test_every_stage_comes_to_what_the_plain_loop_does"

RULES = (
    Rule(
        where={"precision": ("float16",)},
        state="refused",
        message="need 'float32' or 'bfloat16'",
        refused=("training.precision=float16",),
    ),
    Rule(
        where={"engine": ("plain",), "devices": _SEVERAL},
        state="refused",
        message="training.engine plain trains a client in one process",
        refused=("training.processes=2",),
    ),
    Rule(
        where={"engine": ("together",), "devices": _SEVERAL},
        state="refused",
        message="training.engine zero trains one client at a time",
        refused=("training={engine: zero, processes: 2, clients_per_batch: 2}",),
    ),
    Rule(
        where={"engine": ("zero stage 3",), "devices": _SEVERAL, "quantisation": _IN_BITS},
        state="refused",
        message="divides the base weight by weight",
        refused=("training={engine: zero, processes: 2}", "model.quantization=nf4"),
    ),
    Rule(
        where={"quantisation": _IN_BITS, "method": ("that changes the base",)},
        state="refused",
        message="changes the base, whose weights are then no longer those bits",
        refused=("model.quantization=int8", "method.name=fedex", _ONE_RANK),
    ),
    Rule(
        where={
            "engine": ("zero stage 3",),
            "devices": _SEVERAL,
            "method": ("that changes the base",),
        },
        state="refused",
        message="divides the base, but method.name",
        refused=("training={engine: zero, processes: 2}", "method.name=fedex", _ONE_RANK),
    ),
    Rule(where={"devices": _GPUS}, state="untested"),
    Rule(where={"method": ("one's own",)}, state="untested"),
    Rule(
        where={
            "devices": ("several CPU processes",),
            "precision": ("float32",),
            "quantisation": ("4-bit (NF4)",),
        },
        state="tested",
        tests=(_ZERO_TEST,),
    ),
    Rule(
        where={"devices": ("several CPU processes",), "quantisation": _IN_BITS},
        state="untested",
    ),
    Rule(
        where={"quantisation": _IN_BITS},
        state="tested",
        tests=(
            f"{_QUANTISED}::test_every_engine_trains_alike_on_a_quantised_base",
            f"{_QUANTISED}::test_what_methods_ask_trains_as_on_the_weights_that_the_bits_stand_for",
        ),
    ),
    Rule(
        where={"engine": ("plain",)},
        state="tested",
        tests=(
            "rounds/test_method_kill.py::test_every_method_resumes_to_the_same_bits",
            "inputs/test_half_precision.py::"
            "test_bfloat16_learns_in_eight_steps_what_float32_learns",
        ),
    ),
    Rule(
        where={"engine": ("together",)},
        state="tested",
        tests=(
            _EVERY_METHOD,
            "inputs/test_half_precision.py::"
            "test_clients_that_train_together_learn_in_bfloat16_as_in_float32",
        ),
    ),
    Rule(where={"engine": _ZERO}, state="tested", tests=(_EVERY_METHOD, _ZERO_TEST)),
)
"""In order: what is refused, what no test runs, what tests run."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A feature, and the engines with which it is in one state."""

    name: str
    engines: tuple[str, ...]
    state: State
    tests: tuple[str, ...] = ()
    message: str = ""
    refused: tuple[str, ...] = ()


_CHECKPOINTING = "`training.gradient_checkpointing: auto`, `true`, `false`"
FEATURES = (
    Feature(
        name=_CHECKPOINTING,
        engines=("plain",),
        state="tested",
        tests=("packing/test_recompute.py::test_what_recomputes_may_change_at_any_time",),
    ),
    Feature(
        name=_CHECKPOINTING,
        engines=("together",),
        state="tested",
        tests=("training/test_together.py::test_every_member_trains_as_by_itself",),
    ),
    Feature(name=_CHECKPOINTING, engines=_ZERO, state="tested", tests=(_ZERO_TEST,)),
    Feature(
        name="`torch.compile`",
        engines=VALUES["engine"],
        state="refused",
        message="training.compile: no such key",
        refused=("training.compile=true",),
    ),
)


def cells() -> Iterator[Cell]:
    """Yield every cell of the table."""
    for values in product(*VALUES.values()):
        yield dict(zip(VALUES, values, strict=True))


def rule_of(cell: Cell) -> Rule:
    """Return the rule of a cell."""
    return next(rule for rule in RULES if rule.holds(cell))


def support_table() -> str:
    """Return the tables as Markdown; equal neighbours are one row."""
    header = [*VALUES, "state"]
    rows = [
        [", ".join(rule.where.get(name, ("any",))) for name in VALUES] + [_state(rule)]
        for rule in RULES
    ]
    features = [[each.name, ", ".join(each.engines), _state(each)] for each in FEATURES]
    return "\n".join([*_table(header, rows), "", *_table(["feature", "engine", "state"], features)])


def _state(row: Rule | Feature) -> str:
    if row.state == "untested":
        return "untested"
    if row.message:
        return f"refused: `{row.message}`"
    files = dict.fromkeys(test.partition("::")[0] for test in row.tests)
    return f"tested: {', '.join(f'`tests/{file}`' for file in files)}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


if __name__ == "__main__":
    sys.stdout.write(support_table() + "\n")

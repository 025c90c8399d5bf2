"""`fedllm aggregate`: combine PEFT adapters of any ranks."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli.completion import complete_methods
from fedllm.cli.options import (
    AsJson,
    OutFolder,
    fresh_folder,
    say,
    say_json,
)
from fedllm.cli.progress_bar import progress_bar
from fedllm.config.models import Config, is_own
from fedllm.config.spelling import resolve_scalars
from fedllm.config.yaml_text import parse_yaml
from fedllm.errors import AdapterError, ConfigError, counted
from fedllm.reporting.tables import rank_span
from fedllm.storage.own_code import read_own_code

if TYPE_CHECKING:
    from fedllm.server.combine import (
        Combined,
        CombinedModule,
        CombineRequest,
        RequestedRank,
    )

MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="M",
        help="Method that combines the adapters.",
        autocompletion=complete_methods,
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of the method."),
]

_MAX_NAMES = 3  # modules that a line names; the others are counted
_ROUNDING = 1e-9  # a relative excess below this counts as zero


def aggregate(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...",
            help="PEFT adapter folders of any ranks. Default weight: 1.",
        ),
    ],
    out: OutFolder,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="R|full",
            help="Rank of the result; full: no loss. Default: the largest of each module.",
        ),
    ] = None,
    method: MethodName = "flexlora",
    options: MethodOptions = None,
    device: Annotated[
        str, typer.Option("--device", metavar="D", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="T", help="float32, bfloat16 or float16.")
    ] = "float32",
    exact: Annotated[
        bool, typer.Option("--exact", help="Use direct decompositions in float64 only.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="E",
            help="Energy that may be lost beyond the least possible, as a share of it.",
        ),
    ] = 1e-4,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="PATH",
            help="Folder or hub name of the base, if the adapters name it differently.",
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Combine even if over half of the modules are missing in some adapters.",
        ),
    ] = False,
    json_: AsJson = False,
) -> None:
    """Combine PEFT adapters of any ranks into one that PEFT loads."""
    from fedllm.server.combine import CombineRequest, WeightedAdapter, combine_adapters

    if is_own(method):
        read_own_code(method, [str(Path.cwd())])
    pairs = [_adapter_and_weight(text) for text in adapters]
    request = CombineRequest(
        adapters=[WeightedAdapter(folder=folder, weight=weight) for folder, weight in pairs],
        out=fresh_folder(out),
        rank=_rank(rank),
        method=method,
        options=_options(options or []),
        device=device,
        dtype=dtype,
        exact=exact,
        tolerance=tolerance,
        base=base,
        allow_missing=allow_missing,
    )
    with progress_bar() as count:
        combined = combine_adapters(request, report=partial(count, "modules"))
    if json_:
        say_json(_combined_json(request, combined))
    else:
        say("\n".join(_combined_lines(request, combined)))


def _adapter_and_weight(text: str) -> tuple[Path, float]:
    """Split `path:weight` at the last colon, unless the whole is a folder."""
    head, _, tail = text.rpartition(":")
    if not head or Path(text).is_dir():
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        return Path(text), 1.0
    if not weight and re.search("[1-9]", tail.lower().partition("e")[0]):
        raise AdapterError(f"{head}: its weight {tail} is too small for a number, and would be 0")
    return Path(head), weight


def _options(texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"--option {text}: need NAME=VALUE, for example truncated=keep")
        found[name] = parse_yaml(value.encode(), f"--option {text}")
    found = resolve_scalars({"method": {"options": found}}, Config)["method"]["options"]
    return dict(found)


def _rank(text: str | None) -> "RequestedRank":
    if text is None:
        return None
    if text == "full":
        return "full"
    try:
        return int(text)
    except ValueError as error:
        raise AdapterError(f"--rank: got {text!r}, need a number >= 1, or full") from error


def _combined_lines(request: "CombineRequest", combined: "Combined") -> list[str]:
    lines = [
        f"weight {entry.share:.4f}  rank {entry.largest_rank:>4}  {entry.folder}"
        for entry in combined.inputs
    ]
    lines += _missing(combined)
    capped = [name for name, module in combined.modules.items() if module.capped]
    if capped:
        lines.append(f"rank limited to the smaller side in: {_first(capped)}")
    worst = min(combined.modules, key=lambda name: combined.modules[name].energy_kept)
    lowest = combined.modules[worst].energy_kept
    ranks = [module.rank for module in combined.modules.values()]
    lines.append(
        f"{rank_span(ranks)} in {counted(len(ranks), 'module')}; energy kept "
        f"{combined.energy_kept:.6f} (lowest: {lowest:.6f} in {worst})"
    )
    lines += [*_certificates(combined), f"seconds: {_stages(combined)}"]
    lines.append(f"{request.out}: PEFT adapter, {request.dtype}")
    return lines


def _certificates(combined: "Combined") -> list[str]:
    """Return a line on the error for the modules of each shape, ranks and route."""
    groups: dict[str, list[CombinedModule]] = {}
    for module in combined.modules.values():
        sizes = f"{module.shape.out}x{module.shape.in_}, rank {module.stacked_rank}"
        kind = f"{sizes} to {module.rank}: route {module.route}"
        groups.setdefault(kind, []).append(module)
    return [
        f"{len(modules)} of {kind}, {_excess_error(modules)}" for kind, modules in groups.items()
    ]


def _excess_error(modules: "Sequence[CombinedModule]") -> str:
    excess = max(module.relative_excess for module in modules)
    failure = max(module.failure_probability for module in modules)
    if excess < _ROUNDING:
        return "the error is the least possible"
    sure = f" (failure probability {failure:.0e})" if failure else ""
    return f"the error exceeds the least possible by at most {excess:.1e} of it{sure}"


def _stages(combined: "Combined") -> str:
    return ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in combined.seconds.items())


def _missing(combined: "Combined") -> list[str]:
    """Return a line on the modules that only some adapters have."""
    lacking = Counter(module for entry in combined.inputs for module in entry.missing)
    if not lacking:
        return []
    names = [module for module in combined.modules if module in lacking]
    total = len(combined.inputs)
    counts = sorted({total - count for count in lacking.values()})
    among = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [
        f"{len(names)} of {counted(len(combined.modules), 'module')}: in {among} of {total} "
        f"adapters only; they count as zero in the others: {_first(names)}"
    ]


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _combined_json(request: "CombineRequest", combined: "Combined") -> dict[str, Any]:
    return {
        "out": str(request.out),
        "method": request.method,
        "dtype": request.dtype,
        "base_model": combined.base_model,
        "energy_kept": combined.energy_kept,
        "seconds": dict(combined.seconds),
        "adapters": [
            {
                "path": str(entry.folder),
                "weight": entry.share,
                "rank": entry.largest_rank,
                "missing": list(entry.missing),
            }
            for entry in combined.inputs
        ],
        "modules": {
            name: {
                "rank": module.rank,
                "energy_kept": module.energy_kept,
                "stacked_rank": module.stacked_rank,
                "route": module.route,
                "relative_excess": module.relative_excess,
                "failure_probability": module.failure_probability,
            }
            for name, module in combined.modules.items()
        },
    }

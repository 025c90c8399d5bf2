"""`fedllm aggregate`: PEFT adapters of any ranks to one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli.options import (
    AsJson,
    OutFolder,
    fresh_folder,
    say,
    say_json,
)
from fedllm.cli.progress_bar import modules_done
from fedllm.errors import AdapterError

if TYPE_CHECKING:
    from fedllm.server.combine import (
        Combined,
        CombinedModule,
        CombineRequest,
        RequestedRank,
    )

_NAMED = 3  # modules that a line names before it counts
_ROUNDING = 1e-9  # of what is lost: less is not worth telling


def aggregate(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...",
            help="PEFT adapter folders of any ranks; a weight is 1 unless given.",
        ),
    ],
    out: OutFolder,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="R|full",
            help="Rank of the result; full loses nothing. Default: each module's largest.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="M", help="How adapters are combined.")
    ] = "flexlora",
    device: Annotated[
        str, typer.Option("--device", metavar="D", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="T", help="float32, bfloat16 or float16.")
    ] = "float32",
    exact: Annotated[
        bool, typer.Option("--exact", help="Direct decompositions in float64 only.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="E",
            help="How much more energy than the best may be left out, as a share of that.",
        ),
    ] = 1e-4,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="PATH",
            help="The base of all adapters, where they name it differently: folder or hub name.",
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Combine even if more than half of the modules are not in all adapters.",
        ),
    ] = False,
    json_: AsJson = False,
) -> None:
    """Combine PEFT adapters of any ranks into one that PEFT loads."""
    from fedllm.server.combine import CombineRequest, WeightedAdapter, combine_adapters

    pairs = [_adapter_and_weight(text) for text in adapters]
    request = CombineRequest(
        adapters=[WeightedAdapter(folder=folder, weight=weight) for folder, weight in pairs],
        out=fresh_folder(out),
        rank=_rank(rank),
        method=method,
        device=device,
        dtype=dtype,
        exact=exact,
        tolerance=tolerance,
        base=base,
        allow_missing=allow_missing,
    )
    with modules_done() as report:
        combined = combine_adapters(request, report=report)
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
        return Path(head), float(tail)
    except ValueError:
        return Path(text), 1.0


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
        lines.append(f"rank above the smaller side, which they get instead: {_first(capped)}")
    worst = min(combined.modules, key=lambda name: combined.modules[name].energy_kept)
    least = combined.modules[worst].energy_kept
    ranks = [module.rank for module in combined.modules.values()]
    lines.append(
        f"{_span(ranks)} in {len(ranks)} modules; energy kept {combined.energy_kept:.6f} "
        f"(least: {least:.6f} in {worst})"
    )
    lines += [*_certificates(combined), f"seconds: {_stages(combined)}"]
    lines.append(f"{request.out}: PEFT adapter, {request.dtype}")
    return lines


def _certificates(combined: "Combined") -> list[str]:
    """Return a line for the modules of each shape, ranks and route: what the result is worth."""
    alike: dict[str, list[CombinedModule]] = {}
    for module in combined.modules.values():
        sizes = f"{module.shape.out}x{module.shape.in_}, rank {module.stacked_rank}"
        what = f"{sizes} to {module.rank}: route {module.route}"
        alike.setdefault(what, []).append(module)
    return [f"{len(modules)} of {what}, {_surplus(modules)}" for what, modules in alike.items()]


def _surplus(modules: "Sequence[CombinedModule]") -> str:
    excess = max(module.relative_excess for module in modules)
    failure = max(module.failure_probability for module in modules)
    if excess < _ROUNDING:
        return "what is lost is the least possible"
    sure = f" (failure probability {failure:.0e})" if failure else ""
    return f"what is lost exceeds the least possible by at most {excess:.1e} of it{sure}"


def _stages(combined: "Combined") -> str:
    return ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in combined.seconds.items())


def _missing(combined: "Combined") -> list[str]:
    """Return a line for the modules that only some adapters have: how many, in how many."""
    lacking = Counter(module for entry in combined.inputs for module in entry.missing)
    if not lacking:
        return []
    names = [module for module in combined.modules if module in lacking]
    total = len(combined.inputs)
    held = sorted({total - count for count in lacking.values()})
    among = str(held[0]) if len(held) == 1 else f"{held[0]} to {held[-1]}"
    return [
        f"{len(names)} of {len(combined.modules)} modules are in {among} of {total} adapters only "
        f"and count as zero in the others: {_first(names)}"
    ]


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _span(ranks: Iterable[int]) -> str:
    found = sorted(ranks)
    return f"rank {found[0]}" if found[0] == found[-1] else f"ranks {found[0]} to {found[-1]}"


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

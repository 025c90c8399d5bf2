"""`fedllm export`: write a run's server state as a PEFT adapter or a merged model."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedllm.cli.options import (
    AsJson,
    OutFolder,
    RoundNumber,
    RunFolder,
    chosen_round,
    existing_run,
    fresh_folder,
    say,
    say_json,
)
from fedllm.errors import AdapterError, counted
from fedllm.reporting.tables import rank_span

if TYPE_CHECKING:
    from fedllm.server.export import Exported, Merged

_ENOUGH = 0.95  # share of the change that the merged weights should hold


def export(
    run: RunFolder,
    out: OutFolder,
    round_: RoundNumber = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="R", help="Rank of the adapter. Default: the state's largest."
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the base model with the adapter merged.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="T",
            help="With --merge: float32, bfloat16 or float16. Default: as the run's base.",
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub", metavar="OWNER/NAME", help="Upload it, as a private repository."
        ),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(
            "--client", metavar="C", help="The adapter that this client trained in the round."
        ),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Write a run's state as a PEFT adapter, or as a merged model."""
    from fedllm.server.client_export import export_client
    from fedllm.server.export import Merged, export_adapter, export_model, open_state
    from fedllm.server.hub_upload import push_folder, require_repository

    if dtype and not merge:
        raise AdapterError("--dtype: is for --merge, an adapter is float32; leave it out")
    if client and (merge or rank):
        raise AdapterError("--client: writes its adapter as it is; leave out --merge and --rank")
    if push_to_hub is not None:
        require_repository(push_to_hub)
    paths, folder = existing_run(run), fresh_folder(out)
    # deepspeed, where it is installed, logs to stdout when transformers saves a model
    with redirect_stdout(sys.stderr):
        number = chosen_round(paths, round_)
        if client:
            exported = export_client(paths, number, client, folder)
        elif merge:
            exported = export_model(open_state(paths, number), folder, rank=rank, dtype=dtype)
        else:
            exported = export_adapter(open_state(paths, number), folder, rank=rank)
    pushed = push_folder(push_to_hub, folder) if push_to_hub is not None else None
    if json_:
        say_json(_exported_json(out, exported) | ({"pushed": pushed} if pushed else {}))
        return
    what = "model, the adapter merged" if merge else "PEFT adapter"
    line = (
        f"{out}: {what}, of round {exported.round}, {rank_span(exported.ranks.values())} "
        f"in {counted(len(exported.ranks), 'module')} of {exported.base_model}"
    )
    say(line + _survival(exported) if isinstance(exported, Merged) else line)
    if pushed:
        say(f"uploaded to {pushed}")


def _survival(merged: "Merged") -> str:
    """Return how much of the change the stored weights hold, with advice if it is little."""
    text = (
        f"; {merged.dtype}: {merged.survived:.1%} of the change survived rounding "
        f"(relative error {1 - merged.survived:.2g}, "
        f"{merged.unchanged_share:.1%} of its entries unchanged)"
    )
    if merged.survived < _ENOUGH and merged.dtype != "float32":
        text += (
            "\nmuch of the change is lost in these weights: merge with --dtype float32, or export "
            "the adapter without --merge"
        )
    return text


def _exported_json(out: Path, exported: "Exported") -> dict[str, Any]:
    from fedllm.server.export import Merged

    found = {
        "out": str(out),
        "round": exported.round,
        "ranks": dict(exported.ranks),
        "base_model": exported.base_model,
        "merged": isinstance(exported, Merged),
    }
    if isinstance(exported, Merged):
        found |= {
            "dtype": exported.dtype,
            "survived": exported.survived,
            "unchanged_share": exported.unchanged_share,
        }
    return found

"""`fedllm compare`: compare runs, and the arms of a sweep."""

from pathlib import Path
from typing import Annotated, cast

import typer

from fedllm.cli.completion import complete_runs
from fedllm.cli.options import AsJson, say, say_json
from fedllm.cli.sweeps import existing_sweep
from fedllm.errors import UserError
from fedllm.reporting.comparing.comparison_tables import comparison_of, comparison_text
from fedllm.reporting.comparing.scored_runs import read_scored_arms
from fedllm.reporting.comparing.side_by_side import BY, By, side_by_side
from fedllm.reporting.sweeps.tuned_rates import rates_table, tuned_rates
from fedllm.storage.sweep_records import SweepRecord


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|NAME=RUN|SWEEP...",
            help="Runs, named or not, and sweeps.",
            autocompletion=complete_runs,
        ),
    ],
    last: Annotated[
        int | None,
        typer.Option("--last", metavar="K", min=1, help="Take the mean of the last K evaluations."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="tier|group",
            help="With one run of each arm: scores by tier of clients, or by group alone.",
        ),
    ] = "tier",
    json_: AsJson = False,
) -> None:
    """Compare runs, or the arms of a sweep, on the same test rows.

    It answers two questions: do these models differ on clients like these, and do these methods
    differ with other seeds too?
    """
    if by not in BY:
        raise UserError(f"--by: got {by!r}, need one of {', '.join(BY)}")
    scored = read_scored_arms(runs, last)
    comparison = comparison_of(scored)
    singles = {arm: of_arm[0].root for arm, of_arm in scored.arms.items() if len(of_arm) == 1}
    # one run of each arm: its tiers, ranks and bytes in full
    tables = side_by_side(singles, cast(By, by)) if len(singles) == len(scored.arms) else ""
    if json_:
        say_json(comparison.as_dict())
        return
    if tables:
        say(f"{tables}\n")
    say(comparison_text(comparison))
    for sweep in filter(None, (existing_sweep(Path(given)) for given in runs)):
        if rates := rates_table(tuned_rates(sweep, SweepRecord.read(sweep.record))):
            say(f"\n{rates}")

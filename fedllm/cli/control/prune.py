"""`fedllm prune`: remove files that `storage` says not to keep."""

from typing import Annotated

import typer

from fedllm.cli.options import AsJson, RunFolder, existing_run, say, say_json
from fedllm.config.loading import read_config
from fedllm.reporting.tables import size
from fedllm.rounds.retention import prune as prune_run
from fedllm.rounds.retention import removable


def prune(
    run: RunFolder,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and keep it.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Remove old states, updates, logs and leftovers of a run.

    The keys of `storage` say what is kept, and `fedllm resume` still works. The coordinator prunes
    after every round too; both may do it at once.
    """
    paths = existing_run(run)
    config = read_config(paths.config)
    removals = removable(paths, config) if dry_run else prune_run(paths, config)
    total = sum(removal.num_bytes for removal in removals)
    if json_:
        gone = [{"path": str(r.path), "bytes": r.num_bytes} for r in removals]
        say_json({"dry_run": dry_run, "bytes": total, "removed": gone})
        return
    word = "would remove" if dry_run else "removed"
    for removal in removals:
        say(f"{word} {removal.path.relative_to(paths.root)} ({size(removal.num_bytes)})")
    say(f"{word} {size(total)} in all" if removals else "nothing to remove")

"""`fedllm methods`: what `method.name` can be, with options and papers."""

import dataclasses

from fedllm.cli.options import AsJson, say, say_json
from fedllm.methods.catalog import METHODS
from fedllm.methods.options import OPTIONS, NoOptions
from fedllm.reporting.tables import text_table


def methods(json_: AsJson = False) -> None:
    """List the federated methods with their options and papers."""
    defaults = {name: OPTIONS.get(name, NoOptions)().model_dump(mode="json") for name in METHODS}
    if json_:
        entries = {name: dataclasses.asdict(entry) for name, entry in METHODS.items()}
        say_json([{"name": n, **entries[n], "options": defaults[n]} for n in METHODS])
        return
    header = ["method.name", "ranks", "base", "method.options and their defaults", "paper"]
    rows = [
        [
            name,
            entry.ranks,
            entry.base,
            ", ".join(f"{option}: {value}" for option, value in defaults[name].items()) or "-",
            entry.paper,
        ]
        for name, entry in METHODS.items()
    ]
    say(text_table("server side of a run", header, rows) + "\n")
    for name, entry in METHODS.items():
        say(f"{name}: {entry.summary}")

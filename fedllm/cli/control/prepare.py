"""`fedllm prepare`: fetch, fingerprint and tokenise what a run needs."""

from fedllm.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    configuration,
    default_run_dir,
    say,
    say_json,
)
from fedllm.cli.preparing import prepared_anew
from fedllm.cli.progress_bar import progress_bar
from fedllm.errors import counted
from fedllm.scheduling.traits import cache_for


def prepare(config: ConfigFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Fetch, fingerprint and tokenise what a run needs.

    Run it where the network is; all later steps work offline.
    """
    loaded = configuration(config, set_ or [])
    cache = cache_for(loaded, default_run_dir(config))
    with progress_bar() as count:
        prepared = prepared_anew(loaded, cache, count)
    if json_:
        say_json(prepared.model_dump(mode="json", by_alias=True))
        return
    from fedllm.programs.prepare import describe_layout

    say(f"cache {cache.root}")
    rows = sum(client.train_rows for client in prepared.clients)
    trainable = sum(client.train_rows > 0 for client in prepared.clients)
    say(f"model {prepared.model_path} ({prepared.model_parameters:,} parameters)")
    numbers = f"{counted(trainable, 'client')}, {counted(rows, 'training row')}"
    say(f"data {prepared.data_path}: {numbers}")
    answers = sum(client.cut_answers for client in prepared.clients)
    prompts = sum(client.truncated_rows for client in prepared.clients) - answers
    dropped = sum(client.dropped_rows for client in prepared.clients)
    cutoff = loaded.data.cutoff_tokens
    cut = f"{counted(prompts, 'prompt')} and {counted(answers, 'answer')}"
    say(f"{cut} cut at data.cutoff_tokens: {cutoff}")
    say(f"{counted(dropped, 'row')} dropped without an answer")
    say(describe_layout(prepared.layout))

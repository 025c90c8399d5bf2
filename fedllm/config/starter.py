"""First configuration of a user: a short commented file from the answers to three questions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.yaml_text import write_yaml

EMBEDDED = "embedded"

# what files call the columns that fedllm calls so
_CLIENT_NAMES = ("client_id", "client", "user", "user_id", "author", "speaker", "owner", "site")
_INSTRUCTION_NAMES = ("instruction", "question", "query", "task")
_INPUT_NAMES = ("input", "context", "text", "passage", "document")
_OUTPUT_NAMES = ("output", "answer", "response", "target", "label", "summary")
_TALK = ("messages", "conversations")
_COMPLETION = ("prompt", "completion")
# clients that rows without owners are dealt out to
_NUM_CLIENTS = 10


@dataclass(frozen=True, kw_only=True)
class StarterPlace:
    """Place where a run's jobs run: the command that starts a run, and the section of its keys."""

    start: str
    scheduler: str


PLACES: Mapping[str, StarterPlace] = {
    "here": StarterPlace(
        start="fedllm run",
        scheduler="""scheduler:
  kind: local                 # processes on this machine
  workers: 2                  # clients that train at the same time
""",
    ),
    "slurm": StarterPlace(
        start="fedllm submit",
        scheduler="""scheduler:
  kind: slurm                 # job arrays; `fedllm doctor` says what to change on your cluster
  max_parallel: 16            # tasks that run at the same time
  sbatch:
    default: {}               # of every job, such as {account: lab, partition: short}
    client: {cpus-per-task: 1, mem: 4G}    # of tasks that train; with a GPU: gpus: 1
""",
    ),
}


@dataclass(frozen=True, kw_only=True)
class StarterAnswers:
    """Answers to the three questions, and what was found out about them.

    `place` is one of `PLACES`. `columns` are those of the data, empty if they are not known: data
    of the hub are not fetched. `has_chat_template` says whether the model's tokenizer has one.
    """

    data: str
    model: str
    place: str
    columns: Sequence[str] = ()
    has_chat_template: bool = False


def starter_text(answers: StarterAnswers, name: str) -> str:
    """Return a configuration file with comments; `name` is its path, for the comments."""
    run = f"runs/{re.sub(r'[.][^./]*$', '', name.rpartition('/')[2])}"
    parts = [
        f"# Written by `fedllm init`. All keys: docs/configuration.md, or `fedllm schema`.\n#\n"
        f"#   fedllm plan {name}      what it would do and cost; nothing is started\n"
        f"#   {PLACES[answers.place].start} {name}\n"
        f"#   fedllm status {run}\n",
        "seed: 0\nrounds: 3                     # more with: fedllm resume RUN --set rounds=6\n",
        _model(answers),
        _data(answers),
        _CLIENTS,
        _TRAINING,
        PLACES[answers.place].scheduler,
    ]
    return "\n".join(parts)


def _model(answers: StarterAnswers) -> str:
    if answers.model == EMBEDDED:
        return (
            "model:\n  path: embedded              # a small model that fedllm makes; or a folder, "
            "or a hub name\n"
        )
    return (
        f"model:\n  path: {_scalar(answers.model)}\n"
        "  dtype: float32              # bfloat16: half the memory\n\n"
        "lora:\n  target_modules: all-linear  # or a list of names, as in PEFT\n"
        "  scaling: proportional       # alpha = 2 r: every rank learns at the same rate\n"
    )


def _data(answers: StarterAnswers) -> str:
    lines = ["data:", f"  path: {_scalar(answers.data)}"]
    if answers.data != EMBEDDED and answers.columns:
        lines += _columns(answers.columns)
    if answers.model != EMBEDDED and answers.has_chat_template:
        lines.append("  template: chat              # the prompt of the model's own chat template")
    lines += ["  test_fraction: 0.1          # of each client's rows, if there is no test file", ""]
    return "\n".join(lines)


def _columns(found: Sequence[str]) -> list[str]:
    """Return the lines that name the columns of the data: left fedllm's names, right the data's."""
    lines = [f"  # your columns: {', '.join(found)}", "  columns:"]
    client = _first(_CLIENT_NAMES, found)
    named = {"client": client, "category": _first(("category",), found)}
    if not any(name in found for name in _TALK) and not set(_COMPLETION) <= set(found):
        named |= {
            "instruction": _first(_INSTRUCTION_NAMES, found),
            "input": _first(_INPUT_NAMES, found),
            "output": _first(_OUTPUT_NAMES, found) or found[-1],
        }
    lines += [
        f"    {key}: {'null' if name is None else _scalar(name)}" for key, name in named.items()
    ]
    if client is None:
        lines += [
            "  # no column was seen that names a client, so rows are dealt out. If there is one,",
            "  # name it above and remove this line",
            f"  partition: {{kind: iid, clients: {_NUM_CLIENTS}}}",
        ]
    return lines


def _first(names: Sequence[str], found: Sequence[str]) -> str | None:
    return next((name for name in names if name in found), None)


_CLIENTS = """clients:
  tiers:                      # classes of clients: which LoRA ranks can they afford?
    small: {ranks: 4, share: 50}
    large: {ranks: 16, share: 50}
  cohort: {fraction: 0.5}     # share of the clients that train in a round
"""

_TRAINING = """training:
  max_steps: 20               # optimizer steps of one client in one round
  batch_size: 4
  learning_rate: 1.0e-3       # the key to tune first: examples/learning_rates.yaml
"""


def _scalar(text: str) -> str:
    """Return a text as a YAML value on one line."""
    return write_yaml({"x": text}).removeprefix("x: ").rstrip("\n")

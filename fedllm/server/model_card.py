"""The model card of an export: what it is, from which base, how it was trained, how it scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from fedllm.errors import counted
from fedllm.reporting.results.gains import GROUPS
from fedllm.reporting.results.metrics import by_group
from fedllm.reporting.tables import number, rank_span
from fedllm.storage.hub import is_hub_name
from fedllm.storage.records import EvaluationRecord

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card tells.

    Attributes:
        base_model: the hub name of the base, or its folder.
        method: the method in words.
        round: the round of the state.
        ranks: the rank of every module.
        clients: the number of clients that may train; dev and unseen clients do not.
        rows: the number of their training rows.
        merged: whether the export is the whole model.
        base: the scores before training; None: not known.
        scores: the scores of the state; None: not known.
    """

    base_model: str
    method: str
    round: int
    ranks: Mapping[str, int]
    clients: int
    rows: int
    merged: bool
    base: EvaluationRecord | None
    scores: EvaluationRecord | None


def model_card(facts: CardFacts) -> str:
    """Return the text of a model card with the fields that the hub reads."""
    parts = ["\n".join(_fields(facts)), *_about(facts), *_scores(facts), _usage(facts)]
    return "\n\n".join(parts) + "\n"


def _fields(facts: CardFacts) -> Iterator[str]:
    yield "---"
    # the hub knows names, no folders
    if "/" in facts.base_model and is_hub_name(facts.base_model):
        yield f"base_model: {facts.base_model}"
    yield f"library_name: {'transformers' if facts.merged else 'peft'}"
    yield "pipeline_tag: text-generation"
    yield "tags: [lora, federated-learning, fedllm]"
    yield "---"


def _about(facts: CardFacts) -> Iterator[str]:
    what = "Model with a merged LoRA adapter" if facts.merged else "LoRA adapter"
    yield f"# {what}, trained by federated fine-tuning"
    yield (
        f"- Base: `{facts.base_model}`\n"
        f"- Method: {facts.method}, state of round {facts.round}\n"
        f"- Adapter: {rank_span(facts.ranks.values())} in {counted(len(facts.ranks), 'module')}\n"
        f"- Data: {counted(facts.clients, 'client')} with {facts.rows:,} training rows\n"
        f"- Made with fedllm {version('fedllm')}"
    )


def _scores(facts: CardFacts) -> Iterator[str]:
    if facts.scores is None:
        return
    before = by_group(facts.base.clients) if facts.base else {}
    after = by_group(facts.scores.clients)
    lines = ["| clients | number | answer loss | Rouge-L | exact match |", "|---|---|---|---|---|"]
    for group, name in GROUPS.items():
        if group not in after:
            continue
        mean, base = after[group], before.get(group)
        cells = [
            (f"{number(getattr(base, key))} -> " if base else "") + number(getattr(mean, key))
            for key in ("loss", "rouge_l", "exact_match")
        ]
        lines.append(f"| {name} | {mean.clients} | {' | '.join(cells)} |")
    yield "## Scores"
    yield "Means over clients on their test rows, base -> this state, each at its client's rank."
    yield "\n".join(lines)


def _usage(facts: CardFacts) -> str:
    base = facts.base_model
    code: Sequence[str] = (
        ("model = AutoModelForCausalLM.from_pretrained(HERE)",)
        if facts.merged
        else (
            f"base = AutoModelForCausalLM.from_pretrained({base!r})",
            "model = PeftModel.from_pretrained(base, HERE)",
        )
    )
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    imports = imports if facts.merged else ["from peft import PeftModel", *imports]
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(HERE)"
    return "\n".join(["## Use", "", "```python", *imports, "", *code, tokenizer, "```"])

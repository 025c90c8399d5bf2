"""What is it worth to answer without reading? Each client's most frequent answer, on its test rows.

    python benchmarks/evidence/frequent_answer.py RUN

Scores the clients and rows of the run's last evaluation. The answer is the most frequent one of the
client's own training rows (of equal ones, the first), so even an unseen client gets one: a bound
that a model without that client's rows cannot know. Prints means over clients, per group.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedllm.config.loading import read_config
from fedllm.data.cache import Row, TokenizedClients
from fedllm.evaluation.text_scores import exact_match, rouge_l
from fedllm.planning.evaluation_targets import choose_targets
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import PreparedRecord


def most_frequent(rows: Sequence[Row]) -> str:
    """Return the most frequent answer of some rows; empty without rows."""
    counts = Counter(row.references[0] for row in rows)
    return counts.most_common(1)[0][0] if counts else ""


def score(run: RunPaths) -> dict[str, dict[str, float]]:
    """Return mean Rouge-L and exact match over clients, per group."""
    config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
    data = TokenizedClients.open(Path(prepared.data_path))
    found: dict[str, list[tuple[float, float]]] = {}
    for target in choose_targets(config, prepared, config.rounds):
        answer = most_frequent(data.rows(target.client, "train"))
        test = data.rows(target.client, "test")
        rows = [test[index].references for index in target.rows]
        overlap = sum(rouge_l(answer, references) for references in rows) / len(rows)
        exact = sum(exact_match(answer, references) for references in rows) / len(rows)
        found.setdefault(target.group, []).append((overlap, exact))
    return {
        group: {
            "clients": len(scores),
            "rouge_l": sum(overlap for overlap, _ in scores) / len(scores),
            "exact_match": sum(exact for _, exact in scores) / len(scores),
        }
        for group, scores in found.items()
    }


def main() -> None:
    """Print a line per group."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    for group, scores in score(RunPaths(root=parser.parse_args().run.resolve())).items():
        print(json.dumps({"group": group, **scores}))


if __name__ == "__main__":
    main()

"""The most frequent answer is scored on the rows that the run's last evaluation scored."""

from pathlib import Path

from benchmarks.evidence.frequent_answer import most_frequent, score
from fedllm.data.cache import Row
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import EvaluationRecord


def test_it_is_the_first_of_the_most_frequent_ones() -> None:
    answers = ["b", "a", "a", "b", "c"]
    rows = [Row(prompt_ids=[1], answer_ids=[2], references=[answer, "c"]) for answer in answers]
    assert most_frequent(rows) == "b"
    assert most_frequent([]) == ""


def test_it_is_scored_for_the_clients_of_the_last_evaluation(finished: Path) -> None:
    run = RunPaths(root=finished)
    scored = EvaluationRecord.read(run.round(2).evaluation_record).clients
    found = score(run)
    assert {group: int(scores["clients"]) for group, scores in found.items()} == {
        group: sum(client.group == group for client in scored) for group in found
    }
    assert all(0 <= scores["exact_match"] <= 1 for scores in found.values())

"""What `make quickstart` shows is read from the two runs: answers first, then the table."""

from pathlib import Path

import fedllm
from examples.quickstart import examples, table


def test_answers_before_and_after_and_the_share_of_exact_ones_by_tier(finished: Path) -> None:
    run = fedllm.load_run(finished)
    lines = examples(run)
    assert len(lines) == run.answers[run.answers["group"] == "train"]["tier"].nunique()
    assert all("before: " in line and "   right: " in line for line in lines)
    shares = table(run, run)
    assert [*shares] == ["base", "rank 1 for all", "FlexLoRA"]
    assert {*shares.index} == {"small", "large", "all"}
    assert shares["FlexLoRA"].equals(shares["rank 1 for all"].rename("FlexLoRA"))

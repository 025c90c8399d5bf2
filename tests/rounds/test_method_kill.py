"""`kill -9` in the middle of a run of every method, then resume: the same bits."""

import json
import subprocess
import sys
from pathlib import Path

from fedllm.methods.catalog import METHODS
from fedllm.methods.local_rules import LOCAL_RULES
from tests.tiny import Tiny

REPOSITORY = Path(__file__).resolve().parents[2]
FEWEST = ["training.max_steps=2", "evaluation.every=9", "clients.cohort.count=3"]
ONE_RANK = ["clients.tiers.large.ranks=2"]
OPTIONS: dict[str, list[list[str]]] = {
    "hetlora": [["method.options={pruning: 0.5, penalty: 100.0}", "training.learning_rate=0.05"]],
    "flexlora": [
        ["method.options={truncated: keep, frozen_tail: true}"],
        ["method.server=fedavgm"],
    ],
    "factor_mean": [["method.server=fedyogi"]],
    "slora": [["method.options.sparse_rounds=1"]],
    "ffa": [["privacy.clip_norm=0.1", "aggregation.weights=uniform"]],
}


def cases() -> list[list[str]]:
    """Return the options of a run of every method, each local rule and more of its options."""
    found = []
    for name, entry in METHODS.items():
        ranks = ONE_RANK if entry.ranks == "one" else []
        common = [*FEWEST, f"method.name={name}", *ranks]
        found += [[*common, *more] for more in [[], *OPTIONS.get(name, [])]]
    # AdamW is that of all others
    return found + [[*FEWEST, f"method.local={local}"] for local in LOCAL_RULES if local != "fedit"]


def test_every_method_resumes_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.rounds.method_killing"]
    done = subprocess.run(
        [*program, str(tiny.config), str(tmp_path), json.dumps(cases())],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for options, found in zip(cases(), lines, strict=True):
        assert found["killed"], options
        assert len(found["early"]) == 2, options  # round 0 and 1: killed in the second
        method = next((w for w in options if w.startswith("method.name=")), "method.name=flexlora")
        keeps = METHODS[method.removeprefix("method.name=")].client_state
        # without a federation clients alone change
        assert len(set(found["whole"])) == (1 if keeps == "all" else 3), options
        assert found["resumed"] == found["whole"], options
        assert bool(found["kept"]) == (keeps != "none"), options
        assert found["kept_again"] == found["kept"], options

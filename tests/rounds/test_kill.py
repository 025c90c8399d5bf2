"""`kill -9` before every publication of a run, then resume."""

import json
import subprocess
import sys
from pathlib import Path

from tests.rounds.simulation import Simulation, complete, states

REPOSITORY = Path(__file__).resolve().parents[2]


def test_killed_before_any_publication_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    undisturbed = Simulation()
    complete(tmp_path / "undisturbed", undisturbed)
    expected = states(tmp_path / "undisturbed")
    program = [sys.executable, "-m", "tests.rounds.killing", str(tmp_path / "killed")]
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 30
    for kill in kills:
        assert kill["states"] == expected, f"killed before publication {kill['kill']}"
        trained = [tuple(pair) for pair in kill["trained"]]
        published = {tuple(pair) for pair in kill["published"]}
        assert len(trained) == len(set(trained))
        assert not published & set(trained), "a published client was trained again"
    assert not kills[-1]["trained"]

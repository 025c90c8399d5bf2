"""What `make quickstart` runs: one rank for all against FlexLoRA, answers before and after."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import fedllm
from fedllm.api.loaded_run import LoadedRun

CONFIG, OUT = "configs/quickstart.yaml", Path("runs")
# the bucket effect: every client at the rank of the smallest tier, A and B averaged separately
TIERS = ("tiny", "small", "wide", "large")
SMALLEST = ["method.name=factor_mean", *(f"clients.tiers.{tier}.ranks=1" for tier in TIERS)]
CAVEAT = "One seed, a base of 0.7 million weights: not enough to tell methods apart."


def main() -> None:
    """Run both, show three answers and a table, and write the report page."""
    smallest = fedllm.run(CONFIG, run_dir=OUT / "quickstart-smallest", overrides=SMALLEST)
    run = fedllm.run(CONFIG, run_dir=OUT / "quickstart")
    print("\nthe first test row of a client in each of three tiers, before and after training")
    print(*examples(run), sep="\n")
    print("\nshare of exact answers on test rows, mean over clients\n")
    print(table(smallest, run).to_string(float_format="{:.2f}".format))
    print(f"\n{CAVEAT}")
    command = [Path(sys.executable).with_name("fedllm"), "report", run.path]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    print(f"report page: {run.path / 'report.html'}")


def examples(run: LoadedRun) -> list[str]:
    """Return lines about a kept row of the first client of each of the first three tiers."""
    answers = run.answers[run.answers["group"] == "train"].set_index(["client", "row"])
    before = answers[answers["round"] == 0]["answer"]
    after = answers[answers["round"] == answers["round"].max()]
    lines = []
    for place, row in after.groupby("tier").head(1).head(3).iterrows():
        asked = row["prompt"].partition("### Instruction:\n")[2].partition("\n\n### Response")[0]
        asked = asked.replace("\n\n### Input:\n", " ")
        words = f"before: {before[place]}   after: {row['answer']}   right: {row['references'][0]}"
        lines.append(f"\n  {asked}\n      {words}")
    return lines


def table(smallest: LoadedRun, run: LoadedRun) -> Any:
    """Return the shares by tier: of the base, at one rank for all, and with FlexLoRA."""
    last = run.clients[run.clients["round"] == run.clients["round"].max()].set_index("client")
    frames = {"base": (run, 0), "rank 1 for all": (smallest, -1), "FlexLoRA": (run, -1)}
    for name, (of, place) in frames.items():
        at = sorted(of.clients["round"].unique())[place]
        last[name] = of.clients[of.clients["round"] == at].set_index("client")["test_exact_match"]
    means = last.groupby("tier")[[*frames]].mean()
    means.loc["all"] = last[[*frames]].mean()
    return means


if __name__ == "__main__":
    main()

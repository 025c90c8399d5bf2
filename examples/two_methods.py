"""Two methods on the same clients, seeds and budget, with a plot of their answer loss.

    python examples/two_methods.py                          # configs/quickstart.yaml: 5 minutes
    python examples/two_methods.py mine.yaml --set rounds=4

Runs with one seed have the same cohorts, order of rows and first adapter, so that what differs
comes from the method. One seed is no claim about methods: examples/learning_rates.yaml shows how to
ask.
"""

import argparse
from pathlib import Path

from matplotlib import pyplot

import fedllm

ARMS = {
    "FlexLoRA": ["method.name=flexlora"],
    # what a client did not receive counts as unchanged, not as zero
    "FlexLoRA, kept": ["method.name=flexlora", "method.options.truncated=keep"],
}


def compare(config: Path, out: Path, overrides: list[str]) -> Path:
    """Run every arm, or go on with it, and plot the loss on test rows over rounds."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for number, (name, changes) in enumerate(ARMS.items()):
        run = fedllm.run(config, run_dir=out / f"arm-{number}", overrides=[*overrides, *changes])
        # a row per evaluated round and group of clients; the mean over clients as deployed,
        # which means: each with the adapter of its own rank
        scores = run.groups[run.groups.group == "train"]
        axes.plot(scores["round"], scores.test_loss, marker="o", label=name)
        print(f"{name}: answer loss {scores.test_loss.iloc[-1]:.3f} after the last round")
    axes.set(xlabel="round", ylabel="answer loss, test rows of clients that train")
    axes.legend()
    figure.savefig(out / "two_methods.png", dpi=150)
    pyplot.close(figure)
    return out / "two_methods.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/two-methods"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    print(compare(given.config, given.out, given.set))

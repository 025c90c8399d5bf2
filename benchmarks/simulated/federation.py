"""Many clients without data: sizes like those of Natural Instructions, durations as recorded."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm.planning.seeding import seed_of
from fedllm.storage.records import ClientRecord, ModuleRecord, PreparedRecord

RECORDED = Path(__file__).with_name("recorded.json")

# The tokens of the 1,613 clients of Natural Instructions (10 % of each task, at most 512 tokens a
# row): a log-normal between the smallest and the largest, 42 thousand in the mean.
_LOG_MEAN, _LOG_DEVIATION = 9.79, 1.45
_FEWEST_TOKENS, _MOST_TOKENS = 388, 286_000
_TOKENS_PER_ROW = 166
# The simulated base has so many times the parameters of the recorded one and takes so many times
# the seconds per token: clients of a minute in the mean.
LARGER = 20

# small: what files hold is not the subject
MODULES = {
    "layer.q_proj": ModuleRecord(out_features=16, in_features=16, kind="attention"),
    "layer.up_proj": ModuleRecord(out_features=24, in_features=16, kind="mlp"),
}


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What a small run took: microseconds per token of clients by tier, seconds of start-ups."""

    model_parameters: int
    microseconds_per_token: Mapping[str, list[float]]
    startup_seconds: list[float]

    @classmethod
    def read(cls) -> "Recorded":
        """Read what `scale.py --record` wrote."""
        found = json.loads(RECORDED.read_text(encoding="utf-8"))
        return cls(
            model_parameters=found["model_parameters"],
            microseconds_per_token=found["microseconds_per_token"],
            startup_seconds=found["startup_seconds"],
        )

    def training_seconds(self, tier: str, tokens: float, *identity: str | int) -> float:
        """Draw how long a client trains, a function of `identity`."""
        draw = random.Random(seed_of("seconds", *identity))
        return LARGER * 1e-6 * tokens * draw.choice(self.microseconds_per_token[tier])

    def startup(self, *identity: str | int) -> float:
        """Draw how long a worker needs before it trains."""
        return random.Random(seed_of("startup", *identity)).choice(self.startup_seconds)


def prepared_record(num_clients: int, seed: int, recorded: Recorded) -> PreparedRecord:
    """Return what prepare would find for so many clients."""
    draw = random.Random(seed_of("tokens", seed))
    clients = []
    for number in range(num_clients):
        tokens = math.exp(draw.gauss(_LOG_MEAN, _LOG_DEVIATION))
        tokens = int(min(max(tokens, _FEWEST_TOKENS), _MOST_TOKENS))
        rows = max(1, tokens // _TOKENS_PER_ROW)
        clients.append(
            ClientRecord(
                id=f"task{number:05d}",
                category=f"category{number % 76}",
                train_rows=rows,
                test_rows=max(1, rows // 8),
                train_tokens=tokens,
            )
        )
    return PreparedRecord(
        model_fingerprint="base",
        model_path="nowhere",
        data_fingerprint="data",
        data_path="nowhere",
        model_parameters=LARGER * recorded.model_parameters,
        modules=MODULES,
        clients=clients,
    )

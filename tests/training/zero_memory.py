"""Measures the memory of a process that holds a part of a base; see `test_zero_memory.py`.

`zero_memory.py TINY LARGE OUT`, once for each process.
"""

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import nn

from fedllm.config.models import TrainingSection
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.model.base import load_base
from fedllm.model.memory import give_back_freed
from fedllm.packing.slots import AdapterSlots
from fedllm.training.loop import LocalSettings
from fedllm.training.partitioned import divide_base
from fedllm.training.step_plan import Draws
from fedllm.training.trainer_protocol import Member
from fedllm.training.zero import Zero
from tests.training.processes import joined
from tests.training.test_loop import TARGETS, rows_of, start

CLIENTS = 40


def private_bytes() -> int:
    """The memory of this process that is no mapping of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (own,) = (line for line in lines if line.startswith("RssAnon"))
    return int(own.split()[1]) * 1024


@contextmanager
def watched(found: list[int]) -> Iterator[None]:
    """Append the most private memory that the block has beyond that at its beginning."""
    gc.collect()
    give_back_freed()
    begun, most, over = private_bytes(), [0], Event()

    def watch() -> None:
        while not over.is_set():
            most.append(private_bytes())
            time.sleep(0.001)

    thread = Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()
    found.append(max(*most, private_bytes()) - begun)


def divided(module: nn.Module) -> list[Any]:
    return [weight for weight in module.parameters() if hasattr(weight, "ds_tensor")]


def whole_bytes(module: nn.Module) -> int:
    """The memory of the weights that are whole now."""
    return sum(4 * weight.numel() for weight in divided(module))


def trainer_of(folder: Path, processes: int) -> tuple[Zero, Member]:
    section = {
        "engine": "zero",
        "processes": processes,
        "batch_size": processes,
        "max_steps": 1,
        "gradient_checkpointing": False,
    }
    training = TrainingSection.model_validate(section)
    base = load_base(folder, dtype="float32", device="cpu", to_divide=True)
    slots = AdapterSlots(base, target_modules=TARGETS, layout="parts")
    settings = LocalSettings(training=training, rule=LOCAL_RULES["fedit"])
    adapter = start(slots)
    draws = Draws(seed=0, round=1, client="one")
    member = Member(received=lambda: adapter, rows=rows_of(0), draws=draws)
    return Zero(slots=slots, settings=settings), member


def clients_one_after_the_other(trainer: Zero, member: Member) -> list[int]:
    """The private memory after every tenth client."""
    after = []
    for number in range(CLIENTS):
        client = replace(member, draws=Draws(seed=0, round=1, client=str(number)))
        trainer.train([client])
        if number % 10 == 9:
            gc.collect()
            give_back_freed()
            after.append(private_bytes())
    return after


def main(tiny: Path, large: Path, out: Path) -> None:
    with joined() as (rank, processes):
        # packages are imported by now, which takes memory too
        after = clients_one_after_the_other(*trainer_of(tiny, processes))
        loading: list[int] = []
        gathered: list[int] = []
        with watched(loading):
            trainer, member = trainer_of(large, processes)
            divide_base(trainer.slots, torch.device("cpu"))
        model: Any = trainer.slots.base.model
        layers = model.model.layers
        for layer in layers:
            layer.register_forward_hook(lambda *_: gathered.append(whole_bytes(model)))
        # what a pass needs is known, and fetched ahead, from the third one on
        for _ in range(3):
            (result,) = trainer.train([member])
            assert not result.reason
        found = {
            "clients": after,
            "loading": loading[0],
            "gathered": max(gathered),
            "layer": sum(4 * w.ds_numel for w in divided(layers[0])),
            "part": sum(4 * w.ds_tensor.numel() for w in divided(model)),
        }
        out.with_name(f"{out.name}.{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

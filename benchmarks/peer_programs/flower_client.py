"""Flower's client: it loads the base for every call, or keeps it with FEDLLM_PEER_KEEP=1.

Loading for every call is what Flower's examples of language models do. This is a module of its own,
because Ray sends what lies in `__main__` by value, which would lose what is kept.
"""

import os
from functools import cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import set_peft_model_state_dict

from benchmarks.peer_programs.adapters import adapter_of, load_model
from benchmarks.peer_programs.work import Work, read_work, trained
from benchmarks.rounds import plain_batch, plain_steps

app = ClientApp()


@cache
def kept_work() -> Work:
    """Return the work, read once for each process: examples keep their data sets so."""
    return read_work()


@cache
def kept_model(path: str) -> Any:
    """Return the model of this process."""
    return load_model(path)


def train(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
    """Train one client from the global adapter."""
    torch.set_num_threads(1)
    keep = os.environ.get("FEDLLM_PEER_KEEP") == "1"
    work, asked = kept_work(), message.content["config"]
    client = work.rounds[asked["server-round"] - 1][asked["place"]]
    model = kept_model(work.model) if keep else load_model(work.model)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    plain_steps(model, [plain_batch(rows) for rows in client.steps])
    trained(client, len(client.steps))
    content = RecordDict(
        {
            "arrays": ArrayRecord(adapter_of(model)),
            "metrics": MetricRecord({"num-examples": client.rows}),
        }
    )
    return Message(content=content, reply_to=message)


app.train()(train)

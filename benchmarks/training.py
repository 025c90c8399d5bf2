"""Time optimizer steps of many clients: fedllm's against the plain padded step.

    python benchmarks/training.py --model BASE --data NATURAL_INSTRUCTIONS --batch 4 --cutoff 512

All ways take the same steps over the same rows in one process, group after group of clients, in
an order that is drawn every time; the first turn does not count. Each leaves out more:

    plain       as the Hugging Face loop has it: rows padded on the right, all logits (rounds.py)
    packed      rows behind each other without padding, logits of all tokens
    shared      the rows' common prefix computed once, logits of all tokens
    selected    logits where there is a loss alone: what fedllm trains a client with
    co-trained  the same with several clients in a pass (`training.clients_per_batch`)

A step is forward, backward and update; laying out its rows is timed in no way. Peak memory is that
of a process of its own for each way, over what it held before: it takes the largest steps, in host
memory on a CPU, in memory allocated on a GPU.

`--random llama-1.3b` trains random weights of that shape in place of the base's, whose tokenizer
and rows it keeps: to time a GPU, nothing else.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.inputs.adapters import MODELS
from benchmarks.measured.training_ways import WAYS, Bench, Client, Taken
from benchmarks.rounds import ALPHA, RANK, RATE, TARGETS
from fedllm.config.loading import validate
from fedllm.config.models import Config
from fedllm.data.cache import TokenizedClients
from fedllm.errors import FedllmError
from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.model.base import Base, load_base, load_tokenizer
from fedllm.model.targets import find_modules
from fedllm.packing.layout_check import find_layout
from fedllm.packing.sequences import length_of
from fedllm.packing.slots import AdapterSlots
from fedllm.programs.prepare import prepare
from fedllm.storage.paths import CachePaths
from fedllm.storage.records import PreparedRecord
from fedllm.training.loop import LocalSettings
from fedllm.training.step_plan import Draws

_PREPARED = "prepared.json"
_LARGEST = 3  # groups that the process which measures memory trains


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or be the process that measures the memory of one way."""
    asked = parsed(argv)
    torch.set_num_threads(asked.threads)
    # PEFT asks transformers by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if asked.memory_of:
        print(json.dumps({"bytes": memory_of(asked.memory_of, asked)}))
        return 0
    try:
        with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
            asked.scratch = Path(scratch)
            prepared_in(asked.scratch, asked)
            found = timed(asked)
            for name, way in found["ways"].items():
                way["peak_mib"] = peak_mib(name, asked)
            report(found, asked)
    except FedllmError as error:
        sys.exit(str(error))
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--model", default=os.environ.get("FEDLLM_MODEL", "embedded"))
    parser.add_argument("--random", choices=sorted(MODELS), help="train random weights instead")
    parser.add_argument("--data", default=os.environ.get("FEDLLM_DATA", "embedded"))
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (default: 4)")
    parser.add_argument("--cutoff", type=int, default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--clients", type=int, default=60, help="default: 60")
    parser.add_argument("--steps", type=int, default=1, help="of each client (default: 1)")
    parser.add_argument("--co", type=int, default=4, help="clients trained together (default: 4)")
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="all; ratios to the first"
    )
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--scratch", type=Path, help="where rows go (default: the system's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def configuration(asked: argparse.Namespace, data: str) -> Config:
    """Return how clients train."""
    return validate(
        {
            "model": {"path": asked.model},
            "data": {"path": data, "cutoff_tokens": asked.cutoff},
            "lora": {"target_modules": list(TARGETS), "alpha": ALPHA},
            "clients": {"tiers": {"all": {"ranks": RANK}}},
            "training": {
                "max_steps": asked.steps,
                "batch_size": asked.batch,
                "learning_rate": RATE,
                "schedule": "constant",
                "threads": asked.threads,
                "device": asked.device,
                "clients_per_batch": asked.co,
            },
        }
    )


def prepared_in(scratch: Path, asked: argparse.Namespace) -> None:
    """Tokenise the rows of the clients, as fedllm does it; of a Parquet folder, of these alone."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    data, file = asked.data, Path(asked.data) / "train.parquet"
    if file.is_file():
        ids = pc.unique(pq.read_table(file, columns=["client_id"])["client_id"]).to_pylist()
        drawn = set(random.Random(0).sample(sorted(ids), min(asked.clients, len(ids))))
        data = str(scratch / "clients")
        (scratch / "clients").mkdir()
        rows = pq.read_table(file, filters=[("client_id", "in", drawn)])
        pq.write_table(rows, scratch / "clients" / file.name)
    cache = CachePaths(root=scratch / "cache")
    prepare(configuration(asked, data), cache, lambda _line: None).publish(scratch / _PREPARED)


def groups_of(asked: argparse.Namespace) -> list[list[Client]]:
    """Return the clients, those alike in cost together, as those are that train together."""
    prepared = PreparedRecord.read(asked.scratch / _PREPARED)
    data = TokenizedClients.open(Path(prepared.data_path))
    ids = sorted(record.id for record in prepared.clients if record.train_rows)
    clients = [
        Client(draws=Draws(seed=0, round=1, client=id_), rows=data.rows(id_, "train"))
        for id_ in random.Random(0).sample(ids, min(asked.clients, len(ids)))
    ]
    settings = settings_of(asked)

    def padded(client: Client) -> int:
        return sum(
            len(rows) * max(length_of(row) for row in rows) for rows in client.batches(settings)
        )

    clients.sort(key=padded, reverse=True)
    return [clients[start : start + asked.co] for start in range(0, len(clients), asked.co)]


def settings_of(asked: argparse.Namespace) -> LocalSettings:
    """Return how clients train: with AdamW."""
    return LocalSettings(
        training=configuration(asked, asked.data).training, rule=LOCAL_RULES["fedit"]
    )


def bench_of(asked: argparse.Namespace) -> Bench:
    """Load the base twice: for the plain loop and for fedllm."""
    plain, base = base_of(asked), base_of(asked)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    found = find_layout(base.model.config, cutoff_tokens=asked.cutoff)
    layout: str = getattr(found, torch.device(asked.device).type)
    return Bench(
        plain=get_peft_model(plain.model, lora).train(),
        slots=AdapterSlots(base, target_modules=TARGETS, layout=layout),
        layout=layout,
        adapter=first_adapter(base),
        settings=settings_of(asked),
    )


def base_of(asked: argparse.Namespace) -> Base:
    """Return the base, float32 on a CPU and bfloat16 on a GPU, or random weights of a shape."""
    path = Path(PreparedRecord.read(asked.scratch / _PREPARED).model_path)
    dtype = "float32" if asked.device == "cpu" else "bfloat16"
    if asked.random is None:
        return load_base(path, dtype=dtype, device=asked.device)
    layers, hidden, inner, values = MODELS[asked.random]
    heads = hidden // 128
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads * values // hidden,
        max_position_embeddings=max(2048, asked.cutoff),
    )
    torch.manual_seed(0)
    with torch.device(asked.device):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).requires_grad_(False)
    return Base(model=model, tokenizer=load_tokenizer(path), fingerprint="", modules={})


def first_adapter(base: Base) -> Adapter:
    """Return what every client begins with."""
    draws = torch.Generator().manual_seed(0)
    return {
        name: Factors(
            a_RI=torch.randn(RANK, module.in_features, generator=draws) / module.in_features**0.5,
            b_OR=torch.zeros(module.out_features, RANK),
            scale=ALPHA / RANK,
        )
        for name, module in find_modules(base.model, TARGETS).items()
    }


def timed(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the tokens and the times of every way."""
    groups, bench = groups_of(asked), bench_of(asked)
    num_steps = sum(len(client.batches(bench.settings)) for group in groups for client in group)
    turns = [one_turn(bench, groups, asked.ways, n) for n in range(asked.repeats + 1)][1:]
    found = {}
    for name in asked.ways:
        seconds = [turn[name].seconds for turn in turns]
        found[name] = {
            "tokens_a_step": turns[0][name].tokens / num_steps,
            "ms_a_step": [1e3 * each / num_steps for each in seconds],
            "times_as_fast": [
                turn[asked.ways[0]].seconds / each
                for turn, each in zip(turns, seconds, strict=True)
            ],
        }
    return {"layout": bench.layout, "steps": num_steps, "groups": len(groups), "ways": found}


def one_turn(
    bench: Bench, groups: Sequence[Sequence[Client]], names: list[str], turn: int
) -> dict[str, Taken]:
    """Take all steps in all ways: of each group in one way after the other, in any order."""
    total = dict.fromkeys(names, Taken(seconds=0.0, tokens=0))
    orders = random.Random(turn)
    for group in groups:
        for name in orders.sample(names, len(names)):
            taken, before = WAYS[name](bench, group), total[name]
            total[name] = Taken(
                seconds=before.seconds + taken.seconds, tokens=before.tokens + taken.tokens
            )
    return total


def peak_mib(way: str, asked: argparse.Namespace) -> float:
    """Return what a process that trains in one way needs at most beside the loaded models."""
    command = [sys.executable, "-m", "benchmarks.training", f"--memory-of={way}"]
    names = "device", "model", "data", "batch", "cutoff", "clients", "steps", "co", "threads"
    command += [f"--{name}={getattr(asked, name)}" for name in (*names, "scratch")]
    command += [f"--random={asked.random}"] if asked.random else []
    root = Path(__file__).parents[1]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=root)
    return float(json.loads(done.stdout.splitlines()[-1])["bytes"]) / 2**20


def memory_of(way: str, asked: argparse.Namespace) -> int:
    """Train the largest groups in one way; return the bytes that it took at most."""
    largest, bench = groups_of(asked)[:_LARGEST], bench_of(asked)
    on_gpu = bench.slots.device.type == "cuda"
    if on_gpu:
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status_bytes("VmRSS")
    peak = 0
    # training begins the count of a GPU anew for every client
    for clients in largest if way == "co-trained" else [[c] for group in largest for c in group]:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        WAYS[way](bench, clients)
        peak = max(peak, torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM"))
    return peak - before


def status_bytes(name: str) -> int:
    """Return a size of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


def report(found: dict[str, Any], asked: argparse.Namespace) -> None:
    """Print the figures of all ways."""
    if asked.json:
        given = {name: str(value) for name, value in vars(asked).items() if name != "scratch"}
        print(json.dumps({"asked": given, **found}, indent=1))
        return
    print(
        f"{found['steps']} steps of {asked.batch} rows, at most {asked.cutoff} tokens, on "
        f"{asked.device} ({found['layout']}), {asked.threads} threads; "
        f"{asked.co} clients co-trained"
    )
    for name, way in found["ways"].items():
        ms, fast = way["ms_a_step"], way["times_as_fast"]
        print(
            f"{name:10} {way['tokens_a_step']:7.0f} tokens a step "
            f"{statistics.median(ms):8.1f} ms ({min(ms):.1f}-{max(ms):.1f}) "
            f"{statistics.median(fast):5.2f} x ({min(fast):.2f}-{max(fast):.2f}) "
            f"{way['peak_mib']:7.0f} MiB"
        )


if __name__ == "__main__":
    sys.exit(main())

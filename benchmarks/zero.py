"""What DeepSpeed ZeRO divides, and what a step costs: by stage, against plain data parallelism.

    python benchmarks/zero.py --model BASE --processes 2
    python benchmarks/zero.py --shape 24x2048x5504 --dtype bfloat16 --variants stage-2,stage-3

Every variant trains one client of random rows, in processes of its own:

    plain       one process, the plain engine
    parallel    plain data parallelism: whole state in every process, gradients summed by all-reduce
    stage-N     the zero engine

Bytes are those of the first process: tensors of the base (`base`), of the gradients and of the
optimizer after the last step, beside what the formula says for N processes, P weights of which V in
vectors, and F trained factors of 4 bytes:

    base        whole below stage 3, else (P - V) / N + V, in `model.dtype`
    gradients   those that the optimizer reads: 4 F / N; plain and parallel: 4 F
    optimizer   AdamW: 8 F / N; plain and parallel: 8 F

`private` is the most memory of the process that is no mapping of a file, `mapped` the most that is,
both beyond what it had before it loaded the base. A base in the format of its files is mapped, and
all processes of a node share it; what stage 3 keeps of it is private. A step's time is the median
of all but the first two, with the extremes; `CPU` is the processor time of the first process in it.

Lines on stderr tell how far it is.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.config.models import TrainingSection
from fedllm.embedded.embedded_text import build_tokenizer
from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.model.base import load_base
from fedllm.packing.slots import AdapterSlots
from fedllm.scheduling.heap import with_heap_settings
from fedllm.training.loop import LocalSettings, Loop, TrainResult
from fedllm.training.plain import Plain
from fedllm.training.shares import divide_rows
from fedllm.training.step_plan import Draws
from fedllm.training.trainer_protocol import Member
from fedllm.training.zero import Zero

VARIANTS = ("plain", "parallel", "stage-1", "stage-2", "stage-3")
WARM_UP = 2
BYTES = {"float32": 4, "bfloat16": 2}
LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Row:
    """A row of tokens."""

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_targets: Sequence[int] = ()


class ParallelLoop(Loop):
    """Steps of a client whose rows are divided and whose gradients are summed, all else whole."""

    def step(self, number: int) -> None:
        """Take one optimizer step."""
        rows = [self._rows[place] for place in self._steps[number]]
        lengths = [len(row.prompt_ids) + len(row.answer_ids) for row in rows]
        own = divide_rows(lengths, dist.get_world_size())[dist.get_rank()]
        passes = self.passes(number, self._slots.layout, own) if own else []
        targets = sum(len(row.answer_ids) for row in rows)
        total = torch.zeros(())
        for each in passes:
            self._slots.rows.enter(self.pieces(number, each))
            loss = each.loss_sum(self._slots.model) / targets
            loss.backward()
            total += loss.detach()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        flat = torch.cat([total.view(1), *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        pieces = torch.split(flat[1:], [gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
        self.end_step(number, passes, flat[0])


class Parallel(Plain):
    """Plain data parallelism."""

    def train(self, members: Sequence[Member], **more: Any) -> list[TrainResult]:
        """Train the only member."""
        (member,) = members
        installed = self.slots.install(member.received())
        loop = ParallelLoop(self.slots, installed, member.rows, self.settings, member.draws)
        before_step = more["before_step"]
        return [loop.run(None, lambda step, snapshot: before_step(step, lambda: [snapshot()]))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or be one of the processes of a variant."""
    asked = parsed(argv)
    if asked.serve:
        serve(asked)
        return 0
    if asked.scratch is not None:
        asked.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        if asked.model is None:
            asked.model = random_base(asked.shape, asked.dtype, Path(scratch))
        for turn in range(asked.turns):
            for variant in asked.variants.split(","):
                found = [json.loads(line) for line in run(asked, variant, Path(scratch))]
                report(found[0], asked, turn)
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, help="a model directory; default: random weights")
    parser.add_argument("--shape", default="4x512x1376", help="LAYERSxHIDDENxMLP of random weights")
    parser.add_argument("--dtype", default="float32", choices=sorted(BYTES))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--tokens", type=int, default=128, help="of a row, a quarter of it answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def random_base(shape: str, dtype: str, scratch: Path) -> Path:
    """Write a base of random weights, with the tokenizer of the embedded base."""
    layers, hidden, mlp = map(int, shape.split("x"))
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype=dtype,
    )
    folder = scratch / "base"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    write_random_weights(model, getattr(torch, dtype), folder)
    return folder


def write_random_weights(model: torch.nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Write weights in the shapes of a model, a file for each layer."""
    # drawing 10^9 numbers takes a minute: these are the same ones again and again
    some = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    some = some.to(dtype)
    files: dict[str, dict[str, Tensor]] = {}
    for name, weight in model.state_dict().items():
        found = LAYER.match(name)
        files.setdefault(f"model-{found[1] if found else 'rest'}.safetensors", {})[name] = weight
    for file, weights in files.items():
        say(f"random weights: {file}, of {len(files)} files")
        made = {
            name: torch.ones(weight.shape, dtype=dtype)
            if weight.ndim == 1
            else some.repeat(-(-weight.numel() // len(some)))[: weight.numel()].view(weight.shape)
            for name, weight in weights.items()
        }
        save_file(made, folder / file, metadata={"format": "pt"})
    places = {name: file for file, weights in files.items() for name in weights}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def say(line: str) -> None:
    """Tell on stderr what is going on."""
    print(line, file=sys.stderr, flush=True)


def run(asked: argparse.Namespace, variant: str, scratch: Path) -> list[str]:
    """Run a variant in its processes; return what each of them found."""
    count = 1 if variant == "plain" else asked.processes
    say(f"{variant}: {count} {'process' if count == 1 else 'processes'}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(count):
        out = scratch / f"{variant}.{rank}.json"
        group = {"BENCH_RANK": str(rank), "BENCH_COUNT": str(count), "BENCH_PORT": str(port)}
        command = [sys.executable, __file__, "--serve", variant, "--out", str(out)]
        for name in ("model", "dtype", "processes", "rows", "tokens", "rank", "steps", "threads"):
            command += [f"--{name}", str(getattr(asked, name))]
        environment = with_heap_settings({**os.environ, **group})
        started.append((subprocess.Popen(command, env=environment), out))
    ends = [process.wait() for process, _ in started]
    if any(ends):
        sys.exit(f"{variant}: a process failed")
    return [out.read_text() for _, out in started]


def serve(asked: argparse.Namespace) -> None:
    """Train as a process of a variant, and write what was found."""
    torch.set_num_threads(asked.threads)
    rank, count, port = (int(os.environ[f"BENCH_{name}"]) for name in ("RANK", "COUNT", "PORT"))
    if count > 1:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, count, is_master=rank == 0, timeout=timedelta(minutes=10)
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    found = measured(asked, count)
    asked.out.write_text(json.dumps(found))
    if count > 1:
        dist.destroy_process_group()


def measured(asked: argparse.Namespace, count: int) -> dict[str, Any]:
    """Train, and return seconds and bytes."""
    stage = int(asked.serve.removeprefix("stage-")) if asked.serve.startswith("stage") else None
    to_divide = stage == 3 and count > 1
    if stage:
        # what it takes to import it is not what it divides
        os.environ["DS_ACCELERATOR"] = "cpu"
        import_module("deepspeed")
    memory = MemoryWatch()
    base = load_base(asked.model, dtype=asked.dtype, device="cpu", to_divide=to_divide)
    targets = [name for name in base.modules if name.rpartition(".")[2] in TARGETS]
    adapter = started_adapter(base.modules, targets, asked.rank)
    weights = sum(w.numel() for w in base.model.parameters())
    vectors = sum(w.numel() for w in base.model.parameters() if w.ndim == 1)
    slots = AdapterSlots(base, target_modules=targets, layout="parts")
    trainer = TRAINERS.get(asked.serve, Zero)(slots=slots, settings=settings(asked, stage, count))
    rows = random_rows(asked)
    member = Member(received=lambda: adapter, rows=rows, draws=Draws(seed=0, round=1, client="one"))
    clock = StepClock(asked.serve)
    sizes = OptimizerSizes()
    with sizes:
        (result,) = trainer.train([member], before_step=lambda _step, _save: clock.read())
    clock.read()
    assert not result.reason, result.reason
    own = list(base.model.parameters())
    adapters = {id(p) for n, p in base.model.named_parameters() if "lora_" in n}
    return {
        **memory.most(),
        "base": sum(base_bytes(w) for w in own if id(w) not in adapters),
        "gradients": sizes.gradients,
        "optimizer": sizes.state,
        "weights": weights,
        "vectors": vectors,
        "factors": sum(f.a_RI.numel() + f.b_OR.numel() for f in adapter.values()),
        "count": count,
        "stage": stage,
        "losses": result.stats.losses,
        "seconds": clock.seconds(),
        "cpu_seconds": clock.cpu_seconds(),
    }


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINERS: dict[str, Any] = {"plain": Plain, "parallel": Parallel}


def base_bytes(weight: Tensor) -> int:
    """Return the bytes that a process holds of a weight between steps."""
    part = getattr(weight, "ds_tensor", None)
    kept = part.nbytes if part is not None else 0
    return kept + weight.data.nbytes


class StepClock:
    """The times of steps: it is read before every step and after the last."""

    def __init__(self, variant: str) -> None:
        self._variant, self._begun = variant, time.perf_counter()
        self._moments: list[float] = []
        self._cpu_moments: list[float] = []

    def read(self) -> None:
        """Note the time; the first process of a variant tells it."""
        self._moments.append(time.perf_counter())
        self._cpu_moments.append(time.process_time())
        if os.environ["BENCH_RANK"] == "0":
            done, passed = len(self._moments) - 1, self._moments[-1] - self._begun
            say(f"{self._variant}: {done} steps after {passed:.1f} s")

    def seconds(self) -> list[float]:
        """Return the seconds of each step but the first ones."""
        return [b - a for a, b in pairwise(self._moments)][WARM_UP:]

    def cpu_seconds(self) -> list[float]:
        """Return the processor time of each step but the first ones."""
        return [b - a for a, b in pairwise(self._cpu_moments)][WARM_UP:]


class OptimizerSizes:
    """The bytes of gradients and of what the optimizer keeps, at its last step."""

    gradients = 0
    state = 0

    def __enter__(self) -> "OptimizerSizes":
        """Watch the steps of the block."""
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        owned = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.gradients = sum(gradient.nbytes for gradient in owned)

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        parts = [part for kept in optimizer.state.values() for part in kept.values()]
        self.state = sum(part.nbytes for part in parts if isinstance(part, Tensor) and part.ndim)


class MemoryWatch:
    """The most memory of this process since now, by kind."""

    def __init__(self) -> None:
        self._over, self._begun = Event(), memory_bytes()
        self._most = self._begun
        self._thread = Thread(target=self._watch, daemon=True)
        self._thread.start()

    def most(self) -> dict[str, int]:
        """Stop watching; return the most bytes of each kind beyond the first ones."""
        self._over.set()
        self._thread.join()
        return {kind: most - self._begun[kind] for kind, most in self._most.items()}

    def _watch(self) -> None:
        while not self._over.is_set():
            self._most = {kind: max(self._most[kind], n) for kind, n in memory_bytes().items()}
            time.sleep(0.005)


def memory_bytes() -> dict[str, int]:
    """Return the memory of this process that is no mapping of a file, and that which is."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    kinds = {"private": "RssAnon", "mapped": "RssFile"}
    return {kind: int(sizes[name]) * 1024 for kind, name in kinds.items()}


def settings(asked: argparse.Namespace, stage: int | None, count: int) -> LocalSettings:
    """Return how the client trains."""
    zero = {"engine": "zero", "processes": count, "zero": {"stage": stage}} if stage else {}
    section = {
        "batch_size": asked.rows,
        "max_steps": asked.steps,
        "epochs": asked.steps,
        "gradient_checkpointing": True,
        **zero,
    }
    return LocalSettings(
        training=TrainingSection.model_validate(section), rule=LOCAL_RULES["fedit"]
    )


def random_rows(asked: argparse.Namespace) -> list[Row]:
    """Return the rows of a step, of about equal length."""
    draws = torch.Generator().manual_seed(0)
    texts = torch.randint(2, 250, (asked.rows, asked.tokens), generator=draws).tolist()
    answer = asked.tokens // 4
    return [Row(text[: -answer - n], text[-answer - n :]) for n, text in enumerate(texts)]


def started_adapter(modules: Any, targets: Sequence[str], rank: int) -> Adapter:
    """Return an adapter as a client receives it first."""
    draws = torch.Generator().manual_seed(0)
    return {
        name: Factors(
            a_RI=torch.randn(rank, modules[name].in_features, generator=draws),
            b_OR=torch.zeros(modules[name].out_features, rank),
            scale=2.0,
        )
        for name in targets
    }


def formula(found: dict[str, Any], dtype: str) -> dict[str, float]:
    """Return the bytes of a process by the formula of the stage."""
    count, stage = found["count"], found["stage"]
    weights, vectors, factors = (found[name] for name in ("weights", "vectors", "factors"))
    divided = count if stage else 1
    base = (weights - vectors) / count + 2 * vectors if stage == 3 and count > 1 else weights
    return {
        "base": base * BYTES[dtype],
        "gradients": 4 * factors / divided,
        "optimizer": 8 * factors / divided,
    }


def report(found: dict[str, Any], asked: argparse.Namespace, turn: int) -> None:
    """Print a variant: bytes beside the formula, seconds of a step."""
    name = "plain" if found["count"] == 1 and not found["stage"] else f"{found['count']} processes"
    seconds = sorted(found["seconds"])
    expected = formula(found, asked.dtype)
    if asked.json:
        print(json.dumps({**found, "formula": expected}))
        return
    parts = [f"{key} {found[key] / 1e6:.2f} MB ({expected[key] / 1e6:.2f})" for key in expected]
    stage = f"stage {found['stage']}" if found["stage"] else "no ZeRO"
    print(
        f"turn {turn}: {name}, {stage}: {', '.join(parts)}, private {found['private'] / 1e6:.0f} "
        f"MB, mapped {found['mapped'] / 1e6:.0f} MB, step {statistics.median(seconds):.2f} s "
        f"({seconds[0]:.2f} to {seconds[-1]:.2f}), "
        f"CPU {statistics.median(found['cpu_seconds']):.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())

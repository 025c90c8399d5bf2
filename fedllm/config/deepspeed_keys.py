"""Keys of DeepSpeed that a user may set, and those that follow from keys of fedllm."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"
_ZERO = "zero_optimization"


@dataclass(frozen=True, kw_only=True)
class _Derived:
    """A key of DeepSpeed whose value follows from a key of fedllm; None: from the data."""

    key: str
    value: Callable[[Any], object] = lambda _training: None
    why: str = ""


# DeepSpeed's key -> where its value comes from; `auto` and that value are accepted
_DERIVED: Mapping[str, _Derived] = {
    "train_batch_size": _Derived(key="training.batch_size", value=lambda t: t.batch_size),
    "train_micro_batch_size_per_gpu": _Derived(
        key="training.micro_batch_size", value=lambda t: t.micro_batch_size
    ),
    "gradient_accumulation_steps": _Derived(key="training.micro_batch_size"),
    "gradient_clipping": _Derived(key="training.clip_norm", value=lambda t: t.clip_norm or 0.0),
    "bf16.enabled": _Derived(key="training.precision", value=lambda t: t.precision == "bfloat16"),
    "fp16.enabled": _Derived(
        key="training.precision",
        value=lambda _: False,
        why=": fedllm trains in float32 or bfloat16, on CPU and GPU",
    ),
    f"{_ZERO}.stage": _Derived(key="training.zero.stage", value=lambda t: t.zero.stage),
    f"{_ZERO}.offload_optimizer.device": _Derived(
        key="training.zero.offload", value=lambda t: t.zero.offload
    ),
    f"{_ZERO}.offload_param.device": _Derived(key="training.zero.offload", value=lambda _: "none"),
    "optimizer": _Derived(key="method.local"),
    "scheduler": _Derived(key="training.schedule"),
}
# passed on to the engine of the factors
_TO_ENGINE = (
    *("communication_data_type", "comms_logger", "wall_clock_breakdown", "memory_breakdown"),
    *(
        f"{_ZERO}.{name}"
        for name in (
            *("reduce_bucket_size", "allgather_bucket_size", "allgather_partitions"),
            *("reduce_scatter", "overlap_comm", "contiguous_gradients"),
        )
    ),
    *(f"{_ZERO}.offload_optimizer.{name}" for name in ("pin_memory", "buffer_count")),
)
# of a base that is divided; DeepSpeed's key -> its name where the base is divided
_TO_BASE: Mapping[str, str] = {
    f"{_ZERO}.stage3_prefetch_bucket_size": "prefetch_bucket_size",
    f"{_ZERO}.stage3_max_live_parameters": "max_live_parameters",
    f"{_ZERO}.stage3_max_reuse_distance": "max_reuse_distance",
}


def deepspeed_problems(given: Mapping[str, Any], training: Any) -> Iterator[str]:
    """Yield a line for every key that contradicts one of fedllm, or would have no effect.

    Args:
        given: `training.deepspeed`.
        training: the section `training`, as it holds for clients of the engine `zero`.
    """
    for name, value in _leaves(given):
        where = f"training.deepspeed.{name}: got {value!r}"
        derived = _derived(name)
        if derived is not None:
            own = derived.value(training)
            if value not in (AUTO, own):
                decides = f"but {derived.key} decides it{_now(own)}{derived.why}"
                yield f"{where}, {decides}; remove it, or set that key"
        elif name in _TO_BASE:
            if training.zero.stage < 3:
                yield (
                    f"{where}, without effect at training.zero.stage {training.zero.stage}; "
                    "remove it, or training.zero.stage: 3"
                )
        elif not _is_for_engine(name):
            yield f"{where}, which fedllm does not pass on; need one of {', '.join(_accepted())}"


def for_engine(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is passed on to the engine of the factors, nested as DeepSpeed has it."""
    nested: dict[str, Any] = {}
    for name, value in _leaves(given):
        if _is_for_engine(name):
            *parents, last = name.split(".")
            node = nested
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
    return nested


def for_base(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is passed on where a base is divided."""
    return {_TO_BASE[name]: value for name, value in _leaves(given) if name in _TO_BASE}


def _leaves(given: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_for_engine(name: str) -> bool:
    return any(name == key or name.startswith(f"{key}.") for key in _TO_ENGINE)


def _derived(name: str) -> _Derived | None:
    name = name.replace("bfloat16.", "bf16.")
    whole = name.partition(".")[0]
    return _DERIVED.get(name) or (_DERIVED.get(whole) if whole != name else None)


def _now(own: object) -> str:
    return "" if own is None else f" (now {own!r})"


def _accepted() -> list[str]:
    return sorted([*_TO_ENGINE, *_TO_BASE, *_DERIVED])

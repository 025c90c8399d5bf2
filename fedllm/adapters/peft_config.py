"""The file `adapter_config.json`: PEFT's fields for factors, and which adapters are refused."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedllm.adapters.tensor_names import same_place
from fedllm.config.scales import scale_of
from fedllm.config.target_modules import pattern_problem
from fedllm.errors import AdapterError

CONFIG = "adapter_config.json"

# Keys of adapters that are more than `W + scale B A`, or start from another W, and their names.
_MORE_THAN_LORA: Mapping[str, str] = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save (whole layers)",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "a trained bias (lora_bias)",
    "target_parameters": "LoRA on parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_POINTER = b"version https://git-lfs"
_SHOWN = 5
# a module of a mixture of experts may have a pattern of its own
_MOST_PATTERNS = 20_000

Value = TypeVar("Value")
Rank = Annotated[int, Field(ge=1)]
# PEFT has names as a set: their order in the file has no meaning
Names = Annotated[
    list[str] | str | None,
    AfterValidator(lambda names: sorted(names) if isinstance(names, list) else names),
]
# PEFT writes null if there is no pattern
_Pattern = BeforeValidator(lambda value: {} if value is None else value)


class AdapterConfig(BaseModel):
    """The adapter fields that are read, with PEFT's defaults; other fields are ignored."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    r: Rank = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names = None
    rank_pattern: Annotated[dict[str, Rank], _Pattern] = {}
    alpha_pattern: Annotated[dict[str, float], _Pattern] = {}

    @property
    def base(self) -> str | None:
        """The base model as one name, with its revision; a folder has its real path."""
        if not self.base_model_name_or_path:
            return None
        path = Path(self.base_model_name_or_path)
        name = str(path.resolve()) if path.is_dir() else self.base_model_name_or_path.rstrip("/")
        return f"{name} (revision {self.revision})" if self.revision else name

    def rank(self, module: str) -> int:
        """Return the rank that PEFT gives to a module."""
        return _of_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Return the scale that PEFT gives to a module's `B A`."""
        return scale_of(
            alpha=_of_pattern(self.alpha_pattern, module, self.lora_alpha),
            scaling="rslora" if self.use_rslora else "fixed",
            rank=self.rank(module),
        )


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the configuration of a PEFT adapter folder.

    Raises:
        AdapterError: the file is missing or broken, or the adapter is more than A and B; the
            message names the folder and the field.
    """
    raw = _read_json(folder)
    _refuse_more_than_lora(folder, raw)
    try:
        config = AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdapterError(
            f"{folder / CONFIG}: {where}: got {first['input']!r} ({first['msg']}); correct it"
        ) from error
    _refuse_patterns(folder / CONFIG, config)
    return config


def _refuse_patterns(file: Path, config: AdapterConfig) -> None:
    """Refuse patterns that are none, or that could take for ever: anybody may have written them."""
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = getattr(config, field)
        if len(patterns) > _MOST_PATTERNS:
            raise AdapterError(
                f"{file}: {field} has {len(patterns)} patterns, need at most {_MOST_PATTERNS}"
            )
        for pattern in patterns:
            if problem := pattern_problem(_whole(pattern)):
                raise AdapterError(f"{file}: {field}: the pattern {pattern[:200]!r}: {problem}")


def _whole(pattern: str) -> str:
    """Return the expression by which PEFT matches the name of a module."""
    return rf"(.*\.)?({pattern})$"


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    # re's own cache is too small for a pattern per module
    return re.compile(_whole(pattern))


def _of_pattern(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """Return the value of the first pattern that matches the end of the module's name, as PEFT.

    If none matches, return that of the first pattern that is another name of the module.
    """
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    named = (value for pattern, value in patterns.items() if same_place(pattern, module))
    return next(named, patterns.get(module, default))


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise AdapterError(f"{folder}: {problem}; give the folder of a PEFT adapter")
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder}: not a PEFT adapter (no {CONFIG}){adapters_below(folder)}")
    refuse_pointer(path)
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: cannot be read ({error}); copy the adapter again") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: got a {type(raw).__name__}, need PEFT's keys and values")
    return raw


def refuse_pointer(path: Path) -> None:
    """Raise AdapterError if a file is a pointer of Git LFS to the real file.

    Raises:
        AdapterError: the file is a pointer.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise AdapterError(
                f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its "
                "repository, or download it"
            )


def adapters_below(folder: Path) -> str:
    """Return the end of a message if sub-folders are adapters: their names; else empty."""
    names = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"; it holds the adapters {', '.join(names[:_SHOWN])}{more}: give {folder / names[0]}"


def _refuse_more_than_lora(folder: Path, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder}: peft_type is {kind!r}, need LORA; leave it out")
    for key, name in _MORE_THAN_LORA.items():
        if raw.get(key):
            raise AdapterError(
                f"{folder}: holds {name}, which is more than lora_A and lora_B; train without {key}"
            )
    if raw.get("bias") not in (None, "none"):
        raise AdapterError(
            f"{folder}: holds trained biases (bias: {raw['bias']}); train with bias: none"
        )
    start = str(raw.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{folder}: init_lora_weights {start} changes the base weights; save it again with "
            "path_initial_model_for_weight_conversion"
        )

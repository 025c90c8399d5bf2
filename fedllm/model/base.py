"""The base model: found, described without its weights, loaded from local files only."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from fedllm.config.models import ModelSection
from fedllm.errors import ModelError
from fedllm.model.embedded import Report, embedded_base
from fedllm.model.fingerprint import check_model_folder, fingerprint_model
from fedllm.storage.folders import publishing_folder
from fedllm.storage.hub import first_line, hub_key, is_hub_name
from fedllm.storage.paths import CachePaths
from fedllm.storage.records import ModuleRecord

EMBEDDED = "embedded"
Kind = Literal["attention", "mlp", "other"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what a causal language model needs of a hub repository: no second copy of the weights
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|\bfc\d|dense_(h_to|4h_to)|(gate|up|down)_proj")
_ATTENTION_LEAVES = re.compile(r"\b(([qkvo]|qkv|out)_proj|query|key|value|query_key_value|W?qkv)$")


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model in memory; it never trains. `modules` are all that could be adapted."""

    model: nn.Module
    tokenizer: Any
    fingerprint: str
    modules: dict[str, ModuleRecord]


@dataclass(frozen=True, kw_only=True)
class BaseDescription:
    """What is known of a base without loading its weights; `config` is transformers' own."""

    path: Path
    fingerprint: str
    parameters: int
    modules: dict[str, ModuleRecord]
    config: Any


def locate_base(section: ModelSection, cache: CachePaths, report: Report) -> Path:
    """Return the directory of a base, made or fetched into the cache where need be.

    What was fetched of a hub name stays the same; another `model.revision` is another directory.

    Raises:
        ModelError: there is no such directory, and no such name on the hub or no way to it.
    """
    if section.path == EMBEDDED:
        return embedded_base(cache, report)
    folder = Path(section.path).expanduser()
    if not folder.exists() and is_hub_name(section.path):
        folder = _fetch(section.path, section.revision, cache, report)
    check_model_folder(folder)
    return folder.resolve()


def describe_base(folder: Path, target_modules: Sequence[str]) -> BaseDescription:
    """Describe a base by its configuration; no weight is read but for the fingerprint.

    Raises:
        ModelError: it is no causal language model, or has not the target modules.
    """
    fingerprint = fingerprint_model(folder)
    with _told(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config)
    return BaseDescription(
        path=folder,
        fingerprint=fingerprint,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        modules=find_modules(model, target_modules),
        config=config,
    )


def load_base(path: Path, *, dtype: str, device: str | torch.device) -> Base:
    """Load a base from its directory, without any network.

    Raises:
        ModelError: it cannot be loaded, or its weights do not fill the model.
    """
    fingerprint = fingerprint_model(path)
    # a bar for every worker would fill the logs
    disable_progress_bar()
    with _told(path):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=_DTYPES[dtype], output_loading_info=True
        )
    if loading["missing_keys"]:
        names = sorted(loading["missing_keys"])
        raise ModelError(
            f"model.path: {path} lacks the weights of {', '.join(names[:3])}"
            f"{' and more' if len(names) > 3 else ''}; restore its files"
        )
    model = model.to(device).eval().requires_grad_(False)
    return Base(
        model=model,
        tokenizer=load_tokenizer(path),
        fingerprint=fingerprint,
        modules=_adaptable(model),
    )


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a model directory, without any network.

    Raises:
        ModelError: there is none.
    """
    with _told(path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)


def find_modules(model: nn.Module, target_modules: Sequence[str]) -> dict[str, ModuleRecord]:
    """Return the modules that `target_modules` name: by full path, or by its last parts.

    Raises:
        ModelError: a name fits no module, or one that cannot be adapted.
    """
    adaptable = _adaptable(model)
    found: dict[str, ModuleRecord] = {}
    for target in target_modules:
        fitting = {path: m for path, m in adaptable.items() if f".{path}".endswith(f".{target}")}
        if not fitting:
            raise ModelError(_no_module(model, target, adaptable))
        found |= fitting
    return {path: found[path] for path in adaptable if path in found}


def _adaptable(model: nn.Module) -> dict[str, ModuleRecord]:
    causal: Any = model
    head = causal.get_output_embeddings()
    return {
        path: ModuleRecord(
            out_features=module.out_features, in_features=module.in_features, kind=_kind(path)
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _kind(path: str) -> Kind:
    """Say what a module belongs to: by the parts of its path, the last one deciding last."""
    parents, _, leaf = path.rpartition(".")
    if _ATTENTION.search(parents):
        return "attention"
    if _MLP.search(path):
        return "mlp"
    return "attention" if _ATTENTION.search(leaf) or _ATTENTION_LEAVES.search(leaf) else "other"


def _no_module(model: nn.Module, target: str, adaptable: Mapping[str, ModuleRecord]) -> str:
    name = type(model).__name__
    for path, module in model.named_modules():
        if path and f".{path}".endswith(f".{target}"):
            return (
                f"lora.target_modules: `{target}` of {name} is a {_described(module)}, only Linear "
                "modules can be adapted; choose another base or other modules"
            )
    leaves = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in adaptable)) or "none"
    return f"lora.target_modules: {name} has no module `{target}`; it has {leaves}"


def _described(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{name} (weights stored transposed)" if isinstance(module, Conv1D) else name


def _fetch(name: str, revision: str | None, cache: CachePaths, report: Report) -> Path:
    folder = cache.model(hub_key(name, revision))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    report(f"model {name}: fetching it from the Hugging Face hub, once")
    try:
        with publishing_folder(folder) as beside:
            snapshot_download(name, revision=revision, local_dir=beside, allow_patterns=_HUB_FILES)
            check_model_folder(beside)
    except Exception as error:  # the hub's client raises its own, httpx's and OSError
        raise ModelError(
            f"model.path: {name}: no such directory, and no model that the Hugging Face hub gives "
            f"us ({first_line(error)}); correct it, or run `fedllm prepare` where the network is"
        ) from error
    return folder


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn what transformers raises into one line that names the directory."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model.path: {folder} cannot be loaded ({first_line(error)}); need a causal language "
            "model with its tokenizer, as save_pretrained writes them"
        ) from error

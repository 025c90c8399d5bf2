"""The base model: found, described without its weights, loaded from local files only."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fedllm.config.models import ModelSection
from fedllm.config.target_modules import Targets
from fedllm.errors import ModelError
from fedllm.model.base_files import check_base_files, check_shapes
from fedllm.model.embedded_base import Report, embedded_base
from fedllm.model.fingerprint import check_model_folder, fingerprint_model
from fedllm.model.quantised import KINDS, quantisation_text, quantise
from fedllm.model.suitable import suitable_modules
from fedllm.model.targets import adaptable_modules
from fedllm.model.unread_weights import UnreadWeights, set_format, stored_format
from fedllm.model.vocabulary import embedded_tokens
from fedllm.model.weight_files import weight_shards
from fedllm.storage.hub import first_line, hub_key, is_hub_name
from fedllm.storage.kept_records import Count, uncounted
from fedllm.storage.paths import CachePaths
from fedllm.storage.publishing.folders import publishing_folder
from fedllm.storage.records import ModuleRecord

EMBEDDED = "embedded"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# the files of a hub repository that a causal language model needs, without other copies of weights
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# no network, and no Python code from a folder, whatever its files or standard input say
_LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_SENTENCEPIECE = "*tokenizer*.model"
_CONVERTERS: Mapping[str, str] = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _ignore(_line: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model in memory; it never trains.

    Attributes:
        model: its layers.
        tokenizer: its tokenizer.
        fingerprint: the hash of its directory's content.
        modules: all that can have an adapter.
        unread: its weights where they are not in memory yet, but in its files; None: they are.
        quantisation: what the bits of its linear layers depend on; empty: they are not quantised.
    """

    model: nn.Module
    tokenizer: Any
    fingerprint: str
    modules: dict[str, ModuleRecord]
    unread: UnreadWeights | None = None
    quantisation: str = ""


@dataclass(frozen=True, kw_only=True)
class BaseDescription:
    """A description of a base, made without loading its weights.

    Attributes:
        path: the directory.
        fingerprint: the hash of its content.
        parameters: number of parameters.
        linear_parameters: those of linear layers but for the output head, which can be quantised.
        modules: the modules that get an adapter.
        embedded_tokens: number of tokens that the base has an embedding for.
        config: the configuration of transformers.
    """

    path: Path
    fingerprint: str
    parameters: int
    linear_parameters: int
    modules: dict[str, ModuleRecord]
    embedded_tokens: int
    config: Any


def locate_base(
    section: ModelSection, cache: CachePaths, report: Report, count: Count = uncounted
) -> Path:
    """Return the directory of a base; make it or fetch it into the cache if needed.

    A base that was fetched from the hub stays the same; another `model.revision` gets another
    directory.

    Raises:
        ModelError: there is no such directory, and the hub has no such model or is unreachable.
    """
    if section.path == EMBEDDED:
        return embedded_base(cache, report, count=count)
    folder = Path(section.path).expanduser()
    if not folder.exists() and is_hub_name(section.path):
        folder = _fetch(section.path, section.revision, cache, report)
    check_model_folder(folder)
    return folder.resolve()


def describe_base(
    folder: Path, targets: Targets, *, say: Report = _ignore, begun: bool = False
) -> BaseDescription:
    """Describe a base by its configuration; weights are read only for the fingerprint.

    Args:
        folder: the directory of the base.
        targets: `lora.target_modules`.
        say: called with each line that the user should know and that is no error.
        begun: a run has trained on it: objections from measuring are said, not raised.

    Raises:
        ModelError: the base is no causal language model, or the targets cannot be adapted.
    """
    check_base_files(folder)
    with _as_model_error(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    check_shapes(folder, model)
    modules = suitable_modules(model, config, targets, say=say, begun=begun)
    linear = adaptable_modules(model)
    return BaseDescription(
        path=folder,
        fingerprint=fingerprint_model(folder),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_parameters=sum(m.out_features * m.in_features for m in linear.values()),
        modules=modules,
        embedded_tokens=embedded_tokens(model),
        config=config,
    )


def load_base(
    path: Path,
    *,
    dtype: str,
    device: str | torch.device,
    to_divide: bool = False,
    quantization: str = "none",
) -> Base:
    """Load a base from its directory, without network.

    Args:
        path: the directory.
        dtype: `model.dtype`.
        device: where it computes.
        to_divide: leave the weights in its files; `training.partitioned.divide_base` reads them.
        quantization: `model.quantization`; of a base that is not to be divided.

    Raises:
        ConfigError: what quantises the base is not installed.
        ModelError: the base cannot be loaded, or some of its weights are missing.
    """
    check_base_files(path)
    fingerprint = fingerprint_model(path)
    asked, is_quantised = _DTYPES[dtype], quantization in KINDS
    assert not (to_divide and is_quantised), "what is quantised is not divided"
    # in the format of the files transformers maps the weights, and copies none
    mapped = to_divide or is_quantised
    model = _load_model(path, (mapped and stored_format(weight_shards(path))) or asked)
    unread = UnreadWeights.of(model, asked) if to_divide else None
    if is_quantised:
        quantise(model, quantization, device)
        set_format(model, asked)
    if unread is None:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    return Base(
        model=model,
        tokenizer=load_tokenizer(path),
        fingerprint=fingerprint,
        modules=adaptable_modules(model),
        unread=unread,
        quantisation=quantisation_text(quantization) if is_quantised else "",
    )


def _load_model(path: Path, dtype: torch.dtype) -> Any:
    # a bar for every worker would fill the logs
    disable_progress_bar()
    with _as_model_error(path):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, use_safetensors=True, **_LOCAL
        )
    if loading["missing_keys"]:
        names = sorted(loading["missing_keys"])
        raise ModelError(
            f"model.path: {path} lacks the weights of {', '.join(names[:3])}"
            f"{' and more' if len(names) > 3 else ''}; restore its files"
        )
    return model


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a model directory, without network.

    Raises:
        ModelError: there is no tokenizer, or it cannot be read here.
    """
    _check_sentencepiece(path)
    with _as_model_error(path):
        tokenizer = AutoTokenizer.from_pretrained(path, **_LOCAL)
        ordinary = len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys())
    if not ordinary:
        raise ModelError(
            f"model.path: {path}: its tokenizer has special tokens only; copy what is missing "
            "(tokenizer.json, or the vocabulary that tokenizer_config.json's class reads)"
        )
    return tokenizer


def _check_sentencepiece(folder: Path) -> None:
    """Raise ModelError if transformers needs packages for the tokenizer that are missing."""
    if (folder / "tokenizer.json").is_file():
        return
    model_file = next(folder.glob(_SENTENCEPIECE), None)
    missing = [name for name, module in _CONVERTERS.items() if not _is_installed(module)]
    if model_file is not None and missing:
        raise ModelError(
            f"model.path: {folder} has {model_file.name} (SentencePiece) and no tokenizer.json, "
            f"which takes the package {' and '.join(missing)} to read; install it (pip install "
            f"{' '.join(missing)}), or save tokenizer.json there, where it is installed "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


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
    except Exception as error:  # the hub's client raises its own errors, httpx's and OSError
        raise ModelError(
            f"model.path: {name}: no such directory, and no model that the Hugging Face hub gives "
            f"us ({first_line(error)}); correct it, or run `fedllm prepare` where the network is"
        ) from error
    return folder


@contextmanager
def _as_model_error(folder: Path) -> Iterator[None]:
    """Turn any error of transformers into a ModelError of one line that names the directory."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # model classes raise anything for files of other models
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model.path: {folder} is a model of Python code in its own files (auto_map), "
                "which fedllm never runs; give a base of a class that transformers has"
            ) from error
        raise ModelError(
            f"model.path: {folder} cannot be loaded ({first_line(error)}); need a causal language "
            "model with its tokenizer, as save_pretrained writes them"
        ) from error

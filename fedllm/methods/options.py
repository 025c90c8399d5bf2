"""Options of the methods, `method.options`: a frozen, validated class for each method that has any.

The coordinator checks options before it starts a job: nothing here loads torch.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedllm.config.models import WHOLE_LINES, Section
from fedllm.config.problems import problem_lines
from fedllm.errors import ConfigError

_KEY = "method.options"
LOCAL_KEY = "method.local_options"
SERVER_KEY = "method.server_options"


class NoOptions(Section):
    """A method without options."""


class FlexLoraOptions(Section):
    """FlexLoRA: what becomes of the directions that a client did not receive."""

    truncated: Literal["drop", "keep"] = "drop"
    """Directions that a client did not receive count as zero, as in the paper (`drop`), or as
    unchanged (`keep`)."""
    frozen_tail: bool = False
    """Clients also receive the directions beyond their rank, frozen. Needs `truncated: keep`."""

    @model_validator(mode="after")
    def _tail_is_kept(self) -> "FlexLoraOptions":
        if self.frozen_tail and self.truncated != "keep":
            # what a client does not train would otherwise be erased by the mean
            raise PydanticCustomError(
                WHOLE_LINES,
                f"{_KEY}.frozen_tail: got true beside truncated: drop; need truncated: keep",
            )
        return self


class SLoraOptions(FlexLoraOptions):
    """SLoRA: how long entries of the weights train; the others are FlexLoRA's, after that."""

    sparse_rounds: Annotated[int, Field(ge=1)] = 5
    """The number of rounds in which entries of the weights train."""


class HetLoraOptions(Section):
    """HetLoRA's self-pruning: with how many of its directions a client goes on."""

    pruning: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Gamma: the share of its directions that a client goes on with; 1 prunes nothing."""
    penalty: Annotated[float, Field(ge=0)] = 0.0
    """Lambda: what the product of the norms of the other directions counts in the loss."""


class LoraFairOptions(Section):
    """LoRA-FAIR's correction of B."""

    ridge: Annotated[float, Field(gt=0)] = 0.01
    """Lambda: what the squared norm of the correction of B counts."""


class FloristOptions(Section):
    """FLoRIST: how many directions are kept."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.99
    """The share of a module's energy that the kept directions hold."""


class FedMomentumOptions(Section):
    """FedMomentum: how many directions go into the base."""

    energy: Annotated[float, Field(gt=0, le=1)] = 0.99
    """The share of a mean's energy that adapter and base together keep."""


class FedProxOptions(Section):
    """FedProx: the proximal term of a client's loss."""

    mu: Annotated[float, Field(ge=0)] = 0.01
    """µ: what the term counts."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """The optimizer of the clients."""


class FedAvgMOptions(Section):
    """FedAvgM: a movement that goes on from round to round."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """β: what remains of the last movement."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """η: what the change of a round counts."""


class AdaptiveOptions(Section):
    """FedAdam and FedYogi: the rate, how slowly the moments follow, and what bounds the rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """η: the size of a step."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What remains of the mean change."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """What remains of the mean squared change (`fedadam`), or how slowly it follows (`fedyogi`)."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Added to the root of the mean squared change."""


OPTIONS: Mapping[str, type[Section]] = {
    "flexlora": FlexLoraOptions,
    "slora": SLoraOptions,
    "hetlora": HetLoraOptions,
    "lora_fair": LoraFairOptions,
    "florist": FloristOptions,
    "fedmomentum": FedMomentumOptions,
}


# of the client side, `method.local`
LOCAL_OPTIONS: Mapping[str, type[Section]] = {"fedprox": FedProxOptions}

# of the server's optimizer, `method.server`
SERVER_OPTIONS: Mapping[str, type[Section]] = {
    "fedavgm": FedAvgMOptions,
    "fedadam": AdaptiveOptions,
    "fedyogi": AdaptiveOptions,
}

_OWNERS: Mapping[str, Mapping[str, type[Section]]] = {
    _KEY: OPTIONS,
    LOCAL_KEY: LOCAL_OPTIONS,
    SERVER_KEY: SERVER_OPTIONS,
}


def parse_options(
    method: str, model: type[Section], raw: Mapping[str, Any], *, key: str = _KEY
) -> Section:
    """Return the options of a method, of a client side, or of the server's optimizer.

    Args:
        method: what `method.name`, `method.local` or `method.server` says.
        model: the method's class of options.
        raw: what `method.options`, `method.local_options` or `method.server_options` says.
        key: which of them it is.

    Raises:
        ConfigError: one line per option that is unknown, belongs to another method, or has a value
            that is not allowed.
    """
    unknown = list(_unknown(method, model, raw, key))
    known = {name: value for name, value in raw.items() if name in model.model_fields}
    try:
        options = model.model_validate(known)
    except ValidationError as error:
        lines = problem_lines(error, known, model, f"{key}.")
        raise ConfigError("\n".join([*unknown, *lines])) from error
    if unknown:
        raise ConfigError("\n".join(unknown))
    return options


def _unknown(method: str, model: type[Section], raw: Mapping[str, Any], key: str) -> Iterator[str]:
    names = list(model.model_fields)
    valid = f"{method} has {', '.join(names)}" if names else f"{method} has no options"
    for name in raw:
        if name in names:
            continue
        owners = [other for other, its in _OWNERS[key].items() if name in its.model_fields]
        if owners:
            yield f"{key}.{name}: an option of {', '.join(owners)}; {valid}"
        elif near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
            yield f"{key}.{name}: unknown option; did you mean `{key}.{near[0]}`?"
        else:
            yield f"{key}.{name}: unknown option; {valid}"

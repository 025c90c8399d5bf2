"""Adapter slots: PEFT layers, injected once into the base model, refilled for every client.

Legend: O out, I in, R rank.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from fedllm.config.target_modules import Targets
from fedllm.errors import AdapterError
from fedllm.lora.entries import entry_places
from fedllm.lora.factors import Adapter, Factors, ModuleShape
from fedllm.methods.local_task import LocalTask
from fedllm.model.base import Base
from fedllm.model.quantised import absent
from fedllm.model.targets import find_modules
from fedllm.model.vocabulary import embedded_tokens
from fedllm.packing.adapter_product import LeanFactor
from fedllm.packing.base_change import BaseChange, ChangeableWeights
from fedllm.packing.entry_product import EntryProduct, PassedOn
from fedllm.packing.gated_mlp import save_mlp_memory
from fedllm.packing.installed import Installed
from fedllm.packing.layout_check import set_layout
from fedllm.packing.precision import keep_sums_in_float32, make_float32_factor
from fedllm.packing.recompute import Recomputation, Recompute
from fedllm.packing.row_dropout import RowDropout, RowSeeds
from fedllm.packing.stacked_adapters import ClientLengths, StackedA, StackedB

# PEFT would import it, in seconds and with the compiler of torch, for its own quantised layers;
# those of `model.quantised` are ordinary ones to PEFT
_UNUSED = "bitsandbytes"
with absent(_UNUSED):
    from peft import LoraConfig, import_utils, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

_Signature = tuple[tuple[str, int], ...]  # (module, rank), sorted
_Kind = Literal["factors", "frozen", "entries"]  # what the values of a slot are
_AS_RECEIVED = LocalTask()


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """A slot for one client: a PEFT adapter and its tensors."""

    name: str
    layers: Mapping[str, LoraLayer]
    a: Mapping[str, nn.Parameter]
    b: Mapping[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class _GroupSlot:
    """A slot for a group of clients: a PEFT adapter, and the tensors that the members train.

    `pool` has the tensors by module, rank and place in the group, so that groups share them.
    """

    name: str
    layers: Mapping[str, LoraLayer]
    pool: dict[tuple[str, int, int], tuple[nn.Parameter, nn.Parameter]]


class AdapterSlots:
    """The slots of one base model: room for one adapter, or one group of adapters, at a time.

    There is one PEFT adapter per distinct set of ranks: `c0`, `c1`, ... `install` copies A, B and
    scale into it, so that memory does not grow with the number of clients. Frozen factors and
    entries of weights have adapters of their own. Only the installed adapter requires gradients.
    The base stays frozen. `layout` is one of `packing.layout_check`.
    `is_divided` says whether this process has only a part of the weights, and others the rest.
    """

    def __init__(
        self,
        base: Base,
        *,
        target_modules: Targets,
        dropout: float = 0.0,
        layout: str = "padded",
    ) -> None:
        self.base = base
        self.model: nn.Module = base.model
        self.layout = layout
        self.is_divided = False
        # asked for now: the embedding of a divided base has no rows any more
        self._embedded_tokens = embedded_tokens(base.model)
        self.rows = RowSeeds()
        self._modules = find_modules(base.model, target_modules)
        self._dropout = dropout
        self._weights = ChangeableWeights(
            base.model, {name: found.transposed for name, found in self._modules.items()}
        )
        self.client_lengths = ClientLengths()
        self._slots: dict[tuple[_Kind, _Signature], _Slot] = {}
        self._groups: dict[_Kind, _GroupSlot] = {}
        self._members_in_layers: list[int] = []  # ids of the members whose factors the layers hold
        self._group_seed: int | None = None  # of the entries that the group trains, if it does
        self._active: tuple[_Slot | _GroupSlot, ...] = ()
        self._recomputation = Recomputation(base.model)
        self.model.requires_grad_(False)
        keep_sums_in_float32(self.model)
        save_mlp_memory(self.model)
        set_layout(self.model, layout)

    @property
    def device(self) -> torch.device:
        """The device of the base model."""
        return next(self.model.parameters()).device

    def change_base(self, change: BaseChange | None) -> None:
        """Let the base have a change, in place of the one that it has; None takes it off."""
        assert change is None or not self.is_divided, "a divided base cannot change"
        self._weights.put_on(change)

    def install(self, adapter: Adapter, task: LocalTask = _AS_RECEIVED) -> Installed:
        """Install an adapter: copy its values, and let the model compute with it.

        Args:
            adapter: by module; frozen factors are added to those that train.
            task: which factors train, the others stay; or that the values are entries of weights.

        Raises:
            AdapterError: a module is no target, or a factor does not have its module's shape.
        """
        self._check(adapter)
        frozen = _frozen(adapter)
        slot = self._slot(_signature(adapter), _kind_of(task))
        tail = self._slot(_signature(frozen), "frozen") if frozen else None
        self._activate(slot, tail)
        installed = replace(_filled(slot, adapter), trained=task.trained).with_cores()
        if task.entries_seed is not None:
            self._fill_entries(slot, [installed], task.entries_seed)
        if tail:
            for parameter in _filled(tail, frozen).parameters:
                parameter.requires_grad_(False)
        installed.begin()
        return installed

    def install_group(
        self, adapters: Sequence[Adapter], task: LocalTask = _AS_RECEIVED
    ) -> list[Installed]:
        """Install the adapters of a group; `use_members` says whose tokens each pass computes.

        All have the same modules, with any ranks; each member has parameters of its own, and frozen
        factors in addition if it received any.

        Raises:
            AdapterError: as `install`.
        """
        for adapter in adapters:
            self._check(adapter)
        modules = tuple(sorted(adapters[0]))
        assert all(tuple(sorted(adapter)) == modules for adapter in adapters), "unequal modules"
        slot = self._group_slot(modules, _kind_of(task))
        members = [self._copied(slot, adapter, place) for place, adapter in enumerate(adapters)]
        members = [replace(member, trained=task.trained).with_cores() for member in members]
        tails = [_frozen(adapter) for adapter in adapters]
        tail = None
        if any(tails):
            tail = self._group_slot(modules, "frozen")
            tails = [_frozen(adapter, or_empty=True) for adapter in adapters]
            copies = [self._copied(tail, own, place) for place, own in enumerate(tails)]
            members = [replace(m, frozen=own) for m, own in zip(members, copies, strict=True)]
        self._activate(slot, tail)
        self._members_in_layers = []
        self._group_seed = task.entries_seed
        for member in members:
            member.begin()
        return members

    def use_members(self, members: Sequence[Installed], lengths: Sequence[int]) -> None:
        """Set the members whose tokens the next forward pass computes, one after the other.

        Args:
            members: all or some of the installed group.
            lengths: number of tokens of each of these members.
        """
        slot, *tail = self._active
        assert isinstance(slot, _GroupSlot), "no group installed"
        self.client_lengths.enter(lengths)
        ids = [id(member) for member in members]
        if self._members_in_layers == ids:
            return
        self._members_in_layers = ids
        if self._group_seed is None:
            _fill_stacks(slot, members)
        else:
            self._fill_entries(slot, members, self._group_seed)
        for each in tail:
            _fill_stacks(each, [m.frozen for m in members if m.frozen])

    def train(self, *, recompute: Recompute = False) -> None:
        """Set the model to training: dropout is on."""
        self._recomputation.set(recompute)
        # `train` visits every module, so it is called only if needed
        if not self.model.training:
            self.model.train()

    def evaluate(self) -> None:
        """Set the model to evaluation: dropout is off."""
        if self.model.training:
            self.model.eval()

    def _check(self, adapter: Adapter) -> None:
        if not adapter:
            raise AdapterError("an adapter without modules: nothing to install")
        for module, factors in adapter.items():
            target = self._modules.get(module)
            if target is None:
                known = ", ".join(self._leaves())
                raise AdapterError(f"{module}: not a target module of this base; need {known}")
            shape = (factors.shape.out, factors.shape.in_)
            if shape != (target.out_features, target.in_features):
                raise AdapterError(
                    f"{module}: the adapter is for a weight of {shape[0]}x{shape[1]}, the base has "
                    f"{target.out_features}x{target.in_features}: it belongs to another model"
                )

    def _leaves(self) -> list[str]:
        return sorted({module.rpartition(".")[2] for module in self._modules})

    def _slot(self, signature: _Signature, kind: _Kind) -> _Slot:
        slot = self._slots.get((kind, signature))
        if slot is None:
            # PEFT loses the layers of a name like "0" and refuses dots
            name = f"c{len(self._slots)}"
            slot = self._slots[kind, signature] = self._inject(name, dict(signature), kind)
            for module, layer in slot.layers.items():
                if kind == "entries":
                    layer.lora_A[name] = PassedOn(slot.a[module])
                    layer.lora_B[name] = EntryProduct()
                else:
                    _join_dropout(layer, name)
        return slot

    def _fill_entries(
        self, slot: "_Slot | _GroupSlot", members: Sequence[Installed], seed: int
    ) -> None:
        """Put the values that some clients train, and their entries, into the layers of a slot."""
        for number, module in enumerate(members[0].modules):
            layer, target = slot.layers[module], self._modules[module]
            shape = ModuleShape(out=target.out_features, in_=target.in_features)
            layer.scaling[slot.name] = 1.0
            pairs = [(member.a[number], member.b[number]) for member in members]
            product = layer.lora_B[slot.name]
            assert isinstance(product, EntryProduct)
            product.fill(
                [
                    (a, b, entry_places(seed=seed, shape=shape, rank=len(a)).to(self.device))
                    for a, b in pairs
                ]
            )

    def _activate(self, slot: "_Slot | _GroupSlot", tail: "_Slot | _GroupSlot | None") -> None:
        """Let the model compute with a slot, and with frozen factors in addition."""
        active = (slot, tail) if tail else (slot,)
        if active != self._active:
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.set_adapter([each.name for each in active])
            self._active = active

    def _group_slot(self, modules: Sequence[str], kind: _Kind) -> _GroupSlot:
        """Return the slot of groups: its layers have those of several clients instead of PEFT's."""
        slot = self._groups.get(kind)
        if slot is None:
            name = f"group_{kind}"
            layers = self._inject(name, dict.fromkeys(modules, 1), kind).layers
            for layer in layers.values():
                if kind == "entries":
                    layer.lora_A[name] = PassedOn(_weight(layer.lora_A[name]))
                    layer.lora_B[name] = EntryProduct(self.client_lengths)
                else:
                    layer.lora_A[name] = StackedA(self.client_lengths)
                    layer.lora_B[name] = StackedB(self.client_lengths)
                layer.scaling[name] = 1.0
            slot = self._groups[kind] = _GroupSlot(name=name, layers=layers, pool={})
        assert set(slot.layers) == set(modules), "groups of unequal modules"
        return slot

    def _copied(self, slot: _GroupSlot, adapter: Adapter, place: int) -> Installed:
        """Copy the adapter of the member at `place` into the tensors of that place."""
        pairs = {}
        for module, factors in sorted(adapter.items()):
            key = (module, factors.rank, place)
            if key not in slot.pool:
                shapes = factors.a_RI.shape, factors.b_OR.shape
                a, b = (nn.Parameter(torch.empty(s, device=self.device)) for s in shapes)
                slot.pool[key] = a, b
            a, b = pairs[module] = slot.pool[key]
            with torch.no_grad():
                a.copy_(factors.a_RI)
                b.copy_(factors.b_OR)
        return Installed(
            modules=tuple(pairs),
            scales={module: adapter[module].scale for module in pairs},
            a=tuple(a for a, _ in pairs.values()),
            b=tuple(b for _, b in pairs.values()),
        )

    def _inject(self, name: str, ranks: Mapping[str, int], kind: _Kind) -> _Slot:
        config = LoraConfig(
            target_modules=list(ranks),
            # PEFT takes these keys as regular expressions
            rank_pattern={re.escape(module): rank for module, rank in ranks.items()},
            lora_alpha=1,
            lora_dropout=0.0,
            fan_in_fan_out=any(self._modules[module].transposed for module in ranks),
        )
        # PEFT draws its first A from the global generator
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # several adapters in one model are intended here
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            # a base may store weights both ways: PEFT handles each module right
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            _put_layers(config, self.model, name)
        layers = {module: self._layer(module) for module in ranks}
        for module, layer in layers.items():
            # trained in float32 in any format of the base
            make_float32_factor(layer.lora_A[name])
            make_float32_factor(layer.lora_B[name])
            # what is frozen belongs to the model that a client adapts: nothing of it is dropped;
            # entries of weights have no product whose input could be
            if self._dropout and kind == "factors":
                layer.lora_dropout[name] = RowDropout(self._dropout, module=module, rows=self.rows)
        self.model.train(self.model.training)
        return _Slot(
            name=name,
            layers=layers,
            a={module: _weight(layer.lora_A[name]) for module, layer in layers.items()},
            b={module: _weight(layer.lora_B[name]) for module, layer in layers.items()},
        )

    @property
    def pad_token(self) -> int:
        """A token for padding; any embedded token will do, since padding is masked."""
        tokenizer = self.base.tokenizer
        token = tokenizer.pad_token_id
        if token is None:
            token = tokenizer.eos_token_id or 0
        return int(token) if token < self._embedded_tokens else 0

    def _layer(self, module: str) -> LoraLayer:
        layer = self.model.get_submodule(module)
        assert isinstance(layer, LoraLayer), f"{module} is {type(layer).__name__}"
        return layer


def _signature(adapter: Adapter) -> _Signature:
    return tuple((module, adapter[module].rank) for module in sorted(adapter))


def _frozen(adapter: Adapter, *, or_empty: bool = False) -> Adapter:
    """Return the frozen factors of an adapter, by module; of rank 0 for modules without any."""
    if not or_empty:
        return {module: own.frozen for module, own in adapter.items() if own.frozen}
    return {
        module: own.frozen or Factors(a_RI=own.a_RI[:0], b_OR=own.b_OR[:, :0], scale=1.0)
        for module, own in adapter.items()
    }


def _kind_of(task: LocalTask) -> _Kind:
    return "factors" if task.entries_seed is None else "entries"


def _filled(slot: _Slot, adapter: Adapter) -> Installed:
    """Copy an adapter into its slot."""
    modules = tuple(sorted(adapter))
    with torch.no_grad():
        for module in modules:
            factors = adapter[module]
            slot.a[module].copy_(factors.a_RI)
            slot.b[module].copy_(factors.b_OR)
            slot.layers[module].scaling[slot.name] = factors.scale
    return Installed(
        modules=modules,
        scales={module: adapter[module].scale for module in modules},
        a=tuple(slot.a[module] for module in modules),
        b=tuple(slot.b[module] for module in modules),
    )


def _fill_stacks(slot: "_Slot | _GroupSlot", members: Sequence[Installed]) -> None:
    """Put the factors of some members of a group into the layers of a slot."""
    for number, module in enumerate(members[0].modules):
        layer = slot.layers[module]
        a, b = layer.lora_A[slot.name], layer.lora_B[slot.name]
        assert isinstance(a, StackedA) and isinstance(b, StackedB)
        a.fill([member.a[number] for member in members])
        b.fill([member.b[number] for member in members])
        b.scales = tuple(member.scales[module] for member in members)


def _join_dropout(layer: LoraLayer, name: str) -> None:
    """Join A and the dropout before it, if any: together they save less for the gradient."""
    dropout = layer.lora_dropout[name]
    factor = layer.lora_A[name]
    assert isinstance(factor, nn.Linear)
    own = dropout if isinstance(dropout, RowDropout) else None
    layer.lora_A[name] = LeanFactor(factor, own).train(dropout.training)
    layer.lora_dropout[name] = nn.Identity()


def _put_layers(config: LoraConfig, model: nn.Module, name: str) -> None:
    """Put PEFT's layers of a new adapter into a model."""
    # PEFT remembers what it found
    known = import_utils.is_bnb_available, import_utils.is_bnb_4bit_available
    for each in known:
        each.cache_clear()
    with absent(_UNUSED):
        inject_adapter_in_model(config, model, adapter_name=name)
    for each in known:
        each.cache_clear()


def _weight(linear: nn.Module) -> nn.Parameter:
    assert isinstance(linear.weight, nn.Parameter)
    return linear.weight

"""Mixture-of-experts weights as one linear layer an expert, so that each is calibrated, factored and stored alone.

transformers keeps the experts of a block in two three-dimensional parameters, ``gate_up_proj`` (experts, 2 f, d) and
``down_proj`` (experts, d, f). `unfuse_experts` puts an `Experts` in the place of such a module: the same router and
gating, the same result, with layers ``gate_up_proj.3`` and ``down_proj.3`` for expert 3. Where the layers were factored
and their kernel can, all experts run in one launch a projection, whatever the router chose; elsewhere one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from tnc.errors import ModelError
from tnc.kernels.grouping import Group, Grouping, grouped

_TRAITS = ("has_gate", "has_bias", "is_transposed")  # what transformers notes on every fused module
_UNGROUPED: dict[str, Any] = {"_kernels": (), "_groups": "nobody asked yet"}
_WATCHED = "its layers are watched by hooks, or their forward is replaced"
_TOKENS = 8  # of the check that both give the same result


class Experts(nn.Module):
    """The experts of one block, called as transformers calls the fused module.

    Args:
        fused: the module to stand in for; its weights are shared, not copied, unless they are stored transposed.
    """

    _kernels: tuple[object, ...]  # of all layers when they were put together; None of those that are not factored
    _groups: tuple[Grouping, Group, Group] | str  # of both projections, or why there are none

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.gated = bool(fused.has_gate)
        self.into = "gate_up_proj" if self.gated else "up_proj"
        self.add_module(self.into, _linears(fused, self.into))
        self.add_module("down_proj", _linears(fused, "down_proj"))
        self.gating = _without_parameters(fused)
        self.__dict__ |= _UNGROUPED
        self.register_state_dict_post_hook(_of_their_own)  # type: ignore[no-untyped-call]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted by the router.

        Args:
            hidden_states: (tokens, d).
            top_k_index: (tokens, k) experts of each token.
            top_k_weights: (tokens, k) the router's weights.

        Returns:
            (tokens, d); experts that no token chose do not run.
        """
        if not torch.compiler.is_compiling():
            self._regroup()
        if isinstance(self._groups, str):
            return self._one_by_one(hidden_states, top_k_index, top_k_weights)
        return self._together(*self._groups, hidden_states, top_k_index, top_k_weights)

    def explain(self) -> str:
        """Text for people: how the experts run, and why not together."""
        self._regroup()
        count = len(self._layers("down_proj"))
        if isinstance(self._groups, str):
            return f"Experts({count}): one at a time, those that tokens chose; not together: {self._groups}"
        _, into, out = self._groups
        lines = [f"Experts({count}): together", f"  {self.into}: {into.describe()}", f"  down_proj: {out.describe()}"]
        return "\n".join(lines)

    def _one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        pairs = zip(self._layers(self.into), self._layers("down_proj"), strict=True)
        for expert, (into, out) in enumerate(pairs):
            token, place = torch.where(top_k_index == expert)
            if len(token):
                inner = self._activate(into(hidden_states[token]))
                weighted = out(inner) * top_k_weights[token, place, None]
                result.index_add_(0, token, weighted.to(result.dtype))
        return result

    def _together(
        self, grouping: Grouping, into: Group, out: Group, hidden_states: Tensor, top_k_index: Tensor, weights: Tensor
    ) -> Tensor:
        index, count = top_k_index.flatten(), len(self._layers("down_proj"))
        routing = grouping.route(index, count)
        inner = self._activate(self._biased(self.into, into(hidden_states, index, routing), index))
        rows = self._biased("down_proj", out(inner, index, routing), index)
        return grouping.weighted_sum(rows, weights, top_k_index, count)

    def _biased(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """Rows of pairs plus the bias of their expert; pairs of no expert get any."""
        biases = [layer.bias for layer in self._layers(name) if isinstance(layer.bias, Tensor)]
        if not biases:
            return rows
        return rows + torch.stack(biases)[index.clamp(0, len(biases) - 1)].to(rows.dtype)

    def _regroup(self) -> None:
        """Put the layers together anew if one of them was bound, loaded or moved since."""
        layers = [*self._layers(self.into), *self._layers("down_proj")]
        watched = any(map(_watched, layers))
        kernels = () if watched else tuple(getattr(layer, "bound_kernel", None) for layer in layers)
        if kernels and len(kernels) == len(self._kernels) and all(map(is_, kernels, self._kernels)):
            return
        self._kernels = kernels
        self._groups = _WATCHED if watched else self._grouped()

    def _grouped(self) -> tuple[Grouping, Group, Group] | str:
        into, out = (grouped([*self._layers(name)]) for name in (self.into, "down_proj"))
        if isinstance(into, str) or isinstance(out, str):
            return into if isinstance(into, str) else str(out)
        return *into, out[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        self.__dict__ |= _UNGROUPED
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._regroup()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the groups: a copy has parameters of its own, which are no views of them."""
        return self.__dict__ | _UNGROUPED

    def _layers(self, name: str) -> nn.ModuleList:
        layers = getattr(self, name)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def _activate(self, inner: Tensor) -> Tensor:
        function = self.gating._apply_gate if self.gated else self.gating.act_fn
        activated: Tensor = function(inner)  # type: ignore[operator]
        return activated


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with fused three-dimensional expert weights, by full name."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, trait) for trait in _TRAITS) and getattr(module, "down_proj", None) is not None
        if isinstance(module.down_proj, nn.Parameter) and module.down_proj.ndim == 3
    }


def unfuse_experts(model: nn.Module, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Replace fused experts by `Experts`, in place.

    Args:
        model: any module; without fused experts nothing happens.
        names: of the modules to replace; ``None`` is all of them.

    Returns:
        Names of the modules replaced.

    Raises:
        ModelError: for a name that is no fused module, or one whose result `Experts` does not reproduce on random
            tokens; nothing is replaced then.
    """
    found = fused_experts(model)
    wanted = list(found) if names is None else list(names)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ModelError(f"{unknown[0]!r} is no fused expert module; expected some of {', '.join(found) or 'none'}.")
    replacements = {name: Experts(found[name]).train(found[name].training) for name in wanted}
    for name, module in replacements.items():
        _check_same(name, found[name], module)
    for name, module in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return tuple(wanted)


def _of_their_own(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Give what a group holds memory of its own in a state: writers of files refuse, or drop, tensors that share it."""
    if isinstance(module._groups, str):
        return
    for name, tensor in state.items():
        shared = isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes
        if name.startswith(prefix) and shared and not isinstance(tensor, nn.Parameter):
            state[name] = tensor.clone()


def _watched(layer: nn.Module) -> bool:
    """Whether somebody relies on the layer being called."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)


def _linears(fused: nn.Module, name: str) -> nn.ModuleList:
    stacked: nn.Parameter = getattr(fused, name)
    biases = getattr(fused, f"{name}_bias") if fused.has_bias else [None] * len(stacked)
    layers = nn.ModuleList()
    for weight, bias in zip(stacked.detach(), biases, strict=True):
        matrix = weight.mT.contiguous() if fused.is_transposed else weight  # (out_features, in_features)
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(matrix, requires_grad=stacked.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=stacked.requires_grad)
        layers.append(layer)
    return layers


def _without_parameters(fused: nn.Module) -> nn.Module:
    """A copy that knows its activation and limits and holds no weight."""
    shell = copy.copy(fused)
    shell._parameters = {}
    return shell


def _check_same(name: str, fused: nn.Module, experts: Experts) -> None:
    """Raise unless both modules agree on random tokens; modules on ``meta`` hold no numbers to compare."""
    weight = experts.get_parameter("down_proj.0.weight")
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    count = len(experts._layers("down_proj"))
    hidden = torch.randn(_TOKENS, weight.shape[0], generator=generator).to(weight)
    chosen = torch.rand(_TOKENS, count, generator=generator).topk(min(2, count)).indices.to(weight.device)
    shares = torch.rand(chosen.shape, generator=generator).to(weight)
    with torch.no_grad():
        expected, got = fused(hidden, chosen, shares), experts(hidden, chosen, shares)
    size = float(expected.double().norm())
    if not float((expected - got).double().norm()) <= 64 * torch.finfo(weight.dtype).eps * size:
        raise ModelError(
            f"the experts of {name!r} ({type(fused).__name__}) are not computed as gate, up and down projections in "
            "the usual way, so they cannot be unfused. Leave them fused: they stay dense, the other layers compress."
        )

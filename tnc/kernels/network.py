"""Expressions without sums as einsum networks: which leaf is contracted how, and in which order.

A leaf is a small network of its stored tensors (its `Form`); neighbours in a product whose legs fit join into
one network, which opt_einsum orders together with ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from string import ascii_letters
from typing import Literal

import opt_einsum
import torch
from torch import Tensor
from torch.nn.functional import linear

from tnc.kernels.reference import rebuild
from tnc.kernels.table import Tensors
from tnc.terms import Chain, Expression, Mpo, Spec

_TOKENS = "t"  # the leg of x that is no feature
_EXACT = 12  # operands up to which every order without outer products is searched
_LABELS = ascii_letters.replace(_TOKENS, "")


@dataclass(frozen=True)
class Form:
    """A leaf as an einsum network, in labels of its own (ASCII letters but ``t``).

    Attributes:
        operands: (tensor name, its labels), in any order; the name ``""`` is the leaf's own rebuilt matrix, a name
            such as ``"0."`` the rebuilt matrix of a term of a `Chain`, as its core.
        out: labels of the output legs; their sizes multiply to out_features.
        into: labels of the input legs; a leg that is also in ``out`` is diagonal.
    """

    operands: tuple[tuple[str, str], ...]
    out: str
    into: str


_MATRIX = Form((("", "ab"),), out="a", into="b")


def _cores(leaf: Expression) -> Form:
    """Cores (r_prev, o, i, r_next) in a row; rebuilt where they are padded or more than the alphabet holds."""
    assert isinstance(leaf, Mpo | Chain)
    names = [f"{k}." for k in range(len(leaf.terms))] if isinstance(leaf, Chain) else list(leaf.tensors())
    d = len(names)
    padded = (prod(leaf.out_modes), prod(leaf.in_modes)) != leaf.shape
    if padded or 3 * d + 1 > len(_LABELS):
        return _MATRIX
    bonds, out, into = _LABELS[: d + 1], _LABELS[d + 1 : 2 * d + 1], _LABELS[2 * d + 1 : 3 * d + 1]
    operands = ((name, bonds[k] + out[k] + into[k] + bonds[k + 1]) for k, name in enumerate(names))
    return Form(tuple(operands), out, into)


def _tensor_ring(cores: Tensors) -> Form:
    """A closed chain of cores; one core is a trace, and rebuilt."""
    d = len(cores)
    if d == 1 or 3 * d > len(_LABELS):
        return _MATRIX
    bonds, out, into = _LABELS[:d], _LABELS[d : 2 * d], _LABELS[2 * d : 3 * d]
    operands = ((name, bonds[k] + out[k] + into[k] + bonds[(k + 1) % d]) for k, name in enumerate(cores))
    return Form(tuple(operands), out, into)


def _tucker(count: int) -> Form:
    """A core with a factor on each of ``count`` legs."""
    modes, ranks = _LABELS[:count], _LABELS[count : 2 * count]
    factors = ((f"factor{k}", modes[k] + ranks[k]) for k in range(count))
    return Form((("core", ranks), *factors), modes[: count // 2], modes[count // 2 :])


def _cp(count: int) -> Form:
    """``count`` factors that share one leg."""
    modes, rank = _LABELS[:count], _LABELS[count]
    operands = tuple((f"factor{k}", modes[k] + rank) for k in range(count))
    return Form(operands, modes[: count // 2], modes[count // 2 :])


# How each kind is contracted without rebuilding its matrix. A kind that is not here is rebuilt on every call.
_FORMS: dict[str, Callable[[Expression], Form]] = {
    "dense": lambda leaf: Form((("matrix", "ab"),), out="a", into="b"),
    "diagonal": lambda leaf: Form((("vector", "a"),), out="a", into="a"),
    "low_rank": lambda leaf: Form((("left", "ar"), ("right", "rb")), out="a", into="b"),
    "mpo": _cores,
    "chain": _cores,
    "block_low_rank": lambda leaf: Form((("left", "jlkr"), ("right", "kjri")), out="jl", into="ki"),
    "monarch": lambda leaf: Form((("left", "jlkr"), ("right", "kjri")), out="lj", into="ki"),
    "blast": lambda leaf: Form((("left", "alr"), ("coupling", "abr"), ("right", "brc")), out="al", into="bc"),
    "tensor_ring": lambda leaf: _tensor_ring(leaf.tensors()),
    "tucker": lambda leaf: _tucker(len(leaf.tensors()) - 1),
    "cp": lambda leaf: _cp(len(leaf.tensors())),
}


@dataclass(frozen=True)
class Operand:
    """One weight operand: a stored tensor, or the rebuilt matrix of a subexpression, reshaped to ``legs`` if given."""

    names: tuple[tuple[str, str], ...]  # (name inside the subexpression, name in the whole)
    spec: Spec | None  # None: the stored tensor itself
    legs: tuple[int, ...] | None = None

    def load(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The stored tensor as it is, or the rebuilt matrix in ``dtype`` or float32, whichever is wider."""
        if self.spec is None:
            return tensors[self.names[0][1]]
        matrix = rebuild(self.spec, {inner: tensors[outer] for inner, outer in self.names}, dtype)
        return matrix if self.legs is None else matrix.reshape(self.legs)

    def describe(self) -> str:
        """Name of the tensor, or the kind of the rebuilt subexpression in brackets."""
        return self.names[0][1] if self.spec is None else f"[{self.spec['kind']}]"


def rebuilt(expression: Expression, prefix: str) -> Operand:
    """The matrix of a subexpression as an operand; ``prefix`` is that of its tensors in the whole."""
    return Operand(tuple((name, prefix + name) for name in expression.tensors()), expression.spec())


@dataclass(frozen=True)
class Piece:
    """Weight operands as one network before it meets ``x``: labels and shapes, output and input legs."""

    operands: tuple[Operand, ...]
    labels: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    out: str
    into: str

    def sizes(self) -> dict[str, int]:
        """Size of every label."""
        pairs = zip(self.labels, self.shapes, strict=True)
        return {label: size for labels, shape in pairs for label, size in zip(labels, shape, strict=True)}

    def legs(self, labels: str) -> tuple[int, ...]:
        """Sizes of the given labels."""
        sizes = self.sizes()
        return tuple(sizes[label] for label in labels)


def piece(expression: Expression, prefix: str) -> Piece:
    """A leaf by its form, any other expression as its rebuilt matrix."""
    form = _FORMS[expression.kind](expression) if expression.kind in _FORMS else _MATRIX
    tensors = expression.tensors()
    operands, labels, shapes = [], [], []
    for name, legs in form.operands:
        if isinstance(expression, Chain) and name:
            operands.append(_core(expression, prefix, int(name.rstrip("."))))
        else:
            operands.append(Operand(((name, prefix + name),), None) if name else rebuilt(expression, prefix))
        labels.append(legs)
        shapes.append(operands[-1].legs or (tuple(tensors[name].shape) if name else expression.shape))
    return Piece(tuple(operands), tuple(labels), tuple(shapes), form.out, form.into)


def _core(chain: Chain, prefix: str, k: int) -> Operand:
    """Term k of a chain as the core (r_prev, o, i, r_next)."""
    return replace(rebuilt(chain.terms[k], f"{prefix}{k}."), legs=chain.core_shape(k))


def join(left: Piece, right: Piece) -> Piece | None:
    """``left @ right`` as one network; ``None`` if the legs between them differ or the alphabet runs out."""
    if left.legs(left.into) != right.legs(right.out):
        return None
    rename = dict(zip(left.into, right.out, strict=True))
    free = [label for label in _LABELS if label not in right.sizes()]
    private = [label for label in left.sizes() if label not in rename]
    if len(private) > len(free):
        return None
    table = str.maketrans({**rename, **dict(zip(private, free, strict=False))})
    return Piece(
        left.operands + right.operands,
        tuple(labels.translate(table) for labels in left.labels) + right.labels,
        left.shapes + right.shapes,
        left.out.translate(table),
        right.into,
    )


@dataclass(frozen=True)
class Multiply:
    """``x`` times a weight as one `torch.nn.functional.linear`, in the dtype of ``x``.

    On CPU torch's einsum takes bmm, which for bfloat16 and one token took 16 times as long (1024 x 1024).
    """

    x_order: tuple[int, ...]
    weight_order: tuple[int, ...]
    contracted: int  # legs, last in both orders
    legs: tuple[int, ...]  # sizes of the weight's other legs

    def __call__(self, dtype: torch.dtype, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` with the contracted legs replaced by ``legs``, which come last."""
        rows = x.permute(self.x_order).flatten(-self.contracted)
        matrix = weight.to(dtype).permute(self.weight_order).flatten(-self.contracted).flatten(0, -2)
        return torch.unflatten(linear(rows, matrix), -1, self.legs)


@dataclass(frozen=True)
class Contract:
    """Any other contraction: in the dtype of ``x``, and among weights in float32 if that is wider."""

    equation: str

    def __call__(self, dtype: torch.dtype, *taken: Tensor) -> Tensor:
        """``torch.einsum`` of the operands; ``dtype`` is that of ``x``."""
        if _TOKENS not in self.equation:
            dtype = torch.promote_types(dtype, torch.float32)
        result: Tensor = torch.einsum(self.equation, *(tensor.to(dtype) for tensor in taken))
        return result


Step = tuple[tuple[int, ...], Multiply | Contract]


@dataclass(frozen=True)
class Network:
    """``x`` (operand 0) and weights, contracted in the order of ``steps``.

    Attributes:
        operands: the weights, operands 1, 2, ...
        steps: positions among the operands left (the result is appended), and what is done with them.
        into: sizes of the input legs of ``x``.
        order: permutation of the result that puts tokens and output legs in order.
        flops: operations for the tokens planned for, without dequantization.
    """

    operands: tuple[Operand, ...]
    steps: tuple[Step, ...]
    into: tuple[int, ...]
    order: tuple[int, ...]
    flops: float = field(compare=False)

    def __call__(self, x: Tensor, tensors: Tensors) -> Tensor:
        """(tokens, in_features) to (tokens, out_features), in the dtype of ``x``."""
        left = [
            torch.unflatten(x, -1, self.into),
            *(operand.load(tensors, x.dtype) for operand in self.operands),
        ]
        for positions, step in self.steps:
            result = step(x.dtype, *(left[i] for i in positions))
            left = [*(tensor for i, tensor in enumerate(left) if i not in positions), result]
        return left[0].permute(self.order).flatten(1)

    def describe(self) -> str:
        """The contractions in order."""
        left = ["x", *(operand.describe() for operand in self.operands)]
        for positions, _ in self.steps:
            result = f"({' '.join(left[i] for i in positions)})"
            left = [*(name for i, name in enumerate(left) if i not in positions), result]
        return left[0]


def network(piece: Piece, tokens: int) -> Network:
    """The cheapest order for ``tokens`` rows of ``x``, found by opt_einsum."""
    into = piece.legs(piece.into)
    labels, shapes = (_TOKENS + piece.into, *piece.labels), ((tokens, *into), *piece.shapes)
    path, flops = contraction_path(labels, shapes, _TOKENS + piece.out)
    steps, last = _steps(path, list(labels), piece, _TOKENS + piece.out)
    return Network(piece.operands, steps, into, tuple(last.index(leg) for leg in _TOKENS + piece.out), flops)


@lru_cache(maxsize=4096)
def contraction_path(
    labels: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], output: str
) -> tuple[tuple[tuple[int, ...], ...], float]:
    """The cheapest order of contraction, as positions among the operands left, and its FLOPs."""
    sizes = [tuple(max(size, 1) for size in shape) for shape in shapes]  # an empty leg would make every order free
    # not "optimal", which in opt_einsum 3.4 misses the best order of "tb,ab,b->ta" (a leg that three share)
    method: Literal["dp", "greedy"] = "dp" if len(labels) <= _EXACT else "greedy"
    path, info = opt_einsum.contract_path(f"{','.join(labels)}->{output}", *sizes, shapes=True, optimize=method)
    return tuple(tuple(positions) for positions in path), float(info.opt_cost)


def _steps(
    path: tuple[tuple[int, ...], ...], left: list[str], piece: Piece, output: str
) -> tuple[tuple[Step, ...], str]:
    """The steps of a path, and the labels of the last result."""
    steps: list[Step] = []
    for positions in path:
        positions = tuple(sorted(positions, key=lambda i: _TOKENS not in left[i]))  # x comes first
        taken = [left[i] for i in positions]
        left = [labels for i, labels in enumerate(left) if i not in positions]
        needed = {*output, *"".join(left)}
        result = "".join(label for label in dict.fromkeys("".join(taken)) if label in needed)
        steps.append((positions, _step(taken, result, piece)))
        left.append(result)
    return tuple(steps), left[0]


def _step(taken: list[str], result: str, piece: Piece) -> Multiply | Contract:
    """A multiplication if ``x`` meets one weight, shared legs are contracted and all others stay, else an einsum."""
    first, weight = taken[0], taken[-1]
    shared = [label for label in weight if label in first]
    new = "".join(label for label in weight if label not in first)
    kept = [label for label in first if label not in shared]
    ends = any(label in result for label in shared) or any(label not in result for label in [*new, *kept])
    if _TOKENS not in first or len(taken) != 2 or not shared or not new or ends:
        return Contract(f"{','.join(taken)}->{result}")
    return Multiply(
        tuple(first.index(label) for label in [*kept, *shared]),
        tuple(weight.index(label) for label in [*new, *shared]),
        len(shared),
        piece.legs(new),
    )

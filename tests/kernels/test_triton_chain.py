"""Operators of quantized cores by the fused kernels: against the cores' own numbers in float64."""

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton_cases import DEVICE, Case, check, inputs, serving

from tnc.formats import IntFormat, number_format
from tnc.kernels import chain as row
from tnc.kernels import launch, table
from tnc.quant import rtn
from tnc.terms import Chain, Dense, Mpo, Quantized, dense64

pytestmark = pytest.mark.usefixtures("memory_begins_as_nan")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The rows of the table refuse other devices by one function each."""
    for name in ("chain", "mpo2", "mpo3"):
        module = __import__(f"tnc.kernels.{name}", fromlist=["unsuited"])
        monkeypatch.setattr(module, "unsuited", lambda device: None)


def chain(outs, ins, bonds, format, *, features=None, seed=0):
    """A chain of cores rounded to a format, and its matrix by einsum in float64."""
    generator = torch.Generator().manual_seed(seed)
    ranks, terms, cores = (1, *bonds, 1), [], []
    for k, (o, i) in enumerate(zip(outs, ins, strict=True)):
        core = torch.randn(ranks[k] * o, i * ranks[k + 1], generator=generator) / (i * ranks[k + 1]) ** 0.5
        term = rtn(core.to(DEVICE), format)
        terms.append(term)
        cores.append(dense64(term).reshape(ranks[k], o, i, ranks[k + 1]))
    operator = Chain(tuple(terms), ranks, tuple(outs), tuple(ins), features)
    return Case(operator, dense64(Mpo(tuple(cores), features)))


class _Bound:
    """The row as `check` takes it, bound for half precision."""

    @staticmethod
    def bind(operator):
        return row.bind(operator, torch.device(DEVICE), torch.float16)


FORMATS = {
    "int8": IntFormat(8, 16, pad=True),
    "int4": IntFormat(4, 16, pad=True),
    "nf4": number_format("nf4", group_size=16, pad=True),
}
MODES = [
    ((6, 7), (5, 9), (4,), "mpo2"),
    ((5, 3, 2), (3, 7, 6), (4, 3), "mpo3"),
    ((3, 2, 2, 2), (2, 3, 2, 2), (3, 4, 2), "mpo"),
]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("outs", "ins", "bonds", "name"), MODES)
def test_cores_run_by_the_row_of_their_number(outs, ins, bonds, name, format):
    case = chain(outs, ins, bonds, format)
    bound = _Bound.bind(case.operator)
    assert bound.row == name and f"by {name}: " in bound.describe()
    for tokens in (1, 5):
        check(_Bound, case, inputs(tokens, case.operator.shape[1], torch.float16))


def test_padded_modes():
    case = chain((6, 7), (5, 9), (4,), IntFormat(8, 16, pad=True), features=(40, 43))
    check(_Bound, case, inputs(3, 43, torch.float16))


def test_packing_comes_back():
    case = chain((6, 7), (5, 9), (4,), IntFormat(4, 16, pad=True))
    bound, tensors = _Bound.bind(case.operator), case.operator.tensors()
    packed = bound.pack(tensors)
    assert all(packed[name] is tensor for name, tensor in tensors.items()) and len(packed) == len(tensors) + 2
    again = bound.unpack(packed)
    assert again.keys() == tensors.keys() and all(again[name] is tensor for name, tensor in tensors.items())


def test_what_it_serves():
    case = chain((6, 7), (5, 9), (4,), IntFormat(4, 16, pad=True))
    assert table.row_of(case.operator, torch.device("cuda"), torch.bfloat16) == "chain"
    mixed = Chain((Dense(torch.ones(6, 20)), *case.operator.terms[1:]), (1, 4, 1), (6, 7), (5, 9))
    assert row.refusal(mixed) == row.refusal(Mpo((torch.ones(1, 2, 2, 1),))) == "it runs a chain of quantized cores"
    assert isinstance(case.operator.terms[0], Quantized)


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setattr(row, "unsuited", launch.unsuited)
    case = chain((6, 7), (5, 9), (4,), IntFormat(4, 16, pad=True))
    assert serving(case, "chain", "cpu") == "it needs a CUDA device, the tensors are on cpu"

import pytest
import torch
from quant_cases import case

from tnc.errors import FormatError
from tnc.quant import ORDERS, gptq
from tnc.quant.order import column_order
from tnc.stats import LayerStats


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("columns", "group"), [(1, 1), (12, 4), (13, 4), (7, 7), (5, 1), (3, 8)])
def test_every_order_is_a_permutation(name, columns, group):
    diagonal = torch.rand(columns, generator=torch.Generator().manual_seed(columns))
    assert sorted(column_order(name, diagonal, group).tolist()) == list(range(columns))


def test_orders_by_hand():
    diagonal = torch.tensor([1.0, 2.0, 9.0, 1.0, 6.0, 7.0, 3.0])
    assert column_order("activation", diagonal, 2).tolist() == [2, 5, 4, 6, 1, 0, 3]
    assert column_order("group", diagonal, 2).tolist() == [5, 4, 2, 3, 6, 1, 0]  # means 6.5, 5, 3 (one column), 1.5
    assert column_order("natural", diagonal, 2).tolist() == list(range(7))


def test_gptq_follows_the_order():
    c = case(0, 5, 1, 24, 3, per_row=True)
    turned = LayerStats.from_hessian(c.hessian.flip(0, 1), tokens=9)
    for order in ("activation", "group"):  # one group a row: the same
        codes = gptq(c.weight, c.stats, c.format, order=order).integer_codes()
        assert torch.equal(codes, gptq(c.weight.flip(1), turned, c.format, order=order).integer_codes().flip(1))
        assert torch.equal(codes, gptq(c.weight, c.stats, c.format).integer_codes())
    natural = gptq(c.weight, c.stats, c.format, order="natural").integer_codes()
    assert not torch.equal(natural, codes)
    assert not torch.equal(natural, gptq(c.weight.flip(1), turned, c.format, order="natural").integer_codes().flip(1))


def test_unknown_order():
    c = case(0, 2, 1, 8, 3)
    with pytest.raises(FormatError, match=r"order='random' is unknown; expected one of activation, group, natural\."):
        gptq(c.weight, c.stats, c.format, order="random")

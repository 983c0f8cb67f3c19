"""`FactoredEmbedding`: an expression in the place of the table of ``torch.nn.Embedding``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tnc.errors import ShapeError
from tnc.modules import FactoredLinear
from tnc.terms import Expression
from tnc.terms.rows import check_rows, gather_rows


class FactoredEmbedding(FactoredLinear):
    """Row lookup in an expression (num_embeddings, embedding_dim); the table is never rebuilt.

    Tensors are stored and named as in `FactoredLinear`. The rows have the dtype of the embedding that it stands
    for, which follows ``.half()`` and the like.

    Args:
        operator: (num_embeddings, embedding_dim): dense, low rank, quantized, mpo, their sums, and products that
            begin with them.

    Raises:
        BackendError: if the rows of the operator cannot be gathered without its matrix.
    """

    def __init__(self, operator: Expression, bias: Tensor | None = None, *, backend: str = "auto") -> None:
        check_rows(operator)
        if bias is not None:
            raise ShapeError("FactoredEmbedding got a bias; expected none: an embedding has no bias.")
        super().__init__(operator, backend=backend)

    @classmethod
    def from_embedding(cls, embedding: nn.Module, operator: Expression) -> FactoredEmbedding:
        """The stand-in for an ``nn.Embedding`` with ``operator`` in the place of its table.

        Raises:
            ShapeError: if it is not a plain ``nn.Embedding``, renormalizes its rows, or has another shape.
        """
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            raise ShapeError(
                f"FactoredEmbedding.from_embedding got {embedding}; expected a plain torch.nn.Embedding without "
                "max_norm."
            )
        module = cls.from_linear(embedding, operator)
        assert isinstance(module, cls)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Rows of the ids ``x`` (...): (..., embedding_dim).

        Raises:
            ShapeError: if the ids are not integers.
        """
        if x.is_floating_point() or x.dtype == torch.bool:
            raise ShapeError(f"FactoredEmbedding got ids of {x.dtype}; expected integers below {self.out_features}.")
        taken = gather_rows(self.operator, x.flatten())
        return taken.to(self._dtype).reshape(*x.shape, self.in_features)

    def explain(self) -> str:
        """Text for people: the expression, its size, and how rows are found."""
        first, stored, *_ = super().explain().splitlines()
        return "\n".join([first.replace("FactoredLinear", "FactoredEmbedding"), stored, "  rows gathered from factors"])

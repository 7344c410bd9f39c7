"""Many parameters as one vector, so that what is done to all of them alike is one operation."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

LINE = 64
"""Bytes: each parameter begins at a multiple of them, so that products read it as fast as if it stood alone."""


class Vector:
    """Parameters as parts of one vector `values` [n], and their gradients as parts of its gradient.

    The parameters stay what and where they are for whoever holds them, as long as they are changed in place. There are
    a few zeros between the parts.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        like, step = self.parameters[0], max(LINE // self.parameters[0].element_size(), 1)
        *self._starts, size = accumulate((-(-p.numel() // step) * step for p in self.parameters), initial=0)
        self.values = torch.zeros(size, dtype=like.dtype, device=like.device)
        self.gradient = torch.zeros_like(self.values)
        self.values.grad = self.gradient
        with torch.no_grad():
            for p, part, slope in zip(self.parameters, self.parts(self.values), self.parts(self.gradient), strict=True):
                part.copy_(p)
                p.data, p.grad = part, slope

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Those of a vector [n], each in the shape of its parameter; views."""
        return [
            vector[start : start + p.numel()].view_as(p) for start, p in zip(self._starts, self.parameters, strict=True)
        ]

    def joined(self, parts: Sequence[Tensor | None]) -> Tensor:
        """A vector [n] of such parts; None is zero."""
        vector = torch.zeros_like(self.gradient)
        for own, part in zip(self.parts(vector), parts, strict=True):
            if part is not None:
                own.copy_(part)
        return vector

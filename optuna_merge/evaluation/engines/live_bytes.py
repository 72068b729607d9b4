"""Peak bytes of tensors, counted on a CPU as a GPU's allocator would count them."""

# mypy: untyped-calls-exclude=torch.utils._python_dispatch

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A context that counts the tensors made within it.

    Attributes:
        peak: Most bytes alive at once. Temporary buffers inside an operation are not seen.
    """

    def __init__(self) -> None:
        cast(Any, super()).__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor, known)
        return made

    def _count(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in known or address in self._sizes:
            return
        self._sizes[address] = storage.nbytes()
        weakref.finalize(storage, self._sizes.pop, address, None)
        self.peak = max(self.peak, sum(self._sizes.values()))

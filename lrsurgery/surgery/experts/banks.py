"""Banks: the weights of one projection of fused experts, dense as a parameter of three axes, or factorised.

A factorised bank takes the parameter's place, and its name, in the module of the experts. That module reads it as it
read the parameter; see `operand`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lrsurgery.linalg.factors import Factors, working_dtype
from lrsurgery.modules import FILLS
from lrsurgery.surgery.experts.families import active_experts, is_transposed
from lrsurgery.surgery.experts.operand import Operand
from lrsurgery.surgery.layers import FactorisedLayer, Kind

REROUTED = ("deepgemm", "sonicmoe")  # transformers' functions whose kernels read the weights of all experts themselves


class BankWeight(nn.Module):
    """One factor of a bank: `weight`, a parameter of three axes, the first of which are the experts."""

    def __init__(self, *shape: int, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x (experts, positions, in) -> (experts, positions, out)."""
        return torch.bmm(x, self.weight.mT)


class DenseBank(nn.Module):
    """A view of one parameter of fused experts as a layer: `weight` is the parameter itself.

    `transposed` tells that it is (experts, in, out), not (experts, out, in); `active` how many experts work on a token.
    """

    bias = None

    def __init__(self, weight: nn.Parameter, *, transposed: bool, active: int = 1) -> None:
        super().__init__()
        self.weight, self.transposed, self.active = weight, transposed, active

    def forward(self, x: Tensor) -> Tensor:
        """x (experts, positions, in) -> (experts, positions, out), as the layer is timed."""
        return torch.bmm(x, self.weight if self.transposed else self.weight.mT)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, transposed={self.transposed}"


class FactorisedBank(FactorisedLayer):
    """The factors of a bank: `u.weight` (experts, out, rank), `v.weight` (experts, rank, in), without a bias.

    It stands for its product wherever the code of the experts takes it as a tensor. `transposed` and `active` are those
    of the `DenseBank`.
    """

    u: BankWeight  # type: ignore[assignment]
    v: BankWeight  # type: ignore[assignment]

    def __init__(self, layout: Kind, v: BankWeight, u: BankWeight, *, transposed: bool, active: int) -> None:
        nn.Module.__init__(self)
        self.layout, self.v, self.u = layout, v, u
        self.rank = v.weight.shape[1]
        self.side = None
        self.transposed, self.active = transposed, active
        self.register_buffer("order", None)
        self._is_hf_initialized = True  # the experts' initialisation finds no parameter to fill

    def forward(self, x: Tensor) -> Tensor:
        """x (experts, positions, in) -> (experts, positions, out), as the layer is timed."""
        return self.u(self.v(x))  # type: ignore[no-any-return]

    @property
    def operand(self) -> Operand:
        """What stands for the dense parameter, in its orientation."""
        return Operand(local(self.u.weight), local(self.v.weight), turned=self.transposed)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.u.weight.shape[1], self.v.weight.shape[2]

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        return (len(self.u.weight), *self.matrix_shape)

    @property
    def factors(self) -> Factors:
        """Tensors u (experts, rows, rank), v (experts, rank, columns)."""
        return Factors(self.u.weight, self.v.weight)

    def wide_matrix(self) -> Tensor:
        wide = working_dtype(self.u.weight.dtype)
        product = torch.empty(self.stacked_shape, dtype=self.u.weight.dtype, device=self.u.weight.device)
        for each, u, v in zip(product, self.u.weight.detach(), self.v.weight.detach(), strict=True):
            each.copy_(u.to(wide) @ v.to(wide))  # rounded by expert: in fp32 a bank takes twice its room
        return product

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.stacked_shape}, rank={self.rank}"

    # what the code of the experts asks a parameter for

    def __getitem__(self, index: Any) -> Any:
        return self.operand[index]

    def __len__(self) -> int:
        return len(self.u.weight)

    def __matmul__(self, other: Any) -> Tensor:
        product: Tensor = self.operand @ other
        return product

    def __rmatmul__(self, other: Any) -> Tensor:
        return other @ self.operand  # type: ignore[no-any-return]

    def transpose(self, one: int, other: int) -> Any:
        return self.operand.transpose(one, other)

    @property
    def mT(self) -> Operand:
        return self.operand.mT

    @property
    def shape(self) -> torch.Size:
        return self.operand.shape

    def size(self, dim: int | None = None) -> Any:
        return self.operand.size(dim)

    def dim(self) -> int:
        return 3

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> torch.dtype:
        return self.u.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.u.weight.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in FILLS:  # the initialisation of a model: a bank has no values of its own
            return args[0] if args else (kwargs or {})["tensor"]
        args, kwargs = tree_map_only(FactorisedBank, lambda bank: bank.operand, (args, kwargs or {}))
        return func(*args, **kwargs)


def local(weight: Any) -> Tensor:
    """This process's part of a weight that is sharded over several; of a copy, gradients are summed over them."""
    if not hasattr(weight, "to_local"):
        return weight  # type: ignore[no-any-return]
    from torch.distributed.tensor import Partial

    copied = all(placement.is_replicate() for placement in weight.placements)
    options = {"grad_placements": [Partial()] * len(weight.placements)} if copied else {}
    return weight.to_local(**options)  # type: ignore[no-any-return]


def banks_in(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of fused experts that a module holds itself, by their names in it."""
    if is_transposed(module) is not None:
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                yield key, parameter


def view_of(module: nn.Module, parameter: nn.Parameter) -> DenseBank:
    """A parameter of fused experts as a layer."""
    return DenseBank(parameter, transposed=bool(is_transposed(module)), active=active_experts(module))


def reroute() -> None:
    """Let experts that hold a bank run grouped products where a config asks for kernels that read dense weights.

    The functions are registered anew in transformers' interface, and leave other experts to the former ones.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name in REROUTED:
        former = ALL_EXPERTS_FUNCTIONS.get(name)
        if former is not None and not isinstance(former, _Rerouted):
            ALL_EXPERTS_FUNCTIONS.register(name, _Rerouted(name, former))


class _Rerouted:
    """One of transformers' functions for experts, with grouped products in its place for factorised banks."""

    def __init__(self, name: str, former: Callable[..., Tensor]) -> None:
        self._name, self._former = name, former

    def __call__(self, experts: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not any(isinstance(child, FactorisedBank) for child in experts.children()):
            return self._former(experts, *args, **kwargs)
        from transformers.integrations.moe import grouped_mm_experts_forward
        from transformers.utils import logging

        logging.get_logger("transformers").warning_once(
            f"experts_implementation '{self._name}' reads dense weights; factorised experts use grouped_mm"
        )
        return grouped_mm_experts_forward(experts, *args, **kwargs)  # type: ignore[no-any-return]

"""Factorised layers: two ordinary modules, `v` then `u`, in place of one.

`u` and `v` are plain nn.Linear or nn.Conv1d to 3d modules, so quantisers, LoRA, pruning, tensor parallelism,
compilers and exporters support them. A layer has one of two forms: balanced, y = u(v(x)), and pivoted
(`linalg.pivot`), which stores r^2 numbers less and has an `order`.

The file is long because all that is true of every layer, and of linear ones and convolutions, is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lrsurgery.linalg.factors import Factors, working_dtype
from lrsurgery.linalg.pivot import Pivoted, Side, inverse_of, pivot, product, put, side_of, take, unpivot

# a dense module of some kind; only the functions of its kind know its attributes
Dense: TypeAlias = Any
# classes of `u` and `v`
PARTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


class Spec(NamedTuple):
    """What a dense layer became: all that a config says of a factorised layer."""

    kind: str
    rank: int
    side: Side | None = None  # of the pivots; None for the balanced form
    v_of: str | None = None  # the layer that stores its v, where it is another's (`shared.modules`)
    pivots: tuple[int, int] | None = None  # start and number of its pivots among v's outputs, where v is shared
    groups: int = 1  # of a grouped convolution, each with a matrix of its own
    tied_to: str | None = None  # the layer that stores its u and v, where its weight is another's


def _one_to_one(module: Dense) -> int:
    return 1


def _no_sides(module: Dense) -> tuple[Side, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The properties of one kind of layer; `kinds.KINDS` holds one entry per kind.

    The matrix of a layer is (rows, columns): rows are outputs, columns are inputs. Functions between weights and
    matrices only view or reshape. No field is a lambda, so that models can be pickled. Of a layer with groups,
    `matrix_shape` and `to_matrix` give the rows of all, and factors have the groups as a first axis (`linalg.factors`).
    """

    name: str
    matches: Callable[[nn.Module, str], bool]  # module, convolution scheme -> whether the module is of this kind
    weight_axes: int  # of the dense weight
    matrix_shape: Callable[[torch.Size], tuple[int, int]]  # of the dense weight's shape
    to_matrix: Callable[[Tensor], Tensor]  # dense weight -> (rows, columns)
    to_weight: Callable[[Tensor, FactorisedLayer], Tensor]  # (rows, columns) -> dense weight
    to_matrices: Callable[[Tensor, Tensor], Factors]  # u.weight, v.weight -> u (rows, rank), v (rank, columns)
    to_weights: Callable[[Factors, torch.Size], tuple[Tensor, Tensor]]  # factors, dense shape -> u.weight, v.weight
    build: Callable[[Dense, int], FactorisedLayer]  # dense layer, rank -> factorised layer on the meta device
    build_dense: Callable[[FactorisedLayer], nn.Module]  # the reverse, on the meta device
    fan_in: Callable[[torch.Size], int]  # dense shape -> inputs per output
    # calibration: module, input x, mask of counted positions -> inputs (positions, columns) in fp32, in parts
    inputs: Callable[[Dense, Tensor, Tensor | None], Iterator[Tensor]]
    # module, shape of the input, gradient of the output, mask -> output gradients (positions, rows) in fp32, in parts
    gradients: Callable[[Dense, torch.Size, Tensor, Tensor | None], Iterator[Tensor]]
    outputs: Callable[[Tensor, int], int]  # output, counted inputs -> positions of the output
    sample_input: Callable[[Dense, int], tuple[int, ...]]  # dense layer, positions -> shape of an input to time
    v_per_u: Callable[[Dense], int] = _one_to_one  # output positions of v per output position of u
    sides: Callable[[Dense], tuple[Side, ...]] = _no_sides  # of which a layer can have pivots
    build_pivoted: Callable[[Dense, int, Side], FactorisedLayer] | None = None  # as `build`, for kinds with sides
    takes_tokens: bool = True  # applied once per token: padding can be masked, and FLOPs per token are known
    no_form: Callable[[Dense], str | None] | None = None  # why a module of this kind cannot be factorised, or None
    plain_product: bool = False  # weight @ x may be computed as u @ (v @ x)
    u_turned: bool = False  # u.weight is (rank, out, ...), not (out, rank, ...)
    shares_v: bool = False  # layers with the same input may have one v
    lookup: bool = False  # inputs are numbers of rows, and no product gives the dense layer's outputs
    parameter: bool = False  # the weight is a parameter under the layer's own name, which another module reads
    multiplied: bool = False  # the product is formed on every call: factors save no FLOPs
    # a weight of three axes: one matrix for each expert, the first axis of matrices and factors alike
    stacked: bool = False
    active: Callable[[Dense], int] = _one_to_one  # how many of the matrices of a stacked weight work on one token
    multiple_of: int = 1  # every rank is one, up to full rank
    since: int = 2  # the first version of the checkpoint format that has it; a new kind's is the newest

    def matrix_of(self, weight: Tensor, groups: int = 1) -> Tensor:
        """The matrix (rows, columns) of a dense weight; with several groups (groups, rows, columns)."""
        matrix = self.to_matrix(weight)
        return matrix if groups == 1 else matrix.reshape(groups, -1, matrix.shape[1])

    def weight_key(self, name: str) -> str:
        """The state-dict key of the dense weight of a layer of this name."""
        return name if self.parameter else f"{name}.weight"

    def make(self, dense: Dense, rank: int, side: Side | None) -> FactorisedLayer:
        """Build a factorised layer in a form, on the meta device; `side` is that of the pivots, None for balanced."""
        if side is None:
            return self.build(dense, rank)
        assert self.build_pivoted is not None, self.name
        return self.build_pivoted(dense, rank, side)


class FactorisedLayer(nn.Module):
    """A layer whose dense weight is the product of `u` and `v`.

    Attributes: `u`, `v` (modules; `u` has the bias), `rank`, `kind` (a key of `KINDS`), `form` ("balanced" or
    "pivoted"), `weight` (read-only: the product in the orientation and dtype of the dense layer) and `bias`.

    A pivoted layer has a `side` and an `order`, an int32 permutation of its outputs (rows) or inputs (columns), the
    `rank` pivots first. Rows: y[order] = cat(v(x), u(v(x))), with a bias in each. Columns: y = u(x_P + v(x_rest)),
    where x_P, x_rest are the parts of x[order].
    """

    if TYPE_CHECKING:  # torch.jit.script reads the annotations that are left, and knows none of these
        u: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        v: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        order: Tensor | None
        rank: int
        axis: int  # of the channels in inputs and outputs
        tied: tuple[FactorisedLayer, ...]  # all layers with the same u and v, first the one that stores them
        folded: str | None  # the class that computed the dense weight from other tensors (`kinds.folds`)
    start, tied, folded = 0, (), None
    __constants__: ClassVar[list[str]] = ["axis"]  # both are for torch.jit.script
    __jit_unused_properties__: ClassVar[list[str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep torch.jit.script, which compiles properties, to what `forward` uses."""
        super().__init_subclass__(**kwargs)
        cls.__jit_unused_properties__ = [name for name in dir(cls) if isinstance(getattr(cls, name, None), property)]

    def __init__(self, layout: Kind, v: nn.Module, u: nn.Module, side: Side | None = None) -> None:
        super().__init__()
        self.layout = layout
        self.v = v  # type: ignore[assignment]
        self.u = u  # type: ignore[assignment]
        # here: quantisers pack weights into other shapes
        self.rank = layout.to_matrices(self.u.weight, self.v.weight).u.shape[-1]
        self.side = side
        rows, columns = self.matrix_shape
        length = {"rows": rows, "columns": columns}
        order = torch.empty(length[side], dtype=torch.int32, device=self.u.weight.device) if side else None
        self.register_buffer("order", order)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactorisedLayer:
        """As of any module; `module.type(dtype)` casts integer buffers too, and fp16 rounds places above 2,048."""
        before = self._buffers.get("order")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._buffers.get("order")
        if before is not None and after is not None and after.is_floating_point():
            self._buffers["order"] = before.to(after.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.order is None:
            return self.u(self.v(x))  # type: ignore[no-any-return]
        if self.side == "rows":
            kept = self.v(x)
            return put(torch.cat([kept, self.u(kept)], self.axis), self.order, self.axis)
        kept, others = take(x, self.order.long(), self.axis).tensor_split([self.rank], self.axis)
        return self.u(kept + self.v(others))  # type: ignore[no-any-return]

    @property
    def kind(self) -> str:
        return self.layout.name

    @property
    def spec(self) -> Spec:
        return Spec(self.kind, self.rank, self.side, groups=self.groups)

    @property
    def groups(self) -> int:
        """How many matrices it has, each of a group of its inputs and outputs."""
        return 1

    @property
    def form(self) -> str:
        return "balanced" if self.side is None else "pivoted"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix of the weight, or of each group's."""
        u, v = self.layout.to_matrices(outline(self.u.weight), outline(self.v.weight))
        more = {"rows": (self.own, 0), "columns": (0, self.rank)}[self.side] if self.side else (0, 0)
        return u.shape[-2] + more[0], v.shape[-1] + more[1]

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape of the matrix, behind the number of matrices where there are several."""
        return self.matrix_shape if self.groups == 1 else (self.groups, *self.matrix_shape)

    @property
    def pivoted(self) -> Pivoted:
        """The parts of a pivoted layer as matrices."""
        if self.side is None or self.order is None:
            raise AttributeError("a balanced layer has no pivots")  # as torch.jit.trace asks with hasattr
        u, v = self.layout.to_matrices(plain(self.u.weight), plain(self.v.weight))
        return Pivoted(self.side, self.order, *((v, u) if self.side == "rows" else (u, v)))

    @property
    def factors(self) -> Factors:
        """Matrices u (rows, rank), v (rank, columns) whose product is the matrix of the weight; balanced in that form.

        With several groups these are a first axis of both.

        In the other they are the kept part, and the mixing with an identity in the pivots' place.
        """
        return product_factors(self.layout, Stored(plain(self.u.weight), plain(self.v.weight), self.order), self.side)

    @property
    def matrix(self) -> Tensor:
        """The matrix of the weight (rows, columns)."""
        if self.side is None:
            u, v = self.factors
            return u @ v
        return product(self.pivoted)

    @property
    def weight(self) -> Tensor:
        # Some model code reads `layer.weight` (GPT-2's init, Mamba's dt_proj, nn.MultiheadAttention), often for its
        # dtype alone (T5, flash attention), so the product is lazy. Compilers drop an unused product by themselves;
        # they get a plain tensor, and so do factors that are no plain parameters (sharded, quantised).
        plain = type(self.u.weight) is type(self.v.weight) is nn.Parameter
        if not plain or torch.compiler.is_compiling() or torch._C._is_tracing():
            return _multiply(self)
        return Product(self)

    @property
    def bias(self) -> Tensor | None:
        if self.side != "rows" or self.u.bias is None:
            return self.u.bias
        assert self.v.bias is not None
        assert self.order is not None
        mixing = self.layout.to_matrices(plain(self.u.weight), plain(self.v.weight)).u
        first = self.v.bias[self.start : self.start + self.own]
        return torch.cat([first, self.u.bias + mixing @ self.v.bias])[inverse_of(self.order)]

    @property
    def own(self) -> int:
        """How many of v's outputs, from `start` on, are outputs of this layer, where its pivots are rows."""
        return self.rank

    def wide_matrix(self) -> Tensor:
        """The matrix of the weight, detached and computed in fp32 or wider."""
        wide = working_dtype(outline(self.u.weight).dtype)
        if self.side is None:
            u, v = self.factors
            return u.detach().to(wide) @ v.detach().to(wide)
        parts = self.pivoted
        return product(parts._replace(kept=parts.kept.detach().to(wide), mixing=parts.mixing.detach().to(wide)))

    def extra_repr(self) -> str:
        return f"{self.kind}, rank={self.rank}{self._form_repr()}"

    def __format__(self, spec: str) -> str:
        """The representation, and a hint: PEFT formats a module that it cannot adapt into its error."""
        if spec:
            return super().__format__(spec)
        return f"{self!r} (low rank; adapt its parts: target_modules=lrsurgery.hf.lora_targets(model, [...]))"

    def _form_repr(self) -> str:
        return f", pivoted {self.side}" if self.side else ""


def packing_of(tensor: Tensor) -> Any:
    """What bitsandbytes knows of a weight that it packs into 4 bits: shape, dtype, quant_type; None for others."""
    return getattr(tensor, "quant_state", None)


def outline(tensor: Tensor) -> Tensor:
    """A tensor with the shape and dtype of a parameter's values: itself, or an empty one where it is packed."""
    packing = packing_of(tensor)
    return tensor if packing is None else torch.empty(packing.shape, dtype=packing.dtype, device="meta")


def count_parameters(module: nn.Module, *, recurse: bool = True) -> int:
    """How many numbers the parameters of a module have, of packed ones those of the dense weight."""
    return sum(outline(parameter).numel() for parameter in module.parameters(recurse))


def plain(tensor: Tensor) -> Tensor:
    """The values of a parameter that another tool keeps in a class of its own, such as a quantised weight."""
    if (packing := packing_of(tensor)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(tensor.data, packing)  # type: ignore[no-any-return]
    own = type(tensor).dequantize is not Tensor.dequantize
    return tensor.dequantize() if own else tensor


def _multiply(layer: FactorisedLayer) -> Tensor:
    return layer.layout.to_weight(layer.matrix, layer)


class Product(Tensor):
    """The lazy dense weight of a layer: any computation forms the product; shape, dtype and device cost nothing."""

    layer: FactorisedLayer

    @staticmethod
    def __new__(cls, layer: FactorisedLayer) -> Product:
        u, v = layer.u.weight, layer.v.weight
        rows_columns = torch.empty(layer.stacked_shape, device="meta")
        product: Product = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            layer.layout.to_weight(rows_columns, layer).shape,
            dtype=u.dtype,
            device=u.device,
            requires_grad=u.requires_grad or v.requires_grad,
        )
        product.layer = layer
        return product

    def __init__(self, layer: FactorisedLayer) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.data_ptr:  # PEFT compares those of tied weights; a product is a new tensor each time
            return args[0].layer.u.weight.data_ptr()
        if func in MATMULS and type(args[0]) is cls and args[0].layer.layout.plain_product and not kwargs:
            u, v = args[0].layer.factors  # Mamba applies its dt_proj this way
            return u @ (v @ args[1])
        args, kwargs = tree_map_only(cls, lambda product: _multiply(product.layer), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} got the lazy weight of a factorised layer; pass (layer.weight + 0) instead")


FREE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}
MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class FactorisedLinear(FactorisedLayer):
    """A factorised `nn.Linear` or transformers `Conv1D`: `v` (in -> rank, no bias), then `u` (rank -> out)."""

    if TYPE_CHECKING:
        u: nn.Linear
        v: nn.Linear
    axis = -1

    @property
    def in_features(self) -> int:
        return self.v.in_features + (self.rank if self.side == "columns" else 0)

    @property
    def out_features(self) -> int:
        return self.u.out_features + (self.own if self.side == "rows" else 0)

    @out_features.setter
    def out_features(self, count: int) -> None:
        # transformers sets it after `resize_token_embeddings`
        self.u.out_features = count - (self.own if self.side == "rows" else 0)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}{self._form_repr()}"


class FactorisedConv(FactorisedLayer):
    """A factorised convolution: its kernel then a kernel of 1 (channel), or kh x 1 then 1 x kw (spatial).

    With groups, both have them: rank channels and one matrix a group.
    """

    if TYPE_CHECKING:
        u: Dense
        v: Dense

    @property
    def in_channels(self) -> int:
        return int(self.v.in_channels) + (self.rank if self.side == "columns" else 0)

    @property
    def out_channels(self) -> int:
        return int(self.u.out_channels) + (self.rank if self.side == "rows" else 0)

    @property
    def groups(self) -> int:
        return int(self.v.groups)

    # those of the dense layer, which some models read (Whisper's stride)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self._together("kernel_size")

    @property
    def stride(self) -> tuple[int, ...]:
        return self._together("stride")

    @property
    def dilation(self) -> tuple[int, ...]:
        return self._together("dilation")

    @property
    def padding(self) -> str | tuple[int, ...]:
        if isinstance(self.v.padding, str):
            return self.v.padding
        return tuple(max(pair) for pair in zip(self.v.padding, self.u.padding, strict=True))

    @property
    def padding_mode(self) -> str:
        return str(self.v.padding_mode)

    def _together(self, what: str) -> tuple[int, ...]:  # along each axis, one of both does nothing
        return tuple(max(pair) for pair in zip(getattr(self.v, what), getattr(self.u, what), strict=True))

    def extra_repr(self) -> str:
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{shape}, rank={self.rank}{self._form_repr()}"


class FactorisedConv1d(FactorisedConv):
    """A factorised `nn.Conv1d`; see `FactorisedConv`."""

    axis = -2


class FactorisedConv2d(FactorisedConv):
    """A factorised `nn.Conv2d`; see `FactorisedConv`."""

    axis = -3


class FactorisedConv3d(FactorisedConv):
    """A factorised `nn.Conv3d`; see `FactorisedConv`."""

    axis = -4


def side_for(kind: Kind, dense: Dense, matrix: tuple[int, int]) -> Side | None:
    """The side on which pivots of a dense layer's matrix would be; None if its kind has no pivoted form."""
    sides, wanted = kind.sides(dense), side_of(*matrix)
    return wanted if wanted in sides else next(iter(sides), None)


class Stored(NamedTuple):
    """The tensors of a factorised layer but its bias: `u.weight`, `v.weight` and, of a pivoted one, `order`."""

    u: Tensor
    v: Tensor
    order: Tensor | None = None


def factor_weights(kind: Kind, weight: Tensor, factors: Factors, side: Side | None = None) -> Stored:
    """The tensors that store `factors` for a dense `weight` in a form, in its dtype and on its device.

    For a `weight` on the meta device they stay on the device of the factors. Pivots are chosen and computed in fp64.
    """
    order, device = None, factors.u.device if weight.is_meta else weight.device
    if side is not None:
        wide = Factors(factors.u.double(), factors.v.double())
        _, order, kept, mixing = pivot(wide, side)
        factors = Factors(mixing, kept) if side == "rows" else Factors(kept, mixing)
        order = order.to(device, torch.int32)
    u, v = kind.to_weights(factors, weight.shape)
    return Stored(u.to(device, weight.dtype), v.to(device, weight.dtype), order)


def product_factors(kind: Kind, stored: Stored, side: Side | None) -> Factors:
    """Matrices u (rows, rank), v (rank, columns) of the product that these tensors store."""
    u, v = kind.to_matrices(stored.u, stored.v)
    if side is None or stored.order is None:
        return Factors(u, v)
    return unpivot(Pivoted(side, stored.order, *((v, u) if side == "rows" else (u, v))))


def split_bias(kind: Kind, bias: Tensor, stored: Stored, side: Side | None) -> tuple[Tensor | None, Tensor]:
    """The biases that give a dense bias (rows,), in its dtype: v's goes through u, which is taken off of u's own."""
    if side != "rows":
        return None, bias
    assert stored.order is not None
    first, rest = bias[stored.order.to(bias.device)].tensor_split([len(stored.v)])
    mixing = kind.to_matrices(stored.u, stored.v).u.to(bias.device)
    return first, (rest.double() - mixing.double() @ first.double()).to(bias.dtype)


def dense_weight(layer: FactorisedLayer) -> Tensor:
    """The dense weight: the product in fp32 or wider, rounded once to the layer's dtype."""
    return layer.layout.to_weight(layer.wide_matrix(), layer).to(outline(layer.u.weight).dtype).contiguous()


def build_dense(layer: FactorisedLayer) -> nn.Module:
    """Build the dense layer that a factorised one replaced, on the meta device."""
    return layer.layout.build_dense(layer)

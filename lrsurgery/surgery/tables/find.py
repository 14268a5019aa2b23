"""Which tables of a model are of tokens, and which layers have their weights, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from lrsurgery.surgery.budget import UNITS, Budget
from lrsurgery.surgery.kinds.linear import LINEAR
from lrsurgery.surgery.kinds.table import kind_of
from lrsurgery.surgery.layers import FactorisedLayer
from lrsurgery.surgery.tables.embedding import EMBEDDING


def find_tables(model: nn.Module) -> list[str]:
    """Names of the tables of tokens of a model, in its order: not those of positions or types.

    Of a model with a config they are the input embeddings, and tables with as many rows as a vocabulary; of another
    model every table, since nothing tells them apart.
    """
    inside = {id(module.u) for module in model.modules() if isinstance(module, FactorisedLayer)}
    tables = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module) not in inside
    }
    sizes = {
        size
        for module in model.modules()
        if (config := getattr(module, "config", None)) is not None
        for key, size in vars(config).items()
        if "vocab_size" in key and key != "type_vocab_size" and isinstance(size, int)
    }
    inputs = {id(table) for module in model.modules() if (table := _input_table(module)) is not None}
    known = bool(sizes or inputs)
    return [name for name, each in tables.items() if not known or each.num_embeddings in sizes or id(each) in inputs]


def _input_table(module: nn.Module) -> nn.Module | None:
    if not hasattr(module, "get_input_embeddings"):
        return None
    try:
        found = module.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # of a model whose inputs are no tokens
        return None
    return found if isinstance(found, nn.Module) else None


def partners_of(weight: str, model: nn.Module, shared: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(name, kind) of the other layers with a shared weight, in the order of the model; `shared` as `_find_shared`."""
    names, waiting = {weight}, [weight]
    while waiting:
        current = waiting.pop()
        near = {other for name, other in shared.items() if name == current}
        near |= {name for name, other in shared.items() if other == current}
        waiting += near - names
        names |= near
    for name, module in model.named_modules():
        if f"{name}.weight" in names - {weight}:
            kind = kind_of(module)
            yield name, "" if kind is None else kind.name


def reason_to_keep(
    name: str, model: nn.Module, shared: Mapping[str, str], tables: Sequence[str], budget: Budget | None
) -> str | None:
    """Why a table stays dense though tables are factorised; None if it does not. `shared` as for `partners_of`."""
    if name not in tables:
        return "embedding of positions or types"
    partners = list(partners_of(f"{name}.weight", model, shared))
    for partner, kind in partners:
        if kind not in (EMBEDDING.name, LINEAR.name):
            return f"tied to {partner}, a {type(model.get_submodule(partner)).__name__}"
        if partner in tables[: tables.index(name)]:
            return f"tied to {partner}"
    products = any(kind == LINEAR.name for _, kind in partners)
    if budget is not None and (budget.kind == "time" or (budget.kind == "flops" and not products)):
        return f"embedding: a lookup has no {UNITS[budget.kind]} to save"
    return None

"""The groups that the specs of layers tell of, and whether they can be."""

from __future__ import annotations

from collections.abc import Mapping

from lrsurgery.errors import SurgeryError
from lrsurgery.surgery.layers import Spec


def groups_in(specs: Mapping[str, Spec], error: type[SurgeryError], where: str = "") -> dict[str, list[str]]:
    """Leader -> the names of its group, itself first, of all layers that share one v.

    Raises `error`, which `where` begins, for a group without a leader, with two ranks, kinds or forms, or whose pivots
    are not the outputs of its v, each once.
    """
    groups: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if spec.v_of is not None:
            groups.setdefault(spec.v_of, [spec.v_of]).append(name)
    for leader, names in groups.items():
        lead = specs.get(leader)
        if lead is None or lead.v_of is not None:
            raise error(f"{where}{names[1]}: its v is that of {leader[:60]}, which is no layer that stores one")
        for name in names[1:]:
            other = specs[name]
            if (other.kind, other.rank, other.side) != (lead.kind, lead.rank, lead.side):
                raise error(f"{where}{name}: differs from {leader}, whose v it has, in its kind, rank or form")
        _check_pivots(leader, [specs[name] for name in names], error, where)
    for name, spec in specs.items():
        if spec.pivots is not None and name not in groups and spec.v_of is None:
            raise error(f"{where}{name}: has pivots of a group, and no layer has its v")
    return groups


def _check_pivots(leader: str, specs: list[Spec], error: type[SurgeryError], where: str) -> None:
    pivots = [spec.pivots for spec in specs]
    if specs[0].side is None:
        if any(each is not None for each in pivots):
            raise error(f"{where}{leader}: its group is balanced and has pivots")
        return
    end = 0
    for each in sorted((each for each in pivots if each is not None), key=lambda each: (each[0], each[0] + each[1])):
        if each[0] != end:
            break
        end += each[1]
    if None in pivots or end != specs[0].rank or specs[0].side != "rows":
        raise error(f"{where}{leader}: the pivots of its group do not fill the outputs 0 to {specs[0].rank} of its v")

"""Labels: what a dataset says of its rows, and which of a head's classes that is.

Classes go by name: exactly, else by the one name that differs in case, '-', '_' and spaces alone, else through
`--label-map`. Class numbers go by number. Whatever else is refused with the names of both sides.

The file is long because each way to read labels and to match names is a function of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lrsurgery.errors import DataError
from lrsurgery.files.json import parse_as
from lrsurgery.text import expanded

if TYPE_CHECKING:
    from datasets import Dataset

# "class": one class of a row; "classes": any number of them; "value": a number, or a list of numbers, to predict;
# "tags": a class of each of its words
Kind: TypeAlias = Literal["class", "classes", "value", "tags"]
HIDDEN = (-1, -100)  # numbers that stand for "no label", as in test sets of GLUE
NUMBER = re.compile(r"(?:LABEL_)?(\d+)")  # transformers names nameless classes LABEL_0, LABEL_1, ...
SYNSET = re.compile(r"n\d{8}")
SHOWN = 20  # names in a message
MOST_CLASSES = 10**7
NO_MAP = "not a label map; write a JSON object or lines of DATASET-NAME,MODEL-NAME"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a dataset's rows, before they are matched with a head."""

    kind: Kind
    # one of each row: a class (place in `names`), a tuple of classes, a number or a tuple of numbers; None: no label.
    # A word without a tag has one of `HIDDEN`
    of_rows: tuple[Any, ...]
    names: tuple[str, ...] = ()  # of classes
    numbered: bool = False  # the classes' numbers are the dataset's own, and not an order that was made up here
    multi_hot: bool = False  # "classes" were written as a 0 or 1 for each class
    notes: tuple[str, ...] = ()


def read_column(rows: Dataset, column: str, reference: str) -> Labels:
    """Read a column of labels: ClassLabel, numbers, texts, or lists of these. Raises DataError."""
    import datasets

    feature: Any = rows.features[column]
    values = [None if _is_nan(v) else v for v in rows[column][:]]
    inner = getattr(feature, "feature", None)
    if isinstance(feature, datasets.ClassLabel):
        return _class_labels("class", feature.names, values)
    if isinstance(inner, datasets.ClassLabel):
        return _class_labels("classes", inner.names, [None if v is None else tuple(v) for v in values])
    known = [v for v in values if v is not None]
    if known and all(isinstance(v, list | tuple) for v in known):
        return _lists(values, column, reference)
    return _single(values, column, reference)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _class_labels(kind: Kind, names: Sequence[str], values: Sequence[Any]) -> Labels:
    return Labels(kind=kind, of_rows=tuple(values), names=tuple(names), numbered=True)


def _single(values: Sequence[Any], column: str, reference: str) -> Labels:
    known = [v for v in values if v is not None]
    if known and all(isinstance(v, bool) for v in known):
        return Labels(kind="class", of_rows=tuple(values), names=("False", "True"), numbered=True)
    if known and all(isinstance(v, str) for v in known):
        if all(NUMBER.fullmatch(v) or v in map(str, HIDDEN) for v in known):
            return _numbers([None if v is None else _number(v) for v in values], column, reference)
        names = sorted(set(known))
        place = {name: i for i, name in enumerate(names)}
        return Labels(kind="class", of_rows=tuple(place.get(v) for v in values), names=tuple(names))
    if all(isinstance(v, int) for v in known):
        return _numbers(values, column, reference)
    if all(isinstance(v, int | float) for v in known):
        infinite = next((row for row, v in enumerate(values) if v is not None and math.isinf(v)), None)
        if infinite is not None:
            raise DataError(f"{reference}: row {infinite} of column '{column}' holds {values[infinite]}, not a number")
        return Labels(kind="value", of_rows=tuple(None if v is None else float(v) for v in values))
    row = next((row for row, v in enumerate(values) if not isinstance(v, int | float | str | None)), None)
    where = "" if row is None else f" (row {row} holds a {type(values[row]).__name__})"
    raise DataError(f"{reference}: column '{column}' holds neither class numbers nor class names throughout{where}")


def _number(text: str) -> int:
    found = NUMBER.fullmatch(text)
    return int(found[1]) if found else int(text)


def _numbers(values: Sequence[int | None], column: str, reference: str) -> Labels:
    known = [v for v in values if v is not None]
    least = min((v for v in known if v not in HIDDEN), default=0)
    if least < 0:
        # numbers to predict may be negative, numbers of classes may not
        return Labels(kind="value", of_rows=tuple(None if v is None else float(v) for v in values))
    names = _numbered(max(known, default=-1), column, reference)
    return Labels(kind="class", of_rows=tuple(values), names=names, numbered=True)


def _numbered(largest: int, column: str, reference: str) -> tuple[str, ...]:
    """Names of the classes 0 to `largest`. Raises DataError for more than any head has."""
    if largest >= MOST_CLASSES:
        raise DataError(
            f"{reference}: column '{column}' has class number {str(largest)[:20]}; at most {MOST_CLASSES:,} classes are"
            " read"
        )
    return tuple(str(i) for i in range(largest + 1))


def _lists(values: Sequence[Any], column: str, reference: str) -> Labels:
    """Lists of names, of class numbers, of a 0 or 1 for each class, or of numbers to predict."""
    items = [item for v in values if v is not None for item in v]
    lengths = {len(v) for v in values if v is not None}
    rows = [None if v is None else tuple(v) for v in values]
    if items and all(isinstance(item, str) for item in items):
        names = sorted(set(items))
        place = {name: i for i, name in enumerate(names)}
        sets = tuple(None if row is None else tuple(place[item] for item in row) for row in rows)
        return Labels(kind="classes", of_rows=sets, names=tuple(names))
    if not all(isinstance(item, int | float) for item in items):
        raise DataError(f"{reference}: column '{column}' holds lists of neither numbers nor class names throughout")
    if len(lengths) == 1 and max(lengths) > 1 and all(item in (0, 1) for item in items):
        hot = tuple(None if row is None else tuple(i for i, item in enumerate(row) if item) for row in rows)
        note = f"column '{column}' has a 0 or 1 for each of {max(lengths)} classes in every row"
        names_of = tuple(str(i) for i in range(max(lengths)))
        return Labels(kind="classes", of_rows=hot, names=names_of, numbered=True, multi_hot=True, notes=(note,))
    if all(isinstance(item, int) and item >= 0 for item in items):
        names_of = _numbered(max(items, default=-1), column, reference)
        return Labels(kind="classes", of_rows=tuple(rows), names=names_of, numbered=True)
    return Labels(kind="value", of_rows=tuple(None if r is None else tuple(map(float, r)) for r in rows))


def read_tags(rows: Dataset, column: str, reference: str) -> Labels:
    """Read a column with a list of tags in each row: ClassLabel, numbers or names. Raises DataError."""
    import datasets

    inner = getattr(rows.features[column], "feature", None)
    values = rows[column][:]
    for row, tags in enumerate(values):
        whole = isinstance(tags, list) and (all(type(t) is int for t in tags) or all(isinstance(t, str) for t in tags))
        if not whole:
            raise DataError(
                f"{reference}: row {row} of column '{column}' holds {str(tags)[:40]}; a row is a list of tags, one for"
                " each word"
            )
    if isinstance(inner, datasets.ClassLabel):
        return _class_labels("tags", inner.names, [tuple(tags) for tags in values])
    items = {tag for tags in values for tag in tags}
    if all(isinstance(tag, int) for tag in items):
        least = min(items - set(HIDDEN), default=0)
        if least < 0:
            raise DataError(f"{reference}: column '{column}' has tag {least}; numbers of tags begin at 0")
        names = _numbered(max(items, default=-1), column, reference)
        return Labels(kind="tags", of_rows=tuple(map(tuple, values)), names=names, numbered=True)
    names = tuple(sorted(items))
    place = {name: i for i, name in enumerate(names)}
    return Labels(kind="tags", of_rows=tuple(tuple(place[tag] for tag in tags) for tags in values), names=names)


def read_labels(rows: Dataset, column: str, reference: str) -> tuple[list[str], list[int | None]]:
    """Read class names and each row's class from a ClassLabel column, from numbers, or from texts; None: no label.

    Names that are texts stand in alphabetical order, which says nothing of a head's: see `match_labels`.

    Raises DataError, also for labels that are no single class.
    """
    found = read_column(rows, column, reference)
    if found.kind != "class":
        raise DataError(f"{reference}: column '{column}' holds neither class numbers nor class names throughout")
    return list(found.names), [None if label in HIDDEN else label for label in found.of_rows]


def match_labels(
    names: Sequence[str], labels: Sequence[int | None], head: Sequence[str], reference: str, *, hint: str = "--new-head"
) -> list[int | None]:
    """Renumber each row's class as the head does, by name, or by number where the names are numbers.

    Raises DataError where the head knows a name neither exactly nor in another spelling.
    """
    used = sorted({label for label in labels if label is not None})
    places, _ = match_names(names, used, head, reference, numbered=False, hint=hint)
    return [None if label is None else places[label] for label in labels]


def match_names(
    names: Sequence[str],
    used: Iterable[int],
    head: Sequence[str],
    reference: str,
    *,
    numbered: bool,
    hint: str = "--new-head",
    what: str = "data",
) -> tuple[dict[int, int], list[str]]:
    """Match the classes of a dataset that occur, `used` places in `names`, with the classes of a head.

    Returns class of the dataset -> class of the head, and notes about every match that is not exact. `numbered` says
    that the places in `names` are the dataset's own numbers.

    Raises DataError.
    """
    places = list(used)
    beyond = [p for p in places if not 0 <= p < len(names)]
    if beyond:
        raise DataError(f"{reference}: has a row of class {beyond[0]}, its classes are 0 to {len(names) - 1}")
    wanted = [names[p] for p in places]
    for way in (_exactly, _by_spelling, _by_synset, _by_number, _by_order):
        found = way(wanted, places, names, head, numbered)
        if found is not None:
            matched, notes = found
            return dict(zip(places, matched, strict=True)), [f"{reference}: {note}" for note in notes]
    unknown = next((n for n in wanted if n not in head), wanted[0])
    raise DataError(
        f"{reference}: has {len(names)} classes, the model's head {len(head)}; {hint} makes a head for these, and"
        f" --label-map FILE says which is which: '{unknown}' is none of the model's; the {what} has"
        f" {_listed(wanted)}; the model has {_listed(head)}"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more


# ways to match: names that occur, their places, all names, the head's names, whether places are the dataset's own
# numbers -> the head's class for each name and notes; None where this way does not know them all
Match: TypeAlias = tuple[list[int], list[str]] | None


def _places(head: Iterable[str]) -> dict[str, int]:
    """Name -> class; names of more than one class are left out."""
    known = list(head)
    counts = Counter(known)
    return {name: i for i, name in enumerate(known) if counts[name] == 1}


def _spelling(name: str) -> str:
    """A name without what people write in several ways: case, hyphens, underscores, spaces."""
    return re.sub(r"[-_\s]+", " ", name).strip().casefold()


def _exactly(
    wanted: Sequence[str], places: Sequence[int], names: Sequence[str], head: Sequence[str], numbered: bool
) -> Match:
    known = _places(head)
    return ([known[n] for n in wanted], []) if all(n in known for n in wanted) else None


def _by_spelling(
    wanted: Sequence[str], places: Sequence[int], names: Sequence[str], head: Sequence[str], numbered: bool
) -> Match:
    exact, close = _places(head), _places(map(_spelling, head))
    found = [exact.get(name, close.get(_spelling(name))) for name in wanted]
    if any(f is None for f in found):
        return None
    matched = [f for f in found if f is not None]
    others = [f"'{n}' is '{head[f]}'" for n, f in zip(wanted, matched, strict=True) if n != head[f]]
    return matched, [f"classes matched in another spelling: {_joined(others)}"]


def _by_synset(
    wanted: Sequence[str], places: Sequence[int], names: Sequence[str], head: Sequence[str], numbered: bool
) -> Match:
    """WordNet synsets, as ImageNet's folders are named, on a head with the classes of ImageNet in timm's order."""
    if not all(SYNSET.fullmatch(name) for name in wanted):
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": len(head)})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    order = {name: i for i, name in enumerate(info.label_names())}
    if not all(name in order for name in wanted):
        return None
    if not is_nameless(head):  # a head with names of its own may stand in another order
        lemmas = [_spelling(text.partition(",")[0]) for text in info.label_descriptions()]
        agree = sum(_spelling(n.partition(",")[0]) == lemma for n, lemma in zip(head, lemmas, strict=True))
        if agree < 0.9 * len(head):
            return None
    return [order[name] for name in wanted], [f"synsets taken as classes of {subset}, in timm's order"]


def is_nameless(head: Sequence[str]) -> bool:
    """Tell whether a head's names are but the numbers of its classes."""
    return all(NUMBER.fullmatch(name) and _number(name) == i for i, name in enumerate(head))


def _by_number(
    wanted: Sequence[str], places: Sequence[int], names: Sequence[str], head: Sequence[str], numbered: bool
) -> Match:
    if not wanted or not all(NUMBER.fullmatch(name) for name in wanted):
        return None
    values = [_number(name) for name in wanted]
    least, most = min(values), max(values)
    notes = []
    if not is_nameless(head):
        own = _numbers_in(head)
        if own is not None and all(v in own for v in values) and any(own[v] != v for v in values):
            # "4" on a head of '1 star' to '5 stars'
            from_0 = [head[v] for v in values] if most < len(head) else []
            both = f"; as class numbers from 0 they would be {_joined(list(map(repr, from_0)))}" if from_0 else ""
            pairs = _joined([f"{v} is '{head[own[v]]}'" for v in values])
            return [own[v] for v in values], [f"numbers taken for the numbers in the head's names: {pairs}{both}"]
    if most >= len(head):
        ascend = numbered and [_number(n) for n in names if NUMBER.fullmatch(n)] == sorted(map(_number, names))
        if ascend and len(names) == len(head) and list(names) != [str(i) for i in range(len(names))]:
            return list(places), [f"classes '{names[0]}' to '{names[-1]}' taken as classes 0 to {len(head) - 1}"]
        return None
    if least > 0:
        notes = [f"numbers {least} to {most} taken as class numbers from 0; no row is of class 0"]
    return values, notes


def _numbers_in(head: Sequence[str]) -> dict[int, int] | None:
    """The number that stands in each name -> class; None where a name has not just one, or two have the same."""
    found = [re.findall(r"\d+", name) for name in head]
    if any(len(numbers) != 1 for numbers in found):
        return None
    own = {int(numbers[0]): i for i, numbers in enumerate(found)}
    return own if len(own) == len(head) else None


def _by_order(
    wanted: Sequence[str], places: Sequence[int], names: Sequence[str], head: Sequence[str], numbered: bool
) -> Match:
    """The dataset's own numbers of its classes, on a head without names for as many."""
    if not (numbered and is_nameless(head) and len(names) == len(head)):
        return None
    pairs = _joined([f"{i} is '{names[i]}'" for i in range(len(names))])
    return list(places), [f"the head has no names for its classes; those of the data are numbered as it does: {pairs}"]


def _joined(texts: Sequence[str]) -> str:
    return ", ".join(texts[:5]) + (", ..." if len(texts) > 5 else "")


def read_label_map(file: str) -> dict[str, str | None]:
    """Read --label-map: name in the dataset -> name in the model, or None for rows to leave out.

    A JSON object, or two columns of CSV without a heading. Raises DataError.
    """
    import csv

    path = expanded(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            parse_as(dict[str, str | int | float | None], text, f"{file}: {NO_MAP}", DataError)
            pairs: list[tuple[Any, Any]] = json.loads(text, object_pairs_hook=list)  # with names that stand twice
        else:
            pairs = [(row[0].strip(), row[1].strip() or None) for row in csv.reader(text.splitlines()) if row]
    except FileNotFoundError as e:
        raise DataError(f"{file}: no such label map") from e
    except (OSError, ValueError, IndexError, csv.Error) as e:
        raise DataError(f"{file}: {NO_MAP}") from e
    found = {str(name): None if value is None else str(value) for name, value in pairs}
    if len(found) < len(pairs):
        raise DataError(f"{file}: names a class of the dataset twice")
    return found


def rename(labels: Labels, renamed: Mapping[str, str | None], file: str) -> Labels:
    """Rename the classes of a dataset by a label map; rows of a class that becomes None have no label any more.

    Raises DataError where the map names a class that no row has, or the labels are no classes.
    """
    if labels.kind == "value":
        whole = all(v is None or (isinstance(v, float) and v.is_integer()) for v in labels.of_rows)
        if not whole:
            raise DataError(f"{file}: maps names of classes, the labels are numbers to predict")
        labels = as_classes(labels)
    foreign = [name for name in renamed if name not in labels.names]
    if foreign:
        raise DataError(f"{file}: '{foreign[0]}' is no class of the data, which has {_listed(labels.names)}")
    kept = {name: renamed.get(name, name) for name in labels.names}
    names = list(dict.fromkeys(new for new in kept.values() if new is not None))
    place = {name: i for i, name in enumerate(names)}
    to = [None if kept[old] is None else place[str(kept[old])] for old in labels.names]

    def renumbered(value: Any) -> Any:
        if labels.kind == "tags" and isinstance(value, tuple):
            tags = [item if item in HIDDEN else to[item] for item in value]
            return tuple(HIDDEN[0] if tag is None else tag for tag in tags)
        if isinstance(value, tuple):
            new = tuple(to[item] for item in value)
            return tuple(dict.fromkeys(item for item in new if item is not None))
        return value if value is None or value in HIDDEN else to[value]

    # the order of names that a map gives is no order of numbers
    of_rows = tuple(map(renumbered, labels.of_rows))
    return Labels(kind=labels.kind, of_rows=of_rows, names=tuple(names), notes=labels.notes)


def as_classes(labels: Labels) -> Labels:
    """Take whole numbers, such as 1.0, as class numbers."""
    numbers = tuple(None if v is None else int(v) for v in labels.of_rows)
    names = _numbered(max((n for n in numbers if n is not None), default=-1), "labels", "the data")
    return Labels(kind="class", of_rows=numbers, names=names, numbered=True, notes=labels.notes)


def occurring(labels: Labels) -> list[int]:
    """The classes that some row has, in their order."""
    found: set[int] = set()
    for value in labels.of_rows:
        found.update(value if isinstance(value, tuple) else () if value is None else (value,))
    return sorted(found - set(HIDDEN))

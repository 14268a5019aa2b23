"""Rows of text, of conversations or of tokens into documents of tokens, as the checkpoint's tokenizer makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrsurgery.checkpoints.source import Source
from lrsurgery.data.batches import IGNORED
from lrsurgery.data.datasets import TEXT_COLUMNS, column_names, pick_column
from lrsurgery.errors import DataError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from lrsurgery.data.datasets import Table

CHAT = "messages"  # the column of conversations
TOKENS = ("attention_mask", "token_type_ids", "labels")  # what rows may hold beside input_ids


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer, with a padding token. Raises DataError if it has none, or one that fails."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        has_files = source.folder is not None and any(source.folder.glob("tokenizer*"))
        cause = f" ({_cause(e)})" if has_files else ""  # without any, transformers tells of all that it looked for
        raise DataError(
            f"{source.reference}: no tokenizer that loads{cause}; a text task needs tokenizer.json or the like in the"
            " folder"
        ) from e
    # without its files some classes make an empty one that turns every text into nothing
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"{source.reference}: no tokenizer in the folder; a text task needs one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if "attention_mask" not in tokenizer.model_input_names:  # a batch is cut back by it; the model is not given it
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0:
        raise DataError(
            f"{source.reference}: tokenizer_config.json: model_max_length {str(longest)[:40]}: write a number above 0"
        )
    try:
        tokenizer([""], padding=tokenizer.pad_token_id is not None)  # it need not know any one word
    except Exception as e:  # settings of odd types show at the first use alone
        raise DataError(f"{source.reference}: its tokenizer does not work ({_cause(e)}); mend its files") from e
    return tokenizer


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Special tokens around a text."""

    prefix: tuple[int, ...] = ()  # at the head of each window, such as BOS or [CLS]
    suffix: tuple[int, ...] = ()  # at its end, such as [SEP], in masked language models
    end: tuple[int, ...] = ()  # after each document

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, bos: str = "auto", reference: str = "tokenizer") -> Frame:
        """Read off what the tokenizer itself adds around a text; a document ends with that or the end-of-text token.

        `bos` is "auto", "always" (a tokenizer that adds nothing in front then gives its BOS token, else its end-of-text
        token) or "never". Raises DataError for "always" if there is no such token.
        """
        body, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        starts = (i for i in range(len(full) - len(body) + 1) if full[i : i + len(body)] == body)
        at = next(starts, None) if body else None
        if at is None:
            full, body = tokenizer("")["input_ids"], []
            at = (len(full) + 1) // 2
        prefix, suffix = tuple(full[:at]), tuple(full[at + len(body) :])
        eos = tokenizer.eos_token_id
        if bos == "always" and not prefix:
            known = (tokenizer.bos_token_id, tokenizer.cls_token_id, eos)
            prefix = tuple(token for token in known if token is not None)[:1]
            if not prefix:
                raise DataError(f"{reference}: its tokenizer has no BOS token, which --bos always needs")
        return Frame(
            prefix=() if bos == "never" else prefix,
            suffix=suffix,
            end=suffix or (() if eos is None else (eos,)),
        )

    def strip(self, ids: list[int]) -> list[int]:
        """The tokens without a prefix of their own, which windows get anyway."""
        count = len(self.prefix)
        return ids[count:] if count and tuple(ids[:count]) == self.prefix else ids


def encode(
    rows: Table,
    tokenizer: PreTrainedTokenizerBase,
    column: str | None,
    reference: str,
    *,
    frame: Frame | None = None,
    join: bool = False,
) -> Table:
    """Turn each document into its tokens, `input_ids`, with the frame's end after it; `join` makes one of all rows.

    Special tokens spelled out in the text are recognised; a prefix that a document brings along is taken off, since
    each window gets its own. Conversations go through the tokenizer's chat template and end as that ends them. Rows
    with `input_ids` are taken as tokenised already, unless a text column is asked for.

    Raises DataError that names the row.
    """
    import datasets

    frame = frame or Frame.of(tokenizer)
    names = column_names(rows)
    if column is None and "input_ids" in names:
        return check_tokens(rows, frame, reference, join)
    if column is None and CHAT in names and not set(TEXT_COLUMNS) & set(names):
        column = CHAT
    text = pick_column(rows, column, TEXT_COLUMNS, "text", reference)
    pieces = rows.column_names == ["text", "ends"]  # of streamed text
    held = isinstance(rows, datasets.Dataset)
    if join and held:
        rows = join_rows(rows, text, reference)
    end = [] if join else list(frame.end)

    def tokenise(batch: dict[str, list[object]], at: list[int]) -> dict[str, list[list[int]]]:
        texts = batch[text]
        if any(_is_chat(entry) for entry in texts):
            return {"input_ids": [frame.strip(ids) for ids in _apply_template(texts, at, tokenizer, text, reference)]}
        for row, entry in zip(at, texts, strict=True):
            if not isinstance(entry, str):
                raise DataError(f"{reference}: row {row} of column '{text}' holds {_kind(entry)}, not text")
        if join and not held:
            texts = [entry if str(entry).endswith("\n") else f"{entry}\n" for entry in texts]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ends = [end if last else [] for last in batch["ends"]] if pieces else [end] * len(ids)
        return {"input_ids": [frame.strip(row) + after for row, after in zip(ids, ends, strict=True)]}

    return rows.map(tokenise, batched=True, with_indices=True, remove_columns=column_names(rows))


def _kind(entry: object) -> str:
    return "nothing" if entry is None else type(entry).__name__


def check_texts(rows: datasets.Dataset, column: str, reference: str) -> None:
    """Raise DataError that names the first row whose entry in the column is not text."""
    for row, entry in enumerate(rows[column]):
        if not isinstance(entry, str):
            raise DataError(f"{reference}: row {row} of column '{column}' holds {_kind(entry)}, not text")


def check_written(rows: datasets.Dataset, columns: Sequence[str], reference: str) -> None:
    """Raise DataError that names the first row without text, for a tokenizer that makes no token of it."""
    for row, entries in enumerate(zip(*(rows[column] for column in columns), strict=True)):
        if not any(entries):
            raise DataError(
                f"{reference}: row {row} is empty, and the tokenizer adds no token of its own; leave it out"
            )


def join_rows(rows: datasets.Dataset, column: str, reference: str) -> datasets.Dataset:
    """One row with the text of all, each on a line of its own. Raises DataError for a row that is not text."""
    import datasets

    check_texts(rows, column, reference)
    texts = list(rows[column])
    lines = [text if text.endswith("\n") else f"{text}\n" for text in texts[:-1]]
    features = datasets.Features({column: datasets.Value("large_string")})
    return datasets.Dataset.from_dict({column: ["".join([*lines, *texts[-1:]])]}, features=features)


def _is_chat(entry: object) -> bool:
    return isinstance(entry, list) and bool(entry) and all(isinstance(message, Mapping) for message in entry)


def _apply_template(
    chats: Sequence[object], at: Sequence[int], tokenizer: PreTrainedTokenizerBase, column: str, reference: str
) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{reference}: column '{column}' holds conversations, and the model's tokenizer has no chat template;"
            " write them out as text"
        )
    found = []
    for row, chat in zip(at, chats, strict=True):
        if not isinstance(chat, list) or not _is_chat(chat):
            raise DataError(f"{reference}: row {row} of column '{column}' holds {_kind(chat)}, not a conversation")
        messages = [{key: value for key, value in message.items() if value is not None} for message in chat]
        try:
            found.append(list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)))
        except Exception as e:  # a template raises anything
            cause = " ".join(str(e).split())[:200]
            raise DataError(
                f"{reference}: row {row} of column '{column}': the chat template refuses it ({cause})"
            ) from e
    return found


def check_tokens(rows: Table, frame: Frame, reference: str, join: bool) -> Table:
    """Rows of tokens; with their masks and labels where they have any, unless they are joined."""
    names = column_names(rows)
    if "position_ids" in names:
        raise DataError(
            f"{reference}: has position_ids, as rows of several packed texts do, which are not read; unpack the rows,"
            " or leave the column out"
        )
    kept = ["input_ids", *(name for name in TOKENS if name in names)]
    if join and "labels" in kept:
        raise DataError(f"{reference}: rows with labels of their own are not joined; leave --join or the labels out")
    whole = not join and len(kept) > 1

    def check(batch: dict[str, list[Any]], at: list[int]) -> dict[str, list[Any]]:
        for i, (row, ids) in enumerate(zip(at, batch["input_ids"], strict=True)):
            if not _are_tokens(ids):
                shown = str(ids)[:40]
                raise DataError(
                    f"{reference}: row {row} of column 'input_ids' holds {shown};"
                    " a row is a list of whole numbers from 0"
                )
            for name in kept[1:]:
                found = batch[name][i]
                if not isinstance(found, list) or len(found) != len(ids):
                    raise DataError(f"{reference}: row {row} has {len(ids)} input_ids and not as many {name}")
                hidden = name == "labels"
                if not all(type(entry) is int and (entry >= 0 or (hidden and entry == IGNORED)) for entry in found):
                    raise DataError(
                        f"{reference}: row {row} of column '{name}' holds {str(found)[:40]}; a row is a list of whole"
                        f" numbers from 0{f', or {IGNORED} for none' if hidden else ''}"
                    )
                if name == "attention_mask" and ids and not any(found):
                    raise DataError(f"{reference}: row {row} has an attention_mask that hides all of it; leave it out")
            if whole and not ids:
                raise DataError(f"{reference}: row {row} of column 'input_ids' is empty")
        if whole:
            return {name: batch[name] for name in kept}
        masks = batch.get("attention_mask") or [None] * len(at)
        pairs = zip(batch["input_ids"], masks, strict=True)
        unmasked = [ids if mask is None else [t for t, m in zip(ids, mask, strict=True) if m] for ids, mask in pairs]
        return {"input_ids": [frame.strip(ids) for ids in unmasked]}

    return rows.map(check, batched=True, with_indices=True, remove_columns=names)


def _are_tokens(ids: object) -> bool:
    if not isinstance(ids, list):
        return False
    return not ids or (all(type(token) is int for token in ids) and min(ids) >= 0)


def check_known(rows: Sequence[Sequence[int]], known: int, reference: str) -> None:
    """Raise DataError that names the first row with a token that a vocabulary of `known` does not have."""
    for row, ids in enumerate(rows):
        if len(ids) and max(ids) >= known:
            raise DataError(
                f"{reference}: row {row} has token {max(ids)}, the model knows {known}: not its own tokenizer"
            )

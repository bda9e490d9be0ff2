"""Checks of `FocalPOTrainer`'s data before it trains: rows that TRL cannot take, pairs without a signal.

`as_trl_takes_it` sees the texts, `inspect_pairs` the token ids that TRL makes of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import extract_prompt
from trl.trainer.utils import global_then_local_main_first

from focalkern.shared_prompts import PAIR_IDS, cut_sequence

STREAMED_ROWS = 1000  # of a stream: those after them are not looked at
_TEXTS = ("prompt", "chosen", "rejected")
_BATCH_ROWS = 10_000
_SHORT = 4  # tokens: an empty completion is no longer, with the end of its turn
_SHOWN = 70  # characters of a text
_LABELS = ("prompt (masked)", "chosen", "rejected")

# -------------------------------------------------------------------------------------------------- the texts


def as_trl_takes_it(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """The dataset, with the prompt of conversations as messages, and once.

    Public sets have a `prompt` of text beside conversations that begin with it, on which TRL fails; and TRL
    would write a `prompt` of messages twice where `chosen` and `rejected` repeat it.

    Raises:
        ValueError: naming the column or the row.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"the {name} dataset must hold pairs; it is empty")
    missing = [column for column in ("chosen", "rejected") if column not in first]
    if missing:
        raise ValueError(
            f"the {name} dataset must have the columns prompt, chosen and rejected; got {list(first)}:"
            f" {' and '.join(missing)} missing. dataset.rename_columns() gives columns these names"
        )
    kinds = {column: _kind(first[column]) for column in _TEXTS if column in first}
    kind = kinds["chosen"]
    fitting = {"text": ("text",), "messages": ("text", "messages")}.get(kind, ())
    if kinds["rejected"] != kind or kinds.get("prompt", kind) not in fitting:
        raise ValueError(
            f"the {name} dataset must have chosen and rejected (and prompt) as text, or as lists of messages"
            f" {{'role': ..., 'content': ...}}; got {kinds} in its first row"
        )
    _check_rows(dataset, kinds, name)
    if kind == "text" or "prompt" not in first:
        return dataset
    with global_then_local_main_first():
        return dataset.map(_with_prompt_apart, with_indices=True, fn_kwargs={"name": name})


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        return "messages"
    return f"{type(value).__name__} {str(value)[:40]}"


def _with_prompt_apart(row: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    prompt, chosen, rejected = (row[column] for column in _TEXTS)
    if not isinstance(prompt, str):
        repeated = chosen[: len(prompt)] == prompt == rejected[: len(prompt)]
        start = len(prompt) if repeated else 0
        return {"chosen": chosen[start:], "rejected": rejected[start:]}
    if not chosen or not rejected:
        raise ValueError(f"row {index} of the {name} dataset has no messages in chosen or in rejected")
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return {"prompt": [{"role": "user", "content": prompt}]}
    apart = extract_prompt({"chosen": chosen, "rejected": rejected})
    if prompt.strip() not in [str(message.get("content")).strip() for message in apart["prompt"]]:
        raise ValueError(
            f"row {index} of the {name} dataset has a prompt that is not among the messages that chosen and"
            " rejected begin with: remove the column if these are whole conversations"
        )
    return apart


def _check_rows(dataset: Dataset | IterableDataset, kinds: dict[str, str], name: str) -> None:
    """Raise ValueError for null, and for another kind than in the first row."""
    if isinstance(dataset, IterableDataset):
        rows = dataset.take(STREAMED_ROWS)
    elif _arrow_vouches_for(dataset.select_columns(list(kinds))):
        return
    else:
        rows = dataset.select_columns(list(kinds))
    for i, row in enumerate(rows):
        for column, kind in kinds.items():
            value = row[column]
            found = _kind(value)
            if value is None or (found == "messages" and any(map(_lacks_content, value))):
                found = "null"
            if found != kind and value != []:
                raise ValueError(
                    f"row {i} of the {name} dataset has {found} in {column}, and row 0 has {kind}: mend it,"
                    " or filter it out"
                )


def _arrow_vouches_for(dataset: Dataset) -> bool:
    """Whether the columns are of one type each, text or messages, and without null."""
    for table in dataset.with_format("arrow").iter(_BATCH_ROWS):
        for column in table.itercolumns():
            values = column.combine_chunks()
            if pa.types.is_list(values.type) and pa.types.is_struct(values.type.value_type):
                messages = values.flatten()
                parts = [values, messages, *messages.flatten()]
            elif pa.types.is_string(values.type):
                parts = [values]
            else:
                return False
            if any(part.null_count for part in parts):
                return False
    return True


def _lacks_content(message: dict[str, Any]) -> bool:
    """A message that calls a tool may have none."""
    return message.get("content") is None and not message.get("tool_calls")


# ---------------------------------------------------------------------------------------------- the token ids


@dataclass(frozen=True)
class DataReport:
    """The pairs of a tokenised dataset, counted. A pair counts under everything that it is."""

    name: str
    max_length: int | None
    dropped: int  # by TRL: the prompt alone fills max_length
    pairs: int  # left
    cut: int  # by max_length
    doubled_bos: int
    without_eos: int  # neither EOS nor another special token ends chosen, or rejected
    empty: int  # chosen or rejected says nothing
    identical: int  # chosen equals rejected, as far as max_length leaves them
    unprompted: int  # without a prompt
    unpredicted: int  # chosen or rejected is one token at most, and no token before it predicts it
    first_pair: str  # as it is trained on, shortened
    is_sample: bool  # the first rows of a stream

    def __str__(self) -> str:
        return (
            f"{self.name}: {'first ' * self.is_sample}{self.pairs} pairs, {self.dropped} others dropped,"
            f" {self.cut} cut (max_length={self.max_length}); {self.doubled_bos} with BOS twice,"
            f" {self.without_eos} without EOS, {self.empty} empty, {self.identical} with chosen = rejected\n"
            f"{self.first_pair}"
        )

    def warnings(self) -> list[str]:
        """What is probably wrong, and what to do."""
        rows = self.pairs + self.dropped
        cuts_much = 10 * (self.dropped + self.cut) > rows
        found = (
            (self.doubled_bos, "begin with BOS twice: take it out of the texts, or give conversations"),
            (self.without_eos, "do not end with EOS: the model learns no end. See the chat template"),
            (self.empty, "have an empty chosen or rejected: filter them out"),
            (self.identical, "have chosen equal to rejected: filter them out"),
            (self.unpredicted, "have a completion of one token and none before it: filter them out"),
            (
                (self.unprompted == self.pairs) * self.pairs,
                "have no prompt: is it in a column of another name? dataset.rename_column() mends that",
            ),
            (
                cuts_much * self.dropped,
                f"are dropped, their prompts fill max_length={self.max_length}: raise it",
            ),
            (cuts_much * self.cut, f"are cut by max_length={self.max_length}: raise it"),
        )
        return [
            f"{count} of {rows} pairs of the {self.name} dataset {what}" for count, what in found if count
        ]

    def check(self, loss_types: list[str], divides_by_length: bool) -> None:
        """Raise ValueError where the run would end in the middle, or train nothing."""
        if self.unpredicted and divides_by_length:
            raise ValueError(
                f"length_normalize would divide by 0: {self.unpredicted} pairs of the {self.name} dataset"
                " have a completion of one token and none before it. Filter them out, or give them a prompt"
            )
        if self.name != "train":
            return
        if not self.pairs:
            raise ValueError(
                f"max_length={self.max_length} leaves no pair to train on: the prompts of all {self.dropped}"
                " fill it"
            )
        for count, what in (
            (0 if "sft" in loss_types else self.identical, "chosen equals rejected"),
            (self.empty, "chosen or rejected is empty"),
            (self.unpredicted, "a completion is one token, and none before it"),
        ):
            if count == self.pairs:
                raise ValueError(f"nothing can be trained on the train dataset: {what} in all its pairs")


def inspect_pairs(
    dataset: Dataset,
    rows: int,  # before TRL dropped some
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str,
    is_sample: bool = False,
) -> DataReport:
    """The report on a dataset with TRL's `prompt_ids`, `chosen_ids` and `rejected_ids`."""
    bos = tokenizer.bos_token_id
    special = set(tokenizer.all_special_ids)
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)

    @functools.cache
    def is_empty(*ids: int) -> bool:
        return not tokenizer.decode([i for i in ids if i not in special]).strip()

    counts = dict.fromkeys(
        ("pairs", "cut", "doubled_bos", "without_eos", "empty", "identical", "unprompted", "unpredicted"), 0
    )
    first_pair = ""
    for prompt, *completions in token_ids(dataset):
        (start, chosen), (other_start, rejected) = (
            cut_sequence(prompt, ids, max_length, truncation_mode) for ids in completions
        )
        longest = len(prompt) + max(map(len, completions))
        begins = [[*prompt[:2], *ids[:2]][:2] for ids in completions]
        traits = {
            "pairs": True,
            "cut": max_length is not None and longest > max_length,
            "doubled_bos": bos is not None and [bos, bos] in begins,
            # Templates write a line end after the token that ends the turn.
            "without_eos": any(special.isdisjoint(ids[-2:].tolist()) for ids in completions),
            "empty": any(len(ids) <= _SHORT and is_empty(*ids.tolist()) for ids in completions),
            "identical": np.array_equal(chosen, rejected),
            "unprompted": bool((prompt == bos).all()),  # nothing, or BOS
            "unpredicted": len(chosen) <= (not len(start)) or len(rejected) <= (not len(other_start)),
        }
        counts = {trait: counts[trait] + traits[trait] for trait in counts}
        if not first_pair:
            first_pair = "\n".join(
                f"  {label:<16}{_shortened(tokenizer.decode(ids.tolist()))}"
                for label, ids in zip(_LABELS, (start, chosen, rejected), strict=True)
            )
    return DataReport(
        name,
        max_length,
        rows - counts["pairs"],
        **counts,
        first_pair=first_pair,
        is_sample=is_sample,
    )


def token_ids(dataset: Dataset) -> Iterator[list[np.ndarray]]:
    """Prompt, chosen and rejected, row by row."""
    for columns in id_columns(dataset):
        rows = zip(*(column.to_numpy() for column in columns), strict=True)
        yield from ([np.array(ids, dtype=np.int64) for ids in row] for row in rows)


def id_columns(dataset: Dataset) -> Iterator[list[pa.ChunkedArray]]:
    """Prompt, chosen and rejected of some rows after the other, as columns of Arrow: rows take longer."""
    for table in dataset.select_columns(list(PAIR_IDS)).with_format("arrow").iter(_BATCH_ROWS):
        yield [table[column] for column in PAIR_IDS]


def _shortened(text: str) -> str:
    text = repr(text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"

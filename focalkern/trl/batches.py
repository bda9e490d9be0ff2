"""Batches by tokens: pairs of like length come together, as many as `max_tokens_per_batch` holds.

`FocalPOTrainer` samples by `TokenBatchSampler`, whose batches differ in their number of pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch.utils.data import Sampler

from focalkern.trl.config import FocalPOConfig
from focalkern.trl.data import id_columns

# Pairs trade places from epoch to epoch if their tokens differ by less than this share.
_LIKE = 1 / 16


def pair_tokens(
    dataset: Dataset, max_length: int | None, truncation_mode: str, share_prompt: bool
) -> np.ndarray:  # [pairs] int64
    """Tokens of each pair in a batch: prompt + chosen + prompt + rejected, after truncation.

    Args:
        dataset: with TRL's `prompt_ids`, `chosen_ids` and `rejected_ids`.
        share_prompt: count the prompt once, as `share_prompts` lays pairs out.
    """
    parts = [
        np.stack([pc.list_value_length(column).to_numpy() for column in columns]).astype(np.int64)
        for columns in id_columns(dataset)
    ]
    prompt, *completions = np.concatenate(parts, axis=1)
    whole = np.stack([prompt + completion for completion in completions])  # [2, pairs]
    excess = np.zeros_like(whole) if max_length is None else np.maximum(whole - max_length, 0)
    tokens = (whole - excess).sum(0)
    if not share_prompt:
        return tokens
    of_prompt = np.minimum(prompt, whole - excess if truncation_mode == "keep_start" else prompt - excess)
    chosen, rejected = np.maximum(of_prompt, 0)
    return tokens - np.where(chosen == rejected, chosen, 0)  # cut at different places, it stands twice


def tokens_of(dataset: Dataset, args: FocalPOConfig) -> np.ndarray:  # [pairs]
    """As `max_tokens_per_batch` counts them."""
    return pair_tokens(dataset, args.max_length, args.truncation_mode, args.share_prompt)


def check_longest(tokens: np.ndarray, max_tokens: int) -> None:
    """Raise ValueError where a pair alone is above the limit."""
    row = int(tokens.argmax())
    if tokens[row] > max_tokens:
        raise ValueError(
            f"max_tokens_per_batch must hold the longest pair, {tokens[row]} tokens in row {row} of the train"
            f" dataset (counted after max_length has dropped pairs); got {max_tokens}: raise it, or lower"
            " max_length"
        )


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of pairs of like length with at most `max_tokens` tokens, every pair once an epoch.

    The batches of all ranks, one after the other: accelerate hands rank r every batch r, r + ranks, ... Their
    number is a multiple of `ranks`, for which the batches with most pairs are halved. The number of batches
    and the number of pairs in each size of batch are the same in all epochs. The pairs and the order of
    batches are drawn from `seed` and the epoch.

    Args:
        tokens: [pairs], the tokens of each pair.

    Raises:
        ValueError: a pair is longer than `max_tokens`, or the pairs cannot be shared among the ranks.
    """

    def __init__(self, tokens: np.ndarray, max_tokens: int, ranks: int = 1, seed: int = 0) -> None:
        check_longest(tokens, max_tokens)
        self.seed = seed
        self.epoch = 0
        self.pairs = len(tokens)
        self._by_length = np.argsort(-tokens, kind="stable")
        self._classes, sizes = _like_lengths(tokens[self._by_length], max_tokens)
        while len(sizes) % ranks:
            largest = max(sizes)
            if largest == 1:
                raise ValueError(
                    f"max_tokens_per_batch={max_tokens} makes {len(sizes)} batches of one pair, which {ranks}"
                    " ranks cannot share evenly: raise max_tokens_per_batch, or give train_dataset a multiple"
                    f" of {ranks} pairs"
                )
            i = sizes.index(largest)
            sizes[i : i + 1] = [largest - largest // 2, largest // 2]
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = np.lexsort((generator.random(self.pairs), self._classes))
        batches = np.split(self._by_length[order], self._ends[:-1])
        for i in generator.permutation(len(batches)):
            yield batches[i].tolist()

    @property
    def fingerprint(self) -> str:
        """The same for samplers of the same batches in every epoch."""
        return Hasher.hash((self.seed, self._by_length.tolist(), self._classes.tolist(), self._ends.tolist()))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def _like_lengths(tokens: np.ndarray, max_tokens: int) -> tuple[np.ndarray, list[int]]:
    """The class of each pair, and the number of pairs in each batch; pairs are sorted from the longest on.

    Any pair of a class counts as its longest: batches then hold whichever pair of it is drawn, and their
    number is that of every epoch.
    """
    classes, counted = np.empty_like(tokens), np.empty_like(tokens)
    starts = [0]
    while starts[-1] < len(tokens):
        start = starts[-1]
        longest = tokens[start]
        end = int(np.searchsorted(-tokens, -(1 - _LIKE) * longest, side="right"))
        classes[start:end], counted[start:end] = len(starts), longest
        starts.append(end)
    total = np.cumsum(counted)
    ends: list[int] = [0]
    while ends[-1] < len(tokens):
        used = total[ends[-1] - 1] if ends[-1] else 0
        ends.append(int(np.searchsorted(total, used + max_tokens, side="right")))
    return classes, np.diff(np.array(ends)).tolist()


def weighted_mean(values: list[tuple[Any, Any]]) -> float:
    """Σ weight·value / Σ weight of 0-dim tensors, on the host."""
    found = [(value.item(), weight.item()) for value, weight in values]
    return sum(value * weight for value, weight in found) / sum(weight for _, weight in found)

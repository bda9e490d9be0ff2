"""Preference pairs with their prompt once: the layout, the attention mask, the way back to sequences.

A row holds `[prompt | chosen | rejected]`. Both completions go on from the prompt's end and do not see each
other, so that their hidden states are those of two padded sequences ("prefix sharing", arXiv 2410.20305).
Called by `focalkern.trl` and by custom loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch

from focalkern import checks

TRUNCATION_MODES = ("keep_start", "keep_end")
PAIR_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # as TRL names the columns, too
Ids = Sequence[int] | torch.Tensor  # 1-D


class SharedPrompts(NamedTuple):
    """B pairs whose prompt stands once, made by `share_prompts`.

    Each of the 2B sequences is the last token of its prompt, which predicts the first one of the completion,
    and the completion. They have N tokens in all.
    """

    input_ids: torch.Tensor  # [R, T] int64, padded at the end of a row
    position_ids: torch.Tensor  # [R, T] int64: both completions go on from the end of their prompt
    seen_until: torch.Tensor  # [R, T] int64: the token is seen from its own place up to this one, exclusive
    hidden_index: torch.Tensor  # [N] int64: place in the flattened rows of each token of the sequences
    labels: torch.Tensor  # [N] int64: the completions; -100 at the first token of a sequence
    cu_seqlens: torch.Tensor  # [2B + 1] int32: boundaries of the sequences, B chosen then B rejected

    def to(self, device: torch.device | str) -> SharedPrompts:
        return SharedPrompts(*(x.to(device) for x in self))

    def sequences(self, hidden: torch.Tensor) -> torch.Tensor:  # [R, T, H] -> [N, H]
        """The hidden states as the losses take them, with `labels`, `cu_seqlens` and `shift=True`."""
        return hidden.flatten(0, 1).index_select(0, self.hidden_index)

    def attention_mask(self, config: Any) -> Any:
        """What a transformers model takes as `attention_mask`; see `shared_attention_mask`."""
        return shared_attention_mask(config, self.position_ids, self.seen_until)


def share_prompts(
    prompt_ids: Sequence[Ids],
    chosen_ids: Sequence[Ids],
    rejected_ids: Sequence[Ids],
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    one_row: bool = False,
) -> SharedPrompts:
    """Lay B pairs out as `[prompt | chosen | rejected]`, so that a model computes each prompt once.

        batch = share_prompts(prompt_ids, chosen_ids, rejected_ids).to(model.device)
        mask = batch.attention_mask(model.config)
        output = model.model(batch.input_ids, position_ids=batch.position_ids, attention_mask=mask)
        hidden = batch.sequences(output.last_hidden_state)
        loss_fn(hidden, weight, batch.labels, shift=True, cu_seqlens=batch.cu_seqlens).loss.backward()

    Args:
        prompt_ids, chosen_ids, rejected_ids: [B] each: token ids as a list or a 1-D tensor, without padding.
            Where a prompt is empty nothing predicts the first tokens of its completions: the loss leaves
            them out.
        max_length: prompt and completion together are cut to so many tokens. Where "keep_end" cuts the
            prompts of chosen and rejected at different places, the pair is laid out with both.
        truncation_mode: "keep_start" or "keep_end".
        one_row: put all pairs on one row, without padding: for FlexAttention, which skips the pairs that do
            not see each other. By default they fill rows as long as the longest pair: a dense mask then grows
            with that pair, not with the batch.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    checks.check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    checks.check_flag("one_row", one_row)
    if max_length is not None:
        checks.check_integer("max_length", max_length, low=1)
    if not len(prompt_ids) == len(chosen_ids) == len(rejected_ids) > 0:
        raise ValueError(
            "prompt_ids, chosen_ids and rejected_ids must have one entry for each of B > 0 pairs; got"
            f" {len(prompt_ids)}, {len(chosen_ids)} and {len(rejected_ids)}"
        )
    pairs, trees = len(prompt_ids), []
    for i, texts in enumerate(zip(prompt_ids, chosen_ids, rejected_ids, strict=True)):
        named = zip(PAIR_IDS, texts, strict=True)
        prompt, *completions = (_checked(f"{name}[{i}]", ids) for name, ids in named)
        cut = [cut_sequence(prompt, ids, max_length, truncation_mode) for ids in completions]
        (start, chosen), (other_start, rejected) = cut
        if len(start) == len(other_start):
            trees.append(_Tree(start, {i: chosen, pairs + i: rejected}))
        else:
            trees += [_Tree(start, {i: chosen}), _Tree(other_start, {pairs + i: rejected})]

    rows = _filled_rows(trees, one_row)
    width = max(len(row.ids) for row in rows)
    places: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        row.pad(width)
        places |= {s: [i * width + place for place in found] for s, found in row.places.items()}
    order = [places[s] for s in range(2 * pairs)]
    ids = torch.tensor([row.ids for row in rows], dtype=torch.int64)
    index = torch.tensor([*chain.from_iterable(order)], dtype=torch.int64)
    boundaries = torch.tensor([0, *accumulate(map(len, order))], dtype=torch.int32)
    labels = ids.flatten()[index]
    labels[boundaries[:-1][boundaries.diff() > 0].long()] = -100
    return SharedPrompts(
        input_ids=ids,
        position_ids=torch.tensor([row.positions for row in rows], dtype=torch.int64),
        seen_until=torch.tensor([row.seen_until for row in rows], dtype=torch.int64),
        hidden_index=index,
        labels=labels,
        cu_seqlens=boundaries,
    )


def _checked(name: str, ids: Any) -> list[int]:
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    is_empty = tensor is not None and not tensor.numel()
    if tensor is None or tensor.dim() != 1 or not (is_empty or tensor.dtype in (torch.int64, torch.int32)):
        raise TypeError(f"{name} must be token ids, a list of int or a 1-D tensor; got {ids!r}")
    return tensor.tolist()


def cut_sequence(
    prompt: Any, completion: Any, max_length: int | None, truncation_mode: str
) -> tuple[Any, Any]:
    """Prompt and completion of together at most `max_length` tokens, cut as TRL's collator cuts them."""
    excess = 0 if max_length is None else max(len(prompt) + len(completion) - max_length, 0)
    if truncation_mode == "keep_start":
        return prompt[:max_length], completion[: max(len(completion) - excess, 0)]
    return prompt[excess:], completion[max(excess - len(prompt), 0) :]


def shared_attention_mask(
    config: Any,
    position_ids: torch.Tensor,  # [R, T]
    seen_until: torch.Tensor,  # [R, T]
) -> Any:
    """The attention mask of `share_prompts` for a transformers model, made once for all its layers.

    Query q sees key k where k <= q < seen_until[k] and, in layers with a sliding window, where
    position[q] − position[k] < window.

    Args:
        config: of the model: its attention implementation, layer types and sliding window count.

    Returns:
        With FlexAttention a `BlockMask`; with sdpa [R, 1, T, T] bool; with eager the same in fp32, 0 or its
        minimum. A dict of two, by type of layer, where some layers alone have a window.

    Raises:
        ValueError: attn_implementation, or a layer type, of which this mask cannot be made.
    """
    config = config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in _MASKS:
        raise ValueError(
            f"attn_implementation must be one of {[*_MASKS]} with shared prompts: others take no such mask;"
            f" got {implementation!r}"
        )
    windows = _windows(config)
    masks = {
        kind: _MASKS[implementation](position_ids, seen_until, window) for kind, window in windows.items()
    }
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each type of layer that a text config has, None where all tokens are seen."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # all layers are alike
        return {"full_attention" if window is None else "sliding_attention": window}
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    if unknown := set(kinds) - set(known):
        raise ValueError(f"layer_types must be of {[*known]} with shared prompts; got {sorted(unknown)}")
    return {kind: known[kind] for kind in sorted(set(kinds))}


def _bool_mask(position_ids: torch.Tensor, seen_until: torch.Tensor, window: int | None) -> torch.Tensor:
    i = torch.arange(seen_until.shape[1], device=seen_until.device)
    mask = (i <= i[:, None]) & (i[:, None] < seen_until[:, None])
    if window is not None:
        mask &= position_ids[:, :, None] - position_ids[:, None] < window
    return mask[:, None]


def _float_mask(position_ids: torch.Tensor, seen_until: torch.Tensor, window: int | None) -> torch.Tensor:
    mask = _bool_mask(position_ids, seen_until, window)
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def _block_mask(position_ids: torch.Tensor, seen_until: torch.Tensor, window: int | None) -> Any:
    # Half a second to import, and for this implementation alone.
    from torch.nn.attention.flex_attention import and_masks, create_block_mask

    rows, width = seen_until.shape
    reach = width if window is None else window

    def is_seen(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < seen_until[row, k])

    def is_near(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return position_ids[row, q] - position_ids[row, k] < reach

    function = is_seen if window is None else and_masks(is_seen, is_near)
    is_cuda = seen_until.is_cuda  # compiled, it does not hold [T, T]
    return create_block_mask(function, rows, None, width, width, device=seen_until.device, _compile=is_cuda)


_MASKS = {"sdpa": _bool_mask, "eager": _float_mask, "flex_attention": _block_mask}


class _Tree(NamedTuple):
    prompt: list[int]
    completions: dict[int, list[int]]  # by the number of the sequence

    @property
    def size(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions.values()))


class _Row:
    """A row while it is filled."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.seen_until: list[int] = []
        self.places: dict[int, list[int]] = {}  # of each sequence, from the last token of its prompt on

    def add(self, tree: _Tree) -> None:
        prompt_end = len(self.ids) + len(tree.prompt)
        self._append(tree.prompt, 0, len(self.ids) + tree.size)
        last = [prompt_end - 1] if tree.prompt else []
        for sequence, completion in tree.completions.items():
            start, end = len(self.ids), len(self.ids) + len(completion)
            self._append(completion, len(tree.prompt), end)
            self.places[sequence] = [*last, *range(start, end)]

    def pad(self, width: int) -> None:
        for place in range(len(self.ids), width):
            self._append([0], 0, place + 1)  # sees itself alone

    def _append(self, ids: list[int], position: int, seen_until: int) -> None:
        self.ids.extend(ids)
        self.positions.extend(range(position, position + len(ids)))
        self.seen_until.extend([seen_until] * len(ids))


def _filled_rows(trees: list[_Tree], one_row: bool) -> list[_Row]:
    """First fit, the largest first, into rows of the largest; or all in one."""
    if not one_row:
        trees = sorted(trees, key=lambda tree: tree.size, reverse=True)
    width = sum(tree.size for tree in trees) if one_row else trees[0].size
    rows: list[_Row] = []
    for tree in trees:
        row = next((row for row in rows if len(row.ids) + tree.size <= width), None)
        if row is None:
            rows.append(row := _Row())
        row.add(tree)
    return rows

"""`share_prompts` and its attention masks: hidden states, losses and gradients of padded sequences."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tolerance import relative_error

pytest.importorskip("trl")

from torch.nn.attention.flex_attention import create_mask, flex_attention
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_tiny import WINDOW, random_model

from focalkern import FusedFocalPOLoss, logit_options, share_prompts, shared_attention_mask

PROMPTS = [[11, 12, 13], [], [14, 15], list(range(16, 30))]
CHOSEN = [[31, 32], [33, 34, 35], [36], list(range(30, 41))]
REJECTED = [[41], [42, 43], list(range(44, 60)), [31, 33]]
PAIRS = (PROMPTS, CHOSEN, REJECTED)


def test_a_pair_is_its_prompt_and_two_completions():
    batch = share_prompts([[5, 6], []], [[7, 8, 9], [1]], [[4], [2, 3]], one_row=True)
    expected = {
        "input_ids": [[5, 6, 7, 8, 9, 4, 1, 2, 3]],
        "position_ids": [[0, 1, 2, 3, 4, 2, 0, 0, 1]],
        "seen_until": [[6, 6, 5, 5, 5, 6, 7, 9, 9]],
        "hidden_index": [1, 2, 3, 4, 6, 1, 5, 7, 8],
        "labels": [-100, 7, 8, 9, -100, -100, 4, -100, 3],
        "cu_seqlens": [0, 4, 5, 7, 9],
    }
    assert {name: tensor.tolist() for name, tensor in batch._asdict().items()} == expected
    rows = share_prompts([[5, 6], []], [[7, 8, 9], [1]], [[4], [2, 3]])
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 9, 4], [1, 2, 3, 0, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 2], [0, 0, 1, 0, 0, 0]]
    assert rows.seen_until.tolist() == [[6, 6, 5, 5, 5, 6], [1, 3, 3, 4, 5, 6]]
    assert rows.hidden_index.tolist() == [1, 2, 3, 4, 6, 1, 5, 7, 8]
    assert torch.equal(rows.labels, batch.labels)


def test_rows_are_as_long_as_the_longest_pair_and_full():
    sizes = [(1, 2, 1), (3, 4, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0)]  # 4, 10, 6, 3 and no tokens
    texts = [[[9] * pair[i] for pair in sizes] for i in range(3)]
    batch = share_prompts(*texts)
    assert batch.input_ids.bool().sum(1).tolist() == [10, 10, 3]
    lengths = [(prompt > 0) + chosen for prompt, chosen, _ in sizes]
    lengths += [(prompt > 0) + rejected for prompt, _, rejected in sizes]
    assert batch.cu_seqlens.diff().tolist() == lengths
    first = [start for start, length in zip(batch.cu_seqlens.tolist(), lengths, strict=False) if length]
    assert (batch.labels == -100).nonzero().flatten().tolist() == first


def test_tensors_are_taken_as_lists_are():
    tensors = [[torch.tensor(ids, dtype=torch.int32) for ids in texts] for texts in PAIRS]
    for given, expected in zip(share_prompts(*tensors), share_prompts(*PAIRS), strict=True):
        assert torch.equal(given, expected)


def test_a_prompt_that_is_cut_at_two_places_stands_twice():
    cut = {"max_length": 4, "truncation_mode": "keep_end"}
    batch = share_prompts([[5, 6, 7]], [[8, 9]], [[4]], **cut, one_row=True)
    assert batch.input_ids.tolist() == [[6, 7, 8, 9, 5, 6, 7, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.seen_until.tolist() == [[4] * 4 + [8] * 4]
    assert batch.labels.tolist() == [-100, 8, 9, -100, 4]


REFUSED = {
    "prompt_ids": ([[[1]], [[2]], []], {}),
    "truncation_mode": ([[[1]], [[2]], [[3]]], {"truncation_mode": "middle"}),
    "max_length": ([[[1]], [[2]], [[3]]], {"max_length": 0}),
    "one_row": ([[[1]], [[2]], [[3]]], {"one_row": None}),
    r"chosen_ids\[1\]": ([[[1]] * 2, [[2], [1.7]], [[3]] * 2], {}),
    r"prompt_ids\[0\]": (["1", [[2]], [[3]]], {}),
    r"rejected_ids\[0\]": ([[[1]], [[2]], [[[3]]]], {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_by_name(name):
    texts, options = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=name):
        share_prompts(*texts, **options)


# ------------------------------------------------------------------------------------------------- the masks


def config(implementation: str, **options) -> SimpleNamespace:
    """As of a model that has a language model among others."""
    text = SimpleNamespace(_attn_implementation=implementation, **options)
    return SimpleNamespace(get_text_config=lambda: text)


def sees(batch, row: int, q: int, k: int, window: int | None) -> bool:
    """By the definition: an earlier token of the same sequence, and near."""
    position, seen_until = batch.position_ids[row].tolist(), batch.seen_until[row].tolist()
    return k <= q < seen_until[k] and (window is None or position[q] - position[k] < window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("one_row", [True, False])
def test_masks_are_what_they_are_defined_to_be(one_row, window):
    batch = share_prompts(*PAIRS, one_row=one_row)
    rows, width = batch.input_ids.shape
    expected = torch.tensor(
        [
            [[[sees(batch, row, q, k, window) for k in range(width)] for q in range(width)]]
            for row in range(rows)
        ]
    )
    dense = batch.attention_mask(config("sdpa", sliding_window=window))
    assert torch.equal(dense, expected)
    added = batch.attention_mask(config("eager", sliding_window=window))
    assert torch.equal(added == 0, expected)
    assert (added[~expected] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("one_row", [True, False])
def test_block_masks_are_the_dense_ones(one_row, window):
    """Over several blocks of 128; and FlexAttention with the one is sdpa with the other."""
    lengths = [(150, 90, 40), (7, 130, 160), (0, 5, 300)]
    texts = [[[1] * pair[i] for pair in lengths] for i in range(3)]
    batch = share_prompts(*texts, one_row=one_row)
    dense = batch.attention_mask(config("sdpa", sliding_window=window))
    blocks = batch.attention_mask(config("flex_attention", sliding_window=window))
    rows, width = batch.input_ids.shape
    assert blocks.shape == (rows, 1, width, width)
    assert torch.equal(create_mask(blocks.mask_mod, rows, 1, width, width, device="cpu"), dense)
    padding = -width % 128
    padded = torch.nn.functional.pad(dense, (0, padding, 0, padding))
    pooled = torch.nn.functional.max_pool2d(padded.float(), 128) > 0
    assert torch.equal(blocks.to_dense() > 0, pooled)
    assert not pooled.all()
    q, k, v = torch.randn(3, rows, 2, width, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    assert relative_error(flex_attention(q, k, v, block_mask=blocks), expected) < 1e-6


def test_layers_of_two_kinds_have_a_mask_each():
    batch = share_prompts(*PAIRS)
    kinds = ["sliding_attention", "full_attention"] * 2
    masks = batch.attention_mask(config("sdpa", sliding_window=3, layer_types=kinds))
    assert masks.keys() == set(kinds)
    assert torch.equal(masks["sliding_attention"], batch.attention_mask(config("sdpa", sliding_window=3)))
    assert torch.equal(masks["full_attention"], batch.attention_mask(config("sdpa")))
    alike = batch.attention_mask(config("sdpa", sliding_window=3, layer_types=kinds[:1] * 4))
    assert torch.equal(alike, masks["sliding_attention"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attn_implementation", {"implementation": "flash_attention_2"}),
        ("layer_types", {"implementation": "sdpa", "layer_types": ["linear_attention"]}),
    ],
)
def test_what_no_mask_can_be_made_for_is_refused_by_name(name, options):
    with pytest.raises(ValueError, match=name):
        shared_attention_mask(config(**options), *torch.ones(2, 1, 1, dtype=torch.int64))


# ------------------------------------------------------------------------------------------ in a custom loop

EAGER = {"attn_implementation": "eager"}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, **EAGER},
    "Qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Phi3": {"sliding_window": WINDOW},
}
CUT = {"max_length": 12, "truncation_mode": "keep_end"}


def padded_run(model, loss_fn, refs, max_length=None, truncation_mode="keep_start"):
    collate = DataCollatorForPreference(0, max_length, truncation_mode)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = collate([dict(zip(names, pair, strict=True)) for pair in zip(*PAIRS, strict=True)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    hidden = model.base_model(batch["input_ids"], batch["attention_mask"])[0]
    return loss_fn(hidden, model.lm_head.weight, labels, None, *refs, shift=True)


def shared_run(model, loss_fn, refs, one_row, **cut):
    batch = share_prompts(*PAIRS, one_row=one_row, **cut)
    mask = batch.attention_mask(model.config)
    hidden = model.base_model(batch.input_ids, mask, position_ids=batch.position_ids)[0]
    arguments = (batch.sequences(hidden), model.lm_head.weight, batch.labels, None, *refs)
    return loss_fn(*arguments, shift=True, cu_seqlens=batch.cu_seqlens)


@pytest.mark.parametrize("cut", [{}, CUT], ids=["whole", "cut at the start"])
@pytest.mark.parametrize("one_row", [True, False], ids=["one row", "a row a pair"])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_those_of_padded_sequences(kind, one_row, cut):
    model = random_model(kind, vocab_size=64, **MODELS[kind])
    loss_fn = FusedFocalPOLoss(gamma=0.5, **logit_options(model.config))
    refs = torch.randn(2, len(PROMPTS)) - 20
    outs, gradients = [], []
    for run, options in ((padded_run, cut), (shared_run, {"one_row": one_row, **cut})):
        outs.append(run(model, loss_fn, refs, **options))
        gradients.append(torch.autograd.grad(outs[-1].loss, list(model.parameters())))
    padded, shared = outs
    assert torch.equal(shared.lengths, padded.lengths)
    for name in ("losses", "chosen_logps", "rejected_logps", "prob", "weight"):
        assert relative_error(getattr(shared, name), getattr(padded, name)) < 1e-5, name
    for (name, _), ours, theirs in zip(model.named_parameters(), *gradients[::-1], strict=True):
        assert relative_error(ours, theirs) < 1e-5, name


@pytest.mark.slow
def test_a_model_with_compiled_flex_attention_gives_the_hidden_states_of_sdpa():
    model = random_model("Mistral", vocab_size=64, sliding_window=WINDOW)
    batch, states = share_prompts(*PAIRS), []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        mask = batch.attention_mask(model.config)
        with torch.no_grad():
            states.append(model.model(batch.input_ids, mask, position_ids=batch.position_ids)[0])
    assert relative_error(states[1], states[0]) < 1e-5

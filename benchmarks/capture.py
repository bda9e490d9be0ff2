"""Save what a real model feeds into its LM head on preference data, for `throughput.py --capture`.

    python benchmarks/capture.py MODEL --out capture.pt                          # docstring pairs
    python benchmarks/capture.py MODEL --out capture.pt --data pairs.jsonl --tokens 8192
    make demo && python benchmarks/capture.py runs/quickstart/model --out capture.pt

MODEL is any causal LM of transformers, a folder or an id. Of each pair, the completions' hidden states are
kept as the head receives them, beside their labels; `Capture` in `capture_file.py` lists the rest. Without
`--reference`, the reference log-probs are the model's own, as at the first step of a training: every pair
then stands at u = 0 and has the same weight. Pairs come in random order, so that a few of them are a sample.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from preference_data import (
    IGNORE_INDEX,
    Batch,
    DataError,
    Pair,
    PreferenceSet,
    docstring_pairs,
    encode_pairs,
    read_pairs,
)
from quickstart import Policy, at_least

from benchmarks.capture_file import Capture
from benchmarks.inputs import LogitTransform, Sharpness, label_logps


@dataclass(frozen=True)
class Completion:
    """One sequence of a pair."""

    hidden: torch.Tensor  # [length, H]
    labels: torch.Tensor  # [length]
    ref_logps: torch.Tensor  # [] fp32, their sum


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        capture = captured(args)
        capture.save(args.out)
    except (DataError, OSError) as error:
        raise SystemExit(f"{error}\nNothing was captured.") from None
    tokens, hidden = capture.hidden.shape
    size = f"{tokens} tokens x {hidden} x {len(capture.weight)}, {capture.weight.dtype}"
    print(f"{capture.model}: {capture.pairs} pairs, {size}; reference {capture.reference}")
    print(f"{Sharpness(**capture.sharpness)}\nwritten to {args.out}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="path or id")
    add("--out", type=Path, required=True, metavar="PATH", help="the file to write")
    add(
        "--data", type=Path, metavar="JSONL",
        help="lines of prompt, chosen, rejected, as TRL has them; default: docstrings",
    )  # fmt: skip
    add("--reference", metavar="MODEL", help="reference model, with the same tokenizer; default: the model")
    add(
        "--tokens", type=at_least(1), default=2048, metavar="N",
        help="stop with the pair that brings N completion tokens; default: %(default)s",
    )  # fmt: skip
    add("--batch-size", type=at_least(1), default=8, help="pairs in a forward pass; default: %(default)s")
    add("--max-length", type=at_least(2), default=2048, help="leave longer pairs out; default: %(default)s")
    add("--seed", type=int, default=0, help="of the order of the pairs; default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser.parse_args(arguments)


def captured(args: argparse.Namespace) -> Capture:
    """Pairs until there are enough completion tokens.

    Raises:
        DataError: no usable pairs, or a model that cannot be captured; says why.
        OSError: data or model cannot be read.
    """
    pairs = read_pairs(args.data) if args.data else docstring_pairs(args.seed)
    random.Random(args.seed).shuffle(pairs)
    policy = load_policy(args.model, args.device)
    reference = load_policy(args.reference, args.device) if args.reference else policy
    if reference.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise DataError(f"{args.reference} cannot be the reference of {args.model}: another vocabulary")

    chosen, rejected, tokens = [], [], 0
    left_out: Counter[str] = Counter()
    with tqdm(total=args.tokens, desc="completion tokens") as bar:
        for winner, loser in completions(pairs, policy, reference, args, left_out):
            chosen.append(winner)
            rejected.append(loser)
            length = len(winner.labels) + len(loser.labels)
            tokens += length
            bar.update(min(length, args.tokens - bar.n))
            if tokens >= args.tokens:
                break
    for reason, count in left_out.items():
        print(f"{count} pairs left out, {reason}")
    if not tokens:
        raise DataError("no pairs with a completion are left")
    if tokens < args.tokens:
        print(f"The data has {tokens} completion tokens, not {args.tokens}.")
    return pack(chosen + rejected, policy, args)


def load_policy(name: str, device: str) -> Policy:
    """Model, in the dtype of its checkpoint, and tokenizer."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except ValueError as error:
        raise DataError(f"{name} cannot be loaded as a causal LM: {error}") from error
    if model.get_output_embeddings() is None:
        raise DataError(f"{name}: {type(model).__name__} has no output embeddings")
    return Policy(model.to(device), tokenizer)


def completions(
    pairs: Sequence[Pair],
    policy: Policy,
    reference: Policy,
    args: argparse.Namespace,
    left_out: Counter[str],
) -> Iterator[tuple[Completion, Completion]]:
    """Chosen and rejected of each pair that is short enough; the others are counted in `left_out`."""
    config = policy.model.config.get_text_config()
    longest = min(args.max_length, getattr(config, "max_position_embeddings", args.max_length))
    for start in range(0, len(pairs), args.batch_size):
        encoded, reasons = encode_pairs(pairs[start : start + args.batch_size], policy.tokenizer, longest)
        left_out.update(reasons)
        if not encoded:
            continue
        batch = PreferenceSet(encoded, len(encoded), args.device).batch(range(len(encoded)))
        sequences = completions_of(batch, policy, reference)
        yield from zip(sequences[: len(encoded)], sequences[len(encoded) :], strict=True)


@torch.no_grad()
def completions_of(batch: Batch, policy: Policy, reference: Policy) -> list[Completion]:
    targets = batch.labels[:, 1:]
    scored = targets != IGNORE_INDEX
    labels, lengths = targets[scored], scored.sum(-1).tolist()
    hidden, logits = head_pass(policy.model, batch, scored)
    check_transform(policy, hidden, logits)
    if reference is not policy:
        _, logits = head_pass(reference.model, batch, scored)
    ref_logps = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    parts = zip(hidden.split(lengths), labels.split(lengths), ref_logps.split(lengths), strict=True)
    return [Completion(hidden, labels, logps.sum()) for hidden, labels, logps in parts]


def head_pass(
    model: PreTrainedModel,
    batch: Batch,
    scored: torch.Tensor,  # [S, T-1]: the position predicts a completion token
) -> tuple[torch.Tensor, torch.Tensor]:  # [n, H], [n, V]
    """What enters the head where it predicts completion tokens, and the logits that the model makes of it."""
    entered = []

    def pick(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        entered.append(inputs[0][:, :-1][scored])
        return (entered[-1][None],)  # no other logits are computed

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    finally:
        hook.remove()
    if len(entered) != 1:
        raise DataError(f"{type(model).__name__} is not supported: it applies its head {len(entered)} times")
    return entered[0], logits[0]


def check_transform(policy: Policy, hidden: torch.Tensor, logits: torch.Tensor) -> None:
    """Refuse a model that does more to its logits than `logit_options` says."""
    transform = LogitTransform(**policy.logit_options)
    expected = transform(F.linear(hidden, policy.weight, policy.bias).float())
    rounding = max(1e-4, 4 * torch.finfo(hidden.dtype).eps) * expected.abs().max().item()
    if not torch.allclose(logits.float(), expected, rtol=0, atol=rounding):
        name = type(policy.model).__name__
        raise DataError(f"{name} is not supported: it transforms its logits in a way unknown here")


def pack(sequences: list[Completion], policy: Policy, args: argparse.Namespace) -> Capture:
    hidden = torch.cat([sequence.hidden for sequence in sequences])
    labels = torch.cat([sequence.labels for sequence in sequences])
    lengths = torch.tensor([0, *(len(sequence.labels) for sequence in sequences)])
    weight = policy.weight.detach()
    bias = None if policy.bias is None else policy.bias.detach()
    transform = LogitTransform(**policy.logit_options)
    _, _, sharpness = label_logps(hidden, weight, bias, transform, lambda rows, _: labels[rows])
    return Capture(
        hidden=hidden.cpu(),
        weight=weight.cpu(),
        bias=None if bias is None else bias.cpu(),
        labels=labels.cpu(),
        cu_seqlens=lengths.cumsum(0),
        ref_logps=torch.stack([sequence.ref_logps for sequence in sequences]).cpu(),
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
        model=public_name(args.model),
        reference=public_name(args.reference or args.model),
        data=args.data.name if args.data else "docstrings of Python's standard library",
        sharpness=asdict(sharpness),
    )


def public_name(model: str) -> str:
    """An id as it is; of a folder on this machine its name alone."""
    return Path(model).resolve().name if Path(model).exists() else model


if __name__ == "__main__":
    main()

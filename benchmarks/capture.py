"""Save what a real model feeds into its LM head on preference data, for `throughput.py --capture`.

    python benchmarks/capture.py MODEL --out capture.pt                          # docstring pairs
    python benchmarks/capture.py MODEL --out capture.pt --data pairs.jsonl --tokens 8192
    make demo && python benchmarks/capture.py runs/quickstart/model --out capture.pt

MODEL is any causal LM of transformers, a folder or an id. The file, a `Capture`, holds the completions'
hidden states as the head receives them, their labels, and the head. Without `--reference`, the reference
log-probs are the model's own, as at the first step of a training: every pair then stands at u = 0.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from preference_data import (
    IGNORE_INDEX,
    Batch,
    DataError,
    PreferenceSet,
    described,
    docstring_pairs,
    encode_pairs,
    read_pairs,
)
from quickstart_parts import Policy, at_least, load_policy

from benchmarks import parser_of
from benchmarks.inputs import Capture


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="path or id")
    add("--out", type=Path, required=True, metavar="PATH", help="the file to write")
    add("--data", type=Path, metavar="JSONL", help="prompt, chosen, rejected a line; default: docstrings")
    add("--reference", metavar="MODEL", help="reference model, with the same tokenizer; default: the model")
    add("--tokens", type=at_least(1), default=2048, metavar="N", help="of completions; default: %(default)s")
    add("--max-length", type=at_least(2), default=2048, help="leave longer pairs out; default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        capture = captured(args)
        capture.save(args.out)
    except (DataError, OSError) as error:
        raise SystemExit(f"Nothing was captured: {error}") from None
    tokens, hidden = capture.hidden.shape
    size = f"{tokens} tokens x {hidden} x {len(capture.weight)}, {capture.weight.dtype}"
    print(f"{capture.model}: {capture.pairs} pairs, {size}; reference {capture.reference}")
    print(f"written to {args.out}")


def captured(args: argparse.Namespace) -> Capture:
    """Pairs until there are enough completion tokens; `DataError` says why there are none."""
    pairs = read_pairs(args.data) if args.data else docstring_pairs(seed=0)
    random.Random(0).shuffle(pairs)
    policy = load_policy(args.model, args.device, dtype="auto")
    reference = load_policy(args.reference, args.device, dtype="auto") if args.reference else policy
    if reference.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise DataError(f"{args.reference} cannot be the reference of {args.model}: another vocabulary")

    taken, found = [], Counter()
    with tqdm(total=args.tokens, desc="completion tokens") as bar:
        for pair in pairs:
            encoded, counts = encode_pairs([pair], policy.tokenizer, min(args.max_length, policy.max_length))
            found += counts
            if encoded:
                batch = PreferenceSet(encoded, 1, args.device).batch([0])
                taken.append(completions(batch, policy, reference))
                bar.update(sum(len(labels) for _, labels, _ in taken[-1]))
            if bar.n >= args.tokens:
                break
    if not taken:
        raise DataError(f"no pairs are left: {described(found)} with --max-length {args.max_length}")
    if bar.n < args.tokens:
        print(f"The data has {bar.n} completion tokens, not {args.tokens}; pairs: {described(found)}")
    chosen, rejected = zip(*taken, strict=True)
    hidden, labels, ref_logps = zip(*chosen, *rejected, strict=True)
    return Capture(
        hidden=torch.cat(hidden).cpu(),
        weight=policy.weight.detach().cpu(),
        bias=None if policy.bias is None else policy.bias.detach().cpu(),
        labels=torch.cat(labels).cpu(),
        cu_seqlens=torch.tensor([0, *map(len, labels)]).cumsum(0),
        ref_logps=torch.stack(ref_logps).cpu(),
        **policy.logit_options,
        model=public_name(args.model),
        reference=public_name(args.reference or args.model),
        data=args.data.name if args.data else "docstrings of Python's standard library",
    )


@torch.no_grad()
def completions(batch: Batch, policy: Policy, reference: Policy) -> list[tuple[torch.Tensor, ...]]:
    """The chosen one, and the rejected: hidden states [T, H], labels [T] and reference log-prob []."""
    scored = batch.labels[:, 1:] != IGNORE_INDEX
    labels, lengths = batch.labels[:, 1:][scored], scored.sum(-1).tolist()
    hidden, logits = policy.through_head(batch)
    if reference is not policy:
        _, logits = reference.through_head(batch)
    ref_logps = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    sums = [logps.sum() for logps in ref_logps.split(lengths)]
    return list(zip(hidden.split(lengths), labels.split(lengths), sums, strict=True))


def public_name(model: str) -> str:
    """An id as it is; of a folder on this machine its name alone."""
    return Path(model).resolve().name if Path(model).exists() else model


if __name__ == "__main__":
    main()

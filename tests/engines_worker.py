"""One rank of `tests/test_engines.py`: a policy trained by an engine of two processes, and by this one alone.

    python ranks.py engines_worker.py found.json zero1 zero3

The JSON has of each engine, rank and case by how much the two differ, and what shows that the case is what it
says.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from peft import LoraConfig, get_peft_model
from ranks import compile_no_deepspeed_ops
from test_engines import CASES, OF_ONE_ENGINE, SCENARIOS
from tolerance import relative_error
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from focalkern import FusedFocalPOLoss, LinearLogps, linear_logps, lm_head_logps
from focalkern.lm_head import resolve_head

WORLD = 2
PAIRS = 4  # of both ranks
STEPS = 2  # momentum counts from the second on
VOCAB, HIDDEN = 700, 64
COMMON = 256  # the first entries of the vocabulary: the others have next to no probability
LEARNING_RATE, MOMENTUM = 0.8, 0.9
# Rounding a sum of log-probs of 60 nats moves the gradient by 2β·2e-6.
GAMMA, BETA = 1.0, 0.05
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


# -------------------------------------------------------------------------------------------------- the data


def pairs_of(step: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(step)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(2, COMMON, (length,), generator=generator).tolist()

    return [(ids(2, 5), ids(1, 8), ids(1, 8)) for _ in range(PAIRS)]


@dataclass
class Batch:
    """B chosen, then B rejected sequences: padded [2B, T], or packed [N]."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    cu_seqlens: torch.Tensor | None
    lengths: list[int]

    def sequences(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each sequence, without padding."""
        if self.cu_seqlens is not None:
            return list(hidden.split(self.lengths))
        return [row[:length] for row, length in zip(hidden, self.lengths, strict=True)]


def collate(pairs: list[Pair], layout: str, masked: tuple[int, ...] = ()) -> Batch:
    """`masked`: pairs without a label."""
    texts = [(i, p, c) for i, (p, c, _) in enumerate(pairs)] + [
        (i, p, r) for i, (p, _, r) in enumerate(pairs)
    ]
    ids = [torch.tensor(prompt + completion) for _, prompt, completion in texts]
    labels = [x.clone() for x in ids]
    for x, (pair, prompt, _) in zip(labels, texts, strict=True):
        x[: x.numel() if pair in masked else len(prompt)] = -100
    lengths = [x.numel() for x in ids]
    if layout == "packed":
        positions = torch.cat([torch.arange(length) for length in lengths])
        inputs = {"input_ids": torch.cat(ids)[None], "position_ids": positions[None]}
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        return Batch(inputs, torch.cat(labels), cu_seqlens, lengths)
    if not pairs:
        empty = torch.zeros(0, 6, dtype=torch.int64)
        return Batch({"input_ids": empty, "attention_mask": empty}, empty, None, [])
    pad = nn.utils.rnn.pad_sequence
    attention = pad([torch.ones_like(x) for x in ids], batch_first=True)
    inputs = {"input_ids": pad(ids, batch_first=True, padding_value=1), "attention_mask": attention}
    return Batch(inputs, pad(labels, batch_first=True, padding_value=-100), None, lengths)


# ------------------------------------------------------------------------------------------------ the models


def llama(tied: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    return with_rare_tokens(LlamaForCausalLM(config))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, input_ids: torch.Tensor, **_) -> BaseModelOutput:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return BaseModelOutput(last_hidden_state=self.norm(x))


class WithoutAttention(nn.Module):
    """That of transformers fails on a batch of no sequences."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = Backbone()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        with_rare_tokens(self)


def with_rare_tokens(model: nn.Module) -> nn.Module:
    """The first hidden feature large and positive, and most rows of the head far below in it."""
    head, embeddings = model.lm_head.weight, model.model.embed_tokens.weight
    with torch.no_grad():
        embeddings.normal_(std=0.3)[:, 0] = 0.6
        if head is not embeddings:
            head.normal_(std=0.3)
        head[COMMON:, 0] -= 24.0
    return model


def with_lora(model: nn.Module) -> nn.Module:
    targets = ["lm_head", "q_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


class Policy(nn.Module):
    """What an engine wraps: hidden states, and the head's log-probs or the loss."""

    def __init__(self, model: nn.Module, loss_fn: FusedFocalPOLoss, backward: str = "exact") -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.backward = backward
        self.scenario = ""
        self.hidden: torch.Tensor | None = None

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def head(self) -> Any:
        return self.base.lm_head

    def trained_head(self) -> list[nn.Parameter]:
        return [p for p in self.head.parameters() if p.requires_grad]

    def tokens(self, batch: Batch) -> LinearLogps:
        self.hidden = hidden = self.base.model(**batch.inputs, use_cache=False).last_hidden_state
        if hidden.requires_grad:
            hidden.retain_grad()
        hidden = hidden if batch.cu_seqlens is None else hidden[0]
        options = {"shift": True, "backward": self.backward, "cu_seqlens": batch.cu_seqlens}
        call = functools.partial(lm_head_logps, self.head, **options)
        if self.scenario == "the head called twice":
            parts = zip(hidden.chunk(2), batch.labels.chunk(2), strict=True)
            return LinearLogps(torch.cat([call(*part).logps for part in parts]))
        if self.scenario == "the head checkpointed":
            return LinearLogps(checkpoint(lambda x: call(x, batch.labels).logps, hidden, use_reentrant=False))
        return call(hidden, batch.labels)

    def forward(self, batch: Batch, refs: tuple[torch.Tensor, ...] | None = None):
        tokens = self.tokens(batch)
        if refs is None:
            return tokens
        out = loss_of(self.loss_fn, tokens, batch, refs)
        return out.loss, out


def loss_of(loss_fn: FusedFocalPOLoss, tokens: LinearLogps, batch: Batch, refs: tuple[torch.Tensor, ...]):
    return loss_fn.from_logps(tokens, batch.labels, *refs, shift=True, cu_seqlens=batch.cu_seqlens)


@torch.no_grad()
def references(reference: nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
    sums = loss_of(FusedFocalPOLoss(reference_free=True), reference(batch), batch, ())
    return sums.chosen_logps, sums.rejected_logps


def optimizer_of(policy: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=MOMENTUM)


# ----------------------------------------------------------------------------------------------- the engines


class Alone:
    """One process, and what every engine below does in its own way."""

    def __init__(self, policy: Policy, accumulated: int = 1) -> None:
        self.policy = self.wrapped = policy
        self.accumulated = accumulated
        self.optimizer = optimizer_of(policy)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulated).backward()

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.grad.clone()

    def value(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def is_sharded(self) -> bool:
        return False

    def gathered(self) -> AbstractContextManager:
        return nullcontext()

    @staticmethod
    def reference(reference: Policy) -> nn.Module:
        return reference


class Ddp(Alone):
    def __init__(self, policy: Policy, accumulated: int = 1, **options) -> None:
        super().__init__(policy, accumulated)
        self.wrapped = DistributedDataParallel(policy, **options)


class Fsdp2(Alone):
    def __init__(self, policy: Policy, accumulated: int = 1, head: str = "in the root", **options) -> None:
        self.sharded(policy, head, **options)
        super().__init__(policy, accumulated)

    @staticmethod
    def sharded(policy: Policy, head: str, **options) -> None:
        base = policy.base
        for layer in base.model.layers:
            fully_shard(layer, **options)
        if head == "alone":
            fully_shard(base.lm_head, **options)
        elif head == "with the norm":
            fully_shard([base.model.norm, base.lm_head], **options)
        fully_shard(policy, **options)

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.grad.full_tensor()

    def value(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().full_tensor()

    def is_sharded(self) -> bool:
        return all(isinstance(p, DTensor) for p in self.policy.parameters())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self.policy.head.unshard()
        yield
        self.policy.head.reshard()

    @staticmethod
    def reference(reference: Policy) -> nn.Module:
        Fsdp2.sharded(reference, "alone", reshard_after_forward=True)
        return reference


def zero_config(stage: int, accumulated: int = 1) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": 0.0,  # 1 if not given
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100_000,
            # Small parameters, and those that will soon be needed again, would stay gathered.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
    }


class Zero(Alone):
    stage = 0

    def __init__(self, policy: Policy, accumulated: int = 1) -> None:
        self.policy = policy
        config = zero_config(self.stage, accumulated)
        self.wrapped, *_ = deepspeed.initialize(model=policy, optimizer=optimizer_of(policy), config=config)

    def backward(self, loss: torch.Tensor) -> None:
        self.wrapped.backward(loss)
        if not self.wrapped.is_gradient_accumulation_boundary():
            self.wrapped.step()  # counts the micro-batch

    def gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        return safe_get_full_grad(parameter).clone()

    def value(self, parameter: torch.Tensor) -> torch.Tensor:
        return safe_get_full_fp32_param(parameter)

    def step(self) -> None:
        self.wrapped.step()


class Zero1(Zero):
    stage = 1


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3

    def is_sharded(self) -> bool:
        return all(p.numel() == 0 for p in self.policy.parameters())

    def gathered(self) -> AbstractContextManager:
        return deepspeed.zero.GatheredParameters([self.policy.head.weight])

    @staticmethod
    def reference(reference: Policy) -> nn.Module:
        engine, *_ = deepspeed.initialize(model=reference, config=zero_config(3))
        return engine


ENGINES = {"ddp": Ddp, "fsdp2": Fsdp2, "zero1": Zero1, "zero2": Zero2, "zero3": Zero3}


# ------------------------------------------------------------------------------------------------- the cases


class Found:
    """The largest value of each name, over the steps."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def note(self, name: str, value: float) -> None:
        self.values[name] = max(value, self.values.get(name, -float("inf")))

    def error(self, name: str, ours: torch.Tensor, exact: torch.Tensor) -> None:
        self.note(name, relative_error(ours, exact))


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / WORLD


def own_pairs(scenario: str) -> list[list[int]]:
    """Which of the pairs this rank has, in each of its micro-batches."""
    rank = dist.get_rank()
    if scenario == "an empty micro-batch":
        return [[*range(PAIRS)] if rank == 0 else []]
    own = [PAIRS // WORLD * rank + i for i in range(PAIRS // WORLD)]
    return [[i] for i in own] if scenario == "accumulated" else [own]


@dataclass(frozen=True)
class Case:
    """What is trained, and how: the same by an engine and by one process."""

    variant: str = "plain"
    layout: str = "padded"
    backward: str = "certified"
    scenario: str = ""

    @property
    def is_uneven(self) -> bool:
        """Engines average over ranks, so ranks with unequal numbers of pairs take sums."""
        return self.scenario == "an empty micro-batch"

    @property
    def masked(self) -> tuple[int, ...]:
        return (2, 3) if self.scenario == "all pairs of a rank masked" else ()

    def policy(self) -> Policy:
        make = WithoutAttention if self.is_uneven else functools.partial(llama, self.variant == "tied")
        model = with_lora(make()) if self.variant == "LoRA" else make()
        return Policy(model, self.loss_fn(), self.backward)

    def reference(self) -> Policy:
        make = WithoutAttention if self.is_uneven else llama
        return Policy(make(seed=1), FusedFocalPOLoss(), self.backward).requires_grad_(False).eval()

    def loss_fn(self) -> FusedFocalPOLoss:
        return FusedFocalPOLoss(BETA, GAMMA, "focal", reduction="sum" if self.is_uneven else "mean")

    def rows(self, policy: Policy, batch: Batch) -> list[torch.Tensor]:
        """The gradient of the hidden states of each sequence."""
        hidden = policy.hidden.grad
        return batch.sequences(hidden if self.layout == "padded" else hidden[0])


@dataclass
class Step:
    """Of one process, on all pairs."""

    loss: torch.Tensor
    dhidden: list[torch.Tensor]
    dweight: list[torch.Tensor]
    kept_share: torch.Tensor | None


@functools.cache  # every engine is compared with the same
def trained_alone(case: Case) -> tuple[list[Step], list[torch.Tensor], float, torch.Tensor]:
    """The steps, the trained weights and their least movement, and the loss of an evaluation."""
    policy, reference = case.policy(), case.reference()
    alone = Alone(policy)
    scale = 1 / PAIRS if case.is_uneven else 1.0
    trained = [p for p in policy.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    def loss_of_step(step: int) -> tuple[torch.Tensor, Any, Batch]:
        batch = collate(pairs_of(step), case.layout, case.masked)
        loss, out = policy(batch, references(reference, batch))
        return scale * loss, out, batch

    steps = []
    for step in range(STEPS):
        loss, out, batch = loss_of_step(step)
        alone.backward(loss)
        dweight = [p.grad.clone() for p in policy.trained_head()]
        steps.append(Step(loss.detach(), case.rows(policy, batch), dweight, out.kept_share))
        alone.step()
    weights = [p.detach().clone() for p in trained]
    policy.eval()
    with torch.no_grad():
        evaluation = loss_of_step(STEPS)[0]
    return steps, weights, min(map(relative_error, start, weights)), evaluation


def compare(
    engine_class: type[Alone],
    outside: bool = False,  # the loss is computed outside the forward that the engine wraps
    variant: str = "plain",
    layout: str = "padded",
    backward: str = "certified",
    scenario: str = "",
    **options,
) -> dict[str, float]:
    """Some steps of both, and an evaluation."""
    case = Case(variant, layout, backward, scenario)
    expected, expected_weights, least_movement, expected_evaluation = trained_alone(case)
    mine = own_pairs(scenario)
    scale = WORLD / PAIRS if case.is_uneven else 1.0
    engine = engine_class(case.policy(), accumulated=len(mine), **options)
    reference = engine_class.reference(case.reference())
    policy = engine.policy
    policy.scenario = scenario
    trained = [p for p in policy.parameters() if p.requires_grad]
    found = Found()

    def losses_of(step: int) -> Iterator[tuple[torch.Tensor, Any, Batch]]:
        """Of each micro-batch: the loss and all there is beside it."""
        pairs = pairs_of(step)
        for own in mine:
            batch = collate([pairs[i] for i in own], layout, [own.index(i) for i in case.masked if i in own])
            refs = references(reference, batch)
            if outside:
                out = loss_of(policy.loss_fn, engine.wrapped(batch), batch, refs)
                loss = out.loss
            else:
                loss, out = engine.wrapped(batch, refs)
            yield scale * loss, out, batch

    found.note("whole between the steps", not engine.is_sharded())
    for step, exact in enumerate(expected):
        losses, rows = [], []
        for loss, out, batch in losses_of(step):
            engine.backward(loss)
            rows += case.rows(policy, batch)
            losses.append(loss.detach())
            if out.kept_share is not None:
                found.note("kept share", out.kept_share.item())
        if exact.kept_share is not None:
            found.note("kept share of one process", exact.kept_share.item())
        found.note("whole between the steps", not engine.is_sharded())
        found.error("loss", mean_over_ranks(torch.stack(losses).mean()), exact.loss)
        theirs = [exact.dhidden[i + side] for own in mine for side in (0, PAIRS) for i in own]
        if rows:
            found.error("dhidden", torch.cat(rows) / WORLD, torch.cat(theirs))
        for parameter, dweight in zip(policy.trained_head(), exact.dweight, strict=True):
            found.error("dweight", engine.gradient(parameter), dweight)
            found.note("a zero gradient", not dweight.any())
        engine.step()
    for parameter, weight in zip(trained, expected_weights, strict=True):
        found.error("weights", engine.value(parameter), weight)
    found.values["least movement"] = least_movement

    policy.eval()
    with torch.no_grad():
        losses = [loss for loss, *_ in losses_of(STEPS)]
    found.error("evaluation", mean_over_ranks(torch.stack(losses).mean()), expected_evaluation)
    return found.values


def gathered_copies(head: nn.Linear) -> int:
    """Tensors as large as the head that hold memory, the shards of the process itself aside."""
    shape = (head.out_features, head.in_features)
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and x.shape == shape]
    return sum(x.untyped_storage().nbytes() > 0 for x in tensors)


def memory_and_certificate(engine_class: type[Alone], **options) -> dict[str, Any]:
    """What lives of the gathered head after forward and backward, and the certificate that needs it."""
    rank = dist.get_rank()
    batch = collate(pairs_of(0)[2 * rank : 2 * rank + 2], "padded")
    refs = tuple(torch.full((2, 2), -30.0))
    loss_fn = FusedFocalPOLoss(BETA, GAMMA, "focal", backward="certified")
    model = llama()
    alone = Policy(copy.deepcopy(model), loss_fn, "certified")
    loss, out = alone(batch, refs)
    loss.backward()
    expected = out.certificate()
    del alone, loss, out
    gc.collect()
    engine = engine_class(Policy(model, loss_fn, "certified"), **options)
    head, in_call = engine.policy.head, []
    before = gathered_copies(head)
    # After the engine's own hook, which gathers.
    head.register_forward_pre_hook(lambda *_: in_call.append(gathered_copies(head) - before))
    loss, out = engine.wrapped(batch, refs)
    copies = [*in_call, gathered_copies(head) - before]
    engine.backward(loss)
    copies.append(gathered_copies(head) - before)
    try:
        error = str(out.certificate())
    except RuntimeError as raised:
        error = str(raised)
    with engine.gathered():
        certificate = out.certificate()
    return {
        "copies in the call, after forward, after backward": copies,
        "error": error,
        "kept share": certificate.kept_share,
        "off by": abs(certificate.dhidden_bound / expected.dhidden_bound - 1),
    }


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def calls_without_the_engine(engine_class: type[Alone]) -> dict[str, str]:
    """Of the weight itself, and of the head's module, where no forward of the engine's is under way."""
    policy = engine_class(Policy(llama(), FusedFocalPOLoss(), "certified")).policy
    hidden, labels = torch.zeros(2, 5, HIDDEN), torch.full((2, 5), dist.get_rank())
    return {
        "linear_logps": message_of(lambda: linear_logps(hidden, policy.head.weight, labels)),
        "lm_head_logps": message_of(lambda: lm_head_logps(policy.head, hidden, labels)),
    }


def split_by_vocabulary() -> dict[str, float]:
    """Heads as DTensors, the same pairs on both ranks: gradients of all weights, against one process."""

    def by_columns(policy: Policy, mesh: DeviceMesh) -> None:
        split = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(resolve_head(policy.head)[0], mesh, split)

    def with_fsdp2(policy: Policy, mesh: DeviceMesh, head: str = "in the root") -> None:
        both = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("dp", "tp"))
        by_columns(policy, both["tp"])
        Fsdp2.sharded(policy, head, mesh=both["dp"])

    cases = {
        "replicated": (llama, lambda policy, mesh: distribute_module(policy.head, mesh)),
        "by columns": (llama, by_columns),
        "by columns, LoRA": (lambda: with_lora(llama()), by_columns),
        "by columns, FSDP2": (llama, with_fsdp2),
        "by columns, FSDP2 of the head alone": (llama, functools.partial(with_fsdp2, head="alone")),
    }
    batch, mesh, found = collate(pairs_of(0), "padded"), init_device_mesh("cpu", (WORLD,)), {}
    for name, (make, split) in cases.items():
        plain = Policy(make(), FusedFocalPOLoss(), "certified")
        policy = copy.deepcopy(plain)
        split(policy, mesh)
        for each in (policy, plain):
            tokens = each(batch)
            (tokens.logps * torch.arange(tokens.logps.numel()).view_as(tokens.logps)).sum().backward()
        found[name] = max(
            relative_error(x.grad.full_tensor() if isinstance(x, DTensor) else x.grad, y.grad)
            for x, y in zip(policy.parameters(), plain.parameters(), strict=True)
            if y.requires_grad
        )
    return found


def mixed_precision() -> dict[str, Any]:
    """FSDP2's policy of bf16 parameters, against a copy of the model in bf16, on the rank's own pairs."""
    model = llama()
    (own,) = own_pairs("")
    batch = collate([pairs_of(0)[i] for i in own], "padded")
    narrow = Policy(copy.deepcopy(model).bfloat16(), FusedFocalPOLoss(), "certified")
    expected = narrow(batch)
    expected.logps.sum().backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    engine = Fsdp2(Policy(model, FusedFocalPOLoss(), "certified"), head="alone", mp_policy=policy)
    tokens = engine.wrapped(batch)
    tokens.logps.sum().backward()
    gradient = mean_over_ranks(narrow.head.weight.grad.float())
    return {
        "dtypes": [
            str(x.dtype) for x in (tokens.logps, engine.policy.hidden, engine.policy.head.weight.grad)
        ],
        "kept share": tokens.kept_share.item(),
        "logps": relative_error(tokens.logps, expected.logps),
        "dweight": relative_error(engine.gradient(engine.policy.head.weight), gradient),
    }


def all_of(name: str) -> dict[str, Any]:
    engine_class = ENGINES[name]
    cases = CASES | SCENARIOS | OF_ONE_ENGINE.get(name, {})
    found: dict[str, Any] = {case: compare(engine_class, **options) for case, options in cases.items()}
    if name in ("zero3", "fsdp2"):
        found["without the engine"] = calls_without_the_engine(engine_class)
        options = {"head": "alone"} if name == "fsdp2" else {}
        found["memory and certificate"] = memory_and_certificate(engine_class, **options)
    if name == "fsdp2":
        found["mixed precision"] = mixed_precision()
        found["split by vocabulary"] = split_by_vocabulary()
    return found


def main(path: str, *engines: str) -> None:
    logging.disable(logging.WARNING)
    compile_no_deepspeed_ops()
    deepspeed.init_distributed("gloo")
    found: dict[str, list[Any]] = {}
    for name in engines:
        found[name] = [None] * WORLD
        dist.all_gather_object(found[name], all_of(name))
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

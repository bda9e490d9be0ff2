"""What each way to spread a training over GPUs holds, computes and moves per rank: a cost model on paper.

Nothing here is measured. docs/scaling.md explains the formulas, and `scaling.py` makes its tables. Bytes
moved are those that a rank sends; it receives as many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

GB, MIB, GIB = 1e9, 2**20, 2**30
VOCAB_BLOCK = 128
WORKSPACE = 224 * MIB  # focalkern.logps.function.WORKSPACE_BYTES
KEPT_SHARE = 52 / 1002  # of the (token, vocabulary block) pairs: docs/certified-backward.md
PAIR_BYTES = 50  # of the lists of kept pairs, for each pair
STATISTICS_BYTES = 8  # of a completion token and rank in the vocabulary-parallel forward: two numbers
ALPHA_BYTES = 4 * 8  # of a rank: what α-DPO's mean and deviation are made of


@dataclass(frozen=True)
class Model:
    """A Llama: embedding and head are two matrices, the MLP is gated, key and value heads are shared."""

    name: str
    hidden: int
    mlp: int
    key_value: int  # width of the keys, and of the values
    layers: int
    vocab: int

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def layer(self) -> int:
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.key_value
        return attention + 3 * self.hidden * self.mlp + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.hidden + 2 * self.head


@dataclass(frozen=True)
class Machine:
    """Peak rates per second, each link one way, and the shares of them that are assumed to be reached."""

    name: str = "A100-40GB SXM"
    peak: float = 312e12  # bf16, dense
    memory_peak: float = 1.555e12
    nvlink_peak: float = 300e9  # of a GPU
    network_peak: float = 200e9  # of a node: 8 × 200 Gbit/s
    gpus_per_node: int = 8
    memory: float = 40 * GIB
    reserve: float = 2 * GIB  # CUDA context, buffers of the collectives, fragmentation
    compute_share: float = 0.5
    memory_share: float = 0.8
    link_share: float = 0.7

    @property
    def rate(self) -> float:
        return self.peak * self.compute_share

    @property
    def memory_rate(self) -> float:
        return self.memory_peak * self.memory_share

    @property
    def room(self) -> float:
        return self.memory - self.reserve


@dataclass(frozen=True)
class Group:
    """Ranks of one collective. Groups that have ranks on the same node share its network evenly."""

    ranks: int
    ranks_per_node: int

    def rate(self, machine: Machine) -> float:
        peak = machine.nvlink_peak
        if self.ranks > self.ranks_per_node:
            # A ring enters a node once: its ranks there each carry a part of it over the network.
            peak = min(peak, machine.network_peak * self.ranks_per_node / machine.gpus_per_node)
        return peak * machine.link_share


@dataclass(frozen=True)
class Batch:
    """What one rank's share of a step comes to; a group of R ranks works on R shares together."""

    pairs: float
    length: int = 2048  # of a sequence, prompt and completion
    completion_length: int = 1024

    @property
    def tokens(self) -> int:
        return round(2 * self.pairs * self.length)

    @property
    def completion_tokens(self) -> int:
        return round(2 * self.pairs * self.completion_length)


# Of the weights that stage 3 gathers for the forward, what stays for the backward. The root of FSDP2 is what
# is not wrapped by itself: here embedding and head, gathered and freed together.
Kept = Literal["nothing", "head", "root", "all"]


@dataclass(frozen=True)
class Mode:
    """`stage` is ZeRO's: 0 shards nothing, 1 the states of the optimizer, 2 gradients too, 3 weights too."""

    name: str
    stage: int
    kept: Kept = "nothing"
    reduce_bytes: int = 2  # of a number of the gradients, when they are summed
    tensor: int = 1  # ranks that share every matrix, the head by vocabulary
    sequence: int = 1  # ranks that share the tokens of a sequence


@dataclass(frozen=True)
class Plan:
    model: Model
    machine: Machine
    gpus: int
    batch: Batch
    mode: Mode
    kept_share: float = KEPT_SHARE

    def __post_init__(self) -> None:
        group = self.mode.tensor * self.mode.sequence
        if min(self.gpus, self.machine.gpus_per_node) % group:
            raise ValueError(f"{self.mode.name}: {group} ranks do not divide the GPUs of a node")

    @property
    def ranks_per_node(self) -> int:
        return min(self.gpus, self.machine.gpus_per_node)

    @property
    def engine_group(self) -> Group:
        """The ranks over which weights or gradients are sharded or summed: all that hold the same ones."""
        return Group(self.gpus // self.mode.tensor, self.ranks_per_node // self.mode.tensor)

    @property
    def tensor_group(self) -> Group:
        return Group(self.mode.tensor, self.mode.tensor)

    @property
    def sequence_group(self) -> Group:
        return Group(self.mode.sequence, self.mode.sequence)

    @property
    def parameters(self) -> float:
        return self.model.parameters / self.mode.tensor

    @property
    def gathers(self) -> bool:
        """Whether weights come and go layer by layer."""
        return self.mode.stage == 3 and self.mode.kept != "all"

    @property
    def head(self) -> Head:
        """A vocabulary-parallel one works on the tokens of its whole group."""
        ranks = self.mode.tensor
        return Head(self.model, self.machine, ranks * self.batch.completion_tokens, ranks, self.kept_share)


# Collectives, as rings: bytes that each rank sends


def all_gather(size: float, ranks: int) -> float:
    """Every rank ends with `size` bytes, of which it had its share."""
    return (ranks - 1) / ranks * size


def reduce_scatter(size: float, ranks: int) -> float:
    """Every rank had `size` bytes, and ends with its share of their sum."""
    return (ranks - 1) / ranks * size


def all_reduce(size: float, ranks: int) -> float:
    return reduce_scatter(size, ranks) + all_gather(size, ranks)


def all_to_all(size: float, ranks: int) -> float:
    """Every rank had `size` bytes, of which each gets an equal part."""
    return (ranks - 1) / ranks * size


# The head


@dataclass(frozen=True)
class Head:
    """The head and its loss on one rank, with 1/`ranks` of the vocabulary: of completion tokens alone."""

    model: Model
    machine: Machine
    tokens: int
    ranks: int = 1
    kept_share: float = KEPT_SHARE

    @property
    def vocab(self) -> float:
        return self.model.vocab / self.ranks

    @property
    def weight_bytes(self) -> float:
        return 2 * self.vocab * self.model.hidden

    @property
    def kept_pairs(self) -> float:
        """Kept pairs (token, vocabulary block), when they fall evenly on the ranks."""
        return self.kept_share * self.tokens * self.vocab / VOCAB_BLOCK

    # Operations

    @property
    def product(self) -> float:
        """Operations of one product of all rows with this rank's vocabulary."""
        return 2 * self.tokens * self.vocab * self.model.hidden

    @property
    def kept_product(self) -> float:
        return 2 * self.kept_pairs * VOCAB_BLOCK * self.model.hidden

    @property
    def certified_products(self) -> int:
        """dz, dweight, dhidden; dz twice where the workspace does not hold it beside a slice of products."""
        return 3 if self.kept_pairs * VOCAB_BLOCK * 2 * 2 <= WORKSPACE else 4

    @property
    def forward_operations(self) -> float:
        return self.product

    @property
    def exact_operations(self) -> float:
        return 3 * self.product

    @property
    def certified_operations(self) -> float:
        return self.certified_products * self.kept_product

    # Seconds

    @property
    def forward_seconds(self) -> float:
        reads = (2 * self.tokens * self.model.hidden + self.weight_bytes) / self.machine.memory_rate
        return max(self.forward_operations / self.machine.rate, reads)

    @property
    def exact_seconds(self) -> float:
        return self.exact_operations / self.machine.rate

    @property
    def certified_seconds(self) -> float:
        # Each pair's product with the head is written and read once, in 2 bytes a number.
        moved = self.kept_pairs * self.model.hidden * 2 * 2 / self.machine.memory_rate
        return self.certified_operations / self.machine.rate + moved

    # Bytes sent

    @property
    def statistics_sent(self) -> float:
        return all_gather(STATISTICS_BYTES * self.tokens * self.ranks, self.ranks)

    @property
    def dhidden_sent(self) -> float:
        return all_reduce(4 * self.tokens * self.model.hidden, self.ranks)

    @property
    def dropped_mass_sent(self) -> float:
        return all_reduce(4 * self.tokens, self.ranks)

    # What dhidden's sum is hidden behind: the product of dweight that is left when dhidden is complete

    @property
    def chunk(self) -> int:
        """Vocabulary entries of a chunk of the exact backward: `vocab_chunk` of the library, in bf16."""

        def fitting(available: int) -> int:
            return max(available // (2 * self.tokens), VOCAB_BLOCK)

        vocab = math.ceil(self.vocab)
        chunk = max(min(fitting(64 * MIB), math.ceil(vocab / 4)), min(4096, vocab))
        return min(math.ceil(chunk / VOCAB_BLOCK), fitting(256 * MIB) // VOCAB_BLOCK) * VOCAB_BLOCK

    @property
    def last_chunk(self) -> int:
        return math.ceil(self.vocab) % self.chunk or self.chunk

    @property
    def exact_cover(self) -> float:
        """Seconds of the last chunk's product: dhidden sums over all chunks, and ends with the last."""
        return 2 * self.tokens * self.last_chunk * self.model.hidden / self.machine.rate

    @property
    def certified_cover(self) -> float:
        return self.kept_product / self.machine.rate

    # Memory

    @property
    def statistics_bytes(self) -> float:
        return 4 * self.tokens * math.ceil(self.vocab / VOCAB_BLOCK)

    @property
    def backward_bytes(self) -> float:
        """The larger of the two backwards: certified, or exact, in chunks with sums in fp32.

        In shards both have dhidden in fp32, to be summed over the group; the exact one's sums are it.
        """
        numbers = 4 * self.tokens * self.model.hidden
        certified = WORKSPACE + PAIR_BYTES * self.kept_pairs + (numbers if self.ranks > 1 else 0)
        exact = 2 * self.tokens * self.chunk + numbers
        return max(certified, exact)

    @property
    def logits_bytes(self) -> float:
        """What is not held: logits and their gradient in fp32, the least that a loss on logits takes."""
        return 2 * 4 * self.tokens * self.vocab

    def backward_seconds(self, exact: bool) -> float:
        return self.exact_seconds if exact else self.certified_seconds


# Memory per rank, in bytes


@dataclass(frozen=True)
class Memory:
    weights: float
    gradients: float
    optimizer: float  # Adam's two states and the fp32 weights
    checkpoints: float  # the inputs of the layers; the rest is computed again
    in_layer: float  # more, while the backward is in a layer
    at_head: float  # more, while it is at the head

    @property
    def peak(self) -> float:
        states = self.weights + self.gradients + self.optimizer
        return states + self.checkpoints + max(self.in_layer, self.at_head)


def memory(plan: Plan, fused: bool = True) -> Memory:
    model, mode, ranks = plan.model, plan.mode, plan.engine_group.ranks
    weights, gradients, optimizer = (
        size * plan.parameters / (ranks if mode.stage >= stage else 1)
        for size, stage in ((2, 3), (2, 2), (12, 1))
    )
    if mode.stage == 3 and mode.kept == "all":
        weights += 2 * plan.parameters
    return Memory(
        weights,
        gradients,
        optimizer,
        checkpoints=2 * model.layers * plan.batch.tokens * model.hidden,
        in_layer=layer_bytes(plan),
        at_head=sum(head_bytes(plan, fused).values()),
    )


def transient_gradient(plan: Plan, parameters: float) -> float:
    """A gradient that is to be sharded, before it is; its copy in fp32 where that is how it is summed."""
    size = 2 + (4 if plan.mode.reduce_bytes == 4 else 0)
    return size * parameters / plan.mode.tensor if plan.mode.stage >= 2 else 0


def layer_bytes(plan: Plan) -> float:
    """One layer computed again, with its gradients (an estimate), its weights and those of the next one."""
    model, ranks = plan.model, plan.mode.tensor
    per_token = 12 * model.hidden + 4 * model.key_value + 12 * model.mlp
    per_token += 4 * model.hidden * (ranks - 1)  # inputs of attention and MLP, of the group's other tokens
    gathered = 2 * 2 * model.layer / ranks if plan.gathers else 0
    # Embedding and head, and dweight: the root's gradients are summed when all of them are there.
    root = 3 * 2 * model.head / ranks if plan.mode.kept == "root" else 0
    return per_token * plan.batch.tokens + gathered + root + transient_gradient(plan, model.layer)


def head_bytes(plan: Plan, fused: bool = True) -> dict[str, float]:
    """What is held at the head, beside states and checkpoints."""
    model, ranks, head = plan.model, plan.mode.tensor, plan.head
    in_root = plan.mode.kept == "root"
    states = 2 * plan.batch.tokens * ranks * model.hidden  # all tokens of the group
    # The rows of completion tokens, and their dhidden, where these are not all tokens.
    has_prompts = head.tokens < plan.batch.tokens * ranks
    held = {
        "weight": head.weight_bytes if plan.gathers else 0,
        "embedding, gathered with it": head.weight_bytes if in_root else 0,
        "the last layer, gathered ahead": 2 * model.layer / ranks if plan.gathers else 0,
        "dweight": head.weight_bytes if in_root else transient_gradient(plan, model.head),
        "hidden": states,
        "dhidden": states,
    }
    if fused:
        held["rows of completions"] = 2 * 2 * head.tokens * model.hidden if has_prompts else 0
        return held | {"statistics": head.statistics_bytes, "backward": head.backward_bytes}
    return held | {"logits": head.logits_bytes}


def longest_length(plan: Plan, fused: bool = True, step: int = 256) -> int:
    """The longest sequence, to `step` tokens, of which a group holds one pair, half of each completion."""
    group = plan.mode.tensor * plan.mode.sequence

    def fits(length: int) -> bool:
        batch = Batch(1 / group, length, length // 2)
        return memory(replace(plan, batch=batch), fused).peak <= plan.machine.room

    if not fits(step):
        return 0
    low, high = 1, 2
    while fits(high * step):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


# Operations and time per rank and step


@dataclass(frozen=True)
class Operations:
    body_forward: float
    body_backward: float  # with the forward that is computed again
    head_forward: float
    head_backward: float

    @property
    def head(self) -> float:
        return self.head_forward + self.head_backward

    @property
    def total(self) -> float:
        return self.body_forward + self.body_backward + self.head


def operations(plan: Plan, exact: bool = False) -> Operations:
    """2 per parameter and token, and the causal half of the attention.

    A layer's backward costs twice its forward, and the forward that is computed again.
    """
    model, batch, head = plan.model, plan.batch, plan.head
    products = 2 * model.layers * model.layer * batch.tokens
    attention = 2 * model.layers * model.hidden * batch.length * batch.tokens
    forward = products + attention
    backward = head.exact_operations if exact else head.certified_operations
    return Operations(forward, 3 * forward, head.forward_operations, backward)


@dataclass(frozen=True)
class Transfer:
    """A collective, or several alike. What it may run beside hides it as far as that lasts."""

    what: str
    of: str  # "engine", "layers" or "head"
    sent: float
    seconds: float
    behind: str = "nothing"
    cover: float = 0.0  # seconds of that

    @property
    def exposed(self) -> float:
        return max(0.0, self.seconds - self.cover)


@dataclass(frozen=True)
class Step:
    operations: Operations
    forward_seconds: float
    backward_seconds: float
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def compute_seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds

    @property
    def exposed_seconds(self) -> float:
        return sum(transfer.exposed for transfer in self.transfers)

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    def sent(self, of: str) -> float:
        return sum(transfer.sent for transfer in self.transfers if transfer.of == of)


def step(plan: Plan, exact: bool = False) -> Step:
    done, rate = operations(plan, exact), plan.machine.rate
    forward = done.body_forward / rate + plan.head.forward_seconds
    backward = done.body_backward / rate + plan.head.backward_seconds(exact)
    transfers = [
        *engine_transfers(plan, forward, backward),
        *layer_transfers(plan),
        *head_transfers(plan, exact),
    ]
    return Step(done, forward, backward, [transfer for transfer in transfers if transfer.sent])


def engine_transfers(plan: Plan, forward: float, backward: float) -> list[Transfer]:
    """Weights and gradients of the whole model. Those of ZeRO-1 and 2 are gathered after the optimizer."""
    mode, size, ranks = plan.mode, plan.parameters, plan.engine_group.ranks
    head = plan.model.head / mode.tensor
    # The first weights are waited for, and the last gradients: the embedding's, or the root's.
    ends = 2 * head if mode.kept == "root" else head

    def transfer(what: str, sent: float, behind: str = "nothing", cover: float = 0.0) -> Transfer:
        return Transfer(what, "engine", sent, sent / plan.engine_group.rate(plan.machine), behind, cover)

    def reduced(parameters: float) -> float:
        collective = all_reduce if mode.stage == 0 else reduce_scatter
        return collective(mode.reduce_bytes * parameters, ranks)

    def gathered(parameters: float) -> float:
        return all_gather(2 * parameters, ranks)

    if mode.stage < 3:
        return [
            transfer("gradients", reduced(size - ends), "the backward", backward),
            transfer("the last gradients", reduced(ends)),
            transfer("updated weights", gathered(size) if mode.stage else 0),
        ]
    again = {"nothing": size - head, "head": size - head, "root": size - 2 * head, "all": 0}[mode.kept]
    return [
        transfer("weights", gathered(size - ends), "the forward", forward),
        transfer(
            "weights again, gradients", gathered(again) + reduced(size - ends), "the backward", backward
        ),
        transfer("the first weights, the last gradients", gathered(ends) + reduced(ends)),
        # The backward begins where the forward ends: at the head, with nothing to compute meanwhile.
        transfer("the head's weight again", gathered(head) if mode.kept == "nothing" else 0),
    ]


def head_sent_by_engine(plan: Plan) -> float:
    """The head's part of what the engine moves."""
    mode, ranks, size = plan.mode, plan.engine_group.ranks, plan.model.head / plan.mode.tensor
    if mode.stage == 0:
        return all_reduce(mode.reduce_bytes * size, ranks)
    gathers = 2 if mode.stage == 3 and mode.kept == "nothing" else 1
    return reduce_scatter(mode.reduce_bytes * size, ranks) + gathers * all_gather(2 * size, ranks)


def layer_transfers(plan: Plan) -> list[Transfer]:
    """What tensor- and sequence-parallel layers move in forward, forward again and backward, and wait for."""
    model, tokens = plan.model, plan.batch.tokens
    tensor, sequence = plan.tensor_group, plan.sequence_group
    # Attention and MLP each gather their input and scatter their output.
    inputs = 3 * 4 * model.layers * all_gather(2 * tokens * tensor.ranks * model.hidden, tensor.ranks)
    # Queries, keys, values and the output change from tokens to heads, and back.
    width = 2 * model.hidden + 2 * model.key_value
    heads = 3 * model.layers * all_to_all(2 * tokens * width, sequence.ranks)
    return [
        Transfer(
            "inputs and outputs of attention and MLP", "layers", inputs, inputs / tensor.rate(plan.machine)
        ),
        Transfer("queries, keys, values, outputs", "layers", heads, heads / sequence.rate(plan.machine)),
    ]


def head_transfers(plan: Plan, exact: bool) -> list[Transfer]:
    head, group = plan.head, plan.tensor_group
    hidden = all_gather(2 * plan.batch.tokens * group.ranks * plan.model.hidden, group.ranks)
    sums = sequence_sums_sent(plan)

    def transfer(what: str, sent: float, behind: str = "nothing", cover: float = 0.0) -> Transfer:
        return Transfer(what, "head", sent, sent / group.rate(plan.machine), behind, cover)

    if exact:
        dhidden = transfer("dhidden, exact", head.dhidden_sent, "dweight's last chunk", head.exact_cover)
    else:
        dhidden = transfer("dhidden, certified", head.dhidden_sent, "dweight", head.certified_cover)
    dropped = 0 if exact else head.dropped_mass_sent
    return [
        transfer("hidden", hidden),
        transfer("statistics of the shards", head.statistics_sent),
        transfer("dropped mass", dropped, "the backward", head.certified_seconds),
        dhidden,
        Transfer("sums of sequences", "head", sums, sums / plan.sequence_group.rate(plan.machine)),
    ]


def sequence_sums_sent(plan: Plan) -> float:
    """Lengths (int64) and log-probs (fp32) of the group's 2B sequences, summed."""
    pairs = plan.batch.pairs * plan.mode.sequence
    return all_reduce(2 * pairs * (8 + 4), plan.mode.sequence)


def alpha_transfer(plan: Plan) -> Transfer:
    """Four numbers of every rank, whatever the mode."""
    group = Group(plan.gpus, plan.ranks_per_node)
    sent = all_gather(ALPHA_BYTES * plan.gpus, plan.gpus)
    return Transfer("α-DPO's mean and deviation", "head", sent, sent / group.rate(plan.machine))


def hiding_tokens(plan: Plan) -> int:
    """Tokens per rank and pass from which on the layers hide what a stage-3 engine moves of them."""
    found = step(plan)
    ratios = [
        transfer.seconds / transfer.cover
        for transfer in found.transfers
        if transfer.of == "engine" and transfer.cover
    ]
    return math.ceil(max(ratios) * plan.batch.tokens)


def hiding_chunk(machine: Machine, ranks: int) -> int:
    """Vocabulary entries of a last chunk whose product of dweight hides dhidden's all-reduce."""
    group = Group(ranks, ranks)
    return math.ceil(all_reduce(4, ranks) / group.rate(machine) / (2 / machine.rate))


def moving_tokens(model: Model, ranks: int, reduce_bytes: int = 2) -> int:
    """Completion tokens per rank up to which data-parallel layers move less for a vocabulary-parallel head.

    It takes hidden gathered and dhidden summed; a whole head takes its weight twice, and dweight summed.
    """
    tokens_bytes = all_gather(2 * ranks * model.hidden, ranks) + all_reduce(4 * ranks * model.hidden, ranks)
    weight_bytes = 2 * all_gather(2 * model.head, ranks) + reduce_scatter(reduce_bytes * model.head, ranks)
    return math.floor(weight_bytes / tokens_bytes)

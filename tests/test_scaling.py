"""The cost model behind docs/scaling.md: against numbers worked out by hand, the library and itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import publish, scaling
from benchmarks.cost_model import (
    GIB,
    MIB,
    PAIR_BYTES,
    STATISTICS_BYTES,
    WORKSPACE,
    Batch,
    Group,
    Head,
    Machine,
    Plan,
    all_gather,
    all_reduce,
    all_to_all,
    alpha_transfer,
    head_bytes,
    head_sent_by_engine,
    hiding_chunk,
    hiding_tokens,
    longest_length,
    memory,
    moving_tokens,
    operations,
    reduce_scatter,
    sequence_sums_sent,
    step,
)
from benchmarks.scaling import CASE_8B, CASE_70B, CASES, LLAMA_8B, LLAMA_70B, Mode

A100 = Machine()
MODES = [(case, mode) for case in CASES for mode in case.modes]
NAMES = [f"{case.model.name}, {mode.name}" for case, mode in MODES]
each_mode = pytest.mark.parametrize(("case", "mode"), MODES, ids=NAMES)


def head(ranks: int = 1, tokens: int = 8192) -> Head:
    return Head(LLAMA_8B, A100, tokens, ranks)


def sent(plan: Plan, what: str) -> float:
    return sum(transfer.sent for transfer in step(plan).transfers if transfer.what == what)


# By hand


def test_models_have_the_parameters_that_are_published():
    assert LLAMA_8B.parameters == 8_030_261_248
    assert LLAMA_70B.parameters == 70_553_706_496
    assert (LLAMA_8B.head, LLAMA_70B.head) == (525_336_576, 1_050_673_152)


def test_rings():
    assert [all_gather(800, 8), reduce_scatter(800, 8), all_to_all(800, 8)] == [700, 700, 700]
    assert all_reduce(800, 8) == 1400
    assert [collective(800, 1) for collective in (all_gather, reduce_scatter, all_to_all, all_reduce)] == [
        0
    ] * 4


def test_a_ring_over_nodes_has_as_much_of_the_network_as_it_has_gpus_of_a_node():
    machine = Machine(link_share=1.0)
    assert Group(8, 8).rate(machine) == 300e9
    assert Group(64, 8).rate(machine) == 200e9
    assert Group(8, 1).rate(machine) == 25e9


def test_operations_of_the_head_are_those_of_the_certified_backwards_page():
    assert head().forward_operations == 8_607_114_461_184  # 2 · 8192 · 128256 · 4096
    assert head().exact_operations == 25_821_343_383_552
    assert head().kept_pairs == pytest.approx(425_984)
    assert head().certified_operations == pytest.approx(1_340_029_796_352)
    assert head().statistics_bytes == 8192 * 1002 * 4


def test_dz_is_formed_twice_where_the_workspace_does_not_hold_it():
    assert head(tokens=8822).certified_products == 3  # 458,744 pairs
    assert head(tokens=8823).certified_products == 4  # 458,796, of 458,752 at most


def test_operations_of_the_layers():
    plan = CASE_8B.plan(scaling.ZERO_3)
    layers = 32 * 218_112_000
    forward = 2 * layers * 16384 + 2 * 32 * 4096 * 2048 * 16384
    assert operations(plan).body_forward == forward
    assert operations(plan).body_backward == 3 * forward


@pytest.mark.parametrize(
    ("mode", "times_parameters"),
    [
        (scaling.DDP, 4),
        (scaling.ZERO_1, 4),
        (scaling.ZERO_2, 4),
        (scaling.ZERO_3, 6),
        (scaling.FSDP2_ALL, 4),
        (replace(scaling.ZERO_3, reduce_bytes=4), 8),
        (replace(scaling.DDP, reduce_bytes=4), 8),
    ],
)
def test_bytes_of_the_engines(mode, times_parameters):
    """Of each parameter; of the head's alone too, which is one part in P."""
    plan = CASE_8B.plan(mode)
    assert step(plan).sent("engine") == pytest.approx(times_parameters * 7 / 8 * 8_030_261_248)
    assert head_sent_by_engine(plan) == pytest.approx(times_parameters * 7 / 8 * 525_336_576)


@pytest.mark.parametrize(("mode", "matrices"), [(scaling.FSDP2_HEAD, 1), (scaling.FSDP2_ROOT, 2)])
def test_what_is_kept_is_gathered_once(mode, matrices):
    saved = step(CASE_8B.plan(scaling.ZERO_3)).sent("engine") - step(CASE_8B.plan(mode)).sent("engine")
    assert saved == pytest.approx(matrices * 2 * 7 / 8 * 525_336_576)


def test_bytes_of_a_vocabulary_parallel_head():
    shard = head(ranks=8)
    assert shard.statistics_sent == 8 * 8192 * 7
    assert shard.dhidden_sent == 2 * 7 / 8 * 4 * 8192 * 4096
    assert shard.dropped_mass_sent == 2 * 7 / 8 * 4 * 8192
    assert head(ranks=8, tokens=16384).dhidden_sent == 2 * shard.dhidden_sent


def test_bytes_of_groups():
    pairs_of_four_ranks = CASE_8B.plan(replace(scaling.ZERO_3, sequence=4))  # 16 pairs, 32 sequences
    assert sequence_sums_sent(pairs_of_four_ranks) == 2 * 3 / 4 * 32 * (8 + 4)
    # 4096 of queries, 4096 of outputs, 1024 of keys, 1024 of values; three passes; 3/4 to others.
    layers = 32 * 3 * 2 * 16384 * 10240 * 3 / 4
    assert sent(pairs_of_four_ranks, "queries, keys, values, outputs") == layers
    tensor = CASE_8B.plan(replace(scaling.ZERO_3, tensor=4))
    # Two gathers and two scatters of 4 · 16384 tokens a layer; three passes; 3/4 to others.
    assert sent(tensor, "inputs and outputs of attention and MLP") == 32 * 4 * 3 * 2 * 65536 * 4096 * 3 / 4
    assert alpha_transfer(CASE_70B.plan(scaling.ZERO_3)).sent == 32 * 63


def test_memory_of_the_states():
    def states(mode: Mode) -> tuple[float, ...]:
        held = memory(CASE_8B.plan(mode))
        return held.weights, held.gradients, held.optimizer

    size = 8_030_261_248
    assert states(scaling.DDP) == (2 * size, 2 * size, 12 * size)
    assert states(scaling.ZERO_1) == (2 * size, 2 * size, 1.5 * size)
    assert states(scaling.ZERO_2) == (2 * size, 0.25 * size, 1.5 * size)
    assert states(scaling.ZERO_3) == (0.25 * size, 0.25 * size, 1.5 * size)
    assert states(scaling.FSDP2_ALL) == (2.25 * size, 0.25 * size, 1.5 * size)


def test_memory_at_the_head():
    held = head_bytes(CASE_8B.plan(scaling.ZERO_3))
    assert held["weight"] == held["dweight"] == 2 * 525_336_576
    assert held["hidden"] == held["dhidden"] == 2 * 16384 * 4096
    assert held["rows of completions"] == 2 * 2 * 8192 * 4096
    assert held["statistics"] == 4 * 8192 * 1002
    exact = 2 * 8192 * 4096 + 4 * 8192 * 4096  # dz of a chunk of 4096, and dhidden's sums
    assert held["backward"] == pytest.approx(WORKSPACE + PAIR_BYTES * 425_984) and held["backward"] > exact
    assert head(tokens=16384).backward_bytes == 2 * exact
    assert head_bytes(CASE_8B.plan(scaling.ZERO_3), fused=False)["logits"] == 8 * 8192 * 128256
    assert head_bytes(CASE_8B.plan(scaling.DDP))["weight"] == 0


def test_the_usual_head_takes_less_than_300_mib():
    assert head().statistics_bytes + head().backward_bytes < 300 * MIB


def test_what_hides_the_sum_of_dhidden():
    # 7 bytes a number at 210 GB/s, and 2 operations at 156 TFLOP/s for each entry.
    assert hiding_chunk(A100, 8) == 2600
    shard = head(ranks=8)
    assert (shard.chunk, shard.last_chunk) == (4096, 16032 - 3 * 4096)
    assert shard.exact_cover == pytest.approx(2 * 8192 * 3744 * 4096 / 156e12)
    assert shard.certified_cover == pytest.approx(2 * 425_984 / 8 * 128 * 4096 / 156e12)


def test_tokens_from_which_on_moving_them_costs_more_than_moving_the_head():
    assert moving_tokens(LLAMA_8B, 8) == 9619  # 6 · V · H · 7/8 over 10 · 7 · H
    assert moving_tokens(LLAMA_8B, 8, reduce_bytes=4) == 12825  # 8 · V · H · 7/8


# Against the library


def test_constants_are_the_librarys():
    from csrc_triton import launch
    from focalkern.logps.function import WORKSPACE_BYTES
    from focalkern.logps.statistics import shard_statistics
    from focalkern.records import BlockStatistics

    assert WORKSPACE == WORKSPACE_BYTES
    assert launch.VOCAB_BLOCK == 128
    blocks = BlockStatistics(target_z=torch.zeros(1), lse=torch.zeros(1, 2))
    sent = shard_statistics(blocks, torch.zeros(1, dtype=torch.int64))
    assert sum(x.nbytes for x in sent if x is not None) == STATISTICS_BYTES


@pytest.mark.parametrize("tokens", [1, 512, 8192, 16384, 65536, 262144])
@pytest.mark.parametrize("ranks", [1, 8])
def test_chunks_are_the_librarys(tokens, ranks):
    pytest.importorskip("triton")
    from focalkern.triton_launch import vocab_chunk

    assert head(ranks, tokens).chunk == vocab_chunk(tokens, 128256 // ranks, 2)


# Against itself


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_divide_the_operations_of_the_head(ranks):
    whole = head()
    slices = head(tokens=8192 // ranks)
    for part in (head(ranks), slices):
        assert ranks * part.forward_operations == pytest.approx(whole.forward_operations)
        assert ranks * part.exact_operations == pytest.approx(whole.exact_operations)
        assert ranks * part.certified_operations == pytest.approx(whole.certified_operations)
    assert ranks * head(ranks).weight_bytes == pytest.approx(whole.weight_bytes)


@each_mode
def test_all_modes_have_the_operations_of_one_gpu(case, mode):
    batch = replace(case.batch, pairs=case.gpus * case.batch.pairs)
    one = Plan(case.model, case.machine, 1, batch, scaling.DDP)
    for of in ("body_forward", "body_backward", "head_forward", "head_backward"):
        parts = getattr(operations(case.plan(mode), exact=True), of)
        assert case.gpus * parts == pytest.approx(getattr(operations(one, exact=True), of))


@each_mode
def test_the_states_of_all_ranks_are_sixteen_bytes_a_parameter_at_least(case, mode):
    held = memory(case.plan(mode))
    states = case.gpus * (held.weights + held.gradients + held.optimizer)
    least = 16 * case.model.parameters
    if mode.stage == 3 and mode.kept != "all":
        assert states == pytest.approx(least)
    else:
        assert states > 1.5 * least


@pytest.mark.parametrize("mode", scaling.ENGINES, ids=lambda mode: mode.name)
def test_one_gpu_moves_nothing(mode):
    plan = Plan(LLAMA_8B, A100, 1, Batch(1), mode)
    assert step(plan).transfers == []
    assert step(plan).seconds == step(plan).compute_seconds


def test_what_is_not_hidden_is_added_to_the_step():
    found = step(CASE_8B.plan(scaling.ZERO_2))
    late = [transfer for transfer in found.transfers if transfer.exposed]
    assert [transfer.what for transfer in late] == ["the last gradients", "updated weights"]
    assert found.seconds == pytest.approx(found.compute_seconds + sum(transfer.seconds for transfer in late))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model.name)
def test_from_a_number_of_tokens_on_the_layers_hide_their_weights(case):
    few = hiding_tokens(case.plan(scaling.ZERO_3))

    def late(tokens: float) -> float:
        batch = Batch(tokens / 4096)
        found = step(replace(case.plan(scaling.ZERO_3), batch=batch))
        return sum(transfer.exposed for transfer in found.transfers if transfer.cover)

    assert late(1.01 * few) == 0 < late(0.99 * few)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model.name)
def test_the_longest_sequence_is_the_longest(case, fused):
    plan = case.plan(scaling.with_sequence(8))
    longest = longest_length(plan, fused)

    def peak(length: int) -> float:
        return memory(replace(plan, batch=Batch(1 / 8, length, length // 2)), fused).peak

    assert peak(longest) <= 38 * GIB < peak(longest + 256)


def test_groups_stay_within_a_node():
    with pytest.raises(ValueError, match="16 ranks do not divide the GPUs of a node"):
        CASE_70B.plan(Mode("wide", 3, sequence=16))


# What the page says of it


def test_what_fits_is_what_the_page_concludes():
    def fits(case: scaling.Case, mode: Mode, fused: bool = True) -> bool:
        return scaling.fits(memory(case.plan(mode), fused), case.machine)

    assert not fits(CASE_8B, scaling.DDP) and not fits(CASE_8B, scaling.ZERO_1)
    assert fits(CASE_8B, scaling.ZERO_2) and not fits(CASE_8B, scaling.ZERO_2, fused=False)
    assert fits(CASE_8B, scaling.ZERO_3) and fits(CASE_70B, scaling.ZERO_3)
    assert not fits(CASE_70B, scaling.FSDP2_ROOT)
    shards = CASE_70B.plan(CASE_70B.modes[-1])
    shard = shards.head
    assert shard.backward_bytes / 2 < 4 * shard.tokens * shard.model.hidden < shard.backward_bytes
    assert memory(shards).at_head < memory(shards, fused=False).at_head


def test_what_waits_is_what_the_page_concludes():
    sequence, tensor = (CASE_70B.plan(mode) for mode in CASE_70B.modes[-2:])
    assert step(CASE_70B.plan(scaling.ZERO_3)).seconds < step(sequence).seconds < step(tensor).seconds
    two, three = (step(CASE_8B.plan(mode)) for mode in (scaling.ZERO_2, scaling.FSDP2_HEAD))
    assert two.sent("engine") < three.sent("engine")
    assert two.exposed_seconds > three.exposed_seconds
    slow = replace(CASE_70B, machine=replace(CASE_70B.machine, network_peak=scaling.SLOW_NETWORK))
    times = [scaling.engine_seconds(slow.plan(mode)) for mode in (CASE_70B.modes[-1], scaling.ZERO_3)]
    assert 0.8 < times[0] / times[1] < 1
    shard = head(ranks=8)
    assert shard.certified_cover < scaling.dhidden_seconds(shard) < shard.exact_cover


@pytest.mark.parametrize("part", scaling.PARTS)
def test_the_page_has_what_the_code_makes(part):
    text = (publish.ROOT / publish.SCALING_PAGE).read_text(encoding="utf-8")
    made = scaling.PARTS[part](CASES)
    assert publish.replace_part(text, part, made, publish.SCALING_PAGE) == text


def test_other_assumptions_give_other_tables(capsys):
    def printed(*arguments: str) -> str:
        assert scaling.main(arguments) == 0
        return capsys.readouterr().out

    usual = printed("--only", "step-70b")
    assert usual == scaling.PARTS["step-70b"](CASES) + "\n"
    assert printed("--only", "step-70b", "--network", "25") != usual
    assert "does not fit" not in printed("--only", "step-8b", "--memory", "192")
    assert len(printed()) > 10_000


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0"), (56, "56 bytes"), (688_128, "688 kB"), (1.5e6, "1.50 MB"), (2.8e10, "28.0 GB")],
)
def test_bytes_as_text(size, text):
    assert scaling.moved(size) == text


@pytest.mark.parametrize(
    ("time", "text"),
    [(0, "0"), (1e-6, "< 20 µs"), (26.2e-6, "26.2 µs"), (0.0043, "4.30 ms"), (29.4, "29.4 s")],
)
def test_times_as_text(time, text):
    assert scaling.seconds(time) == text


# The command line


def test_other_cases_get_tables_and_no_conclusions(capsys):
    assert scaling.main([]) == 0
    printed = capsys.readouterr().out
    assert "Without short" not in printed
    assert "do not fit" in printed
    scaling.main(["--memory", "80"])
    printed = capsys.readouterr().out
    assert "Without short, choice, overlap" in printed
    assert "do not fit" not in printed
    assert "| ZeRO-2 |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pairs 0 1", "--pairs must be > 0"),
        ("--link-share 0", "--link-share must be in (0, 1]"),
        ("--memory 0", "--memory must be > 0"),
        ("--length 512 --completion 1024", "--completion must be in [1, --length = 512]"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        scaling.main(arguments.split())
    assert message in capsys.readouterr().err

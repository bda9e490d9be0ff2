"""`FocalPOTrainer` on two ranks, as accelerate launches it, against one process with as many pairs a step.

The ranks are processes on the CPU (gloo); ZeRO, FSDP2 and DDP are the engines' own. Their configurations are
those of examples/accelerate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("trl")
pytest.importorskip("deepspeed")

from peft import AutoPeftModelForCausalLM
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import write_jsonl
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_distributed_worker import make_trainer, train
from trl_tiny import RECORDS, TOKENIZER, assert_same_history, llama, near, seeded

from focalkern.trl.metrics import backward_metrics

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [*RECORDS, {"prompt": "The snow is", "chosen": " white." * 5, "rejected": " not white." * 2}]

ALPHA, PACKED, LORA = FP32 = ("alpha-DPO with a schedule", "packed, precomputed", "LoRA on the head")
BF16 = ("bf16", "bf16, LoRA", "bf16, precomputed")
OF_TRL = ("bf16, DPO", "bf16, TRL's DPO")

# Sums over ranks, in another order. Measured on two CPUs, the worst of all engines and trainings: losses
# 5e-7 of their size; metrics 7e-7 of it, or of 1 where they are below; updates of the weights 5e-5 of their
# size, which is the rounding of weights that are a thousand times as large.
RTOL = 2e-6
UPDATE_RTOL = 2e-4


def accelerate(config: str, *options: str) -> tuple[str, ...]:
    path = ROOT / f"examples/accelerate/{config}.yaml"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path))
    return (*launcher, "--num_processes", "2", "--main_process_port", "0", *options)


BY_TOKENS = "batches by tokens"
RESUMED = (f"resumed {ALPHA}", BY_TOKENS, f"resumed {BY_TOKENS}")
# Launcher, and what is run in one launch: a start takes longer than a training.
LAUNCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ZeRO-3, ZeRO-2 in bf16": (
        accelerate("zero3"),
        (*FP32, *RESUMED, "ZeRO stage 2", *BF16, "ZeRO stage 3", "dry run"),
    ),
    "FSDP2": (
        accelerate("fsdp2"),
        (*FP32, *RESUMED, *BF16, *OF_TRL, "refused", "tensor-parallel head", "dry run"),
    ),
    "ZeRO-3 in bf16": (accelerate("zero3"), BF16),
    "ZeRO-2": (accelerate("zero2"), (*FP32, *RESUMED)),
    "ZeRO-1": (accelerate("zero2", "--zero_stage", "1"), (*FP32, *RESUMED)),
    "DDP": ((), (*FP32, *RESUMED)),
}
ZERO, FSDP2, *SLOW = LAUNCHES
SLOW_BF16, *SLOW_ENGINES = (pytest.param(name, marks=pytest.mark.slow) for name in SLOW)
# The others differ by what is sharded alone.
ENGINES = [ZERO, FSDP2, *SLOW_ENGINES]
BF16_ENGINES = [ZERO, FSDP2, SLOW_BF16]


def on(*launches):
    return pytest.mark.parametrize("ranks", launches, indirect=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    model = seeded(llama)
    for name, saved in (("model", model), ("reference", near(model))):
        saved.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture(scope="module")
def ranks(request, inputs, tmp_path_factory) -> Path:
    """The folder of a launch."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher, trainings = LAUNCHES[request.param]
    worker = ROOT / "tests/trl_distributed_worker.py"
    run_ranks(worker, str(inputs), str(folder), *trainings, launcher=launcher)
    return folder


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> dict[str, Path]:
    """The folders of trainings in this process; under "untrained NAME" and "exact NAME" what they stand for.

    All at once: in a test, with poisoned allocations, transformers draws other random numbers for adapters.
    """
    root = tmp_path_factory.mktemp("alone")
    for name in (*FP32, BY_TOKENS, *BF16):
        train(name, inputs, root)
    for name in (*FP32, BY_TOKENS):
        make_trainer(name, inputs, root).save_model(str(root / f"untrained {name}"))
    for name in BF16:
        train(name, inputs, root / "exact", bf16=False)
    folders = {name: root / name for name in (*FP32, BY_TOKENS, *BF16)}
    folders |= {f"untrained {name}": root / f"untrained {name}" for name in (*FP32, BY_TOKENS)}
    return folders | {f"exact {name}": root / "exact" / name for name in BF16}


def logged(folder: Path) -> list[dict[str, float]]:
    """Without the number of floating-point operations, which transformers counts otherwise on ranks."""
    entries = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return [{name: x for name, x in entry.items() if name != "total_flos"} for entry in entries]


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in logged(folder) if "loss" in entry])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def assert_same_update(actual: Path, expected: Path, start: Path) -> None:
    ours, theirs, before = weights(actual), weights(expected), weights(start)
    # PEFT also saves the base of an adapted head, which ZeRO-3 leaves out.
    assert ours.keys() >= {name for name in theirs if "base_layer" not in name}
    for name in ours:
        difference, update = (ours[name] - theirs[name]).norm(), (theirs[name] - before[name]).norm()
        assert update > 0 or "base_layer" in name
        assert difference <= UPDATE_RTOL * update, f"{name}: off by {difference / update:.1e}"


def test_the_configurations_of_zero_differ_by_the_stage_alone():
    """Which the second part of a launch changes."""
    paths = (ROOT / f"examples/accelerate/zero{stage}.yaml" for stage in (2, 3))
    zero2, zero3 = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths)
    assert [x["deepspeed_config"].pop("zero_stage") for x in (zero2, zero3)] == [2, 3]
    for name in ("zero3_init_flag", "zero3_save_16bit_model"):
        assert zero3["deepspeed_config"].pop(name)
    assert zero2 == zero3


# -------------------------------------------------------------------------------------- in fp32: the same run


@pytest.mark.parametrize("name", FP32)
@on(*ENGINES)
def test_two_ranks_train_as_one_process(name, ranks, alone):
    """Losses, metrics, evaluations and weights. The worker has seen that models are sharded."""
    ours, one = ranks / name, alone[name]
    assert_same_history(logged(ours), logged(one), RTOL, RTOL)
    assert_same_update(ours, one, alone[f"untrained {name}"])
    assert losses(one).max() > 1.05 * losses(one).min()
    assert [entry["step"] for entry in logged(one) if entry.get("eval_focal/weight")] == [2, 4]


@on(*ENGINES)
def test_ranks_with_unlike_numbers_of_pairs_train_as_one_process(ranks, alone, inputs, tmp_path):
    """Which accumulates the batches that the ranks have at once: a mean over all pairs of a step."""
    loader = make_trainer(BY_TOKENS, inputs, tmp_path).get_train_dataloader()
    sizes = [len(batch) for batch in loader.batch_sampler]
    assert all(a != b for a, b in zip(sizes[::2], sizes[1::2], strict=True))
    ours, one = ranks / BY_TOKENS, alone[BY_TOKENS]
    # Means over the tokens of a batch, which is that of both ranks or of one.
    of_tokens = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
    of_tokens += ("focal/dropped_mass", "focal/kept_share")
    assert_same_history(logged(ours), logged(one), RTOL, RTOL, without=of_tokens)
    assert_same_update(ours, one, alone[f"untrained {BY_TOKENS}"])


@on(*ENGINES)
def test_the_statistics_are_those_of_the_pairs_of_all_ranks(ranks, alone):
    folders = ranks / ALPHA, alone[ALPHA]
    for name in ("alpha/mean", "alpha/std", "focal/gamma"):
        ours, theirs = ([entry[name] for entry in logged(x) if name in entry] for x in folders)
        assert ours == pytest.approx(theirs, rel=RTOL)
        assert len(set(theirs)) == len(theirs) == 4


def logps_of(folder: Path) -> tuple[float, float]:
    """Mean log-prob of the chosen completions, and of the rejected, from logits of the model in a folder."""
    is_adapter = (folder / "adapter_config.json").exists()
    model = (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(folder)
    examples = []
    for pair in PAIRS:  # tokenised as TRL does it
        prompt = TOKENIZER(pair["prompt"])["input_ids"]
        examples.append({"prompt_ids": prompt})
        for kind in ("chosen", "rejected"):
            whole = TOKENIZER(pair["prompt"] + pair[kind] + TOKENIZER.eos_token)["input_ids"]
            examples[-1][f"{kind}_ids"] = whole[len(prompt) :]
    batch = DataCollatorForPreference(TOKENIZER.pad_token_id)(examples)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    chosen, rejected = (logps * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
    return chosen.mean().item(), rejected.mean().item()


@pytest.mark.parametrize(("name", "folder"), [(ALPHA, "."), (ALPHA, "checkpoint-4"), (LORA, ".")])
@on(*ENGINES)
def test_what_ranks_saved_loads_in_one_process(name, folder, ranks):
    trained = ranks / name
    evaluated = [entry for entry in logged(trained) if "eval_loss" in entry][-1]
    expected = evaluated["eval_logps/chosen"], evaluated["eval_logps/rejected"]
    assert logps_of(trained / folder) == pytest.approx(expected, rel=RTOL)


@pytest.mark.parametrize("name", [ALPHA, BY_TOKENS])
@on(*ENGINES)
def test_training_goes_on_from_a_checkpoint_of_two_ranks(name, ranks):
    """With γ(t) and the statistics of α-DPO where they were: what is logged, and the weights, bit for bit.

    Batches by tokens go on in the second epoch.
    """
    whole, resumed = (ranks / folder / name for folder in (".", "resumed"))
    assert logged(resumed)[:-1] == logged(whole)[:-1]  # the last is the mean loss since the start
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---------------------------------------------------------------------------------------------------- in bf16


@pytest.mark.parametrize("name", BF16)
@on(*BF16_ENGINES)
def test_in_bf16_the_losses_are_off_by_its_rounding(name, ranks, alone):
    """The engines round more than autocast alone: FSDP2 also gradients and norms, ZeRO all weights."""
    exact = losses(alone[f"exact {name}"])
    for folder in (ranks / name, alone[name]):
        error = (losses(folder) / exact - 1).abs()
        assert 0 < error.max() <= 4 * 2**-8  # 0.4 % in one process, 1.0 % at most with an engine


@on(*BF16_ENGINES)
def test_reference_log_probs_computed_in_advance_are_not_rounded(ranks):
    """transformers casts what a batch holds to bf16 under DeepSpeed: a log-prob of −94 by up to 0.25."""
    ours, theirs = (losses(ranks / name) for name in ("bf16, precomputed", "bf16"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@on(FSDP2)
def test_under_a_patch_trl_s_dpo_keeps_fp32_log_probs_as_well(ranks):
    ours, theirs = (ranks / name for name in OF_TRL)
    expected = [
        {name: x for name, x in entry.items() if not name.startswith(("focal/", "logits/"))}
        for entry in logged(ours)
    ]
    assert_same_history(logged(theirs), expected, 1e-4, 1e-4)


@on(FSDP2)
def test_a_tensor_parallel_head_is_the_whole_one(ranks):
    errors = json.loads((ranks / "tensor_parallel_head.json").read_text(encoding="utf-8"))
    assert len(errors) == 6
    assert max(errors.values()) <= RTOL, errors


@on(ZERO, FSDP2)
def test_a_recipe_runs_dry_on_two_ranks(ranks):
    """As docs/training.md launches it. The worker has seen that the model is sharded."""
    found = json.loads((ranks / "dry_run.json").read_text(encoding="utf-8"))
    assert found["moved"] == found["parameters"] > 10
    assert {"README.md", "model.safetensors", "progress.png"} <= set(found["files"])
    gammas = [entry["focal/gamma"] for entry in found["history"] if "focal/gamma" in entry]
    assert gammas[0] > gammas[1]
    assert not Path(found["folder"]).exists()


# -------------------------------------------------------------------------------------------- what is refused


@on(FSDP2)
def test_what_ranks_cannot_do_is_refused_by_name(ranks):
    messages = json.loads((ranks / "refused.json").read_text(encoding="utf-8"))
    assert messages.keys() == {"cp_size", "sp_size", "precompute_ref_log_probs"}
    for name, message in messages.items():
        assert name in message
    for name in ("cp_size", "sp_size"):
        assert "got 2" in messages[name]
        assert "sequence_group" in messages[name]
    assert "load_dataset" in messages["precompute_ref_log_probs"]


# ---------------------------------------------------------------------------------------------------- metrics


def test_what_the_backward_left_out_is_weighted_by_the_tokens_of_ranks():
    """Ranks with 30 and 10 completion tokens, of (token, block) pairs 0.5 and 0.1 kept."""
    ranks = [(6.0, 0.5, 30), (1.0, 0.1, 10)]
    sums: list[torch.Tensor] = []
    for values in ranks:
        backward_metrics(*map(torch.tensor, values), lambda x: sums.append(x) or x)
    found = backward_metrics(*map(torch.tensor, ranks[0]), lambda x: sum(sums))
    assert found["focal/dropped_mass"] == pytest.approx(7 / 40)
    assert found["focal/kept_share"] == pytest.approx((30 * 0.5 + 10 * 0.1) / 40)

"""`focalkern check`: a clean start has no findings, and each planted fault is found by its own message."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from peft import LoraConfig
from tiny import write_jsonl
from trl_tiny import CONVERSATIONS, RECORDS, TOKENIZER, focal_trainer, llama, near, seeded, tokenizer_of

from focalkern.cli import check, memory
from focalkern.cli.main import main
from focalkern.trl import FocalPOTrainer
from focalkern.trl import head as fused_head
from focalkern.trl.data import inspect_pairs

ROOT = Path(__file__).resolve().parents[1]
SIMPO = {"reference_free": True, "length_normalize": True, "gamma": 0.0, "beta": 2.0, "gamma_beta_ratio": 0.5}
LORA = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
SAME = [{**record, "rejected": record["chosen"]} for record in RECORDS]


def trainer_of(folder: Path, *models, records=RECORDS, **changes) -> FocalPOTrainer:
    """Without a second model the reference is the policy's copy."""
    models = models or (seeded(llama),)
    options = {key: changes.pop(key) for key in ("peft_config", "processing_class") if key in changes}
    if not (len(models) > 1 or "peft_config" in options or changes.get("reference_free")):
        models = (*models, seeded(llama))
    options["train_dataset"] = Dataset.from_list(records) if isinstance(records, list) else records
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return focal_trainer(folder, *models, options=options, **changes)


CLEAN = {
    "FocalPO": {},
    "packed, bf16": {"padding_free": True, "bf16": True, "gradient_checkpointing": True},
    "shared": {"share_prompt": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "DynamicFocalPO": {"gamma_schedule": "cosine"},
    "SimPO": SIMPO,
    "LoRA on the head": {"peft_config": LORA},
    "mixed": {"loss_type": ["ipo", "sft"]},
}


@pytest.mark.parametrize("changes", CLEAN.values(), ids=CLEAN)
def test_a_clean_start_has_no_findings(changes, tmp_path, capsys):
    trainer = trainer_of(tmp_path, **changes)
    capsys.readouterr()
    assert check.check(trainer) == []
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 12
    assert "  chosen    masked: <s>The sky is\n            scored:  blue.</s>\n" in printed


def test_a_stream_is_checked_by_its_start(tmp_path, capsys):
    stream = IterableDataset.from_generator(lambda: iter(RECORDS))
    assert check.check(trainer_of(tmp_path, records=stream, **SIMPO)) == []
    assert "train: first 7 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"gamma": 0.0}, "0.6931"),
        ({"gamma": 0.05}, "0.6695"),
        ({"gamma_schedule": "linear"}, "0.6467"),  # gamma_max = 0.1
        ({"gamma": 0.0, "margin": 1.0}, "1.3133"),  # log(1 + e)
    ],
)
def test_the_first_loss_is_known(changes, loss, tmp_path, capsys):
    assert check.check(trainer_of(tmp_path, **changes)) == []
    assert f"first loss: {loss}, expected {loss}" in capsys.readouterr().out


def test_simpo_s_own_first_loss_is_that_of_its_formula(tmp_path, capsys):
    trainer = trainer_of(tmp_path, **SIMPO)
    scores = {}
    for name in ("chosen", "rejected"):
        found = []
        for row in (trainer.train_dataset[i] for i in range(2)):
            ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
            logps = trainer.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            found.append(logps[len(row["prompt_ids"]) - 1 :].mean())
        scores[name] = torch.stack(found)
    u = 2.0 * (scores["chosen"] - scores["rejected"]) - 1.0  # β = 2, γ/β = 0.5
    loss = f"{-torch.nn.functional.logsigmoid(u).mean():.4f}"
    assert check.check(trainer) == []
    assert f"first loss: {loss}, expected {loss}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- of the data


DATA = {
    "doubled BOS": ([{**r, "prompt": f"<s>{r['prompt']}"} for r in RECORDS], "begin with BOS twice: take it"),
    "empty": ([*RECORDS, {**RECORDS[0], "chosen": ""}], "1 of 8 .* have an empty chosen or rejected: filter"),
    "identical": (RECORDS + SAME[:2], "2 of 9 .* have chosen equal to rejected: filter them out"),
    "cut": (RECORDS, "are cut by max_length=14: raise it"),
    "dropped": (
        [*RECORDS, {**RECORDS[0], "prompt": "The sky is " * 60}] * 3,
        "are dropped, their prompts fill max_length=100: raise it",
    ),
}


@pytest.mark.parametrize("fault", DATA)
def test_faults_of_the_data(fault, tmp_path):
    records, message = DATA[fault]
    max_length = {"cut": 14, "dropped": 100}.get(fault)
    (finding,) = check.check(trainer_of(tmp_path, records=records, max_length=max_length))
    assert re.search(message, finding)


def test_a_completion_without_eos(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    rows = [{**row, "chosen_ids": row["chosen_ids"][:-1]} for row in trainer.train_dataset]
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.data_reports["train"] = inspect_pairs(
        trainer.train_dataset, len(rows), "train", TOKENIZER, None, "keep_start"
    )
    (finding,) = check.check(trainer)
    assert "7 of 7 pairs of the train dataset do not end with EOS: the model learns no end" in finding


def test_a_token_that_the_model_does_not_have(tmp_path):
    tokenizer = tokenizer_of(RECORDS)
    tokenizer.add_tokens(["grass"])
    records = [*RECORDS, {"prompt": "The grass is", "chosen": " green.", "rejected": " blue."}]
    (finding,) = check.check(trainer_of(tmp_path, records=records, processing_class=tokenizer))
    assert f"row 7 of the train dataset has the token 'grass' with id {len(TOKENIZER)}" in finding


def test_sequences_longer_than_the_model_was_made_for(tmp_path):
    model = seeded(llama)
    model.config.max_position_embeddings = 40
    (finding,) = check.check(trainer_of(tmp_path, model))
    assert "has 57 tokens, and the model was made for 40: set max_length=40" in finding


# ---------------------------------------------------------------------------------------------- of the model


def test_another_reference(tmp_path):
    model = seeded(llama)
    findings = check.check(trainer_of(tmp_path, model, near(model)))
    assert findings[0].startswith("the reference differs from the starting policy by")
    assert findings[1].startswith("the first loss is")
    assert len(findings) == 2


def test_an_adapter_that_is_not_new(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    findings = check.check(trainer_of(tmp_path, peft_config=lora))
    assert "no adapter that is not new" in findings[0]


def test_dropout(tmp_path):
    model = seeded(llama)
    trainer = trainer_of(tmp_path, model, beta=5.0)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    findings = check.check(trainer)
    assert any("the first loss is" in finding and "dropout" in finding for finding in findings)


def test_weights_that_are_not_numbers(tmp_path):
    trainer = trainer_of(tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = torch.nan
    assert any("the first loss is nan: look for NaN" in finding for finding in check.check(trainer))


def test_a_head_of_another_dtype(tmp_path):
    trainer = trainer_of(tmp_path, bf16=True, **SIMPO)
    trainer.model.lm_head.to(torch.float16)
    findings = check.check(trainer)
    assert any("the head is float16 and the layers are float32: load all in one" in text for text in findings)


def test_weights_of_16_bits_that_lose_their_updates(tmp_path):
    model, other = (seeded(llama).bfloat16() for _ in range(2))
    (finding,) = check.check(trainer_of(tmp_path, model, other, learning_rate=5e-7))
    assert "lose most updates of learning_rate=5e-07: load the model in float32" in finding


def test_nothing_to_train(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.requires_grad_(False)
    assert any("no parameter is trained" in finding for finding in check.check(trainer))


def test_a_parameter_without_a_gradient(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.unused = torch.nn.Parameter(torch.ones(3))
    (finding,) = check.check(trainer)
    assert finding.startswith("1 trained parameters get no gradient, unused among them")


def wrong_head(monkeypatch, change) -> None:
    """As if the fused head had a fault."""
    own = fused_head.linear_logps

    def wrong(*args, **kwargs):
        tokens = own(*args, **kwargs)
        return dataclasses.replace(tokens, logps=change(tokens.logps))

    monkeypatch.setattr(fused_head, "linear_logps", wrong)


def test_log_probs_of_the_fused_head_that_are_wrong(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    wrong_head(monkeypatch, lambda logps: logps * 1.1)
    findings = check.check(trainer)
    assert any("log-probs of the fused head are" in text and "TRL's own head" in text for text in findings)


def test_gradients_of_the_fused_head_that_are_wrong(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    wrong_head(monkeypatch, lambda logps: 1.1 * logps - 0.1 * logps.detach())
    (finding,) = check.check(trainer)
    assert "gradient of" in finding and "10 % off the plain one" in finding


def test_a_head_that_computes_something_else(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    assert any("lm_head must compute what torch.nn.Linear does" in text for text in check.check(trainer))


def test_the_longest_batch_by_tokens_is_within_the_limit(tmp_path, capsys):
    options = {"padding_free": True, "max_tokens_per_batch": 120, "per_device_train_batch_size": 8}
    assert check.check(trainer_of(tmp_path, **options)) == []
    assert "longest batch: 2 pairs, 110 tokens" in capsys.readouterr().out


def test_the_longest_batch_overflows(tmp_path):
    model, other = seeded(llama), seeded(llama)
    records = [*RECORDS, {"prompt": "A", "chosen": "z" * 60, "rejected": "b"}]
    token = TOKENIZER("z", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        for each in (model, other):
            each.model.embed_tokens.weight[token] = torch.inf
    findings = check.check(trainer_of(tmp_path, model, other, records=records))
    (finding,) = findings
    assert "the longest batch has loss nan" in finding


def test_the_longest_batch_does_not_fit(tmp_path, monkeypatch):
    def overflow(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(memory.LiveBytes, "_add", overflow)
    (finding,) = check.check(trainer_of(tmp_path))
    assert "2 pairs do not fit on this device" in finding
    assert "lower max_length or per_device_train_batch_size" in finding
    assert finding.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)")


# --------------------------------------------------------------------------------------------- the command


def write_model(folder: Path) -> str:
    seeded(llama).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def run(tmp_path: Path, records: list[dict], options: str = "") -> int:
    data = write_jsonl(tmp_path / "pairs.jsonl", records)
    given = f"check --model_name_or_path {write_model(tmp_path / 'model')} --dataset_name {data}"
    return main([*given.split(), "--output_dir", str(tmp_path / "out"), "--bf16", "false", *options.split()])


def test_the_command_has_status_0_without_findings(tmp_path, capsys):
    assert run(tmp_path, CONVERSATIONS) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "No findings."
    assert len(printed) <= 12


def test_the_command_has_status_1_with_findings(tmp_path, capsys):
    assert run(tmp_path, RECORDS + SAME[:2]) == 1
    printed = capsys.readouterr().out
    assert "FINDING 1: 2 of 9 pairs of the train dataset have chosen equal to rejected: filter" in printed
    assert printed.endswith("1 findings.\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max_length 2", "max_length=2 leaves no pair to train on"),
        ("--use_peft --lora_target_modules lm_head --use_dora", "lm_head must have plain LoRA; adapter"),
    ],
)
def test_a_trainer_that_cannot_be_made_is_a_finding(options, message, tmp_path, capsys):
    assert run(tmp_path, RECORDS, options) == 1
    assert f"FINDING 1: {message}" in capsys.readouterr().out


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(SystemExit, match="check runs in one process: start it without accelerate launch"):
        run(tmp_path, RECORDS)


@pytest.mark.parametrize("recipe", ["gemma2-9b-alpha-dpo", "llama3-8b-focalpo-lora-24gb"])
def test_a_dry_run_of_a_recipe_has_no_findings(recipe, capsys):
    assert main(["check", str(ROOT / f"examples/recipes/{recipe}.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("No findings.\n")

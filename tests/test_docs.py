"""The code in `README.md` and of the pages in `docs`: every Python block runs, in its order."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from focalkern import FusedFocalPOLoss

try:
    import trl_tiny
except ImportError:  # TRL needs Python 3.11
    trl_tiny = None

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def given() -> dict:
    """What the pages take for granted: a batch of 4 pairs, its model, a reference and a teacher."""
    torch.manual_seed(0)
    ids = torch.randint(50, (8, 6))
    labels = ids.clone()
    labels[:, :2] = -100

    def head(size: int = 16) -> torch.Tensor:
        return torch.randn(50, size, requires_grad=True)

    def model() -> SimpleNamespace:
        states = torch.randn(8, 6, 16, requires_grad=True)
        return SimpleNamespace(
            model=lambda *_, **__: SimpleNamespace(last_hidden_state=states * 1.0),
            lm_head=SimpleNamespace(weight=head()),
        )

    hidden, weight = torch.randn(8, 6, 16, requires_grad=True) * 1.0, head()
    return {
        "torch": torch,
        "model": model(),
        "ref_model": model(),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "ref_chosen_logps": torch.randn(4),
        "ref_rejected_logps": torch.randn(4),
        "hidden": hidden,
        "head": weight,
        "prompt_ids": [[1, 2, 3], [4], [], [5, 6]],
        "chosen_ids": [[7, 8], [9], [10, 11, 12], [13]],
        "rejected_ids": [[14], [15, 16, 17], [18], [19, 20]],
        "ref_hidden": torch.randn(8, 6, 16),
        "ref_head": head(),
        "teacher_hidden": torch.randn(8, 6, 24),
        "teacher_head": head(24),
        "out": FusedFocalPOLoss(reference_free=True)(hidden, weight, labels, shift=True),
    }


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md", "docs/trl.md"])
def test_every_python_block_runs(page, tmp_path, monkeypatch, capsys):
    """Those that train with TRL on the CPU, with a tiny model in place of the one that they name."""
    names = {}
    trainers = []
    monkeypatch.chdir(tmp_path)
    assert len(blocks(page)) >= 3
    for block in blocks(page):
        names |= given()
        if "peft_model" in block:
            peft = pytest.importorskip("peft")
            lora = peft.LoraConfig(target_modules=["lm_head"])
            names["peft_model"] = peft.get_peft_model(tiny_llama(names["hidden"].shape[-1]), lora)
        if "share_prompts" in block:
            names["model"] = tiny_llama()
        if "focalkern.trl" in block:
            pytest.importorskip("trl")
            block = on_a_tiny_model(block, tmp_path)
            names["dataset"] = trl_tiny.Dataset.from_list(trl_tiny.RECORDS)
        try:
            exec(compile(block, page, "exec"), names)
        finally:
            if "focalkern.trl" in block:
                names["focalkern"].trl.unpatch()
        trainers += [names["trainer"]] if "trainer = " in block else []
    assert [trainer.state.global_step for trainer in trainers] == ([] if page == "docs/methods.md" else [1])
    printed = capsys.readouterr().out
    assert page != "README.md" or blocks(page, "text")
    for shown in blocks(page, "text"):
        assert shown in printed


def test_every_python_block_of_scaling_md_runs_on_a_group_of_one_rank():
    """All of them give the loss of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names = given()
        names["hidden"] = names["hidden"].detach().requires_grad_()
        refs = {name: names[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        loss_fn, hidden, weight, labels = FusedFocalPOLoss(), names["hidden"], names["head"], names["labels"]
        names |= {"group": dist.group.WORLD, "weight": weight, "loss_fn": loss_fn, "refs": refs}
        expected = loss_fn(hidden, weight, labels, shift=True, **refs).loss
        engines, *heads = blocks("docs/scaling.md")
        exec(compile(engines, "docs/scaling.md", "exec"), names)
        model = torch.nn.Module()
        model.model = lambda ids: SimpleNamespace(last_hidden_state=hidden)
        model.lm_head = torch.nn.Linear(*weight.T.shape, bias=False)
        model.lm_head.weight.data = weight.detach()
        losses = [names["Policy"](model, loss_fn)(names["input_ids"], labels, **refs)]
        for block in heads:
            exec(compile(block, "docs/scaling.md", "exec"), names)
            if "norm = " in block:
                gradients = [names["own"].grad, names["hidden"].grad]
                torch.testing.assert_close(names["norm"], torch.nn.utils.get_total_norm(gradients))
            else:
                losses.append(names["out"].loss)
        torch.testing.assert_close(torch.stack(losses), expected.expand(3))
    finally:
        dist.destroy_process_group()


def tiny_llama(hidden_size: int = 16) -> LlamaForCausalLM:
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=hidden_size, **sizes))


def on_a_tiny_model(block: str, folder: Path) -> str:
    path = str(folder / "model")
    trl_tiny.seeded(trl_tiny.llama).save_pretrained(path)
    trl_tiny.TOKENIZER.save_pretrained(path)
    block = block.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(path))
    on_cpu = 'FocalPOConfig("out", report_to="none", use_cpu=True, max_steps=1'
    return block.replace('FocalPOConfig("out"', on_cpu)


def test_methods_md_names_every_loss_and_preset():
    from focalkern import methods

    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    losses = [
        name for name, value in vars(methods).items() if getattr(value, "__module__", "") == methods.__name__
    ]
    for name in losses:
        if not name.startswith("_"):
            assert re.search(rf"\b{name}\b", page), name
    for preset in ("dpo", "simpo", "alpha_dpo", "dynamic"):
        assert f".{preset}(" in page

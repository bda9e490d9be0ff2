"""The code in `docs/methods.md` and `README.md`: every Python block runs, in the order of the page."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from focalkern import FusedFocalPOLoss

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


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
        "ref_hidden": torch.randn(8, 6, 16),
        "ref_head": head(),
        "teacher_hidden": torch.randn(8, 6, 24),
        "teacher_head": head(24),
        "out": FusedFocalPOLoss(reference_free=True)(hidden, weight, labels, shift=True),
    }


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_python_block_runs(page, capsys):
    names = {}
    assert len(blocks(page)) >= 3
    for block in blocks(page):
        names |= given()
        exec(compile(block, page, "exec"), names)


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

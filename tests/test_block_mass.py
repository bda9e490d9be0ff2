"""The picture in `docs/certified-backward.md` shows the true block masses and the library's own selection."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

import block_mass

from benchmarks.inputs import Capture

TOKENS = 30
TAU = 2.0**-13


def save_capture(path: Path, has_bias: bool, **transform) -> Capture:
    """Sharp softmax rows over 45 blocks, two chunks of them, the last one of nine entries."""
    generator = torch.Generator().manual_seed(0)
    vocab_size, hidden_size = 5641, 24

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    capture = Capture(
        hidden=3 * draw(TOKENS, hidden_size).bfloat16(),
        weight=draw(vocab_size, hidden_size).bfloat16(),
        bias=draw(vocab_size).bfloat16() if has_bias else None,
        labels=torch.randint(vocab_size, (TOKENS,), generator=generator).index_fill(
            0, torch.tensor([0]), vocab_size - 1
        ),
        cu_seqlens=torch.tensor([0, 10, TOKENS]),
        ref_logps=torch.zeros(2),
        softcap=transform.get("softcap"),
        logit_scale=transform.get("logit_scale", 1.0),
        model="none",
        reference="none",
        data="random numbers",
    )
    capture.save(path)
    return capture


def direct(capture: Capture) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass of each block and probability of each label, in float64."""
    bias = None if capture.bias is None else capture.bias.double()
    z = torch.nn.functional.linear(capture.hidden.double(), capture.weight.double(), bias)
    z = z * capture.logit_scale
    z = z if capture.softcap is None else capture.softcap * torch.tanh(z / capture.softcap)
    p = z.softmax(-1)
    mass = torch.nn.functional.pad(p, (0, -p.shape[1] % 128)).unflatten(1, (-1, 128)).sum(-1)
    return mass, p.gather(1, capture.labels[:, None])[:, 0]


@pytest.mark.parametrize(
    ("has_bias", "transform"), [(False, {}), (True, {"logit_scale": 0.5}), (False, {"softcap": 20.0})]
)
def test_block_statistics_are_those_of_float64(has_bias, transform, tmp_path):
    capture = save_capture(tmp_path / "capture.pt", has_bias, **transform)
    statistics = block_mass.block_statistics(Capture.load(tmp_path / "capture.pt"))
    mass, label_p = direct(capture)
    torch.testing.assert_close(statistics.mass.double(), mass, rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(statistics.one_minus_p.double(), 1 - label_p, rtol=2e-5, atol=0)

    selection = statistics.select(TAU)
    own = capture.labels // 128
    assert selection.keep.gather(1, own[:, None]).all()
    dropped = torch.where(selection.keep, 0.0, mass).sum(1)
    assert dropped.amax() > 0
    torch.testing.assert_close(selection.dropped_mass.double(), dropped, rtol=0, atol=1e-6)


def test_the_picture_is_written_and_described(tmp_path, capsys):
    capture = save_capture(tmp_path / "capture.pt", has_bias=False)
    picture = tmp_path / "figures" / "block-mass.png"
    block_mass.main([str(tmp_path / "capture.pt"), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    # A block clearly above or below the threshold, where no row has to lower it: 45 blocks of 2^-13 are less
    # than the 2^-7 that a row may drop.
    mass, _ = direct(capture)
    expected = (mass > TAU).scatter(1, (capture.labels // 128)[:, None], True).sum() / TOKENS
    described = capsys.readouterr().out
    assert f"{TOKENS} tokens, V = 5641, 45 blocks" in described
    assert f"{expected:.1f} blocks per token" in described


def test_another_file_is_refused_by_name(tmp_path):
    (tmp_path / "other.pt").write_bytes(b"no capture")
    with pytest.raises(SystemExit, match="not written by benchmarks"):
        block_mass.main([str(tmp_path / "other.pt"), "--out", str(tmp_path / "picture.png")])


def test_the_example_of_the_page_runs(capsys):
    page = (Path(block_mass.__file__).parent / "certified-backward.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    exec(compile(code, "certified-backward.md", "exec"), {})
    described = capsys.readouterr().out
    assert "torch.Size([8, 50])" in described and "% of the vocabulary blocks kept" in described

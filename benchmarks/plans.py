"""`focalkern plan`'s table of all recipes in docs/training.md, between `<!-- plan: begin -->` and its end.

python benchmarks/plans.py            # write it (make report)
python benchmarks/plans.py --check    # exit status 1 if it is out of date
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from focalkern.cli.main import main as focalkern

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/training.md"
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
HEADER = "| recipe | machine | GiB per GPU | pairs that fit | host, GiB | hours |"
NODE = "--gpus 8 --gpu-memory 40GB --engine zero3"
MACHINES = {
    "24gb": "--gpus 1 --gpu-memory 24GB --tflops 165",  # RTX 4090
    "80gb": "--gpus 1 --gpu-memory 80GB",
}


def table() -> str:
    out = io.StringIO()
    for recipe in sorted((ROOT / "examples/recipes").glob("*.yaml")):
        machine = MACHINES.get(recipe.stem.rpartition("-")[2], NODE)
        with contextlib.redirect_stdout(out):
            focalkern(["plan", str(recipe), "--row", *machine.split()])
    return f"{HEADER}\n|---|---|---:|---:|---:|---:|\n{out.getvalue().strip()}"


def main(arguments: Sequence[str] = ()) -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    updated = f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"
    if updated == text:
        return 0
    print(f"{PAGE.relative_to(ROOT)}: the plans are {'out of date: make report' if arguments else 'written'}")
    if not arguments:
        PAGE.write_text(updated, encoding="utf-8")
    return int(bool(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

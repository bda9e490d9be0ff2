"""What the project sets itself for a CPU and for a GPU, and how far a comparison of `throughput.py` gets.

The one list of targets: `gpu.py` prints verdicts by it, `publish.py` a table. Reports and comparisons are as
they stand in the JSON files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
Measure = Callable[[Json, str], float | None]  # of a comparison and a backend; None: a peer was not timed

MIB = 2**20
DPO = "DPO"
SOME_ENTRIES = (40, 60)  # softmax entries above 2^-12 per token of what is asked for as --sharpness 50
SHORT_NAMES = {  # of files that were written before rows had an "id"
    "focalkern (triton)": "triton",
    "focalkern (triton, exact)": "triton-exact",
    "focalkern (torch)": "torch",
    "focalkern (torch, exact)": "torch-exact",
    "eager PyTorch": "eager",
    "TRL head": "trl",
}


@dataclass(frozen=True)
class Target:
    """A bound on what `measure` finds at this size: in bf16, for DPO, on the usual input."""

    what: str
    limit: float
    at_most: bool
    measure: Measure
    size: tuple[int, int, int]
    gpus: tuple[str, ...] = ()  # parts of the GPU's name; none: a CPU
    unit: str = "×"

    @property
    def backend(self) -> str:
        return "triton" if self.gpus else "torch"

    @property
    def bound(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}{self.unit}"

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit

    def is_for(self, device: str, device_type: str) -> bool:
        on_gpu = device_type != "cpu"
        return any(name in device for name in self.gpus) if on_gpu else not self.gpus

    def value(self, report: Json, comparison: Json) -> float | None:
        """What one comparison of a report found; None where it is of something else, or lacks a peer."""
        right_size = size_of(comparison) == self.size and comparison["dtype"] == "bf16"
        right_input = is_usual(report, comparison) and loss_of(comparison) == DPO
        if not (self.is_for(report["device"], report["device_type"]) and right_size and right_input):
            return None
        return self.measure(comparison, self.backend)


# Comparisons


def size_of(comparison: Json) -> tuple[int, int, int]:
    shape = comparison["shape"]
    return comparison["tokens"], shape["hidden"], shape["vocab"]


def loss_of(comparison: Json) -> str:
    """As people write it; files from before comparisons had a "loss" are all of DPO's."""
    loss = comparison.get("loss", DPO)
    return {"dpo": DPO, "focalpo": "FocalPO", "alpha-dpo": "α-DPO", "simpo": "SimPO"}.get(loss, loss)


def is_usual(report: Json, comparison: Json) -> bool:
    """The input of the targets: default threshold and sharpness, no saturated pairs, a head that trains."""
    lowest, highest = SOME_ENTRIES
    usual = report["tau"] == "auto" and lowest <= comparison["input"]["entries"] <= highest
    return usual and not comparison["saturated_pairs"] and not comparison["frozen_head"]


def short_name(row: Json) -> str:
    return row.get("id") or SHORT_NAMES.get(row["peer"], row["peer"])


def peer_row(comparison: Json, *names: str) -> Json | None:
    """The first of these peers that was timed."""
    timed = {short_name(row): row for row in comparison["rows"] if "both_ms" in row}
    return next((timed[name] for name in names if name in timed), None)


# Measures


def speed_against(*names: str) -> Measure:
    """How many times faster focalkern's forward and backward are."""

    def measure(comparison: Json, backend: str) -> float | None:
        ours, theirs = peer_row(comparison, backend), peer_row(comparison, *names)
        return theirs["both_ms"]["median"] / ours["both_ms"]["median"] if ours and theirs else None

    return measure


def forward_over_gemm(comparison: Json, backend: str) -> float | None:
    ours = peer_row(comparison, backend)
    return ours and ours["forward_ms"]["median"] / comparison["bare_gemm_ms"]["median"]


def exact_backward(comparison: Json, backend: str) -> float | None:
    exact, trl = peer_row(comparison, f"{backend}-exact"), peer_row(comparison, "trl")
    return exact["backward_ms"]["median"] / trl["backward_ms"]["median"] if exact and trl else None


def both_over_gemm(comparison: Json, backend: str) -> float | None:
    ours = peer_row(comparison, backend)
    return ours and ours["x_floor"]


def extra_mib(comparison: Json, backend: str) -> float | None:
    """The larger of the certified and the exact step's; of one alone it would say too little."""
    rows = [peer_row(comparison, name) for name in (backend, f"{backend}-exact")]
    found = [row["extra_bytes"] / MIB for row in rows if row and "extra_bytes" in row]
    return max(found) if len(found) == 2 else None


SMALL, LARGE = (2048, 512, 32768), (4096, 512, 128256)
GPU_SIZE = (8192, 4096, 128256)
ANY_GPU = ("",)
HOPPER, AMPERE = ("H100", "H200"), ("A100",)
TARGETS = (
    Target("forward and backward, speed against TRL's head", 4, False, speed_against("trl"), SMALL),
    Target("forward and backward, speed against TRL's head", 5, False, speed_against("trl"), LARGE),
    Target("forward, over one bare GEMM", 1.15, True, forward_over_gemm, GPU_SIZE, HOPPER),
    Target("forward, over one bare GEMM", 1.1, True, forward_over_gemm, GPU_SIZE, AMPERE),
    Target("exact backward, over the backward of TRL's head", 1.1, True, exact_backward, GPU_SIZE, ANY_GPU),
    Target("forward and backward, over one bare GEMM", 1.5, True, both_over_gemm, GPU_SIZE, ANY_GPU),
    Target(
        "forward and backward, speed against TRL's head", 2.5, False, speed_against("trl"), GPU_SIZE, ANY_GPU
    ),
    Target("forward and backward, speed against CCE", 2, False, speed_against("cce"), GPU_SIZE, ANY_GPU),
    Target("extra memory", 300, True, extra_mib, GPU_SIZE, ANY_GPU, unit=" MiB"),
)

"""What launches and the host cost: the latency of one text, and the time of a batch of fixed size of which ever more is real.

Both are what CUDA graphs, and rows that the device counts, are for. Run by ``gpu.py``.
"""

from roberta_fast.benchmarks import measure, shapes
from roberta_fast.benchmarks.comparison import Comparison
from roberta_fast.benchmarks.peers import BASELINE, OURS
from roberta_fast.benchmarks.scaling import FILLS, TOKENS, Scaling

LENGTHS = (32, 128)
# Launches decide the first two, products the last.
CAPACITIES = {"cuda": ((8, 128), (32, 256), (64, 512)), "tiny": ((2, 16),)}
COUNTED = (f"{OURS}-eager", f"{OURS}-device", f"{OURS}-graphs")
LATENCY_PEERS = (
    BASELINE,
    "huggingface-compile",
    "huggingface-compile-reduce-overhead",
    f"{OURS}-eager",
    OURS,
    f"{OURS}-deterministic",
)
FILL_PEERS = (BASELINE, *COUNTED)


class Latency(Comparison):
    """A comparison on single texts, timed from the call to the result, as whoever waits for it sees it."""

    def run(self) -> dict:
        """As ``Comparison.run``."""
        return {**super().run(), "kind": "latency"}

    def _clock(self):
        return measure.waiting_clock if self.device == "cuda" else measure.host_clock


class Fill(Scaling):
    """One curve: a padded batch of fixed size, of which ever more is real."""

    def run(self) -> dict:
        """As ``Comparison.run``."""
        return {**super().run(), "kind": "fill"}


def latency(name: str, model, repeats: int, peers=LATENCY_PEERS, commit: str | None = None) -> Latency:
    """One text of each of ``LENGTHS``, on ``model`` of ``shapes.build_model``."""
    batches = [shapes.batch_of(f"S={length}", [length], model.config).to(model.device.type) for length in LENGTHS]
    return Latency(name, model, "eval", batches, list(peers), repeats, commit=commit)


def fill(name: str, model, size: tuple[int, int], repeats: int, peers=FILL_PEERS, commit: str | None = None) -> Fill:
    """A batch of ``size`` B, S, of which every text has the same part that is real."""
    rows, seqlen = size
    real = dict.fromkeys(max(1, round(part * seqlen)) for part in FILLS)
    points = [
        shapes.batch_of(f"{length} of {seqlen}", [length] * rows, model.config, padded_to=seqlen).to(model.device.type)
        for length in real
    ]
    return Fill(name, model, {TOKENS: points}, list(peers), repeats, f"{rows}x{seqlen}", commit)

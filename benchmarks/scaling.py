"""``roberta-fast bench --scaling``: what time follows, real tokens, padded size, or length.

Three curves on one model. ``tokens``: a padded batch of fixed size, of which ever more is real. ``padded``: fixed texts, padded
ever longer, as ``padding="max_length"`` does. ``length``: one text without padding, ever longer.
"""

from roberta_fast.benchmarks import shapes
from roberta_fast.benchmarks.comparison import Comparison
from roberta_fast.benchmarks.peers import OURS, PEERS

MODEL = "roberta-long"
TOKENS, PADDED, LENGTH = CURVES = ("tokens", "padded", "length")
FILLS = (0.125, 0.25, 0.5, 0.75, 1.0)
WIDEST, SHORTEST = 256, 64  # of the first two curves
SEQUENCES = {"cpu": 8, "cuda": 64}


def peers(device: str) -> list[str]:
    """The default ones: those of a default run in full precision, without eager attention, and all of ours."""
    names = [name for name, peer in PEERS.items() if peer.default and device in peer.devices]
    return [n for n in names if n != "huggingface-eager" and (PEERS[n].precision is None or n.startswith(OURS))]


def batches(config, sequences: int, longest: int) -> dict[str, list[shapes.Batch]]:
    """{curve: its batches}, with no sequence longer than ``longest``. Raises ValueError where the model takes none so long."""
    wide, short = min(WIDEST, longest), min(SHORTEST, longest)
    padded = [short << i for i in range((WIDEST // SHORTEST).bit_length()) if short << i <= longest]
    real = dict.fromkeys(max(1, round(fill * wide)) for fill in FILLS)
    lengths = [short]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))

    def batch(curve, rows, length, seqlen):
        return shapes.batch_of(f"{curve} {rows}x{length}/{seqlen}", [length] * rows, config, padded_to=seqlen)

    return {
        TOKENS: [batch(TOKENS, sequences, length, wide) for length in real],
        PADDED: [batch(PADDED, sequences, short, seqlen) for seqlen in padded],
        LENGTH: [batch(LENGTH, 1, length, length) for length in lengths],
    }


class Scaling(Comparison):
    """A comparison whose batches are the points of curves."""

    def __init__(self, name, model, curves: dict[str, list[shapes.Batch]], *arguments, **options):
        super().__init__(name, model, "eval", [batch for points in curves.values() for batch in points], *arguments, **options)
        self._curves = {curve: [batch.name for batch in points] for curve, points in curves.items()}

    def run(self) -> dict:
        """As ``Comparison.run``."""
        return {**super().run(), "kind": "scaling", "curves": self._curves}

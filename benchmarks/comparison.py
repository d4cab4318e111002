"""One table of the encoder: peers on a model and its batches, checked against the stock model, then timed in turn."""

import sys
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from roberta_fast.benchmarks import measure, shapes
from roberta_fast.benchmarks.exported_peers import Unsuited
from roberta_fast.benchmarks.parity import PEER_SLACK, Gate, Nearness, clear_gradients
from roberta_fast.benchmarks.peers import BASELINE, OURS, PEERS
from roberta_fast.benchmarks.report import LATENCY


class NotTheSame(Exception):
    """Peers whose results differ from the stock model's; its text says which, where and by how much."""


class Comparison:
    """One table: peers on a model and its batches, in evaluation or with a training step.

    model: the stock model of ``shapes.build_model`` in that mode, on its device, in its dtype. name: what tables call it.
    title: keeps apart runs that measure the same. dropout: what the model was built with where not as published.
    profiled: also records what a call on the first batch spends its time in.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        mode: str,
        batches: list[shapes.Batch],
        peers: list[str],
        repeats: int,
        title: str | None = None,
        commit: str | None = None,
        dropout: float | None = None,
        profiled: bool = False,
    ):
        self.name, self.model, self.mode, self.batches, self.repeats = name, model, mode, batches, repeats
        self.title, self.commit, self.dropout, self.profiled = title, commit, dropout, profiled
        self.device, self.dtype = model.device.type, str(model.dtype).removeprefix("torch.")
        self.training, self.busy = model.training, measure.busy()
        self.optimizer = None
        drops = shapes.dropout_of(model.config, shapes.ATTENTION_DROPOUT)
        self.absent = {p: PEERS[p].reason_against(self.device, self.dtype, mode, drops) for p in peers}
        self.peers = [p for p in peers if self.absent[p] is None]

    def run(self) -> dict:
        """Checks every peer on every batch, then times. Raises NotTheSame, with nothing timed, where one is wrong.

        Peers in 8 bits are held to a cosine; one of others' that misses it is timed and marked, for so it is what one gets.
        """
        environment = measure.environment(self.device, self.commit)  # of the source as it was loaded
        calls = sum(self._repeats(batch) + 3 for batch in self.batches)  # with the check, the warm-up and the memory
        with tqdm(total=len(self.peers) * (1 + calls), disable=None, leave=False) as bar:
            stages = set()

            def progress(stage, peer=""):
                bar.set_description_str(f"{stage} {peer}".strip())
                bar.update()
                if bar.disable and stage not in stages:  # no terminal: a line for each stage
                    stages.add(stage)
                    print(f"roberta-fast bench: {stage.rstrip(':')}", file=sys.stderr, flush=True)

            functions = self._build(progress)
            nearness, floors = self._gate(functions, progress)
            if self.training:
                # A step of size zero is all of an optimizer's work, and leaves the parameters, which peers share, as they are.
                self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
            rows = [row for batch in self.batches for row in self._rows(functions, batch, nearness, floors, progress)]
        return {
            "kind": "encoder",
            "title": self.title,
            "model": self.name,
            "mode": self.mode,
            **({"optimizer": "AdamW"} if self.training else {}),
            **({} if self.dropout is None else {"dropout": self.dropout}),
            "dtype": self.dtype,
            "environment": environment,
            "busy": self.busy,
            "peak_tflops": measure.peak_tflops(self.device, self.dtype),
            "batches": {batch.name: batch.facts() for batch in self.batches},
            "floors": floors,
            "rows": rows,
            "absent": {name: reason for name, reason in self.absent.items() if reason},
        }

    def _build(self, progress):
        functions = {}
        for name in self.peers:
            peer = PEERS[name]
            progress(f"set up {name}")
            try:
                functions[name] = peer.build(self.model, self.batches[0]) if peer.calibrated else peer.build(self.model)
            except Unsuited as error:
                self.absent[name] = str(error)
        return functions

    def _gate(self, functions, progress) -> tuple[dict[tuple[str, str], Nearness], dict[str, float]]:
        """{(peer, batch): how near it is}, and {batch: the least cosine for 8 bits}."""
        nearness, floors, wrong = {}, {}, []
        self._set_training(functions, dropout=False)
        for batch in self.batches:
            gate = Gate(self.model, functions[BASELINE], batch, batch.labels(self.mode))
            for name in list(functions):
                progress(f"check results on {batch.name}:", name)
                try:
                    if PEERS[name].precision:
                        floors[batch.name] = gate.eight_bit_floor
                        near = nearness[name, batch.name] = gate.measure(functions[name])
                        if name.startswith(OURS) and not near.cosine >= floors[batch.name]:
                            wrong.append(f"{name}, {batch.name} batch: cosine {near.cosine} is not {floors[batch.name]}")
                    else:
                        nearness[name, batch.name] = gate.check(functions[name], 1.0 if name.startswith(OURS) else PEER_SLACK)
                except AssertionError as error:
                    wrong.append(f"{name}, {batch.name} batch: {error}")
                except torch.OutOfMemoryError:
                    self.absent[name] = f"out of memory on the {batch.name} batch"
                    del functions[name]
        if wrong:
            raise NotTheSame("\n".join(wrong))
        self._set_training(functions, dropout=self.training)
        return nearness, floors

    def _repeats(self, batch):
        # A short call is repeated more often for the same certainty.
        return self.repeats * 4 if batch.name == LATENCY else self.repeats

    def _rows(self, functions, batch, nearness, floors, progress):
        steps = {name: self._step(function, batch) for name, function in functions.items()}
        timings = measure.alternate(
            steps,
            self._repeats(batch),
            self._clock(),
            warm_up_seconds=0.2,
            pause_seconds=measure.SPIN_SECONDS if self.device == "cpu" else 0.0,
            progress=lambda name: progress(f"time {batch.name}:", name),
        )
        generates = self.mode == "generate"
        tokens = len(batch.lengths) * shapes.NEW_TOKENS if generates else batch.tokens
        targets = [shapes.NEW_TOKENS] * len(batch.lengths) if generates else None
        flops = shapes.forward_flops(self.model.config, batch.lengths, targets) * (3 if self.training else 1)
        for name, timing in timings.items():
            progress(f"memory on {batch.name}:", name)
            near, precision = nearness[name, batch.name], PEERS[name].precision
            yield {
                "batch": batch.name,
                "peer": name,
                "precision": precision or self.dtype,
                "seconds": timing.facts(),
                "tokens_per_s": tokens / timing.median,
                "ratio": timing.times_faster(timings[BASELINE]),
                "tflops": flops / timing.median / 1e12,
                "peak_bytes": self._peak(name, functions[name], steps[name]),
                "max_abs": near.max_abs,
                "cosine": near.cosine,
                "below_floor": bool(precision) and not near.cosine >= floors[batch.name],
                **self._kernels(steps[name], batch),
            }

    def _clock(self):
        return measure.clock_for(self.device)

    def _peak(self, name, function, step):
        if PEERS[name].compiled:
            return None
        if hasattr(function, "release"):
            function.release()
        return measure.peak_memory(step, self.device)

    def _kernels(self, step, batch):
        """What one call spends its time in: by kind, and its ten longest kernels."""
        if not self.profiled or batch is not self.batches[0]:
            return {}
        times = measure.kernel_split(step, self.device)
        kinds = dict.fromkeys((*measure.KERNEL_KINDS, "other"), 0.0)
        for name, seconds in times.items():
            kinds[measure.kernel_kind(name)] += seconds
        return {"kinds": kinds, "kernels": dict(sorted(times.items(), key=lambda item: -item[1])[:10])}

    def _step(self, function: Callable, batch: shapes.Batch) -> Callable[[], object]:
        inputs, labels = batch.inputs(), batch.labels(self.mode)
        if self.mode == "generate":
            given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "num_beams": 1, "do_sample": False}
            return lambda: function.generate(**given, min_new_tokens=shapes.NEW_TOKENS, max_new_tokens=shapes.NEW_TOKENS)
        if labels is None:
            return torch.no_grad()(lambda: function(**inputs)[0])

        def step():
            clear_gradients(self.model.parameters())
            loss = function(**inputs, labels=labels)[0]
            loss.backward()
            self.optimizer.step()
            return loss

        return step

    def _set_training(self, functions, dropout):
        """Puts the peers into their mode; without dropout, all but the outermost module, by which heads know the mode."""
        for function in functions.values():
            if isinstance(function, nn.Module):
                function.train(dropout)
                function.training = self.training

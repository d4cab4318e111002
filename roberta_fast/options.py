"""What a user may choose about an accelerated model."""

from dataclasses import dataclass

from roberta_fast.dispatch import BACKENDS

UNPAD = ("auto", "host", "device")
ON_UNSUPPORTED = ("warn", "error", "ignore")
PRECISIONS = (None, "int8", "fp8")
RECOMPUTE = (None, "gelu", "layer")
CUDA_GRAPHS = ("auto", True, False)


@dataclass(frozen=True)
class FastOptions:
    """Options of ``accelerate_model``, ``FastRobertaEncoder`` and ``patch_transformers``.

    backend: ``"auto"`` takes the fastest able one for each operation; ``"triton"``, ``"cpp"`` or ``"torch"`` insists.
    unpad: how padding is dropped. ``"host"`` sizes the packed rows exactly, for which the host waits for the device once in a
        forward; ``"device"`` never waits: buffers have a row for every place of the batch, and kernels read on the device
        how many are real. ``"auto"`` is ``"device"`` while a CUDA graph is captured, and ``"host"`` else.
    on_unsupported: what a call that must take the stock path does: ``"warn"`` once for each reason, raise an ``"error"``, or
        ``"ignore"`` it; ``explain`` shows the reason in any case.
    deterministic: a text gives bitwise the same outputs from run to run, alone, in any batch, at any place in it and on any
        number of threads, heads included; a step gives the same gradients from run to run. What cannot promise that raises:
        on CPU, dtypes other than float32, and than bfloat16 where the processor multiplies that, an install without the C++
        extension, and all calls that take the stock path. Linear layers become ``roberta_fast.deterministic.Linear``. Of
        PyTorch's own activations only exact GELU, ReLU and tanh keep the promise.
    precision: None computes in the model's own; ``"int8"`` makes 8-bit copies of the layers' linear weights when
        ``accelerate_model`` is called, and computes with them in inference on CPU; ``"fp8"`` likewise in inference on a GPU.
        ``train()``, ``load_state_dict`` and a change of dtype or device drop the copies; calls that record gradients do without
        them. See docs/int8.md and docs/fp8.md.
    fuse_lm_head: a masked or causal language model in training mode that is given labels computes its head and loss from the
        labelled rows alone, and its ``outputs.logits`` is None; False leaves both as they are.
    recompute: what a backward pass computes again instead of having kept it: None, nothing; ``"gelu"``, the activation between
        the two products of a feed-forward block, a quarter of what a layer keeps; ``"layer"``, every layer from its input.
    prepack: True computes inference in float32 on the CPU from copies of the layers' linear weights, packed as the kernel reads
        them. They are made at their first use, and again where the weights have changed since, and take those weights' memory
        once more. A write through ``weight.data`` that changes few of its numbers may go unseen until ``accelerate_model`` is
        called again. Calls that record gradients, and ``torch.compile``, do without.
    cuda_graphs: replays inference on CUDA as a CUDA graph, which takes the launches from Python away. ``"auto"`` records one for
        each capacity of up to 8,192 rows, sequences times their length, both rounded up: a bound that is not yet measured. True
        records any, and reports calls that run without one; False records none. At most 64 are kept, in one memory pool.
        Training, ``torch.compile``, decoders, requested hidden states, hooks, and modules that are not torch's own do without;
        ``explain`` says why a call did.
    Raises ValueError for any other value.
    """

    backend: str = "auto"
    unpad: str = "auto"
    on_unsupported: str = "warn"
    deterministic: bool = False
    precision: str | None = None
    fuse_lm_head: bool = True
    recompute: str | None = None
    prepack: bool = False
    cuda_graphs: str | bool = "auto"

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r} is not one of {BACKENDS}")
        for name in ("deterministic", "fuse_lm_head", "prepack"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not True or False")
        if self.unpad not in UNPAD:
            raise ValueError(f"unpad={self.unpad!r} is not one of {UNPAD}")
        if self.on_unsupported not in ON_UNSUPPORTED:
            raise ValueError(f"on_unsupported={self.on_unsupported!r} is not one of {ON_UNSUPPORTED}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not one of {PRECISIONS}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute={self.recompute!r} is not one of {RECOMPUTE}")
        if self.cuda_graphs != "auto" and not isinstance(self.cuda_graphs, bool):  # 1 equals True, and is not it
            raise ValueError(f"cuda_graphs={self.cuda_graphs!r} is not one of {CUDA_GRAPHS}")

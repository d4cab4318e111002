"""What an operator chooses; it travels whole to every worker process."""

from dataclasses import dataclass, field

TASKS = {  # {task: the class of transformers that holds its head}
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "translation": "EncoderDecoderModel",
    "text-generation": "AutoModelForCausalLM",
}
CUDA_GRAPHS = {"auto": "auto", "on": True, "off": False}  # {--cuda-graphs: the option cuda_graphs}
POOLINGS = ("mean", "cls", "max")


@dataclass(frozen=True)
class Settings:
    """The options of ``roberta-fast serve``; its ``--help`` says what each means."""

    model: str
    task: str | None = None
    device: str | None = None
    dtype: str = "float32"
    precision: str | None = None
    deterministic: bool = False
    prepack: bool = False
    cuda_graphs: str = "auto"
    stock: bool = False
    pooling: str | None = None
    threads: int | None = None
    max_batch_tokens: int | None = None
    max_batch_requests: int | None = None
    max_queue: int = 512
    max_client_batch_size: int = 32
    max_request_tokens: int = 65_536
    max_new_tokens: int = 256
    max_request_bytes: int = 2_000_000
    timeout: float = 30.0
    workers: int = 1
    api_key: str | None = field(default=None, repr=False)

"""``roberta-fast serve``: a model over HTTP, batched by real tokens."""

import argparse
import contextlib
import functools
import importlib.util
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from roberta_fast.cli import positive
from roberta_fast.serving.settings import CUDA_GRAPHS, POOLINGS, TASKS, Settings

logger = logging.getLogger("roberta_fast.serving")

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_SHUTDOWN_SECONDS = 5  # beyond a request's own deadline
_LOADING_SECONDS = 120  # a worker that is silent for longer is replaced


def run(argv: list[str]) -> int:
    """Runs the command: serves until SIGTERM or SIGINT, then finishes what was accepted. Exits with 2 on bad arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"roberta-fast serve needs {', '.join(missing)}: pip install 'roberta_fast[serve]'", file=sys.stderr)
        return 2
    import uvicorn

    from roberta_fast.serving.connections import OPTIONS

    try:
        settings = _settings(args)
        _check_address(args.host, args.port)
        options = {
            "host": args.host,
            "port": args.port,
            "workers": settings.workers,
            "log_level": args.log_level,
            "access_log": args.access_log,
            **OPTIONS,
            "timeout_graceful_shutdown": round(settings.timeout + _SHUTDOWN_SECONDS),
            "timeout_worker_healthcheck": _LOADING_SECONDS,
        }
        if settings.workers > 1:
            return _serve_by_workers(settings, options)
        server = uvicorn.Server(uvicorn.Config(_app(settings, args.log_level), **options))
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn raises what it handled once more at its end
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return 0 if server.started else 1


def _serve_by_workers(settings, options):
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    from roberta_fast.serving.engine import task_of
    from roberta_fast.serving.metrics import SHARED_FOLDER

    class Supervisor(Multiprocess):
        """Replaces at once a worker that dies before it answers: the end of its pipe tells, as only the worker holds it."""

        def keep_subprocess_alive(self):
            for worker in self.processes:
                worker.child_conn.close()
            super().keep_subprocess_alive()

    task_of(settings)  # rather than in every worker
    with tempfile.TemporaryDirectory(prefix="roberta-fast-metrics-") as folder:
        os.environ[SHARED_FOLDER] = folder
        config = uvicorn.Config(functools.partial(_app_of_worker, settings, options["log_level"]), factory=True, **options)
        Supervisor(config, sockets=[config.bind_socket()]).run()
    return 0


def _app_of_worker(settings, log_level):
    from uvicorn.config import STARTUP_FAILURE

    try:
        return _app(settings, log_level)
    except ValueError as error:
        print(f"roberta-fast serve: error: {error}", file=sys.stderr)
        raise SystemExit(STARTUP_FAILURE) from None  # by which the others are ended, rather than this one started again


def _app(settings, log_level):
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    import transformers

    from roberta_fast.serving.app import create_app
    from roberta_fast.serving.engine import Engine

    transformers.utils.logging.disable_progress_bar()
    engine = Engine(settings)
    logger.info("%s: %s on %s\n%s", settings.model, engine.task, engine.device, engine.explanation())
    return create_app(engine)


def _check_address(host, port):
    """Raises ValueError naming an address that cannot be listened on, before a model is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from None


def _settings(args) -> Settings:
    """Raises ValueError naming an argument that does not fit."""
    api_key = None
    if args.api_key_file is not None:
        try:
            api_key = args.api_key_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"argument --api-key-file: {args.api_key_file} cannot be read: {error}") from None
        if not api_key.isprintable() or len(api_key) < 8:
            raise ValueError(f"argument --api-key-file: {args.api_key_file} must hold one line of at least 8 characters")
    values = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if name != "api_key"}
    if values["threads"] is None and args.workers > 1:
        values["threads"] = max(1, (os.cpu_count() or 1) // args.workers)
    return Settings(**values, api_key=api_key)


def _parser():
    parser = argparse.ArgumentParser(prog="roberta-fast serve", description=__doc__.replace("`", ""))
    add = parser.add_argument
    defaults = Settings("")
    add("--model", required=True, help="a checkpoint folder or a name on the Hub; a folder of save_quantized does too")
    add("--task", choices=tuple(TASKS), help="default: what the model's architecture is made for")
    add("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines (default: 127.0.0.1)")
    add("--port", type=_port, default=8000, help="0 for any that is free (default: 8000)")
    add("--workers", type=positive, default=1, help="processes, each with the model (default: 1)")
    add("--threads", type=positive, help="CPU threads of the model in each worker (default: torch's; cores / workers)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default=defaults.dtype, help="default: float32")
    add("--precision", help="8-bit weights in the encoder's layers: int8 on CPU, fp8 on a GPU (default: those of --dtype)")
    add("--deterministic", action="store_true", help="the same bits whatever a text is batched with")
    add("--prepack", action="store_true", help="packed weights: faster on CPU, for their memory once more")
    add("--cuda-graphs", choices=tuple(CUDA_GRAPHS), default=defaults.cuda_graphs, help="on cuda (default: auto, small batches)")
    add("--stock", action="store_true", help="plain Hugging Face, not accelerated, for comparison")
    add("--pooling", choices=POOLINGS, help="of embeddings (default: what the model's folder says, else mean)")
    add(
        "--max-batch-tokens",
        type=positive,
        help="a batch's budget (default: 1024, on cuda 16384; generating 8192, 65536)",
    )
    add("--max-batch-requests", type=positive, help="sequences in a batch (default: any number)")
    add(
        "--max-queue",
        type=positive,
        default=defaults.max_queue,
        help="requests in a worker; others get 429 (default: %(default)s)",
    )
    add(
        "--max-client-batch-size",
        type=positive,
        default=defaults.max_client_batch_size,
        help="texts in a request (default: %(default)s)",
    )
    add("--max-request-tokens", type=positive, default=defaults.max_request_tokens, help="of all windows (default: %(default)s)")
    add(
        "--max-new-tokens",
        type=positive,
        default=defaults.max_new_tokens,
        help="that a request may have generated (default: %(default)s)",
    )
    add(
        "--max-request-bytes",
        type=positive,
        default=defaults.max_request_bytes,
        help="of a request's body (default: %(default)s)",
    )
    add("--timeout", type=_seconds, default=defaults.timeout, help="seconds for a request; queued ones are dropped (default: 30)")
    add("--api-key-file", type=Path, help="a file whose one line is the bearer token that requests must bring")
    add("--access-log", action="store_true", help="log a line a request, with its path")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: info")
    return parser


def _port(text):
    if not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _seconds(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value

"""Load on ``roberta-fast serve``: latency against rate, throughput beside the stock model, overload, memory, and equal answers.

``python benchmarks/serve.py --model FOLDER`` starts the servers as processes of this machine and asks them questions about texts
of real lengths, from SQuAD's JSON layout (``--squad``) or this package's own sentences. Requests of an open loop come by a
Poisson process, whether or not earlier ones are answered. On two idle cores it takes some 17 minutes, ten of them the soak.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import resources
from pathlib import Path

import httpx

from roberta_fast.benchmarks import measure

SERVERS = {  # {name: options of `roberta-fast serve`}; the second is how people serve a model: a request at a time
    "roberta_fast": [],
    "huggingface": ["--stock", "--max-batch-requests", "1"],
    "huggingface, our batching": ["--stock"],
    "roberta_fast-int8": ["--precision", "int8"],
}
DETERMINISTIC = "roberta_fast, deterministic"
CLIENTS = 16
PATH = "/question"


def run(argv: list[str]) -> int:
    """Runs the benchmark, prints its tables and writes ``--json``. Returns 0; exits with 2 on bad arguments."""
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__.replace("`", ""))
    add = parser.add_argument
    add("--model", required=True, help="a folder with a question answering model")
    add("--squad", type=Path, help="questions and contexts in SQuAD's JSON layout (default: this package's sentences)")
    add("--threads", type=int, default=1, help="of each server's model (default: 1)")
    add("--rounds", type=int, default=3, help="of the throughput measurement, servers in turn (default: 3)")
    add("--seconds", type=float, default=8.0, help="of each measurement (default: 8)")
    add("--rates", default="0.25,0.5,0.9", help="of the open loop, shares of roberta_fast's throughput (default: 0.25,0.5,0.9)")
    add("--soak", type=float, default=600.0, help="seconds of load at half the throughput, watching memory (default: 600)")
    add("--timeout", type=float, default=2.0, help="seconds that the overloaded server gives a request (default: 2)")
    add("--quick", action="store_true", help="a minute or two of everything, to see that it runs; its figures mean nothing")
    add("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.seconds, args.rates, args.soak = 1, 2.0, "0.5", 10.0
    try:
        requests = _requests(args.squad)
        rates = [float(rate) for rate in args.rates.split(",")]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--squad or --rates: {error!r}")
    if busy := measure.busy():
        print(f"serve.py: {busy}", file=sys.stderr)
    result = asyncio.run(_measure(args, requests, rates))
    print(render(result))
    if args.json:
        args.json.write_text(json.dumps({"serving": [result]}, indent=1) + "\n", encoding="utf-8")
    return 0


async def _measure(args, requests, rates):
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(Server(name, args, options)) for name, options in SERVERS.items()}
        for server in servers.values():
            server.wait()
        result = {
            "kind": "serving",
            "model": Path(args.model).name,
            "environment": measure.environment("cpu"),
            "model_threads": args.threads,
            "requests": _lengths(requests),
            "timeout_seconds": args.timeout,
            "throughput": await _throughput(servers, requests, args),
        }
        capacity = result["throughput"]["roberta_fast"]["requests_per_second"]
        result["latency"] = {}
        for fraction, (name, server) in itertools.product(rates, servers.items()):
            load = await open_loop(server, requests, fraction * capacity, args.seconds)
            result["latency"].setdefault(name, []).append({"rate": fraction * capacity, **load})
        result["soak"] = await _soak(servers["roberta_fast"], requests, 0.5 * capacity, args.soak)
    with Server("roberta_fast", args, ["--timeout", str(args.timeout)]) as server:
        server.wait()
        await closed_loop(server, requests, args.seconds / 2)
        result["overload"] = await open_loop(server, requests, 2 * capacity, 3 * args.seconds)
    with Server(DETERMINISTIC, args, ["--deterministic"]) as exact, Server("roberta_fast", args, []) as plain:
        result["equal_answers"] = {}
        for server in (exact, plain):
            server.wait()
            result["equal_answers"][server.name] = await _equal_answers(server, requests[: 20 if args.quick else 100])
    return result


class Server:
    """A ``roberta-fast serve`` of its own process."""

    def __init__(self, name: str, args, options: list[str]):
        self.name, self._log = name, tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        command = [str(Path(sys.executable).with_name("roberta-fast")), "serve", "--model", args.model, "--port", "0"]
        command += ["--task", "question-answering", "--threads", str(args.threads), *options]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def wait(self, seconds: float = 600) -> None:
        """Returns when it serves. Raises RuntimeError with what it said where it does not."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._process.poll() is None:
            said = Path(self._log.name).read_text()
            if found := re.search(r"running on (http://\S+)", said):
                self.url = found[1]
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} does not serve:\n{Path(self._log.name).read_text()}")

    def cpu_seconds(self) -> float:
        """What it has computed so far; other processes of the machine do not change it much."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Its memory now."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10


async def closed_loop(server: Server, requests: list[dict], seconds: float) -> tuple[float, float]:
    """Answers a second, and a second of the server's CPU, to clients that each ask again once they are answered."""
    answered, begun, cpu = 0, time.monotonic(), server.cpu_seconds()
    source = itertools.cycle(requests)

    async def client(http):
        nonlocal answered
        while time.monotonic() < begun + seconds:
            response = await http.post(PATH, json=next(source))
            answered += response.status_code == 200

    async with _http(server) as http:
        await asyncio.gather(*(client(http) for _ in range(CLIENTS)))
    return answered / (time.monotonic() - begun), answered / (server.cpu_seconds() - cpu)


async def open_loop(server: Server, requests: list[dict], rate: float, seconds: float, seed: int = 0) -> dict:
    """Statuses, and latencies of what was answered, under ``rate`` requests a second."""
    draw, source = random.Random(seed), itertools.cycle(requests)
    latencies, statuses, tasks = [], Counter(), []

    async def ask(http, body):
        begun = time.monotonic()
        try:
            status = (await http.post(PATH, json=body)).status_code
        except httpx.TransportError as error:
            status = type(error).__name__
        statuses[str(status)] += 1
        if status == 200:
            latencies.append(time.monotonic() - begun)

    async with _http(server) as http:
        begun = due = time.monotonic()
        while due < begun + seconds:
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(ask(http, next(source))))
        await asyncio.gather(*tasks)
    return {"offered": len(tasks), "statuses": dict(statuses), "seconds": time.monotonic() - begun, **_percentiles(latencies)}


async def _throughput(servers, requests, args):
    rates, of_cpu = {name: [] for name in servers}, {name: [] for name in servers}
    for server in servers.values():
        await closed_loop(server, requests, args.seconds / 3)
    for _ in range(args.rounds):
        for name, server in servers.items():
            rate, rate_of_cpu = await closed_loop(server, requests, args.seconds)
            rates[name].append(rate)
            of_cpu[name].append(rate_of_cpu)
    baseline = of_cpu["huggingface"]
    return {
        name: {
            "requests_per_second": statistics.median(rates[name]),
            "rounds": rates[name],
            "requests_per_cpu_second": statistics.median(of_cpu[name]),
            "rounds_of_cpu": of_cpu[name],
            "times_faster": statistics.median(ours / theirs for ours, theirs in zip(of_cpu[name], baseline, strict=True)),
        }
        for name in servers
    }


async def _soak(server, requests, rate, seconds):
    """Memory at the beginning of each minute, and at the end."""
    memory, loads, begun = [server.resident_bytes()], [], time.monotonic()
    while time.monotonic() < begun + seconds:
        left = begun + seconds - time.monotonic()
        loads.append(await open_loop(server, requests, rate, min(60.0, left), seed=len(memory)))
        memory.append(server.resident_bytes())
    statuses = sum((Counter(load["statuses"]) for load in loads), Counter())
    p99 = [load["p99"] for load in loads]
    return {"rate": rate, "seconds": seconds, "statuses": dict(statuses), "resident_bytes": memory, "p99": p99}


async def _equal_answers(server, requests):
    """How many answers of many clients at a time differ from those alone, in any bit, and in more than the score."""
    async with _http(server) as http:
        alone = [(await http.post(PATH, json=body)).json() for body in requests]
        limit = asyncio.Semaphore(CLIENTS)

        async def ask(body):
            async with limit:
                return (await http.post(PATH, json=body)).json()

        together = await asyncio.gather(*map(ask, requests))
    pairs = list(zip(alone, together, strict=True))
    return {
        "requests": len(requests),
        "differ": sum(a != b for a, b in pairs),
        "differ_in_text": sum(a["answer"] != b["answer"] for a, b in pairs),
    }


def render(result: dict) -> str:
    """The result as Markdown."""
    environment = result["environment"]
    lengths = result["requests"]
    lines = [
        f"{environment['machine']}, {result['model_threads']} thread(s) a model, load from the same machine; "
        f"{lengths['count']} questions with contexts of {lengths['p5']} to {lengths['p95']} characters (5th to 95th percentile)",
        "",
        "| server | requests/s | requests a CPU second | ratio of those | "
        + " | ".join(f"{p['rate']:.1f}/s: p50, p95, p99 ms" for p in _first(result["latency"]))
        + " |",
        "|---|---:|---:|---:|" + "---:|" * len(_first(result["latency"])),
    ]
    for name, speed in result["throughput"].items():
        cells = []
        for point in result["latency"][name]:
            refused = point["offered"] - point["statuses"].get("200", 0)
            shed = f" ({refused / point['offered']:.0%} shed)" if refused else ""
            cells.append(", ".join(_ms(point[p]) for p in ("p50", "p95", "p99")) + shed)
        numbers = f"{speed['requests_per_second']:.1f} | {speed['requests_per_cpu_second']:.1f} | {speed['times_faster']:.2f}"
        lines.append(f"| `{name}` | {numbers} | {' | '.join(cells)} |")
    over, soak = result["overload"], result["soak"]
    rate = 2 * result["throughput"]["roberta_fast"]["requests_per_second"]
    mib = [size / 2**20 for size in soak["resident_bytes"]]
    lines += [
        "",
        f"At {rate:.1f} requests/s, twice its throughput, with --timeout {result['timeout_seconds']:g}: {over['statuses']}; "
        f"of what was answered p50 {_ms(over['p50'])}, "
        f"p99 {_ms(over['p99'])} ms.",
        f"{soak['seconds']:.0f} s at {soak['rate']:.1f} requests/s: {soak['statuses']}, memory {mib[0]:.0f} MiB before, "
        f"{mib[len(mib) // 2]:.0f} half-way, {mib[-1]:.0f} at the end.",
        *(
            f"{name}: {equal['differ']} of {equal['requests']} answers differ under load in any bit, "
            f"{equal['differ_in_text']} in their text."
            for name, equal in result["equal_answers"].items()
        ),
    ]
    return "\n".join(lines)


def _requests(squad: Path | None, count: int = 1000) -> list[dict]:
    draw = random.Random(0)
    if squad is not None:
        articles = json.loads(squad.read_text(encoding="utf-8"))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        asked = [{"question": qa["question"], "context": p["context"]} for p in paragraphs for qa in p["qas"]]
        return draw.sample(asked, min(count, len(asked)))
    lines = (resources.files("roberta_fast") / "sentences.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip()]
    begins = [draw.randrange(len(lines)) for _ in range(count)]
    contexts = [" ".join(lines[i : i + draw.randint(1, 12)]) for i in begins]
    return [{"question": "Who is it about?", "context": context} for context in contexts]


def _lengths(requests):
    lengths = sorted(len(request["context"]) for request in requests)
    return {"count": len(lengths), **{f"p{p}": lengths[len(lengths) * p // 100] for p in (5, 50, 95)}}


def _percentiles(latencies):
    if len(latencies) < 2:
        return dict.fromkeys(("p50", "p95", "p99"))
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def _http(server):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    return httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits)


def _first(values):
    return next(iter(values.values()))


def _ms(seconds):
    return "–" if seconds is None else f"{1e3 * seconds:.0f}"


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

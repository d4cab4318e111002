"""Builds, checks and measures everything on a machine with a GPU, in one command that needs no network.

``python benchmarks/gpu.py --out DIR`` runs its stages in turn, each in processes of its own and under a time limit: install (into
a virtual environment that sees the installed torch), tests (every operation on the GPU), then the measurements. A stage writes
DIR/<stage>.json and .log, so that a later failure loses nothing, and is not measured where its tests are red; ``merge`` gathers
all of DIR into benchmarks/results. ``--stages`` runs some of them, on what earlier ones left in DIR, and ``--part`` one of three
groups of them, which with ``--minutes 10`` ends in that time: ``check``, which comes first, ``inference``, ``training``.
``--device cpu --tiny`` tries out every line on a machine without a GPU.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import site
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "roberta_fast", "kernels", "csrc", "tests")
KINDS = {
    "inference": ("eval", "generate", "autotune"),
    "training": ("train", "mlm", "train-no-dropout", "mlm-no-dropout", "seq2seq"),
}
HOST = ("latency", "fill", "parts")  # of inference: what launches, the host, and gaps between kernels cost
PARTS = ("check", *KINDS)
OPERATIONS = ("linear", "attention", "add_layer_norm", "linear_gelu", "feed_forward", "fp8_linear", "cross_entropy", "embedding")
OPERATIONS += ("pack",)
ANY = "any"
NO_TESTS, OUT_OF_TIME = 5, 124  # pytest's exit status, and that of the command timeout


@dataclass(frozen=True)
class Stage:
    """One step.

    run: its work, given the settings; returns the exit status. limit: seconds for each of its processes. needs: the operations
    whose tests must be green before it is measured; ``ANY`` stands for all that the tests stage ran.
    """

    run: Callable[["Settings", "Stage"], int]
    limit: int
    needs: tuple[str, ...] = ()
    name: str = ""
    part: str = "check"


@dataclass(frozen=True)
class Settings:
    """The command line."""

    out: Path
    venv: Path
    results: Path
    device: str
    tiny: bool
    quick: bool
    commit: str | None
    text: Path | None = None
    deadline: float = math.inf  # of time.monotonic(); only what is there is gathered after it

    @property
    def python(self) -> Path:
        """The interpreter that stages run in; the present one where nothing was installed for them."""
        installed = self.venv / "bin" / "python"
        return installed if installed.exists() else Path(sys.executable)


def call(settings: Settings, stage: Stage, *command: object, **environment: str) -> int:
    """Runs a command in the repository, its output kept in the stage's log; ``OUT_OF_TIME`` where it was stopped."""
    log = settings.out / f"{stage.name}.log"
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            left = math.inf if stage.name == "merge" else settings.deadline - time.monotonic()
            status = process.wait(max(0.0, min(stage.limit, left)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = OUT_OF_TIME
    return status


def install(settings: Settings, stage: Stage) -> int:
    """Installs the package with its extension into an environment that falls back on the packages of the present one."""
    if not settings.python.is_relative_to(settings.venv):
        venv.create(settings.venv, symlinks=True)
    folder = next(settings.venv.glob("lib/python*/site-packages"))
    # addsitedir also runs the .pth files there, which editable installs and some NVIDIA packages need.
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages() if Path(path).is_dir()]
    (folder / "installed_packages.pth").write_text("\n".join(lines) + "\n")
    pip = (settings.python, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-e", ROOT)
    # Where csrc/cuda does not compile or link, Triton's kernels can be measured all the same; the log has the reason.
    builds = [{"ROBERTA_FAST_BUILD": mode} for mode in ("cpu", "none")]
    for build in [{}, *builds] if settings.device == "cuda" else builds[1:]:
        status = call(settings, stage, *pip, **build)
        if status in (0, OUT_OF_TIME):
            break
    if status:
        return status
    show = "from roberta_fast import dispatch; print('C++ extension:', dispatch.load_cpp() or 'loaded')"
    return call(settings, stage, settings.python, "-P", "-c", show)


def tests(settings: Settings, stage: Stage) -> int:
    """Runs each operation's tests, and all others that need a GPU; records what is red."""
    parallel = ("-n", "8") if settings.device == "cuda" and importlib.util.find_spec("xdist") else ()
    groups = {path.stem.removeprefix("test_"): (path,) for path in sorted((ROOT / "tests" / "ops").glob("test_*.py"))}
    groups = {"ops": (ROOT / "tests" / "ops", "-m", "gpu")} if settings.tiny else groups
    if not settings.tiny:
        groups["others"] = (*other_gpu_tests(), "-m", "gpu")
    outcome = {"red": {}, "passed": 0, "skipped": 0, "sources": digest()}
    for name, selection in groups.items():
        xml = settings.out / f"tests-{name}.xml"
        xml.unlink(missing_ok=True)
        status = call(settings, stage, settings.python, "-P", "-m", "pytest", *selection, f"--junitxml={xml}", *parallel)
        failure, passed, skipped = read_junit(xml) if xml.exists() else (None, 0, 0)
        if failure or status not in (0, NO_TESTS):
            outcome["red"][name] = failure or ("out of time" if status == OUT_OF_TIME else f"pytest ended with {status}")
        outcome |= {"passed": outcome["passed"] + passed, "skipped": outcome["skipped"] + skipped}
    (settings.out / "tests.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    return int(bool(outcome["red"]))


def other_gpu_tests() -> list[Path]:
    """The files outside tests/ops that have tests for a GPU. Others would be imported too, with packages that may be missing."""
    files = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.parent.name != "ops")
    return [path for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def read_junit(path: Path) -> tuple[str | None, int, int]:
    """The first failure, and how many tests passed and were skipped."""
    failures, passed, skipped = [], 0, 0
    for case in ElementTree.parse(path).iter("testcase"):
        outcomes = {child.tag: child.get("message") or "" for child in case}
        problem = outcomes.get("failure", outcomes.get("error"))
        if problem is not None:
            failures.append(f"{case.get('name')}: {problem.splitlines()[0] if problem else 'no message'}")
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    return failures[0] if failures else None, passed, skipped


def digest() -> str:
    """A hash of all sources that tests speak for."""
    files = [f for name in SOURCES for f in sorted((ROOT / name).rglob("*")) or [ROOT / name]]
    sums = (hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


def red_reason(settings: Settings, stage: Stage, tested: bool) -> str | None:
    """Why a stage may not be measured: its tests failed, or none ran. tested: whether they ran in this call of the script; what
    an earlier one left counts only for the same sources."""
    if not stage.needs:
        return None
    path = settings.out / "tests.json"
    outcome = json.loads(path.read_text()) if path.exists() else None
    if outcome is None or not (tested or outcome["sources"] == digest()):
        return "the tests have not run on these sources: add the stage tests"
    if settings.device == "cuda" and not outcome["passed"]:
        return "no test ran"
    failed = {name: why for name, why in outcome["red"].items() if name in stage.needs or ANY in stage.needs}
    return "; ".join(f"{name} is red, {why}" for name, why in failed.items()) or None


def measured(*arguments: str) -> Callable[[Settings, Stage], int]:
    """A stage of gpu_stages.py."""

    def run(settings, stage):
        script = ROOT / "benchmarks" / "gpu_stages.py"
        out = settings.out / f"{stage.name}.json"
        sizes = "tiny" if settings.tiny else "quick" if settings.quick else "cuda"
        commit = ("--commit", settings.commit) if settings.commit else ()
        text = ("--text", settings.text) if settings.text else ()
        common = ("--out", out, "--device", settings.device, "--sizes", sizes, *commit, *text)
        return call(settings, stage, settings.python, "-P", script, *arguments, *common)

    return run


def merge(settings: Settings, stage: Stage) -> int:
    """Gathers what the stages left into one file of results for this GPU."""
    script = ROOT / "benchmarks" / "report.py"
    return call(settings, stage, settings.python, "-P", script, "--merge", settings.out, "--results", settings.results)


def all_stages(settings: Settings) -> dict[str, Stage]:
    """Every stage in order. What decides the plan comes first, what takes longest last."""
    stages = {"install": Stage(install, 540), "tests": Stage(tests, 240), "limits": Stage(measured("limits"), 60)}
    stages |= {name: Stage(measured("operation", name), 240, (name,)) for name in OPERATIONS}
    models = ["tiny"] if settings.tiny else ["roberta-base"] if settings.quick else ["roberta-base", "minilm", "roberta-large"]
    for model in models:
        for part, kinds in KINDS.items():
            for kind in kinds:
                if kind in ("eval", "train", "mlm") or not (settings.quick or (settings.tiny and kind == "autotune")):
                    limit = 560 if kind == "autotune" else 400
                    stages[f"{model}-{kind}"] = Stage(measured("encoder", model, kind), limit, (ANY,), part=part)
                if kind == "eval":
                    stages |= {f"{model}-{name}": Stage(measured(name, model), 400, (ANY,), part=part) for name in HOST}
    stages["loss_curve"] = Stage(measured("loss_curve"), 400, (ANY,), part="training")
    stages["merge"] = Stage(merge, 60)
    return {name: replace(stage, name=name) for name, stage in stages.items()}


def main() -> int:
    """Runs the chosen stages; returns 1 where one of them failed or was red."""
    settings, chosen, part = parse()
    stages, failed, ran = all_stages(settings), [], set()
    if part:
        chosen = [name for name, stage in stages.items() if part == stage.part or name == "merge"]
    unknown = [name for name in chosen or () if name not in stages]
    if unknown:
        sys.exit(f"gpu.py: argument --stages: {unknown[0]!r} is not one of {', '.join(stages)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    for name in chosen or stages:
        stage, start = stages[name], time.monotonic()
        if name != "merge" and start > settings.deadline:
            print(f"[{name}] not measured: the time is over", flush=True)
            continue
        for leftover in (f"{name}.json", f"{name}.log"):
            (settings.out / leftover).unlink(missing_ok=True)
        reason = red_reason(settings, stage, "tests" in ran)
        ran.add(name)
        status = 1 if reason else stage.run(settings, stage)
        outcome = f"not measured: {reason}" if reason else "done" if status == 0 else f"failed with status {status}"
        print(f"[{name}] {outcome}, {time.monotonic() - start:.0f} s", flush=True)
        show(settings, name, status)
        failed += [name] if status else []
    print(f"failed: {', '.join(failed)}" if failed else "all done")
    return int(bool(failed))


def show(settings: Settings, name: str, status: int) -> None:
    """Prints what a stage printed, or the end of it where it failed."""
    log = settings.out / f"{name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    printed = lines[-30:] if status or name in ("install", "tests") else lines
    print("\n".join(f"  {line}" for line in printed), flush=True)


def parse() -> tuple[Settings, list[str] | None, str | None]:
    """The settings, the names of the stages to run, None for all, and the part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the folder for results and logs")
    add("--stages", help="comma-separated; all by default")
    add("--part", choices=PARTS, help="instead: one of three groups of stages")
    add("--minutes", type=float, default=math.inf, help="end in this time, with what was measured by then")
    add("--text", type=Path, help="a file of texts, one a line, for the loss curves")
    add("--quick", action="store_true", help="few sizes, roberta-base alone")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="tiny sizes, to try out the script")
    add("--venv", type=Path, default=ROOT / "build" / "gpu-venv", help="where install puts the package")
    add("--results", type=Path, help="the folder to merge into (default: benchmarks/results; DIR/results with --tiny)")
    add("--commit", help="of the source, where this is no git checkout")
    args = parser.parse_args()
    out = args.out.resolve()
    results = args.results or (out / "results" if args.tiny else ROOT / "benchmarks" / "results")
    settings = Settings(
        out=out,
        venv=args.venv.absolute(),
        results=results.resolve(),
        device=args.device,
        tiny=args.tiny,
        quick=args.quick,
        commit=args.commit,
        text=args.text and args.text.resolve(),
        deadline=time.monotonic() + 60 * args.minutes,
    )
    return settings, args.stages.split(",") if args.stages else None, args.part


if __name__ == "__main__":
    sys.exit(main())

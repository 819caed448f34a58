"""What the benchmarks share. Import it first: it puts the repository root before this folder on sys.path."""
import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))  # `import rollout` is the module there, not the benchmark of that name
OPTIONAL = {"trl": "trl==1.16.0", "datasets": "trl==1.16.0", "matplotlib": "matplotlib", "atheris": "atheris",
            "math_verify": "math-verify==0.9.0 antlr4-python3-runtime==4.13.2"}


def need(module: str) -> ModuleType:
    """An optional package or a module of it. If it is missing, the program ends and says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        sys.exit(f"{Path(sys.argv[0]).name} needs {package}: pip install {OPTIONAL[package]} ({error})")


def has(module: str, purpose: str) -> bool:
    """Is this optional package installed? If not, a line says what is left out and what to install."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"{purpose} left out: pip install {OPTIONAL[module]}")
    return found


def pyplot() -> ModuleType:
    need("matplotlib").use("svg")
    return need("matplotlib.pyplot")


def save_figure(figure: object, path: Path) -> None:
    """path.png and path.svg."""
    for ending in ("png", "svg"):
        figure.savefig(f"{path}.{ending}", dpi=150)


def parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def boxed(answer: str) -> str:
    return "\\boxed{" + answer + "}"


def seconds(*functions: Callable[[], object], repeats: int = 1) -> list[float]:
    """Median seconds of each function; called in turn, so that a slow phase of the machine hits all."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return list(map(statistics.median, times))


def machine() -> str:
    versions = (f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    return ", ".join([platform.machine(), *versions])


def start(script: str, *options: object, log: Path) -> subprocess.Popen:
    """train.py or eval.py on one core, so that its seconds do not depend on what runs beside it."""
    with open(log, "a") as output:
        return subprocess.Popen([sys.executable, script, *map(str, options)], cwd=ROOT, stdout=output,
                                stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(script: str, *options: object, log: Path) -> None:
    """The same, to its end. If it fails, the program ends and names the log."""
    if start(script, *options, log=log).wait():
        sys.exit(f"{script} failed: see {log}")


def train_until(out: Path, seconds: float, *options: object) -> dict[str, float]:
    """train.py on one core until it has trained for so long, or on where it was killed; its last metrics."""
    def last() -> dict[str, float]:
        log = out / "metrics.jsonl"
        lines = read_lines(log) if log.exists() else []
        return lines[-1] if lines else {"time/total_s": 0.0}

    while last()["time/total_s"] < seconds:
        process = start("train.py", "--out", out, *options, log=Path(f"{out}.log"))
        while process.poll() is None and last()["time/total_s"] < seconds:
            time.sleep(1)
        process.send_signal(signal.SIGTERM)  # ends after the current step, with a checkpoint
        if process.wait() != 130:
            sys.exit(f"train.py failed: see {out}.log")
    return last()


def checkpoints_at(out: Path, seconds: Sequence[float]) -> list[tuple[Path, dict]]:
    """The policies of a run that were saved nearest to these seconds, each with the metrics of its step."""
    states = {path: json.loads((path / "state.json").read_text()) for path in out.glob("checkpoint-*[0-9]")}
    near = dict.fromkeys(min(states, key=lambda path: abs(states[path]["seconds"] - x)) for x in seconds)
    return [(path / "policy", states[path]["metrics"] | {"time/total_s": states[path]["seconds"]})
            for path in near]


def evaluate(policy: Path, problems: Path, out: Path, *options: object) -> dict:
    """The figures that eval.py writes for one policy and one file of problems; `out` is its folder."""
    run("eval.py", "--model", policy, "--data", problems, "--out", out, *options, log=Path(f"{out}.log"))
    (figures,) = json.loads((out / "results.json").read_text())["results"].values()
    return figures


def run_folder(name: str, seed: int, folder: Path) -> Path:
    """Where the run behind a row of a table is kept."""
    return folder / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{seed}"


def head(*names: str) -> str:
    """Head of a Markdown table."""
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def mean_std(values: Sequence[float], form: str) -> str:
    """mean ± standard deviation (of a sample), each in the given format."""
    spread = f" ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 else ""
    return format(np.mean(values), form) + spread


def write_page(path: Path, text: str) -> None:
    """Replace what stands above the first heading of the second level; what follows was written by hand."""
    _, mark, kept = path.read_text().partition("\n## ") if path.exists() else ("", "", "")
    path.write_text(text + mark + kept)


def print_json(result: dict[str, float], digits: int = 3) -> None:
    """The last line of a benchmark: all its results, for programs."""
    print(json.dumps({key: round(value, digits) for key, value in result.items()}))

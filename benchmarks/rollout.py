"""Sampling G suffixes of one prefix: this engine against model.generate, and against the machine's limit.

    python benchmarks/rollout.py --model FOLDER [--prefixes 128,512,2048] [--repeats 3]    # SmolLM2-135M: 15 minutes

Every pair is timed in one process, alternated, and the medians are compared. model.generate gets the prefix G times,
as TRL's trainers hand it over, and is told to produce exactly S tokens. The last line is one JSON object.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import rollout  # noqa: E402
import rpo  # noqa: E402


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both, alternated."""
    times = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def requests_of(prefix: int, problems: int, group: int, budgets: list[int]) -> list[rollout.Request]:
    rng = np.random.default_rng(0)
    return [rollout.Request(rng.integers(10, 300, prefix).tolist(), budgets[i % len(budgets)],
                            [(i, row) for row in range(group)]) for i in range(problems)]


def matmul_seconds(model: torch.nn.Module, rows: int) -> float:
    """Seconds of one decode step's matrix products alone, in the same shapes."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}

    def once() -> None:
        for m in layers:
            torch.nn.functional.linear(inputs[m.in_features], m.weight)

    once()
    return statistics.median(seconds(once) for _ in range(9))


def limit_fraction(model: torch.nn.Module, how: rollout.Sampling, steps: int = 24) -> float:
    """(time of the matrix products of a decode step alone) / (time of a decode step) at 64 rows, prefix 128.

    The step is the difference of two runs that differ in length only, so that the prefill drops out.
    """
    def run(budget: int) -> float:
        return seconds(lambda: rollout.generate(model, requests_of(128, 4, 16, [budget]), how, 4.0))

    run(2)
    fractions = []
    for _ in range(3):
        alone = matmul_seconds(model, 64)
        fractions.append(alone / ((run(steps + 2) - run(2)) / steps))
    return statistics.median(fractions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prefixes", default="128,512,2048")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--suffix", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder = data.find_model(args.model)
    model = rpo.load_policy(folder, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how = rollout.Sampling((), model.config.vocab_size)
    result: dict[str, float] = {}
    print(f"| P | ours tok/s | generate tok/s | speedup |   G={args.group}, S={args.suffix}\n|---|---|---|---|")
    for prefix in map(int, args.prefixes.split(",")):
        request = requests_of(prefix, 1, args.group, [args.suffix])
        ids = torch.tensor([request[0].context] * args.group)
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=args.suffix, min_new_tokens=args.suffix,
                                  pad_token_id=0)
        ours, theirs = paired(
            lambda: rollout.generate(model, request, how, 4.0),
            lambda: plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config), args.repeats)
        tokens = args.group * args.suffix
        result[f"speedup_P{prefix}"] = theirs / ours
        print(f"| {prefix} | {tokens / ours:.1f} | {tokens / theirs:.1f} | {theirs / ours:.2f} |", flush=True)
    result["limit_fraction"] = limit_fraction(model, how)
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))


if __name__ == "__main__":
    main()

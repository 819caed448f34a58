"""Sampling G suffixes of one prefix: this engine against model.generate, and against the machine's limit.

    python benchmarks/rollout.py [--model FOLDER] [--plot docs/group_cost.svg]     # SmolLM2-135M: 13 minutes

model.generate gets the prefix G times, as TRL's trainers hand it over when they sample without a server, and
is told to produce exactly S tokens. Every pair is timed in one process, in turn, and medians are compared.
The last line is one JSON object. --plot needs matplotlib.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import (AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2Config,
                          Qwen2ForCausalLM)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import rollout  # noqa: E402
import rpo  # noqa: E402

MEMORY = 4.0  # GiB


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def requests_of(prefix: int, problems: int, group: int, budget: int) -> list[rollout.Request]:
    rng = np.random.default_rng(0)
    return [rollout.Request(rng.integers(5, 100, prefix).tolist(), budget, [(i, g) for g in range(group)])
            for i in range(problems)]


def against_generate(model: PreTrainedModel, plain: PreTrainedModel, how: rollout.Sampling, prefix: int,
                     group: int, suffix: int, repeats: int) -> tuple[float, float]:
    """Median seconds (ours, generate)."""
    requests = requests_of(prefix, 1, group, suffix)
    ids = torch.tensor([requests[0].context] * group)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=suffix, min_new_tokens=suffix,
                              pad_token_id=0)
    times = [(seconds(lambda: rollout.generate(model, requests, how, MEMORY)),
              seconds(lambda: plain.generate(**inputs, generation_config=config)))
             for _ in range(repeats)]
    ours, theirs = zip(*times)
    return statistics.median(ours), statistics.median(theirs)


def step_seconds(model: PreTrainedModel, how: rollout.Sampling, prefix: int, group: int, problems: int,
                 steps: int = 24) -> float:
    """Of one decode step: the difference of two runs that differ in length only, so prefill drops out."""
    def run(budget: int) -> float:
        requests = requests_of(prefix, problems, group, budget)
        return seconds(lambda: rollout.generate(model, requests, how, MEMORY))

    run(2)
    return statistics.median((run(steps + 2) - run(2)) / steps for _ in range(3))


def matrix_seconds(model: PreTrainedModel, rows: int) -> float:
    """Of one decode step's matrix products alone, in the same shapes."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}

    def once() -> None:
        for m in layers:
            torch.nn.functional.linear(inputs[m.in_features], m.weight)

    with torch.no_grad():
        once()
        return statistics.median(seconds(once) for _ in range(9))


@contextlib.contextmanager
def counted() -> Iterator[dict]:
    """Of a generate() inside: active rows of each decode step ("rows"), and its decoder."""
    seen = {"rows": [], "decoder": None}
    decode = rollout.Decoder.decode

    def counting(self: rollout.Decoder, ids: list[int]) -> torch.Tensor:
        seen["rows"].append(len(ids))
        seen["decoder"] = self
        return decode(self, ids)

    rollout.Decoder.decode = counting
    try:
        yield seen
    finally:
        rollout.Decoder.decode = decode


def kv_memory_ratio(model: PreTrainedModel, how: rollout.Sampling, prefix: int, group: int,
                    suffix: int) -> float:
    """Keys and values held / those of P + G*S tokens."""
    with counted() as seen:
        rollout.generate(model, requests_of(prefix, 1, group, suffix), how, MEMORY)
    storage = (seen["decoder"].context_kv, seen["decoder"].suffix_kv)
    token = storage[0][:, :, 0, :, 0].numel()
    return sum(x.numel() for x in storage) / token / (prefix + group * suffix)


def occupancy(problems: int = 128, group: int = 16, longest: int = 300) -> tuple[float, str]:
    """(active rows / row slots over all decode steps, how the lengths are spread).

    A random model over 128 tokens, one of which ends a row: geometric lengths, cut off at `longest`. Memory
    for 64 rows at once.
    """
    config = Qwen2Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=128, max_position_embeddings=512)
    model = Qwen2ForCausalLM(config).eval()
    rpo.use_shared_prefix(model)
    memory = next(m for m in np.arange(1, 1000) / 2**14
                  if rollout_rows(model, longest, group, float(m)) >= 64)
    with counted() as seen:
        results = rollout.generate(model, requests_of(32, problems, group, longest),
                                   rollout.Sampling((5,), 128), float(memory))
    lengths = [len(suffix.ids) for suffixes in results for suffix in suffixes]
    quantiles = ", ".join(f"{q:.0f}" for q in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
    return sum(seen["rows"]) / (len(seen["rows"]) * max(seen["rows"])), quantiles


def rollout_rows(model: PreTrainedModel, longest: int, group: int, memory: float) -> int:
    try:
        return rollout.slots(model.config, 32, longest, group, memory)[1]
    except ValueError:
        return 0


def plot_costs(costs: dict[int, float], prefix: int, path: str) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(list(costs), [1000 * cost for cost in costs.values()], marker="o")
    axes.set(xscale="log", xticks=list(costs), xticklabels=list(costs), ylim=(0, None),
             xlabel="suffixes G of one prefix", ylabel="ms per sampled token",
             title=f"{prefix} prefix tokens")
    axes.minorticks_off()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[32, 128, 512, 2048])
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--suffix", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", default="")
    args = parser.parse_args()
    folder = data.find_model(args.model)
    model = rpo.load_policy(folder, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how = rollout.Sampling((), model.config.vocab_size)
    result: dict[str, float] = {}
    print(f"{args.model}, G={args.group}, S={args.suffix}, {torch.get_num_threads()} threads\n\n"
          "| P | ours tok/s | generate tok/s | speedup |\n|---|---|---|---|")
    for prefix in args.prefixes:
        ours, theirs = against_generate(model, plain, how, prefix, args.group, args.suffix, args.repeats)
        tokens = args.group * args.suffix
        result[f"speedup_P{prefix}"] = theirs / ours
        print(f"| {prefix} | {tokens / ours:.1f} | {tokens / theirs:.1f} | {theirs / ours:.2f} |", flush=True)
    pairs = [(step_seconds(model, how, 128, 16, 4), matrix_seconds(model, 64)) for _ in range(3)]
    step, products = (statistics.median(column) for column in zip(*pairs))
    result["limit_fraction"] = products / step
    print(f"\ndecode step of 64 rows: {1000 * step:.0f} ms, its matrix products alone "
          f"{1000 * products:.0f} ms")
    result["kv_memory_ratio"] = kv_memory_ratio(model, how, max(args.prefixes), args.group, args.suffix)
    result["occupancy"], spread = occupancy()
    print(f"rows of {spread} tokens (quartiles): {result['occupancy']:.1%} of the row slots are active")
    if args.plot:
        costs = {g: step_seconds(model, how, 512, g, problems=1) / g for g in (1, 2, 4, 8, 16, 32, 64)}
        print("\n| G | ms per token |\n|---|---|")
        print("\n".join(f"| {g} | {1000 * cost:.1f} |" for g, cost in costs.items()))
        plot_costs(costs, 512, args.plot)
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))


if __name__ == "__main__":
    main()

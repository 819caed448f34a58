"""Forward and backward of one group: the shared prefix computed once, against G whole sequences.

    python benchmarks/update.py --model FOLDER [--shapes 512,16,32 1024,8,32]    # SmolLM2-135M: 20 minutes

Both compute the same gradient: log-probs of the suffix tokens of one problem. "Plain" is what GRPO trainers
do: G rows of prefix + suffix through the model, logits at the suffix only, in micro-batches of the size that
is fastest for it. The two are timed in turn, medians compared. The last line is one JSON object. Linux only.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import rpo  # noqa: E402


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def item_of(prefix: int, group: int, suffix: int) -> rpo.Item:
    rng = np.random.default_rng(0)
    rows = rng.integers(10, 300, (group, suffix)).tolist()
    return rpo.Item(rng.integers(10, 300, prefix).tolist(), rows, rng.normal(size=group).tolist(),
                    [[0.0] * suffix] * group)


def ours(model: PreTrainedModel, item: rpo.Item, tokens_per_forward: int = 2**20) -> None:
    for part in rpo.micro_batches([item], tokens_per_forward):
        batch = rpo.pack(part)
        logprobs, _ = rpo.shared_logprobs(model, batch)
        (-(logprobs * batch.advantages[:, None]).sum() / batch.mask.sum()).backward()
    model.zero_grad()


def plain(model: PreTrainedModel, item: rpo.Item, rows: int) -> None:
    ids = torch.tensor([[*item.context, *suffix] for suffix in item.suffixes])
    advantages = torch.tensor(item.advantages)
    suffix = len(item.suffixes[0])
    for part, weights in zip(ids.split(rows), advantages.split(rows)):
        logits = model(part, use_cache=False, logits_to_keep=suffix + 1).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, part[:, -suffix:, None])[..., 0]
        (-(logprobs * weights[:, None]).sum() / (suffix * len(ids))).backward()
    model.zero_grad()


def matrix_seconds(model: PreTrainedModel, tokens: int, logits: int) -> float:
    """The matrix products of a forward and backward alone: three for each weight, in the same shapes."""
    head = model.get_output_embeddings()
    layers = [(m, logits if m is head else tokens) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    x = {(n, size): torch.randn(n, size) for m, n in layers for size in m.weight.shape}

    def once() -> None:
        for m, n in layers:
            into, out = x[n, m.in_features], x[n, m.out_features]
            torch.mm(into, m.weight.T), torch.mm(out, m.weight), torch.mm(out.T, into)

    with torch.no_grad():
        once()
        return statistics.median(seconds(once) for _ in range(3))


def limit_fraction(model: PreTrainedModel, item: rpo.Item, took: float) -> float:
    """Time that its floating point operations need at the speed of its matrix products / time taken."""
    config, p, g, s = model.config, len(item.context), len(item.suffixes), len(item.suffixes[0])
    tokens = p + g * (s - 1)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    products = 6 * ((weights - head) * tokens + head * g * s)
    pairs = p * p / 2 + g * s * (p + s / 2)  # of a query and a key
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = 3 * 4 * width * pairs * config.num_hidden_layers
    speed = products / matrix_seconds(model, tokens, g * s)
    return (products + attention) / speed / took


def peak_of(folder: str, way: str, shape: str) -> float:
    """GiB that forward and backward of a whole group add to weights and gradients, in its own process."""
    out = subprocess.run([sys.executable, __file__, "--model", folder, "--shapes", shape, "--peak", way],
                         capture_output=True, text=True, check=True,
                         # freed blocks go back to the system, so that the resident size is what is in use
                         env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18)}).stdout
    return float(out.split()[-1])


def print_peak(folder: str, way: str, item: rpo.Item) -> None:
    model = load(folder, way)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    small = item_of(8, 2, 4)
    ours(model, small) if way == "ours" else plain(model, small, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.0)  # written, so that it counts as there
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory_gib("VmRSS")
    ours(model, item) if way == "ours" else plain(model, item, len(item.suffixes))
    print(memory_gib("VmHWM") - before)


def memory_gib(what: str) -> float:
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def load(folder: str, way: str) -> PreTrainedModel:
    if way == "ours":
        return rpo.load_policy(folder, torch.device("cpu"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shapes", nargs="+", default=["32,16,32", "512,16,32", "1024,8,32", "1024,16,64"],
                        help="prefix,group,suffix")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = str(data.find_model(args.model))
    if args.peak:
        return print_peak(folder, args.peak, item_of(*map(int, args.shapes[0].split(","))))
    shared, own = load(folder, "ours"), load(folder, "plain")
    result: dict[str, float] = {}
    print("| P,G,S | ours s | plain s (rows) | speedup | token ratio | speedup/ratio | of the limit |")
    print("|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        p, g, s = map(int, shape.split(","))
        item = item_of(p, g, s)
        ours(shared, item)
        trials = {rows: seconds(lambda: plain(own, item.rows(slice(max(rows, 4))), rows)) / max(rows, 4)
                  for rows in (1, 2, 4, 8) if rows <= g and rows * (p + s) < 9000}
        rows = min(trials, key=trials.get)
        times = [(seconds(lambda: ours(shared, item)), seconds(lambda: plain(own, item, rows)))
                 for _ in range(args.repeats)]
        mine, theirs = (statistics.median(column) for column in zip(*times))
        ratio, fraction = g * (p + s) / (p + g * s), limit_fraction(shared, item, mine)
        result |= {f"speedup_{shape}": theirs / mine, f"token_ratio_{shape}": ratio,
                   f"limit_{shape}": fraction}
        print(f"| {shape} | {mine:.2f} | {theirs:.2f} ({rows}) | {theirs / mine:.2f} | {ratio:.2f} | "
              f"{theirs / mine / ratio:.2f} | {fraction:.2f} |", flush=True)
    largest = args.shapes[-1]
    peaks = [peak_of(folder, way, largest) for way in ("ours", "plain")]
    print(f"peak memory beside weights and gradients at {largest}, whole group at once, activation "
          f"checkpointing: {peaks[0]:.2f} GiB against {peaks[1]:.2f}")
    result |= {"memory_ratio": peaks[0] / peaks[1], "limit_fraction": result[f"limit_{largest}"]}
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()

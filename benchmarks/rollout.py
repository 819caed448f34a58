"""Sampling G suffixes of one prefix: rollout.py against model.generate, and against the machine's limit.

    python benchmarks/rollout.py --model FOLDER [--plot docs/group_cost.svg]     # SmolLM2-135M: 13 minutes

model.generate gets the prefix G times, as TRL's trainers call it without a server, and must produce exactly S
tokens. Prints tables, copied to docs/rollout.md; --plot draws the cost of a token by group size (needs
matplotlib). The last line is one JSON object.
"""
import contextlib
import statistics
from collections.abc import Iterator

from common import head, machine, parser, print_json, pyplot, row, seconds

import numpy as np
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, Qwen2Config,
                          Qwen2ForCausalLM)

import data
import rollout
from policy import Policy, load_policy

MEMORY = 4.0  # GiB


def requests_of(prefix: int, problems: int, group: int, budget: int) -> list[rollout.Request]:
    rng = np.random.default_rng(0)
    return [rollout.Request(rng.integers(5, 100, prefix).tolist(), budget, [(i, g) for g in range(group)])
            for i in range(problems)]


def against_generate(policy: Policy, plain: PreTrainedModel, how: rollout.Sampling, prefix: int, group: int,
                     suffix: int, repeats: int) -> list[float]:
    """Median seconds [ours, generate]."""
    requests = requests_of(prefix, 1, group, suffix)
    ids = torch.tensor([requests[0].context] * group)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=suffix, min_new_tokens=suffix,
                              pad_token_id=0)
    return seconds(lambda: rollout.generate(policy, requests, how, MEMORY),
                   lambda: plain.generate(**inputs, generation_config=config), repeats=repeats)


def step_seconds(policy: Policy, how: rollout.Sampling, prefix: int, group: int, problems: int,
                 steps: int = 24) -> float:
    """Of one decode step: the difference of two runs that differ in length only, so prefill drops out."""
    def run(budget: int) -> float:
        requests = requests_of(prefix, problems, group, budget)
        return seconds(lambda: rollout.generate(policy, requests, how, MEMORY))[0]

    run(2)
    return statistics.median((run(steps + 2) - run(2)) / steps for _ in range(3))


@torch.no_grad()
def matrix_seconds(policy: Policy, rows: int) -> float:
    """Of one decode step's matrix products alone, in the same shapes."""
    layers = [m for m in policy.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features) for m in layers}

    def once() -> None:
        for m in layers:
            torch.nn.functional.linear(inputs[m.in_features], m.weight)

    once()
    return seconds(once, repeats=9)[0]


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


def kv_memory_ratio(policy: Policy, how: rollout.Sampling, prefix: int, group: int, suffix: int) -> float:
    """Keys and values held / those of P + G*S tokens."""
    with counted() as seen:
        rollout.generate(policy, requests_of(prefix, 1, group, suffix), how, MEMORY)
    storage = (seen["decoder"].context_kv, seen["decoder"].suffix_kv)
    token = storage[0][:, :, 0, :, 0].numel()
    return sum(x.numel() for x in storage) / token / (prefix + group * suffix)


def occupancy(problems: int = 128, group: int = 16, longest: int = 300) -> tuple[float, str]:
    """(active rows / row slots over all decode steps, quartiles of the lengths), with slots for 64 rows.

    A random model over 128 tokens, one of which ends a row: geometric lengths, cut off at `longest`.
    """
    config = Qwen2Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=128, max_position_embeddings=512)
    torch.manual_seed(0)
    policy = Policy(Qwen2ForCausalLM(config), 128)
    context, rows = rollout.group_bytes(config, 32, longest, group, torch.float32)
    memory = (3 * context + rows) * (64 / group) / 2**30  # see rollout.slots
    with counted() as seen:
        results = rollout.generate(policy, requests_of(32, problems, group, longest),
                                   rollout.Sampling((5,), 128), memory)
    lengths = [len(suffix.ids) for suffixes in results for suffix in suffixes]
    quartiles = ", ".join(f"{q:.0f}" for q in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))
    return sum(seen["rows"]) / (len(seen["rows"]) * max(seen["rows"])), quartiles


def group_costs(policy: Policy, how: rollout.Sampling, prefix: int, path: str) -> None:
    """Print and draw what a token costs as the group grows."""
    costs = {g: 1000 * step_seconds(policy, how, prefix, g, 1) / g for g in (1, 2, 4, 8, 16, 32, 64)}
    print("", head("G", "ms per token"), *(row(g, f"{cost:.1f}") for g, cost in costs.items()), sep="\n")
    figure, axes = pyplot().subplots(figsize=(5, 3))
    axes.plot(list(costs), list(costs.values()), marker="o")
    axes.set(xscale="log", xticks=list(costs), xticklabels=list(costs), ylim=(0, None),
             xlabel="suffixes G of one prefix", ylabel="ms per sampled token")
    axes.set_title(f"{prefix} prefix tokens")
    axes.minorticks_off()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--model", default="tiny")
    command.add_argument("--prefixes", type=int, nargs="+", default=[32, 128, 512, 2048])
    command.add_argument("--group", type=int, default=16)
    command.add_argument("--suffix", type=int, default=32)
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--plot", metavar="FILE")
    args = command.parse_args()
    folder = data.find_model(args.model)
    policy = load_policy(folder, len(AutoTokenizer.from_pretrained(folder)), torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how, result = rollout.Sampling((), policy.vocab_size), {}
    print(f"{args.model}, G={args.group}, S={args.suffix}, {machine()}, {torch.get_num_threads()} threads\n")
    print(head("P", "ours tok/s", "generate tok/s", "speedup"))
    for prefix in args.prefixes:
        ours, theirs = against_generate(policy, plain, how, prefix, args.group, args.suffix, args.repeats)
        result[f"speedup_P{prefix}"] = theirs / ours
        speeds = (f"{args.group * args.suffix / x:.1f}" for x in (ours, theirs))
        print(row(prefix, *speeds, f"{theirs / ours:.2f}"), flush=True)
    pairs = [(step_seconds(policy, how, 128, 16, 4), matrix_seconds(policy, 64)) for _ in range(3)]
    step, products = (statistics.median(column) for column in zip(*pairs))
    result["limit_fraction"] = products / step
    print(f"\na decode step of 64 rows takes {1000 * step:.0f} ms, its matrix products alone "
          f"{1000 * products:.0f} ms")
    result["kv_memory_ratio"] = kv_memory_ratio(policy, how, max(args.prefixes), args.group, args.suffix)
    result["occupancy"], quartiles = occupancy()
    print(f"rows of {quartiles} tokens (quartiles): {result['occupancy']:.1%} of the row slots are active")
    if args.plot:
        group_costs(policy, how, 512, args.plot)
    print_json(result)


if __name__ == "__main__":
    main()

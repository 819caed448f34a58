"""Forward and backward of one group: the shared prefix computed once, against G whole sequences.

    python benchmarks/update.py --model FOLDER [--shapes 512,16,32 1024,8,32]     # SmolLM2-135M: 20 minutes

Both compute the same gradient, of the log-probs of one problem's suffix tokens. "Plain" is what GRPO trainers
do: G rows of prefix + suffix through the model, logits at the suffix only, in micro-batches of the size that
is fastest for it. Prints a table, copied to docs/update.md; the last line is one JSON object. Linux only.
"""
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import head, machine, parser, print_json, row, seconds

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import data
from policy import Policy, Tree, load_policy, pack


def random_group(prefix: int, group: int, suffix: int) -> tuple[Tree, torch.Tensor]:
    """A tree and the advantages (G,) of its suffixes."""
    rng = np.random.default_rng(0)
    suffixes = rng.integers(10, 300, (group, suffix)).tolist()
    context = rng.integers(10, 300, prefix).tolist()
    return Tree(context, suffixes), torch.tensor(rng.normal(size=group)).float()


def shared(policy: Policy, tree: Tree, advantages: torch.Tensor) -> None:
    batch = pack([tree])
    logprobs, _ = policy(batch)
    (-(logprobs * advantages[:, None]).sum() / batch.mask.sum()).backward()
    policy.zero_grad()


def plain(model: PreTrainedModel, tree: Tree, advantages: torch.Tensor, rows: int) -> None:
    """rows: responses in a micro-batch."""
    ids = torch.tensor([[*tree.context, *suffix] for suffix in tree.suffixes])
    suffix = len(tree.suffixes[0])
    for part, weights in zip(ids.split(rows), advantages.split(rows)):
        logits = model(part, use_cache=False, logits_to_keep=suffix + 1).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, part[:, -suffix:, None])[..., 0]
        (-(logprobs * weights[:, None]).sum() / (suffix * len(ids))).backward()
    model.zero_grad()


def fastest_rows(model: PreTrainedModel, tree: Tree, advantages: torch.Tensor) -> int:
    """The micro-batch with which `plain` takes the least time per response."""
    length, trials = len(tree.context) + len(tree.suffixes[0]), {}
    for rows in (1, 2, 4, 8):
        if rows <= len(tree.suffixes) and rows * length < 9000:
            part = Tree(tree.context, tree.suffixes[:max(rows, 4)])
            trials[rows] = seconds(lambda: plain(model, part, advantages, rows))[0] / len(part.suffixes)
    return min(trials, key=trials.get)


@torch.no_grad()
def matrix_seconds(model: PreTrainedModel, tokens: int, logits: int) -> float:
    """The matrix products of a forward and backward alone: three for each weight, in the same shapes."""
    output = model.get_output_embeddings()
    layers = [(m, logits if m is output else tokens) for m in model.modules()
              if isinstance(m, torch.nn.Linear)]
    x = {(n, size): torch.randn(n, size) for m, n in layers for size in m.weight.shape}

    def once() -> None:
        for m, n in layers:
            into, out = x[n, m.in_features], x[n, m.out_features]
            torch.mm(into, m.weight.T), torch.mm(out, m.weight), torch.mm(out.T, into)

    once()
    return seconds(once, repeats=3)[0]


def limit_fraction(model: PreTrainedModel, tree: Tree, took: float) -> float:
    """Time that its floating point operations need at the speed of its matrix products / time taken."""
    config, p, g, s = model.config, len(tree.context), len(tree.suffixes), len(tree.suffixes[0])
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    output = model.get_output_embeddings().weight.numel()
    products = 6 * ((weights - output) * tree.packed_tokens + output * g * s)
    pairs = p * p / 2 + g * s * (p + s / 2)  # of a query and a key
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    attention = 3 * 4 * width * pairs * config.num_hidden_layers
    speed = products / matrix_seconds(model, tree.packed_tokens, g * s)
    return (products + attention) / speed / took


def peak_memory(folder: Path, way: str, shape: tuple[int, int, int]) -> float:
    """GiB that forward and backward of a whole group add to weights and gradients; needs its own process."""
    def memory(what: str) -> float:
        return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20

    policy, model = load(folder)
    model = policy.model if way == "shared" else model
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    for size in ((8, 2, 4), shape):  # the first one allocates what stays
        tree, advantages = random_group(*size)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.0)  # written, so that it counts as there
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = memory("VmRSS")
        if way == "shared":
            shared(policy, tree, advantages)
        else:
            plain(model, tree, advantages, rows=len(tree.suffixes))
    return memory("VmHWM") - before


def load(folder: Path) -> tuple[Policy, PreTrainedModel]:
    policy = load_policy(folder, len(AutoTokenizer.from_pretrained(folder)), torch.device("cpu"))
    return policy, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                        attn_implementation="sdpa")


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--model", default="tiny")
    command.add_argument("--shapes", nargs="+", default=["32,16,32", "512,16,32", "1024,8,32", "1024,16,64"],
                         help="prefix,group,suffix")
    command.add_argument("--repeats", type=int, default=3)
    args = command.parse_args()
    folder = data.find_model(args.model)
    (policy, model), result = load(folder), {}
    print(f"{args.model}, {machine()}, {torch.get_num_threads()} threads\n")
    print(head("P,G,S", "shared s", "plain s (rows)", "speedup", "token ratio", "speedup / ratio",
               "fraction of the limit"))
    for name in args.shapes:
        p, g, s = shape = tuple(map(int, name.split(",")))
        tree, advantages = random_group(*shape)
        shared(policy, tree, advantages)
        rows = fastest_rows(model, tree, advantages)
        ours, theirs = seconds(lambda: shared(policy, tree, advantages),
                               lambda: plain(model, tree, advantages, rows), repeats=args.repeats)
        ratio, fraction = g * (p + s) / (p + g * s), limit_fraction(policy.model, tree, ours)
        result |= {f"speedup_{name}": theirs / ours, f"token_ratio_{name}": ratio, f"limit_{name}": fraction}
        print(row(name, f"{ours:.2f}", f"{theirs:.2f} ({rows})", f"{theirs / ours:.2f}", f"{ratio:.2f}",
                  f"{theirs / ours / ratio:.2f}", f"{fraction:.2f}"), flush=True)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # freed blocks go back to the system and do not count
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = list(pool.map(peak_memory, [folder] * 2, ("shared", "plain"), [shape] * 2))
    print(f"peak memory besides weights and gradients at {name}, the whole group at once, activation "
          f"checkpointing: {peaks[0]:.2f} GiB shared, {peaks[1]:.2f} plain")
    print_json(result | {"memory_ratio": peaks[0] / peaks[1], "limit_fraction": fraction})


if __name__ == "__main__":
    main()

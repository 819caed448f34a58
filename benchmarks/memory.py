"""What a run needs, from the model's config alone: train.py --dry-run. Does it fit, and if not, what would?

    python train.py --dry-run                                  # the device at hand
    python train.py --dry-run 24                               # a GPU of 24 GB
    torchrun --nproc-per-node 8 train.py --dry-run 80 --shard --model Qwen2.5-Math-7B

Prints the memory by item at the peak of the rollout and at that of the update, for the longest prompts and
responses and full micro-batches, whether it fits or with which options it would, and the tokens sampled in a
round. Loads no weights, writes nothing.
"""
from dataclasses import replace

import torch
from transformers import PreTrainedModel

import cache
import data
import rollout
from policy import LOGITS_PER_CHUNK, device_bytes, device_of, head_shape, load_shape, ranks
from train import OPTIMIZER_BYTES, Config, check_window, dtype_of, peak_rss


FRAGMENTS = 0.1  # of the memory of a process on a CPU, measured; 13 steps of SmolLM2-135M had 0.2


def memory_plan(c: Config, model: PreTrainedModel, device: str, total: float,
                shards: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes by item at the peak of the rollout and at that of the update, on a cpu or cuda of `total` bytes.
    For the longest prompts and responses and full micro-batches. model: needs no weights. shards: how many
    devices share weights, gradients, states and problems."""
    config, n, dtype = model.config, model.num_parameters(), dtype_of(c, device)
    hidden, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    problems = c.problems_per_step / shards
    size, longest, (heads, kv_heads, dim) = dtype.itemsize, c.max_prompt + c.max_response, head_shape(config)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    matrices = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    held = {"weights": 4 * n / shards, "optimiser states": OPTIMIZER_BYTES[c.optimizer] * n / shards,
            "initial policy": size * n * (c.kl_coef > 0), "process": 5e8 if device == "cuda" else peak_rss()}
    copies = 2 * n if device == "cuda" else 4 * sum(x for x in matrices if x >= 2**18) * (size == 4)
    if shards > 1:  # Policy.whole, in which embeddings and head are float32; it stays
        ends = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(),
                                                         model.get_output_embeddings())}
        held["whole weights for decoding"], copies = 2 * n + 2 * sum(ends.values()), 0
    left = 0.8 * (total - sum(held.values()) - copies) if device == "cuda" else total / 4
    group, first = (sum(rollout.group_bytes(config, *lens, dtype)) for lens in (
        (longest, c.max_response, c.group_size), (c.max_prompt, c.max_response, 1)))
    wanted = max(problems * group, (c.cache_init_chunk or 1e9) / shards * first * (c.rollout == "rpo"))
    tokens = min(c.tokens_per_forward, problems * (longest + c.group_size * c.max_response))
    # of a token in a layer: kept for the backward pass, and needed in it
    kept = 16 * hidden + size * (2 * hidden + 2 * (heads + kv_heads) * dim + 4 * inner)
    workspace = 8 * hidden + 3 * size * inner
    whole = 0 if shards == 1 else 2 * size * (n - 2 * vocab * hidden) / layers + 4 * vocab * hidden
    backward = max(tokens * (kept * c.gradient_checkpointing + workspace),
                   12 * min(LOGITS_PER_CHUNK[device], tokens * vocab))
    plans = ({**held, "copy of the weights for decoding": copies,
              "keys, values, logits": max(group, min(wanted, c.rollout_memory * 2**30 or left)),
              "prefill": min(rollout.PREFILL_TOKENS, problems * longest) * (workspace + 4 * hidden)},
             {**held, "gradients": 4 * n / shards, "gradient of the head": (4 + size % 4) * vocab * hidden,
              "whole layers of shards": whole,
              "activations": tokens * layers * (4 * hidden if c.gradient_checkpointing else kept),
              "backward of a layer, or logits": backward})
    for plan in plans:
        plan["freed, kept by the allocator"] = FRAGMENTS * sum(plan.values()) * (device == "cpu")
    return plans


def what_fits(c: Config, model: PreTrainedModel, device: str, total: float, shards: int = 1) -> str:
    """Does the plan fit, or with which options would it?"""
    optimizers = dict.fromkeys((c.optimizer, "adamw8bit" if shards == 1 else c.optimizer))
    choices = [replace(c, optimizer=name, tokens_per_forward=c.tokens_per_forward // 2**i)
               for name in optimizers for i in range(5)]
    loading = 6 * model.num_parameters()  # by each device, while decoding is checked; sharded only then
    for other in choices:
        plans = memory_plan(other, model, device, total, shards)
        if max(loading, *(sum(x.values()) for x in plans)) <= 0.97 * total:
            return "fits" if other is choices[0] else \
                f"fits with --optimizer {other.optimizer} --tokens-per-forward {other.tokens_per_forward}"
    return "does not fit: take a smaller model, --max-response or --group-size, or more GPUs with --shard"


def report(c: Config) -> str:
    """What the run needs, as a table, and whether it fits. Raises ValueError or OSError without a model."""
    model = load_shape(data.find_model(c.model, weights=False))
    check_window(c, model.config)
    device = torch.device("cuda") if c.dry_run else device_of(c.device)
    kind, total = device.type, c.dry_run * 1e9 or device_bytes(device)
    cards = ranks()[1] if c.shard else 1
    plans = memory_plan(c, model, kind, total, cards)
    names = [name for name, size in (plans[0] | plans[1]).items() if size]
    plans = [plan | {"**peak**": sum(plan.values())} for plan in plans]
    cut = cache.parse_max_cut(c.max_cut) * (c.max_response if "." in c.max_cut else 1)
    suffix = c.max_response if c.rollout == "full" else min(c.max_response, cut / 2)
    rows = c.problems_per_step * c.group_size
    return "\n".join([
        f"{c.model} on {cards} {kind} of {total / 1e9:.1f} GB: {what_fits(c, model, kind, total, cards)}", "",
        "| GB | rollout | update |", "|---|---|---|",
        *("| " + " | ".join([name, *(f"{plan[name] / 1e9:.2f}" if name in plan else "" for plan in plans)])
          + " |" for name in (*names, "**peak**")), "",
        f"tokens sampled in a round: about {rows * suffix:,.0f} where suffixes are as long as what was cut "
        f"off, at most {rows * c.max_response:,}"])

"""What RPO does on one GPU: decoding, the update, a whole step, against full paths. No downloads.

    python benchmarks/gpu.py            # one 80 GB GPU, random weights in the sizes of Qwen2.5-1.5B; minutes
    python benchmarks/gpu.py --paper    # the same with paths as long as the paper's; whole steps only
    python benchmarks/gpu.py --toy      # a toy model, also on a CPU: shows only that this file works

Prints a table for docs/gpu.md, then one JSON object. Responses end at a length that is drawn beforehand,
exponential, because a random model does not end them. One round of sampling a step; first paths, answers and
the cache are not part of it. Full paths are also sampled by the continuous batching of transformers, and by
vLLM if it is installed; a row that fails says why.
"""
import contextlib
import gc
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator

from common import head, machine, parser, print_json, row

import numpy as np
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import rollout
import rpo
from data import Problem
from policy import Policy, Tree
from rewards import Group

SIZES = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
             num_key_value_heads=2, vocab_size=151936, max_position_embeddings=16384, rope_theta=1e6,
             tie_word_embeddings=True)
TOY = SIZES | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                   vocab_size=1024)
# problems, group size, prompt, mean path and suffix, longest, tokens of a forward, rows and steps of decoding
WORK = (64, 8, 150, 800, 150, 3072, 16384, (64, 256, 512), 64)
PAPER_WORK = (64, 8, 150, 2690, 150, 8192, 16384, (), 0)  # L = 300
TOY_WORK = (3, 4, 8, 40, 10, 90, 512, (8, 16), 16)


def random_model(sizes: dict, device: torch.device, dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    with device:
        return Qwen2ForCausalLM(Qwen2Config(**sizes)).to(dtype).eval()


def requests_of(problems: int, group: int, context: int, mean: int, longest: int) -> list[rollout.Request]:
    """Contexts of random tokens; the rows of one all end after a number of tokens that is drawn here."""
    rng = np.random.default_rng(0)
    budgets = np.clip(rng.exponential(mean, problems), 1, longest).astype(int).tolist()
    return [rollout.Request(rng.integers(5, 1000, context).tolist(), budget, [(i, g) for g in range(group)])
            for i, budget in enumerate(budgets)]


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float, object]:
    """Seconds, peak GiB and result of `work`."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0, result


@contextlib.contextmanager
def eager(policy: Policy) -> Iterator[None]:
    """Decoding without CUDA graphs."""
    attention, policy.paged_attention = policy.paged_attention, None
    try:
        yield
    finally:
        policy.paged_attention = attention


def decode_step(policy: Policy, how: rollout.Sampling, rows: int, group: int, context: int, memory: float,
                steps: int) -> float:
    """ms of one step: the difference of two runs that differ in length only."""
    def run(budget: int) -> float:
        requests = [rollout.Request(r.context, budget, r.seeds)
                    for r in requests_of(rows // group, group, context, 1, 1)]
        return timed(lambda: rollout.generate(policy, requests, how, memory), policy.device)[0]
    run(17)
    return 1000 * (run(17 + steps) - run(17)) / steps


def update(policy: Policy, optimizer: torch.optim.Optimizer, requests: list[rollout.Request],
           suffixes: list[list[rollout.Suffix]], tokens: int) -> None:
    """One step of DAPO on these responses, of which every second one counts as right."""
    groups = [Group(Problem(str(i), "", "", ""), [], r.context, r.budget, [x.ids for x in row],
                    [x.logprobs for x in row], [True] * len(row), [k % 2 == 0 for k in range(len(row))],
                    [float(k % 2 == 0) for k in range(len(row))])
              for i, (r, row) in enumerate(zip(requests, suffixes))]
    objective = rpo.ALGORITHMS["dapo"]
    advantages = [rpo.group_advantages(group.rewards, objective.advantage) for group in groups]
    rpo.update(policy, None, optimizer, groups, advantages, objective, 1.0, 1, tokens)


def by_transformers(sizes: dict, requests: list[rollout.Request], device: torch.device) -> float:
    """Seconds of the same rows by continuous batching."""
    if device.type == "cuda" and not importlib.util.find_spec("flash_attn"):
        raise ImportError("needs flash-attn; with the attention of torch it does not end in minutes")
    model = random_model(sizes, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)

    def work() -> None:
        with model.continuous_batching_context_manager(generation_config=config) as manager:
            rows = [manager.add_request(r.context, max_new_tokens=r.budget)
                    for r in requests for _ in r.seeds]
            if len(list(itertools.islice(manager, len(rows)))) < len(rows):
                raise RuntimeError("it ended before all responses did")
    return timed(work, device)[0]


def by_vllm(sizes: dict, requests: list[rollout.Request], device: torch.device) -> float:
    """The same by vLLM, from a folder with the same random weights."""
    from vllm import LLM, SamplingParams
    with tempfile.TemporaryDirectory() as folder:
        random_model(sizes, torch.device("cpu"), torch.bfloat16).save_pretrained(folder)
        engine = LLM(model=folder, skip_tokenizer_init=True, dtype="bfloat16", gpu_memory_utilization=0.5)
    prompts = [{"prompt_token_ids": r.context} for r in requests for _ in r.seeds]
    options = [SamplingParams(temperature=1.0, max_tokens=r.budget, ignore_eos=True, detokenize=False)
               for r in requests for _ in r.seeds]
    return timed(lambda: engine.generate(prompts, options), device)[0]


def main() -> None:
    command = parser(__doc__)
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--toy", action="store_true")
    kind.add_argument("--paper", action="store_true")
    args = command.parse_args()
    sizes = TOY if args.toy else SIZES
    problems, group, prompt, path, mean, longest, tokens, decode_rows, steps = \
        TOY_WORK if args.toy else PAPER_WORK if args.paper else WORK
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.toy:
        command.error("no GPU here: --toy shows that this file works")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{'toy' if args.toy else '1.5B'}, {machine()}, {card}, {problems} problems x {group} responses; "
          f"tokens of a prompt {prompt}, path {path}, suffix {mean}\n")
    print(head("what", "time", "peak GiB"))
    result = {}

    def add(name: str, value: float, unit: str, peak: float = 0.0) -> None:
        result[name] = value
        print(row(name, f"{value:.3g} {unit}", f"{peak:.1f}" if peak else ""), flush=True)

    policy = Policy(random_model(sizes, device, torch.float32), sizes["vocab_size"],
                    torch.bfloat16 if device.type == "cuda" else torch.float32)
    how, memory = rollout.Sampling((), policy.vocab_size), rollout.default_memory(device)
    seconds, peak, _ = timed(lambda: rollout.use_pages(policy), device)
    graphs = policy.paged_attention is not None
    add(f"self-check: {'CUDA graphs are used' if graphs else 'decoding stays eager'}", seconds, "s", peak)
    for rows in decode_rows:
        with eager(policy):
            add(f"decode step, {rows} rows, eager",
                decode_step(policy, how, rows, group, prompt + path - mean, memory, steps), "ms")
        if graphs:
            add(f"decode step, {rows} rows, graph",
                decode_step(policy, how, rows, group, prompt + path - mean, memory, steps), "ms")
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    # a step of either kind: RPO scores its paths first, to choose where they are cut
    paths = [Tree(r.context[:prompt], [r.context[prompt:]])
             for r in requests_of(problems, 1, prompt + path, 1, 1)]
    score = timed(lambda: rpo.score(policy, paths, 1.0, tokens), device)[:2]
    add("RPO: path scoring", score[0], "s", score[1])
    for name, before, context, length in (("RPO", score[0], prompt + path - mean, mean),
                                          ("full paths", 0.0, prompt, path)):
        requests = requests_of(problems, group, context, length, longest)
        sampling, peak, suffixes = timed(lambda: rollout.generate(policy, requests, how, memory), device)
        add(f"{name}: rollout of {sum(r.budget for r in requests) * group:,} tokens", sampling, "s", peak)
        training, peak, _ = timed(lambda: update(policy, optimizer, requests, suffixes, tokens), device)
        add(f"{name}: update", training, "s", peak)
        add(f"{name}: whole step", before + sampling + training, "s")
    del policy, optimizer, suffixes
    for name, work in {"transformers, continuous batching": by_transformers, "vLLM": by_vllm}.items():
        try:
            add(f"full paths: rollout by {name}", work(sizes, requests, device), "s")
        except Exception as error:  # whatever another engine raises; its row is a comparison, no more
            reason = f"{type(error).__name__}: {str(error)[:80]}"  # not installed: pip install vllm
            print(row(f"full paths: rollout by {name}", reason, ""))
    print_json(result)


if __name__ == "__main__":
    main()

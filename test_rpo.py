"""Tests: numbers by hand or by an independent path (a plain full-sequence forward, model.generate)."""
import ast
import contextlib
import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel,
                          PreTrainedTokenizerBase, Qwen2Model)

import answers
import cache
import data
import eval as evaluation
import policy as policies
import rewards
import rollout
import rpo
import train
from answers import Checker, extract_answer, is_correct, parse_error
from benchmarks import memory
from policy import Policy, Tree, load_policy, pack, padded
from rewards import Group, length_rewards

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
TINY = Path(__file__).parent / "tiny"
SHARED = Path(__file__).parent.parent / "shared"  # labelled answers, where they are at hand
needs_shared = pytest.mark.skipif(not (SHARED / "verifier").is_dir(), reason="labelled answers not present")
KINDS = ["Qwen2", "Qwen3", "Llama"]
VOCAB = 60


def random_model(kind: str, **sizes) -> PreTrainedModel:
    """A small random model with grouped-query attention; weights so large that its logits differ clearly."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, vocab_size=VOCAB + 4, max_position_embeddings=256,
                 initializer_range=0.25, bos_token_id=None, eos_token_id=None, pad_token_id=None) | sizes
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """float64 throughout: transformers computes RMSNorm in float32 always, which hides errors of 1e-9."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: m.weight * x * (x.square().mean(-1, keepdim=True)
                                                                 + m.variance_epsilon).rsqrt()
    return model


def token_lists(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def plain_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """An ordinary forward over one whole sequence (sdpa: eager has its softmax in float32 always)."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    try:
        return model(torch.tensor([ids])).logits[0]
    finally:
        model.config._attn_implementation = before


def plain_logprobs(model: PreTrainedModel, context: list[int], suffix: list[int], temperature: float,
                   vocab_size: int = VOCAB) -> torch.Tensor:
    logits = plain_logits(model, context + suffix)[len(context) - 1:-1, :vocab_size] / temperature
    return logits.log_softmax(-1)[range(len(suffix)), suffix]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm().clamp_min(1e-30))


@contextlib.contextmanager
def hooked(kind: type, before: Callable = lambda: None, after: Callable = lambda out: None) -> Iterator[None]:
    """Call `before` and `after`, which may give another output, around each forward of such a module."""
    hooks = torch.nn.modules.module
    with contextlib.ExitStack() as handles:
        handles.enter_context(hooks.register_module_forward_pre_hook(
            lambda module, inputs: before() if isinstance(module, kind) else None))
        handles.enter_context(hooks.register_module_forward_hook(
            lambda module, inputs, out: after(out) if isinstance(module, kind) else None))
        yield


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("scarce")


# ---------------------------------------------------------------------------- rollout


def greedy_by_generate(model, context: list[int], budget: int, eos: tuple[int, ...]) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=budget, eos_token_id=list(eos), pad_token_id=0)
    ids = torch.tensor([context])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(context):].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [1.0, 0.0006])  # the second one lets in a few problems at a time
@pytest.mark.parametrize("fused", [True, False])  # the second one is what other devices run
def test_greedy_equals_generate_for_ragged_prefixes(kind, memory, fused):
    contexts = token_lists(1, [3, 17, 1, 30, 9, 17, 25, 2])
    budgets = [12, 5, 20, 1, 9, 14, 7, 3]
    model = random_model(kind, vocab_size=VOCAB)
    free = [greedy_by_generate(model, c, b, ()) for c, b in zip(contexts, budgets)]
    eos = (free[0][4], free[5][2])  # ids that do come up, so that rows leave early and at different times
    expected = [next((f[:i + 1] for i, token in enumerate(f) if token in eos), f) for f in free]
    assert len({len(e) for e in expected}) > 3
    groups = [1, 3, 2, 1, 4, 2, 3, 1]
    requests = [rollout.Request(c, b, [(0,)] * g) for c, b, g in zip(contexts, budgets, groups)]
    how = rollout.Sampling(eos, VOCAB, temperature=0)
    policy = Policy(model, VOCAB)
    policy.fused = fused
    with rollout.packed_weights(model, 99, smallest=0):  # of this small model, too
        assert "forward" in vars(model.lm_head)
        results = rollout.generate(policy, requests, how, memory)
    assert "forward" not in vars(model.lm_head)
    for request, suffixes, want in zip(requests, results, expected):
        assert len(suffixes) == len(request.seeds)
        for suffix in suffixes:
            assert suffix.ids == want
            assert suffix.finished == (want[-1] in eos)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_logprobs_are_those_of_a_plain_forward(kind):
    policy = Policy(random_model(kind), VOCAB)
    contexts = token_lists(2, [4, 21, 11])
    requests = [rollout.Request(c, b, [(7, i, row) for row in range(5)])
                for i, (c, b) in enumerate(zip(contexts, [9, 3, 14]))]
    how = rollout.Sampling((3, 5), VOCAB, temperature=0.7)
    for request, suffixes in zip(requests, rollout.generate(policy, requests, how, 1.0)):
        assert len({tuple(s.ids) for s in suffixes}) > 1
        for suffix in suffixes:
            want = plain_logprobs(policy.model, request.context, suffix.ids, 0.7)
            assert torch.allclose(torch.tensor(suffix.logprobs), want, atol=1e-4)


def test_a_row_does_not_depend_on_what_else_is_in_the_batch():
    policy = Policy(random_model("Qwen2"), VOCAB)
    requests = [rollout.Request(c, 12, [(3, i, row) for row in range(4)])
                for i, c in enumerate(token_lists(3, [5, 19, 8, 13]))]
    how = rollout.Sampling((1, 2), VOCAB)
    together = rollout.generate(policy, requests, how, 1.0)
    alone = [rollout.generate(policy, [r], how, 1.0)[0] for r in requests]
    assert [[s.ids for s in group] for group in together] == [[s.ids for s in group] for group in alone]


def test_out_of_memory_while_sampling_halves_the_memory_and_keeps_what_is_finished(capsys):
    policy, done, failed = Policy(random_model("Qwen2"), VOCAB), [], []
    requests = [rollout.Request(c, budget, [(i, row) for row in range(3)])
                for i, (c, budget) in enumerate(zip(token_lists(3, [5, 19, 8, 13]), [4, 9, 12, 6]))]
    how = rollout.Sampling((), VOCAB)
    want = rollout.generate(policy, requests, how, 0.013)

    def scarce() -> None:
        if done and not failed:  # after a first request is finished
            failed.extend(done)
            out_of_memory()
    with hooked(Qwen2Model, scarce):
        got = rollout.generate(policy, requests, how, 0.013, "", lambda *finished: done.append(finished))
    assert failed and sorted(done) == list(enumerate(got))  # each of them once
    assert [[s.ids for s in group] for group in got] == [[s.ids for s in group] for group in want]
    assert "half of --rollout-memory 0.013" in capsys.readouterr().out
    with hooked(Qwen2Model, out_of_memory), pytest.raises(torch.OutOfMemoryError):
        rollout.generate(policy, requests, how, 0.013)


def emulated_paged_attention(query, key, value, starts, longest, used, pages, scaling):
    """What the CUDA kernel computes, segment by segment; NaN where it leaves memory as it is."""
    out, lse = torch.full_like(query, math.nan), torch.full(query.shape[:2], math.nan)
    for start, end, n, own in zip(starts.tolist(), starts.tolist()[1:], used.tolist(), pages.tolist()):
        assert 0 <= end - start <= longest and end <= len(query) and n <= len(own) * rollout.PAGE
        if start < end:
            k, v = (x[own].flatten(0, 1)[:n].transpose(0, 1).double() for x in (key, value))
            scores = query[start:end].transpose(0, 1).double() @ k.transpose(1, 2) * scaling
            out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
            lse[start:end] = scores.logsumexp(-1).T
    return out, lse


def ragged_requests() -> list[rollout.Request]:
    contexts = token_lists(1, [3, 17, 1, 30, 9, 17, 25, 2])
    sizes = zip(contexts, [12, 5, 20, 1, 37, 14, 30, 21], [1, 3, 2, 1, 4, 2, 3, 4])
    return [rollout.Request(context, budget, [(i, row) for row in range(group)])
            for i, (context, budget, group) in enumerate(sizes)]


@pytest.mark.parametrize("page, memory, eos, top_p", [
    (256, 1.0, (3, 4, 5), 1.0), (4, 1.0, (3, 4, 5), 0.8), (4, 1e-4, (), 1.0)])  # the last: rows make room
def test_decoding_in_static_shapes_gives_the_same_ids_and_logprobs(page, memory, eos, top_p, monkeypatch):
    monkeypatch.setattr(rollout, "PAGE", page)
    policy, requests, rows = Policy(in_float64(random_model("Qwen2")), VOCAB), ragged_requests(), set()
    cut = (lambda weights: evaluation.truncate(weights, top_p, 0)) if top_p < 1 else None
    how = rollout.Sampling(eos, VOCAB, 0.9, cut)
    want = rollout.generate(policy, requests, how, 1.0)
    policy.paged_attention = emulated_paged_attention
    with hooked(Qwen2Model, after=lambda out: rows.add(len(out.last_hidden_state))):
        got = rollout.generate(policy, requests, how, memory)
    assert rows >= ({8, 32} if memory == 1.0 else {8, 16})
    for a, b in zip(itertools.chain(*got), itertools.chain(*want)):
        assert a.ids == b.ids and a.finished == b.finished
        assert np.allclose(a.logprobs, b.logprobs, rtol=0, atol=5e-6)


class Calls(TorchDispatchMode):
    """(operation, shape of its first argument) of all that runs inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket.__name__, tuple(getattr(args[0], "shape", ())) if args else ()))
        return func(*args, **kwargs or {})


def test_a_step_in_static_shapes_never_waits_for_the_device_and_casts_no_weight():
    model = random_model("Qwen2", hidden_size=24, vocab_size=300)  # no activation has the shape of a weight
    policy = Policy(model, 290, torch.bfloat16)
    policy.fused = False  # as on CUDA, where the head computes in bfloat16
    policy.paged_attention = lambda query, *rest: (query, query[..., 0].float())  # the emulated one does wait
    context = [3, 4, 5]
    decoder = rollout.PagedDecoder(policy, [rollout.Request(context, 9, [(0,)] * 5)], 1.0)
    ids, how = torch.arange(5), rollout.Sampling((2,), 290)
    with torch.no_grad(), policy.autocast():
        assert all(decoder.enter(0, context) for _ in range(5))
        decoder.prefill({0: context})
        assert decoder.start(3)
        with Calls() as calls:
            for numbers in torch.rand(3, 5):
                ids, _ = rollout.sample(decoder.decode(ids), numbers, how)
    names = Counter(name for name, _ in calls.seen)
    waits = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "lift_fresh", "equal"}
    assert names["searchsorted"] == 6 and not waits & names.keys()
    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    assert not weights & {shape for name, shape in calls.seen if name == "_to_copy"}


def test_the_cuda_kernel_takes_what_the_decoder_gives_it():
    kv = torch.empty(9, 256, 2, 64, device="meta", dtype=torch.bfloat16)
    numbers = torch.empty(5, device="meta")
    out, lse = rollout.paged_attention(kv.new_empty(12, 2, 64), kv, kv, numbers.int(), 6, numbers[:4].int(),
                                       numbers.new_empty(4, 3).int(), 0.125)
    assert out.shape == (12, 2, 64) and lse.shape == (12, 2) and lse.dtype == torch.float32


@pytest.mark.parametrize("fault, reason", [
    (lambda out, lse: (out, lse), ""), (lambda out, lse: (out, lse / math.log(2)), "log-probs differ by"),
    (lambda out, lse: (out * math.nan, lse), "log-probs differ by"),
    (lambda out, lse: torch.empty(-1), "negative dimension")])
def test_decoding_in_static_shapes_is_used_only_where_it_works(fault, reason, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "PAGE", 16)
    policy = Policy(random_model("Llama"), VOCAB)
    rollout.use_pages(policy, lambda *arguments: fault(*emulated_paged_attention(*arguments)))
    assert bool(policy.paged_attention) == (not reason)
    assert reason in capsys.readouterr().out and (reason or not rollout.use_pages(policy))


def test_slots_and_bytes_by_hand():
    # a token: keys and values of 3 layers, 2 heads of 8, 4 bytes: 384; logits of 64 ids: 256 bytes a copy
    context, rows = rollout.group_bytes(random_model("Qwen2").config, 10, 5, 4, torch.float32)
    assert (context, rows) == (10 * 384 + 256, 4 * (5 * 384 + 4 * 256))
    half = rollout.group_bytes(random_model("Qwen2").config, 10, 5, 4, torch.bfloat16)
    assert half == (10 * 192 + 256, 4 * (5 * 192 + 4 * 256))
    gib = (3 * context + rows) / 2**30
    assert rollout.slots(context, rows, 4, 2.5 * gib) == (6, 8)  # two groups; three contexts each
    assert rollout.slots(context, rows, 4, 0.99 * gib) == (1, 4)
    with pytest.raises(ValueError, match="--rollout-memory"):
        rollout.slots(context, rows, 4, (context + rows - 1) / 2**30)


def test_sampled_frequencies_are_the_softmax():
    """A padded embedding row, whose logit is the largest here, was once sampled."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 9.0])  # the last id lies beyond the tokenizer
    how = rollout.Sampling((), vocab_size=5, temperature=1.5)
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000, dtype=np.float32))
    ids, _ = rollout.sample(logits.expand(20_000, -1), uniforms, how)
    weights = [math.exp(x / 1.5) for x in (2.0, 1.0, 0.0, -1.0, 0.5)]
    expected = [20_000 * w / sum(weights) for w in weights]
    observed = [int((ids == i).sum()) for i in range(5)]
    assert sum(observed) == 20_000  # never the padded id
    chi_square = sum((o - e) ** 2 / e for o, e in zip(observed, expected))
    assert chi_square < 18.47  # 4 degrees of freedom, p = 0.001
    greedy, _ = rollout.sample(logits[None], uniforms[:1], replace(how, temperature=0))
    assert greedy.tolist() == [0]


def test_a_column_is_drawn_from_many_blocks_as_from_one_running_sum():
    rng = np.random.default_rng(0)
    weights = rng.random((40, 1000)).astype(np.float32) * (rng.random((40, 1000)) < 0.7)  # 30 %: never drawn
    uniforms = rng.random(40).astype(np.float32)
    uniforms[:3] = 0, 1 - 2**-24, 0.5
    got = rollout._invert(torch.from_numpy(weights).float(), torch.from_numpy(uniforms)).numpy()
    assert np.all(weights[np.arange(40), got] > 0)
    for row, u, column in zip(weights.astype(np.float64), uniforms, got):
        edges = np.concatenate([[0], row.cumsum()]) / row.sum()
        assert edges[column] - 1e-6 <= u <= edges[column + 1] + 1e-6


def test_top_p_of_a_large_vocabulary_keeps_what_sorting_keeps():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[0.1], [1.0], [2.0], [4.0], [9.0], [0.0]])
    logits = torch.randn(6, 5000, generator=generator) * scale
    probabilities = logits.double().softmax(-1)
    kept = evaluation.truncate((logits - logits.amax(-1, keepdim=True)).exp(), 0.9, 0) > 0
    for row, mask in zip(probabilities, kept):
        assert row[mask].sum() >= 0.9 - 1e-5 and row[mask].sum() - row[mask].min() < 0.9 + 1e-5
        assert row[mask].min() >= row[~mask].max() - 1e-12
    assert kept[0].sum() > 1024 > kept[4].sum()  # both ways were taken


def test_top_k_and_top_p_keep_the_crossing_token():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).expand(1000, -1)
    uniforms = torch.linspace(0, 1 - 2**-24, 1000)  # reaches both ends of the distribution

    def seen(top_p: float = 1.0, top_k: int = 0) -> dict[int, int]:
        how = rollout.Sampling((), 4, truncate=lambda weights: evaluation.truncate(weights, top_p, top_k))
        return dict(Counter(rollout.sample(logits, uniforms, how)[0].tolist()))

    assert set(seen()) == {0, 1, 2, 3}
    assert set(seen(top_k=2)) == {1, 2}
    assert seen(top_k=2)[1] == pytest.approx(1000 * 4 / 7, abs=2)
    assert set(seen(top_p=0.69)) == {1, 2}
    assert set(seen(top_p=0.71)) == {1, 2, 3}
    assert set(seen(top_p=0.01)) == {1}


# ------------------------------------------------------------------- shared-prefix log-probs


@pytest.mark.parametrize("kind, sizes, reason", [
    ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1), "sliding_window"),
    ("Gemma2", dict(layer_types=["full_attention"] * 3, attn_logit_softcapping=2.0), "softcap"),
    ("Gemma2", dict(layer_types=["full_attention"] * 3, attn_logit_softcapping=None,
                    final_logit_softcapping=2.0), "logits differ")])
def test_a_model_that_cannot_share_prefixes_is_refused_in_one_sentence(kind, sizes, reason):
    with pytest.raises(ValueError, match=f"--model: .* cannot share prefixes .*{reason}") as error:
        Policy(random_model(kind, **sizes), VOCAB)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, config, reason", [
    ("multimodal", dict(model_type="llava"), "a llava model is no language model of text alone"),
    ("encoder and decoder", dict(model_type="t5"), "a t5 model is no language model of text alone"),
    ("gptq", dict(quantization_config=dict(quant_method="gptq", bits=4)), "quantized: give .* the original"),
    ("mlx", dict(quantization=dict(bits=4, group_size=64)), "quantized: give .* the original")])
def test_a_folder_of_another_kind_is_refused_in_one_sentence(tmp_path, name, config, reason):
    """Multimodal folders printed the names of 160 classes, quantized ones what else to install."""
    folder = shutil.copytree(TINY, tmp_path / name)
    (folder / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | config))
    with pytest.raises(ValueError, match=f"--model: .* cannot be loaded .*{reason}") as error:
        load_policy(folder, VOCAB, torch.device("cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind, config", [
    ("OPT", dict(vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                 word_embed_proj_dim=32, dropout=0.1)),
    ("Bloom", dict(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))])
def test_opt_runs_and_bloom_is_refused(kind, config):
    """BLOOM has its own attention, but near zero its logits are close; OPT's dropout acts by function."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind + "Config")(**config, pad_token_id=1))
    if kind == "Bloom":
        with pytest.raises(ValueError, match="cannot share prefixes .not all of its layers"):
            Policy(model, VOCAB)
        return
    policy, batch = Policy(model, VOCAB).train(), pack([Tree([4, 2, 3], [[4, 5], [6, 7]])])
    want = plain_logprobs(model.eval(), [4, 2, 3], [4, 5], 1.0)
    assert policy.train()(batch)[0][0].tolist() == pytest.approx(want.tolist(), abs=1e-5)


def test_dropout_is_off():
    model = random_model("Qwen2")
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Dropout(0.5))
    policy, batch = Policy(model, VOCAB).train(), pack([Tree([1, 2, 3], [[4, 5], [6, 7]])])
    assert torch.equal(policy(batch)[0], policy(batch)[0])


def test_pack_by_hand():
    """Masks came from ids once: with one id for EOS and padding, 0 here, no EOS was ever trained."""
    batch = pack([Tree([7, 8], [[2, 0], [0]]), Tree([9], [[3]])])
    assert batch.input_ids.tolist() == [[7, 8, 2, 0, 9]]  # the last token of a suffix is only predicted
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 0]]
    assert batch.mask.tolist() == [[True, True], [True, False], [True, False]]
    assert batch.targets.tolist() == [[2, 0], [0, 0], [3, 0]]
    assert batch.index[batch.mask].tolist() == [1, 2, 1, 4]
    assert Tree([0] * 6, [[0] * 4, [0] * 7]).packed_tokens == 6 + 2 * 6


BUDGET = 11  # of the first group: the longest suffix there could have been


def group_of(context: list[int], suffixes: list[list[int]], prefix: int = 0, **fields) -> Group:
    """A group whose prefix is the last `prefix` tokens of the context."""
    rows, split = len(suffixes), len(context) - prefix
    return Group(**dict(
        problem=None, prompt=context[:split], prefix=context[split:], budget=BUDGET, suffixes=suffixes,
        logprobs=[[0.0] * len(s) for s in suffixes], finished=[True] * rows, correct=[False] * rows,
        rewards=[0.0] * rows) | fields)


def groups_of(contexts: list[int], lengths: list[list[int]], seed: int = 5) -> list[Group]:
    suffixes = [token_lists(seed + i + 1, row) for i, row in enumerate(lengths)]
    return [group_of(c, s, len(c) // 2, budget=BUDGET - i)
            for i, (c, s) in enumerate(zip(token_lists(seed, contexts), suffixes))]


# suffixes of one token, a context of one token; and one suffix twice, in a group that comes twice
GROUPS = groups_of([6, 19, 1], [[4, 1, 7], [1, 1, 1], [5, 2, 9]])
GROUPS[0].suffixes[1:1] = [GROUPS[0].suffixes[0]]
GROUPS[0].logprobs[1:1] = [GROUPS[0].logprobs[0]]
GROUPS.append(replace(GROUPS[0], budget=2))
TREES = [Tree(g.context, g.suffixes) for g in GROUPS]
ADVANTAGES = [np.random.default_rng(i).normal(size=len(g.suffixes)).astype(np.float32).tolist()
              for i, g in enumerate(GROUPS)]
Table = list[list[list[float]]]  # by group, suffix and token


def plain_table(model: PreTrainedModel) -> list[list[torch.Tensor]]:
    """Log-probs of all suffix tokens by plain forwards, with gradient."""
    return [[plain_logprobs(model, g.context, s, 0.8) for s in g.suffixes] for g in GROUPS]


def as_floats(table: list[list[torch.Tensor]], noise: int = 0) -> Table:
    """In numbers that float32 holds exactly; with noise of that seed."""
    generator = torch.Generator().manual_seed(noise)
    scale = 0.3 * bool(noise)
    return [[(x.detach() + scale * torch.randn(x.shape, generator=generator)).float().tolist() for x in rows]
            for rows in table]


def plain_loss(table: list[list[torch.Tensor]], algo: str, old: Table, ref: Table, kl_coef: float,
               which: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
    """The objective written out response by response, token by token."""
    high = {"dapo": 1.28, "gspo": 1.0004}.get(algo, 1.2)
    low = 1 - 3e-4 if algo == "gspo" else 0.8
    total, tokens, responses = 0.0, 0, 0
    for i in which:
        for row, advantage in enumerate(ADVANTAGES[i]):
            terms, diffs = [], [lp - old[i][row][t] for t, lp in enumerate(table[i][row])]
            for t, lp in enumerate(table[i][row]):
                ratio = torch.exp(sum(diffs) / len(diffs) if algo == "gspo" else diffs[t])
                term = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
                if algo == "cispo":
                    term = ratio.detach().clamp(max=5.0) * advantage * lp
                if kl_coef:
                    diff = ref[i][row][t] - lp
                    term = term - kl_coef * (torch.exp(diff) - diff - 1)
                terms.append(term)
            total = total + (sum(terms) / len(terms) if algo in ("grpo", "gspo") else sum(terms))
            tokens += len(terms)
            responses += 1
    return -total / {"dapo": tokens, "cispo": tokens, "dr_grpo": responses * BUDGET}.get(algo, responses)


def gradient(policy: Policy, algo: str, tokens_per_forward: int, old: Table | None = None,
             ref: Table | None = None, kl_coef: float = 0.0) -> list[torch.Tensor]:
    """That of one update through micro-batches."""
    objective = replace(rpo.ALGORITHMS[algo], kl_coef=kl_coef)
    rpo.accumulate_gradient(policy, GROUPS, ADVANTAGES, old, ref, objective, 0.8, tokens_per_forward)
    return [p.grad.clone() for p in policy.parameters()]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], bound: float) -> None:
    assert len(got) == len(want) and all(x < bound for x in map(relative_error, got, want))  # no NaN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logprobs_and_gradients_equal_full_sequence_forwards(kind, dtype, bound):
    """Log-probs were found by a suffix's ids once: two responses alike shared one entry."""
    model = in_float64(random_model(kind)) if dtype == torch.float64 else random_model(kind)
    table, expected = plain_table(model), {}
    old, ref = as_floats(table, 3), as_floats(table, 4)
    for algo in rpo.ALGORITHMS:
        for kl_coef in (0.0, 0.1) if algo in ("grpo", "dapo") else (0.1,):
            expected[algo, kl_coef] = torch.autograd.grad(plain_loss(table, algo, old, ref, kl_coef),
                                                          list(model.parameters()), retain_graph=True)
    policy = Policy(model, VOCAB)
    batch = pack(TREES)
    got, _ = policy(batch, 0.8)
    want = torch.cat([row for group in table for row in group])
    assert relative_error(got[batch.mask], want) < bound
    assert not got[~batch.mask].any()
    for (algo, kl_coef), grads in expected.items():
        for checkpointing in (False, True) if algo == "dapo" else (False,):
            # row by row, about one problem, all at once
            for tokens_per_forward in (1, 40, 10_000) if algo == "dapo" else (40,):
                if checkpointing:
                    model.activation_checkpointing_enable({"use_reentrant": False})
                    policy.train()
                got = gradient(policy, algo, tokens_per_forward, old, ref, kl_coef)
                model.activation_checkpointing_disable()
                policy.eval()
                assert_close(got, grads, bound)


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that is made in this context, and of those that are casts."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.seen = getattr(self, "seen", set()) | {tuple(getattr(out, "shape", ()))}
        if function is torch.ops.aten._to_copy.default:
            self.casts = [*getattr(self, "casts", []), tuple(out.shape)]
        return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [18, 20])  # 2 of the 20 rows are padding, left out on a CPU only
def test_logprobs_entropies_and_gradients_of_the_head_are_those_of_log_softmax(width, bias):
    generator = torch.Generator().manual_seed(0)
    states, weight, offset = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
                              for shape in ((13, 8), (20, 8), (20,)))
    targets, upstream = torch.arange(13), torch.randn(13, generator=generator, dtype=torch.float64)
    plain = ((states @ weight.T + (offset if bias else 0))[:, :18] / 0.7).log_softmax(-1)
    want = torch.autograd.grad((plain[range(13), targets] * upstream).sum(),
                               (states, weight, offset)[:2 + bias])

    def head(weight: torch.Tensor, offset: torch.Tensor, rows: int, dtype=torch.float64) -> tuple:
        return policies._TokenLogprobs.apply(states, weight, offset if bias else None, targets, 0.7, 18,
                                             width, dtype, rows)
    for rows in (1, 5, 100):
        got, entropy = head(weight, offset, rows)
        assert torch.allclose(got, plain[range(13), targets], rtol=1e-12)
        assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), rtol=1e-12)
        assert not entropy.requires_grad
        grads = torch.autograd.grad((got * upstream).sum(), (states, weight, offset)[:2 + bias])
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(grads, want))
    got, _ = head(weight.detach(), offset.detach(), 5)
    with Shapes() as shapes:
        (got * upstream).sum().backward()
    assert torch.allclose(states.grad, want[0], rtol=1e-10, atol=1e-13)
    assert width == 20 or not shapes.seen & {(20, 8), (20,)}  # no gradient of a frozen head is made
    # products of bfloat16 factors are float32; the factors are rounded once a call, not once a chunk
    x, w = (t.detach().bfloat16().double() for t in (states, weight))
    exact = ((x @ w.T + (offset if bias else 0))[:, :18] / 0.7).log_softmax(-1)[range(13), targets]
    with Shapes() as shapes:
        got, _ = head(weight, offset, 1, torch.bfloat16)
    assert torch.allclose(got.double(), exact, atol=1e-5) and shapes.casts.count((width, 8)) == 1


def test_scores_and_logits_are_float32_before_the_softmax():
    """Scores rounded to bfloat16 made the sampling gap 7 times as large."""
    policy, generator = Policy(random_model("Qwen2"), VOCAB, torch.bfloat16), torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 5, 8, generator=generator).bfloat16() * 4 for heads in (4, 2))
    states = torch.randn(3, 32, generator=generator)
    with policy.autocast():
        _, lse = policies.partial_attention(query, key, key, 0.3, None, False)
        logits = policy.logits(states, policy.head_weight())
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.3
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-6)
    assert torch.allclose(logits, states @ policy.model.lm_head.weight.T, rtol=1e-5)


def test_logits_in_chunks_give_the_same_gradient_and_are_never_all_there():
    policy = Policy(random_model("Qwen2"), VOCAB)
    whole = gradient(policy, "dapo", 10_000)
    policy.logits_per_chunk = 5 * VOCAB
    with Shapes() as shapes:
        assert_close(gradient(policy, "dapo", 10_000), whole, 1e-5)
    # 5 of 51 tokens at a time; 32 is the head, transposed
    assert {s[0] for s in shapes.seen if s[1:] == (VOCAB,)} == {5, 1, 32}


def flash_forward(query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
    """aten._flash_attention_forward in float64, one segment at a time; NaN where it leaves memory unset."""
    out = torch.full_like(query, math.nan)
    lse = torch.full(query.shape[1::-1], math.nan, dtype=torch.promote_types(query.dtype, torch.float32))
    for q, k in flash_segments(query, key, cu_q, cu_k, max_q, max_k):
        scores = flash_scores(query[q], key[k], causal, scale)
        lse[:, q] = scores.logsumexp(-1)
        out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), flash_heads(value[k], query)).to(out.dtype)
    return out, lse, None, None, None


def flash_backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused,
                   *, scale):
    """aten._flash_attention_backward likewise: p = exp(score - lse), whatever else out and lse are over."""
    assert grad.is_contiguous() and lse.is_contiguous()
    grads = [torch.full_like(x, math.nan) for x in (query, key, value)]
    for q, k in flash_segments(query, key, cu_q, cu_k, max_q, max_k):
        p = (flash_scores(query[q], key[k], causal, scale) - lse[:, q, None].double()).exp()
        g, v = grad[q].double(), flash_heads(value[k], query)
        delta = (g * out[q].double()).sum(-1).T[..., None]
        d_scores = p * (torch.einsum("qhd,khd->hqk", g, v) - delta) * scale
        parts = (torch.einsum("hqk,khd->qhd", d_scores, flash_heads(key[k], query)),
                 torch.einsum("hqk,qhd->khd", d_scores, query[q].double()),
                 torch.einsum("hqk,qhd->khd", p, g))
        for whole, part, where in zip(grads, parts, (q, k, k)):
            whole[where] = part.unflatten(1, (whole.shape[1], -1)).sum(2).to(whole.dtype)
    return tuple(grads)


def flash_segments(query, key, cu_q, cu_k, max_q, max_k) -> Iterator[tuple[slice, slice]]:
    assert cu_q.dtype == cu_k.dtype == torch.int32 and query.stride(-1) == key.stride(-1) == 1
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(query), len(key))  # every key is somewhere
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max())) and cu_k.diff().min() > 0
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist())):
        yield slice(a, b), slice(c, d)


def flash_heads(keys, query) -> torch.Tensor:
    return keys.double().repeat_interleave(query.shape[1] // keys.shape[1], 1)


def flash_scores(query, key, causal, scale) -> torch.Tensor:
    scores = torch.einsum("qhd,khd->hqk", query.double(), flash_heads(key, query)) * scale
    return scores + torch.full_like(scores, -math.inf).triu(1) if causal else scores


FLASH = policies.Kernel(partial(policies._varlen_forward, flash_forward),  # what CUDA runs
                        partial(policies._varlen_backward, flash_backward))
KERNELS = {"cpu": policies.CPU, "plain": policies.PLAIN, "flash": FLASH}
# of one token, of the same token twice; contexts without a suffix token that is attended to
RAGGED = [Tree([1] * p, [[2] * n for n in lens]) for p, lens in (
    (9, [1, 1]), (6, [7, 7, 3, 1]), (1, [4]), (5, [6, 6]), (5, [6, 2]), (3, [1]))]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
def test_attention_and_its_gradient_are_those_of_a_dense_mask(kernel, ragged, dtype, bound):
    batch, generator = pack(RAGGED, ragged=ragged), torch.Generator().manual_seed(0)
    family: list[tuple] = []  # of each token: its tree, its suffix or None for a context
    for i, tree in enumerate(RAGGED):
        family += [(i, None)] * len(tree.context)
        for row, suffix in enumerate(tree.suffixes):
            family += [(i, row)] * ((len(suffix) if ragged else max(map(len, tree.suffixes))) - 1)
    n = batch.input_ids.numel()
    assert n == len(family)
    mask = torch.tensor([[b <= a and family[b] in (family[a], (family[a][0], None)) for b in range(n)]
                         for a in range(n)])
    *inputs, upstream = (torch.randn(1, n, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2, 4))
    inputs, results = [x.transpose(1, 2) for x in inputs], []
    for exact in (True, False):
        leaves = [x.to(torch.float64 if exact else dtype).detach().requires_grad_() for x in inputs]
        query, *keys = leaves
        if exact:
            key, value = (x.repeat_interleave(2, 1) for x in keys)
            weights = (query @ key.mT * 0.3).masked_fill(~mask, -math.inf).softmax(-1)
            out = (weights @ value).transpose(1, 2)
        else:
            out = policies.Packed(batch, KERNELS[kernel]).attend(0, query, *keys, 0.3)
        assert out.shape == upstream.shape
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    want, got = results
    assert_close([x.double() for x in got], want, bound)


def test_cuda_takes_these_arguments():
    """The real operators, for shapes only."""
    segments = policies.Segments([3, 4], [5, 2], False, torch.device("meta"))
    query, key = (torch.empty(7, heads, 8, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    out, lse = policies.CUDA.forward(segments, 0.3, query, key, key)
    assert (out.shape, lse.shape, lse.dtype) == ((7, 4, 8), (7, 4), torch.float32)
    grads = policies.CUDA.backward(segments, 0.3, query, key, key, out, lse, out)
    assert [x.shape for x in grads] == [(7, 4, 8), (7, 2, 8), (7, 2, 8)]


def broken(change: Callable[[list], None], backward: bool = False) -> policies.Kernel:
    """The CPU's kernel with something wrong in what it returns."""
    def wrong(*args):
        results = list(policies.CPU[backward](*args))
        change(results)
        return results
    return policies.CPU._replace(**{"backward" if backward else "forward": wrong})


@pytest.mark.parametrize("kernel, word", [
    (broken(lambda x: x[1].mul_(0.9)), "off by"), (broken(lambda x: x[2].mul_(1.1), True), "off by"),
    (broken(lambda x: x[1][-1].fill_(math.nan), True), "off by nan"), (policies.CUDA, "CPU")],
    ids=["lse", "gradient", "nan", "missing"])
def test_a_wrong_kernel_is_replaced_with_one_note(kernel, word, capsys):
    data.say_once.cache_clear()
    policy = Policy(random_model("Qwen2"), VOCAB, torch.bfloat16, kernel)
    Policy(random_model("Qwen2"), VOCAB, torch.bfloat16, kernel)
    note = capsys.readouterr().out
    assert policy.kernel is policies.PLAIN and word in note and note.count("without the fused kernel") == 1
    for right in KERNELS.values():
        assert Policy(random_model("Qwen2"), VOCAB, torch.bfloat16, right).kernel is right
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["plain", "flash"])
def test_what_other_devices_run_is_the_same_function(kernel):
    policy = Policy(random_model("Qwen2"), VOCAB)
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    policy.train()
    want = policy(pack(TREES), 0.8)[0]
    grads = torch.autograd.grad(want.square().sum(), list(policy.parameters()))
    policy.kernel, batch = KERNELS[kernel], pack(TREES, ragged=True)
    assert batch.input_ids.numel() < pack(TREES).input_ids.numel()  # no padding
    got = policy(batch, 0.8)[0]
    assert torch.allclose(got, want, atol=1e-5)
    assert_close(torch.autograd.grad(got.square().sum(), list(policy.parameters())), grads, 1e-5)


def test_micro_batches_keep_within_the_budget_and_lose_nothing():
    trees = [Tree(g.context, g.suffixes) for g in groups_of([6, 19, 2], [[4, 1, 7], [9, 9], [3, 2, 2, 2]])]
    for budget in (10, 27, 50, 1000):
        parts = rpo.micro_batches(trees, budget)
        for part in parts:
            pieces = [rpo.rows_of(trees, piece) for piece in part]
            tokens = pack(pieces).input_ids.numel()
            assert tokens == sum(piece.packed_tokens for piece in pieces)
            assert tokens <= budget or len(part) == 1 and len(part[0][1]) == 1
        rows = sorted((i, row) for part in parts for i, rows in part for row in rows)
        assert rows == [(i, row) for i, tree in enumerate(trees) for row in range(len(tree.suffixes))]
    assert len(parts) == 1


def test_scores_are_those_of_a_plain_forward():
    policy = Policy(random_model("Qwen3"), VOCAB)
    want = [x for rows in as_floats(plain_table(policy.model)) for x in rows]
    for tokens_per_forward in (64, 10_000):
        got = [x for rows in rpo.score(policy, TREES, 0.8, tokens_per_forward) for x in rows]
        assert all(a == pytest.approx(b, abs=1e-4) for a, b in zip(got, want, strict=True))


# ------------------------------------------------------------------------------- the update


def sgd_by_hand(model, lr: float, updates: list[tuple[int, ...]], ref: Table) -> list[float]:
    """DAPO with a KL penalty, log-probs of before the first step, gradients of norm 1 at most: the norms."""
    old, norms = as_floats(plain_table(model)), []
    for which in updates:
        loss = plain_loss(plain_table(model), "dapo", old, ref, 0.1, which)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads):
                p -= lr * g / max(1, norms[-1])
    return norms


def test_two_updates_of_a_step_are_those_written_out_by_hand(capsys):
    """The i-th has every second group; out of memory halves the micro-batches and changes nothing else; one
    without a finite gradient is left out."""
    model, ref = in_float64(random_model("Qwen2")), in_float64(random_model("Qwen2"))
    with torch.no_grad():
        for p in ref.parameters():
            p *= 1.05
    start, table, plenty = copy.deepcopy(model.state_dict()), as_floats(plain_table(ref)), []
    sampled = [[[x + 0.25 for x in row] for row in rows] for rows in as_floats(plain_table(model))]
    groups = [replace(g, logprobs=rows) for g, rows in zip(GROUPS, sampled)]
    policy, ref = Policy(model, VOCAB), Policy(ref, VOCAB)

    def by_hand(*updates: tuple[int, ...]) -> list[float]:
        model.load_state_dict(start)
        norms = sgd_by_hand(model, 0.05, updates, table)
        want.extend(p.detach().clone() for p in model.parameters())
        return norms

    def update(advantages: list[list[float]], times: int = 1) -> tuple[dict[str, float], list[float]]:
        model.load_state_dict(start)
        optimizer, objective = torch.optim.SGD(model.parameters(), lr=0.05), rpo.ALGORITHMS["dapo"]
        result = rpo.update(policy, ref, optimizer, groups * times, advantages * times,
                            replace(objective, kl_coef=0.1), 0.8, 2, 130)
        assert_close(list(policy.parameters()), want, 1e-5)
        assert all(p.grad is None for p in policy.parameters()) and not policy.training
        return result

    want: list[torch.Tensor] = []
    norms = by_hand((0, 2), (1, 3))
    assert min(norms) > 1  # both are clipped
    metrics, got = update(ADVANTAGES)
    assert got == pytest.approx(norms, rel=1e-4)
    tokens = [sum(map(len, g.suffixes)) for g in GROUPS]
    assert metrics["policy/skipped_updates"] == 0 and metrics["tokens/trained"] == sum(tokens)
    assert metrics["policy/grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
    # log-probs of the rollout differ by 1/4 from those of the policy that is trained
    assert metrics["policy/sampling_gap_mean"] == pytest.approx(0.25, abs=1e-4)
    largest = math.exp(max(x for rows in sampled for row in rows for x in row))
    assert metrics["policy/probs_diff_max"] == pytest.approx(largest * (1 - math.exp(-0.25)), rel=1e-3)
    assert metrics["policy/approx_kl"] > 0 and metrics["policy/kl_ref"] > 0

    def scarce() -> None:
        plenty.append(torch.is_grad_enabled())
        if sum(plenty) == 2 and plenty[-1]:  # after the first micro-batch has left its gradient
            out_of_memory()
    with hooked(Policy, scarce):
        update(ADVANTAGES, times=3)  # of the same mean over tokens, in two micro-batches
    assert "half of --tokens-per-forward 130" in capsys.readouterr().out
    want.clear()
    by_hand((1, 3))
    metrics, norms = update([[math.nan] * len(ADVANTAGES[0]), *ADVANTAGES[1:]])
    assert not math.isfinite(norms[0]) and math.isfinite(norms[1])
    assert metrics["policy/skipped_updates"] == 1 and metrics["tokens/trained"] == tokens[1] + tokens[3]


# ------------------------------------------------------------------------------- objectives


def test_group_advantages_by_hand():
    """The rounding of a group's mean became a direction once, divided by a standard deviation of 1e-17."""
    # rewards 1 0 0 0: mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4, std 1/2
    assert rpo.group_advantages([1, 0, 0, 0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert rpo.group_advantages([0.1] * 6) == [0.0] * 6
    assert rpo.group_advantages([1.0]) == [0.0]
    assert rpo.group_advantages([1, 0, 0, 0], "mean") == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert rpo.group_advantages([1, 0, 0, 0], "leave_one_out") == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_a_step_counts_as_much_as_it_holds_of_a_full_one():
    whole = group_of([1, 2], [[3] * 4, [3] * 6])
    short = group_of([1] * 9, [[2], [2] * 3], prefix=8)  # 4 of 20 tokens are trained on
    assert rpo.step_weight([whole] * 4, 0) == 1 and rpo.step_weight([], 0) == rpo.step_weight([], 4) == 0
    assert rpo.step_weight([whole], 3) == pytest.approx(1 / 4)
    assert rpo.step_weight([short, whole], 0) == pytest.approx((4 + 10) / (20 + 10))
    assert rpo.step_weight([short, whole], 2) == pytest.approx((4 + 10) / (20 + 10) * 2 / 4)


def mask_of(*lengths: int) -> torch.Tensor:
    return padded([[True] * n for n in lengths], torch.bool)


def test_clipping_by_hand():
    # rows of one token, ratios 1.5, 1.5, 0.5, 0.5, 1.25 with advantages +1 -1 +1 -1 +1
    logprobs = torch.tensor([[1.5], [1.5], [0.5], [0.5], [1.25]]).log().requires_grad_()
    loss, stats = rpo.policy_loss(logprobs, mask_of(1, 1, 1, 1, 1), torch.tensor([1, -1, 1, -1, 1]), 5,
                                  rpo.Objective(clip_high=0.28, aggregation="token"), torch.zeros(5, 1))
    # 1.28 (clipped), -1.5, 0.5, -0.8 (clipped), 1.25
    assert loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8 + 1.25) / 5, abs=1e-6)
    assert stats["clip_fraction"] == 2
    loss.backward()
    # d(ratio)/d(logprob) = ratio where not clipped
    assert logprobs.grad[:, 0].tolist() == pytest.approx([0, 0.3, -0.1, 0, -0.25], abs=1e-6)


def test_the_six_algorithms_by_hand():
    # two responses of 1 and 3 tokens, advantages 2 and -1, every token's ratio 1.5, log pi = log 0.3
    mask, advantages, old = mask_of(1, 3), torch.tensor([2.0, -1.0]), torch.full((2, 3), math.log(0.2))
    groups = [group_of([1], [[2]], budget=6), group_of([1], [[2] * 3], budget=5)]
    losses = {}
    for algo, objective in rpo.ALGORITHMS.items():
        logprobs = torch.full((2, 3), math.log(0.3), requires_grad=True)
        denominator = rpo.loss_denominator(groups, objective.aggregation)
        loss, stats = rpo.policy_loss(logprobs, mask, advantages, denominator, objective, old)
        loss.backward()
        losses[algo] = loss.item(), stats["clip_fraction"], logprobs.grad[:, 0].tolist()
    log = math.log(0.3)
    # the first response is clipped (no gradient), the second is not: its ratio counts against it, 1.5 * -1
    by_hand = {"grpo": (-(2.4 - 1.5) / 2, 1, [0, 1.5 / 6]), "dapo": (-(2.56 - 4.5) / 4, 1, [0, 1.5 / 4]),
               "dr_grpo": (-(2.4 - 4.5) / 12, 1, [0, 1.5 / 12]), "rloo": (-(2.4 - 4.5) / 2, 1, [0, 1.5 / 2]),
               "gspo": (-(2 * 1.0004 - 1.5) / 2, 1, [0, 1.5 / 6]),
               "cispo": (-(3 * log - 4.5 * log) / 4, 0, [-3 / 4, 1.5 / 4])}
    assert by_hand.keys() == losses.keys()
    for algo, (loss, clipped, grads) in by_hand.items():
        assert losses[algo][0] == pytest.approx(loss, abs=1e-6), algo
        assert losses[algo][1] == clipped and losses[algo][2] == pytest.approx(grads, abs=1e-6), algo
    # a ratio of 15: cispo's weight stops at 5
    loss, stats = rpo.policy_loss(torch.full((2, 3), log), mask, advantages, 4, rpo.ALGORITHMS["cispo"],
                                  old - math.log(10))
    assert loss.item() == pytest.approx(-(10 * log - 15 * log) / 4) and stats["clip_fraction"] == 4


def test_kl_penalty_by_hand():
    logprobs, ref = (torch.tensor([[math.log(a), math.log(b)]]) for a, b in ((0.25, 0.4), (0.5, 0.3)))
    loss, stats = rpo.policy_loss(logprobs, mask_of(2), torch.zeros(1), 2,
                                  rpo.Objective(aggregation="token", kl_coef=0.1), None, ref)
    k3 = (2 - math.log(2) - 1) + (0.75 - math.log(0.75) - 1)
    assert stats["kl_ref"] == pytest.approx(k3, abs=1e-6)
    assert loss.item() == pytest.approx(0.1 * k3 / 2, abs=1e-6)


# ------------------------------------------------------------------------------------ cache


def entry(tokens: int, shortest: int) -> cache.Entry:
    return cache.Entry(list(range(tokens)), 1.0, True, shortest, 0)


@pytest.mark.parametrize("max_cut, tokens, shortest, limit", [
    (20, 50, 30, 20), (0.5, 50, 30, 15), (300, 50, 30, 50), (1.0, 40, 60, 40), (0.01, 50, 30, 1)])
def test_cut_lengths_are_uniform_from_1_to_L(max_cut, tokens, shortest, limit):
    rng = np.random.default_rng(0)
    draws = 400 * limit
    path = entry(tokens, shortest)
    cuts = cache.uniform_cuts(np.full(tokens, -0.01), cache.longest_cut(path, max_cut))
    assert cuts.sum() == pytest.approx(1 - 0.99004983 ** limit)  # of not repeating L tokens of log-prob -0.01
    kept = [cache.cut(path, cuts, rng) for _ in range(draws)]
    assert all(k == list(range(len(k))) for k in kept)
    counts = Counter(tokens - len(k) for k in kept)
    assert set(counts) == set(range(1, limit + 1))
    chi_square = sum((n - 400) ** 2 / 400 for n in counts.values())
    freedom = limit - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


def test_an_informed_cut_is_where_the_policy_leaves_the_path():
    rng, draws, path = np.random.default_rng(0), 10_000, entry(5, 5)
    cuts = cache.branch_cuts(np.log([1.0, 0.7, 1.0, 0.9, 0.4]), 2)
    # it leaves at 1 with 0.3, at 3 with 0.7 * 0.1, at 4 with 0.7 * 0.9 * 0.6; of 4 tokens left L = 2 is half
    expected = {0: 0.0, 1: 0.15, 2: 0.0, 3: 0.07, 4: 0.378}
    assert cuts.tolist() == pytest.approx(list(expected.values()))
    counts = Counter(len(cache.cut(path, cuts, rng)) for _ in range(draws))
    for kept, share in expected.items():
        share /= 0.598
        assert abs(counts.pop(kept, 0) - draws * share) <= 3 * math.sqrt(draws * share * (1 - share))
    assert not counts
    assert {len(cache.cut(path, np.zeros(5), rng)) for _ in range(99)} == set(range(5))  # certain: anywhere


def test_the_chance_that_a_group_from_the_bare_prompt_fails():
    for failed, chance in ((0, 1 / 16), (2, (3 / 4) ** 4), (8, 0.9 ** 4)):
        assert cache.fail_probability(replace(entry(1, 1), failed=failed), 4) == pytest.approx(chance)
    wrong, path, draw = [False] * 4, cache.NO_PATH, np.random.default_rng(0)
    for correct, whole, failed in ((wrong, True, 4), (wrong, True, 8), (wrong, False, 8),  # not from a prefix
                                   ([True, *wrong[1:]], True, 0), (wrong, True, 4),
                                   ([True, *wrong[1:]], False, 0)):
        path = cache.update(path, [[1, 2, 3]] * 4, [0.0] * 4, correct, 1, draw, 1.0, False, whole)
        assert path.failed == failed


def test_cache_update_is_epsilon_greedy_and_reaches_every_other_response():
    rng = np.random.default_rng(0)
    rewards_of_group, epsilon, draws = [0.2, 0.9, 0.1, 0.9, 0.0], 0.3, 10_000
    counts = Counter(cache.choose(rewards_of_group, epsilon, rng) for _ in range(draws))
    for index, share in enumerate([0.175, 0.3, 0.175, 0.175, 0.175]):  # the best is the first of the two
        assert abs(counts[index] - draws * share) < 3 * math.sqrt(draws * share * (1 - share))


def test_max_cut_is_tokens_or_a_fraction():
    for text in ("0", "-3", "1.5", "0.0", "many", "", "nan", "1e3", "adaptive"):
        with pytest.raises(ValueError, match="--max-cut"):
            cache.parse_max_cut(text)
    assert [cache.parse_max_cut(t) for t in ("300", "1", "0.5", "1.0")] == [300, 1, 0.5, 1.0]
    assert isinstance(cache.parse_max_cut("1"), int) and isinstance(cache.parse_max_cut("1.0"), float)


@pytest.mark.parametrize("gate, old, correct, allowed", [
    (False, True, [0, 0, 1], {0, 1, 2}), (True, True, [0, 0, 1], {2}), (True, False, [1, 0, 1], {0, 2}),
    (True, True, [0, 0, 0], {0, 1, 2}), (False, True, [0, 0, 0], {0, 1, 2})])
def test_a_correct_response_is_cached_if_there_is_one(gate, old, correct, allowed):
    before = cache.Entry([9, 9], 1.0, old, 2, 3)
    responses = [[0] * 7, [1] * 6, [2] * 8]
    seen = set()
    for seed in range(60):
        after = cache.update(before, responses, [0.1, 0.2, 0.9], list(map(bool, correct)), 8,
                             np.random.default_rng(seed), 0.5, gate, False)
        pick = after.response_ids[0]
        seen.add(pick)
        assert (after.shortest, after.step, after.correct) == (6, 8, correct[pick] > 0)
        assert after.reward == [0.1, 0.2, 0.9][pick]
    assert seen == allowed and before.shortest == 2


def test_cache_file_is_one_json_line_an_entry(tmp_path):
    path = tmp_path / "cache.jsonl"
    entries = {"a": cache.Entry([5, 7, 2], 1.0, True, 3, 4), "b": cache.Entry([], 0.0, False, 1, 0, 16)}
    cache.save(entries, path, "words")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("crc") for line in lines)
    assert lines == [{"tokenizer": "words"},
        {"id": "a", "response_ids": [5, 7, 2], "reward": 1.0, "correct": True, "shortest": 3, "step": 4,
         "failed": 0},
        {"id": "b", "response_ids": [], "reward": 0.0, "correct": False, "shortest": 1, "step": 0,
         "failed": 16}]
    said = []
    assert cache.load(path, "words", {"a", "b"}, 8, said.append) == entries and not said
    assert cache.load(path, "words", {"b"}, 8, said.append) == {"b": entries["b"]}
    assert "line 2 has an unknown problem" in said.pop()
    assert cache.load(path, "words", {"a", "b"}, 7, said.append) == {"b": entries["b"]}  # 7 is an unknown id
    with pytest.raises(ValueError, match="tokenizer"):
        cache.load(path, "other words", {"a", "b"}, 8, said.append)


def test_a_damaged_cache_file_is_reported_and_never_gives_another_path(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "cache.jsonl"
    entries = {f"{i:016x}": cache.Entry(rng.integers(0, 99, 30).tolist(), 1.0, True, 30, i)
               for i in range(20)}
    cache.save(entries, path, "words")
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for place in rng.integers(0, len(whole), 50):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        said = []
        try:
            got = cache.load(path, "words", set(entries), 99, said.append)
        except ValueError as error:
            assert place < header and "tokenizer" in str(error)
            continue
        assert place >= header and got.items() <= entries.items()
        # a line break that became something else joins two lines, one within a line makes two of it
        assert len(got) in (18, 19) and all(f"line {n}" in " ".join(said) for n in
                                            [whole[:place].count(b"\n") + 1])
    for length in rng.integers(header, len(whole) - 1, 20):  # cut off in the middle
        path.write_bytes(whole[:length])
        said = []
        got = cache.load(path, "words", set(entries), 99, said.append)
        assert got.items() <= entries.items() and len(got) >= whole[:length].count(b"\n") - 1
        assert bool(said) == (whole[length - 1:length] != b"\n"
                              and len(got) == whole[:length].count(b"\n") - 1)


# ---------------------------------------------------------------------- answers and rewards


SQRT8 = ("\\boxed{\\sqrt{8}}", r"2\sqrt{2}")  # takes a worker process


def boxed(answer: str) -> str:
    return "\\boxed{" + answer + "}"


def judged(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:  # the (gold, answer) pairs called correct
    return [(gold, answer) for gold, answer in pairs if is_correct(boxed(answer), gold)]


def rows(name: str) -> list[dict]:
    with open(SHARED / name, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


COMMITTED = [
    (r"so \boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed {5}", "5"), (r"\fbox{7}", "7"),
    (r"\boxed{\text{if } \{x\} = \frac{a}{b}}", r"\text{if } \{x\} = \frac{a}{b}"),
    (r"\boxed{\boxed{8}}", r"\boxed{8}"), (r"\boxed{3} is cut off: \boxed{4", None), ("A\n#### 1,45", "1,45"),
    ("so the answer is 12.", "12"), ("**Answer:** $x=3$", "x=3"), ("She has 5.\nA: 99,000", "99,000"),
    ("The final answer is $28 \\%$. I hope it is correct.", "28 \\%"), ("Answer:\n$$\n5\n$$\nas 7 > 5", "5"),
    (r"<think>maybe \boxed{1}</think> It is \boxed{2}.", "2"), (r"<think>\boxed{1}</think> done", "1"),
    (r"\boxed{1} and \boxed{2}", "1, 2"), (r"\boxed{(1,2)}, \boxed{(3,4)}", "(1,2), (3,4)"),
    (r"not \boxed{1}. No: \boxed{2}", "2"), ("there are 5 of them", None), ("", None), ("\\boxed{", None),
    ("####", None), ("Answer:", None), ("The answer is 6, so \\boxed{", None), ("The answer is not 6.", None),
    ("The answer is 6, in total, so she has 2 left.", "6"), ("The answer is $6$, which is $2+4$.", "6"),
    ("The answer is 6 because 2+4=6.", "6"), ("The answer is 6 (that is, 2+4).", "6"),
    ("It is 6 (mod 7). The answer is 6 (mod 7).", "6 (mod 7)"), ("The correct answer is **C**.", "C")]


@pytest.mark.parametrize("text, answer", COMMITTED)
def test_extract_answer_takes_the_committed_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_unmarked_answers_count_only_when_loose() -> None:
    text = "Adding up, the total is $12$ apples, not 3."
    assert extract_answer(text) is None and extract_answer(text, loose=True) == "3"
    assert is_correct("so $x = 4$ works", "4", loose=True) and not is_correct("so $x = 4$ works", "4")
    assert not is_correct("AZYUK2A", "2", loose=True)
    assert Checker().check([("so $x = 4$ works", "4"), (boxed("4"), "4")]) == [False, True]


SAME = r"""
1/2 : \frac12 | \dfrac{1}{2} | \frac{-1}{-2} | 0.5 | .5 | \left(\tfrac 12\right) | 2^{-1} | \frac1{2}
1\frac{3}{4} : \frac74 | 1.75 | 1 3/4 | 7/4
1,234,567 : 1234567 | 1\,234\,567 | 1{,}234{,}567 | 1,\!234,\!567 | 1 234 567
\$12.50 : 12.5 | \$12.50 | 12.50 \text{ dollars}
15 : 15\text{ cm}^2 | 15\ \mathrm{cm} | 15 apples | 15\text{ ways} | x=15 | 15.0 | \text{15}
45^\circ : 45 | 45^{\circ} | 45\degree | 45° | 45 \text{ degrees} | \frac{\pi}{4}
40\% : 40 | 40\% | 0.4 | 40 percent | 40\text{ percent}
6\sqrt{2} : \sqrt{72} | 6\sqrt2 | 6 \cdot 2^{1/2} | 6\times 2^{0.5} | 6sqrt(2) | 6*sqrt(2)
e^{2} : e^2 | \exp(2) | \mathrm{e}^2
2+3i : 3i+2 | 2+3\mathrm{i} | (1+i)(\frac52+\frac{i}{2})
3 : \log_2 8 | \log_{10} 1000 | \ln e^3 | |{-3}| | 2\sin 90^\circ+1 | \lfloor \pi \rfloor
\sin^2 x : 1-\cos^2 x | (\sin x)^2 | \sin(x)\sin x
1 \pm \sqrt{3} : 1-\sqrt3, 1+\sqrt3 | x = 1 \pm \sqrt 3 | \{1+\sqrt 3, 1-\sqrt 3\}
y = 3x - 2 : y=-2+3x | 3x-2 | y - 3x = -2
x^2+y^2=4 : x^2 + y^2 - 4 = 0 | \frac{x^2}{4}+\frac{y^2}{4}=1
(x+1)^2 : x^2+2x+1 | (1+x)(x+1)
(1,-2) : (1, -2) | \left(1,-2\right) | \big(1,-2\big) | (x,y)=(1,-2) | x=1, y=-2
(100,101) : (100, 101)
\{1,2,3\} : \{3,2,1\} | 3, 1, 2 | \lbrace 1,2,3\rbrace | 1, 2 \text{ and } 3 | x \in \{1,2,3\}
[0,1) : [0, 1.0) | x\in[0,1) | 0 \le x < 1 | 1 > x \ge 0
(-\infty,2)\cup(3,\infty) : (3,\infty)\cup(-\infty,2) | x<2 \text{ or } x>3 | (-\infty,2) U (3,+\infty)
x < 1 : -x > -1 | 1 > x | (-\infty,1)
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} : \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} : \left(\begin{array}{cc}1&2\\3&4\end{array}\right)
\begin{pmatrix} 1/2 \\ 1 \end{pmatrix} : \frac12\begin{pmatrix}1\\2\end{pmatrix}
\begin{pmatrix} 1/2 \\ 1 \end{pmatrix} : -\begin{pmatrix}-0.5\\-1\end{pmatrix} | (1/2,1)
52_8 : 52_{8} | 52_8. | (52)_8
7:32 : 7:32 | 14:64 | \frac{7}{32}
\text{(B)} : (B) | B | \text{B} | \mathrm{B} | (\text{B})
(-1)^n n : n(-1)^{n+2}
\left\lfloor\frac{n+1}{2}\right\rfloor : \lceil n/2 \rceil
7 : the answer is 7 | \frac{14}{2}=7 | x \approx 7
\frac{3}{11} : .\overline{27} | \mathbf{\frac{3}{11}}
12 : 12 km/h | 12\ \mathrm{m/s} | 12 cm^2
12\text{ miles} : 12 | 12\text{ mi} | 12 mph | 12 \text{ miles per hour} | x = 12 | 12\text{ in all}
k=1 : 1 | x=1
3:2 : 3\text{ to }2 | 6:4
|x-2| : \lvert 2-x \rvert | abs(x-2)
\{4,6\}\cup\{9\} : \{9,4,6\} | 4, 6, 9 | \{4,6,9,11\}\setminus\{11\}
(-\infty,8)\cup(8,\infty) : x\ne 8 | \mathbb{R}\setminus\{8\} | \mathbb R-\{8\} | \{x \mid x\neq 8\}
\mathbb{R}\setminus\{1,5\} : x\ne 5 \text{ and } x\ne 1 | x \neq 1, 5 | (5,\infty)\cup(-\infty,1)\cup(1,5)
(0,16)\setminus\{7\} : (0,7)\cup(7,16) | 0<x<16, x\ne 7
[3,\infty) : \{t \in \mathbb{R}: t\ge 3\}
2:10 \text{ PM} : 2:10 p.m. | 02:10\,\mathrm{PM} | 2{:}10 pm | \text{2:10 P.M.}
C : \text{(C)}\ 31 | \textbf{(C) } 31 | \text{C. } x+1 | C) Monday
58 : '58' | “58” | \text{"58"} | \text{The total is 58.} | \text{The answer is } 58 | 58\\ | \text{The area of it is } 58
9:4 : 9{:}4 | 9 to 4 | 9 is to 4
CAB : \text{CAB}
\frac{29}{7} : 4\dfrac17 | 4\frac{1}7
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} : \begin{pmatrix}1&2\\[3pt]3&4\end{pmatrix}
"""
DIFFERENT = r"""
1/3 : 0.33 | 0.333333 | \frac{33}{100} | 3 | -\frac13
\pi : 3.14 | 3.14159265358979 | \frac{22}{7} | 2\pi
\sqrt{2} : 1.414 | 1.4142135623730951 | \sqrt[3]{2} | 2
\frac{1}{2004!} : \frac{1}{2006!} | 0
7 : 7 \text{ maybe 8} | 7 \text{ not} | 7 \text{ is wrong, } 8 | 7 \vee 8
7 : 7.0000001 | 7, 8 | 7 \text{ or } 8 | 7 \pm 1 | 6<x<8 | 7\neq 8 | x>7 | 7x | 70 | 7+\epsilon
40\% : 41 | 4 | 4\% | 0.04
12\text{ miles} : 12\text{ km} | 12 \text{ euros} | 12\text{ m} | 13
k=1 : f(x)=1 | k=2
N=n : f(n)=n
5.4\text{ cents} : 5.4\text{ dollars} | 5.4 \text{ euros} | \$5.4
52_8 : 42 | 52 | 52_9
1.5\times 10^{3} : 150 | 1.5\times 10^{-3} | 1.5\times 10^4
(1,2),(3,4) : (2,1),(3,4) | (1,2)
(1,2) : (2,1) | [1,2] | (1,2,0) | \{1,2\} | 1 | 3
1,-2 : 1,2 | 1 | -2 | 1,-2,3
a=4, b=5 : a=5, b=4
1 \pm \sqrt{3} : 1+\sqrt3 | \pm 1 + \sqrt 3
[0,1) : [0,1] | (0,1) | (0,1] | 0\le x\le 1 | 1 | [-1,1)
(-\infty,2)\cup(3,\infty) : (-\infty,2) | (2,3) | x<2
x < 1 : -x < -1 | x<2
y = 3x - 2 : y=3x+2 | y=2-3x | 3x
5x : x=5 | 5 | 5y
10^{-30}\pi : 2\cdot 10^{-30}\pi | 0
0.5 : \pi x+0.5 | 0.5x
3R^2 : 3r^2
\sqrt{x^2} : x
\sin^2 x : \sin x^2 | \sin 2x
\lfloor n/2\rfloor+1 : \lceil n/2\rceil
\lfloor n/30\rfloor : 0
I(0) : 0
4:40 \text{ a.m.} : 4:40 \text{ p.m.} | 1/10
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} : \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix} | (1,2,3,4)
\begin{pmatrix} 1 \\ 2 \end{pmatrix} : \begin{pmatrix} 1 & 2 \end{pmatrix} | (2,1)
\text{even} : \text{not even} | odd | neither
0 : \emptyset | 1e-9 | \infty-\infty | 10^{-100}
1 : \frac{\infty}{\infty} | \frac{0}{0}
\{4,6\}\cup\{9\} : \{4,6\} | \{4,6,9,10\}
(-\infty,8)\cup(8,\infty) : x\ne 7 | \mathbb{R} | \mathbb{R}\setminus\{8,9\} | x=8 | x>8 | \{x \mid x\ge 8\}
\mathbb{R}\setminus\{1,5\} : \mathbb{R}\setminus(1,5) | x\ne 1 | x\ne 1, y\ne 5 | \{1,5\}
(0,16)\setminus\{7\} : (0,16) | [0,7)\cup(7,16) | (0,16)\setminus\{6\}
\mathbb{R} : x>0 \text{ and } x<1 | \{x \mid x>0, x<1\} | 0<1
2:10 \text{ PM} : 2:10 \text{ AM} | 2:10am | 4:20 PM | 10:2 PM
3:20 pm : 6:40 pm
C : \text{(B)}\ 31 | (C) or (D) | \text{(C) is wrong} | (C)(D) | C^2
58 : '59' | \text{The answer is not 58} | \text{The total is 58 or 59} | "58" "59" | 5\\8
9:4 : 4 to 9 | 9 to 5
CAB : ABC | BAC | \text{ACB}
IX : XI
(3,4) : \{(1,2)\}\cup(3,4) | (3,4)\setminus\{3.5\}
"""


def table(text: str) -> list[tuple[str, str]]:
    lines = [line.split(" : ") for line in text.strip().splitlines()]
    return [(gold, answer) for gold, answers in lines for answer in answers.split(" | ")]


def test_right_answers_in_another_form_are_correct_and_wrong_ones_are_not() -> None:
    assert judged(table(SAME) + table(DIFFERENT)) == table(SAME)


def test_several_boxed_answers_are_one_list_not_a_choice() -> None:
    hedge = r"\boxed{1}\boxed{2}\boxed{3}\boxed{7}"
    assert not is_correct(hedge, "7") and is_correct(hedge, "1,2,3,7")
    assert not is_correct(r"The gold is \boxed{7}? No: \boxed{8}.", "7")
    assert not any(is_correct(f"The answer is 6{hedge} 7.", "6") for hedge in (", or maybe", "; it could be"))
    assert is_correct(r"$x=\boxed{1}$ and $x=\boxed{-2}$", "-2, 1")


def test_decimal_gold_has_a_tolerance_and_no_other_gold() -> None:
    right = [("4.1231056", r"\sqrt{17}"), ("38.571", "270/7"), ("3.46223 \\times 10^{3}", "3462.23")]
    wrong = [("16386.20", "16386.17"), ("0.5", "0.54"), (r"\sqrt{17}", "4.1231056"), ("-0.5", "0.5")]
    assert judged(right + wrong) == right


def test_unparseable_gold_is_reported_and_never_scores() -> None:
    for gold in ("", "np.arcsin(10/13)", r"\frac{1}{", "1" * 2000, "(" * 60 + "1" + ")" * 60):
        assert parse_error(gold) and not is_correct(boxed(gold), gold)
    for gold in ("7", r"\text{Monday}", r"(-\infty, 3]", "9 \\text{ a.m.}", "$2,-1$"):
        assert parse_error(gold) is None and is_correct(boxed(gold), gold)
    assert is_correct(boxed("4"), r"A worked solution, so \boxed{4}.")
    assert not is_correct(boxed("5"), r"A worked solution, so \boxed{4}.")


FOUND_BY_FUZZING = [
    r"\sin\emptyset", r"\binom{e}{99999999999}", r"2004%\pm\pm\pm\pm\pm\pm\pm2004%0", r"\mathbb{R}",
    r"\lfloor i\rfloor", r"\log_2\log_2\log_2\log_2\log_2\log_2\log_2\log_2\log_2a", "99999999999.25.25!%",
    r"1\frac{1}{2}!", "0:", r"0.5\ge\mathrm{e}y\pm99999999999x^2", r"1\frac{1}{2}\pmand12i\approx0"]
HOSTILE = FOUND_BY_FUZZING + [
    "9^{9^{9^9}}", "10^{10^{10}}!", "9**9**9**9", "1e999999999", "1e9999", r"\sqrt[10^{10}]{10^{10^{10}}}",
    "((10!)!)!", "1.0000001^{10^{12}}", r"2^{2^{2^{2^{2^{\pi}}}}}", r"\binom{10^{100}}{10^{50}}", "5!!!!!!",
    r"\sin(10^{10^{10}})", r"\pi^{\pi^{\pi^{\pi^\pi}}}", "x^{x^{x^{x^{x^{x}}}}}", r"i^{10^{20}}", "7" * 5000,
    "0" * 99999, "-" * 5000, "(" * 5000, "{" * 9999, r"\frac" * 3000, r"\sqrt" * 300,
    r"\frac{1}{" * 99 + "2" + "}" * 99, r"\boxed{" * 20000, "1," * 9999, "99*" * 5000 + "1",
    r"\pm" * 40 + "1", r"1\pm2\pm3\pm4\pm5\pm6\pm7\pm8", r"\{" * 800, "|" * 501, "|x" * 100, r"\tan(\pi/2)",
    r"\ln 0", r"\log_{0} 5", r"\log_1 7", "0^{-1}", r"0^{-\pi}", r"\frac{7}{1-1}", r"(-8)^{1/3}", "\x00",
    "\ud800", "8\u200b", "\u0667", "⑦⑦", "\U0001f600", r"\text{", "_", "^", "&", "%", "$", "#", "'",
    "'''", r"x'_'", "5_", "__import__('os').system('touch pwned')", "().__class__.__bases__[0]", "lambda: 7",
    r"\begin{pmatrix}1&2\\3\end{pmatrix}", r"\begin{pmatrix}1\end{pmatrix}+\begin{pmatrix}1&2\end{pmatrix}",
    r"\begin{pmatrix}1&2\end{pmatrix}^2", r"\sum_{n=1}^{9} n", r"\lfloor 9^{9^{9}}/2 \rfloor", r"|\infty|",
    r"\overline{}", "0.\\overline{}", "1/0", "1 2/0", r"\sqrt[0]{7}", r"\sqrt[x]{}", r"\int e^{x^2}dx",
    "a=b=c=d", "7=", "=8=", "<", "1<2<3<4<5", "x:y:0", ":", ";", ",,", "7 mod 0", r"\log_{} 7", r"\log_{)} 7"]


@pytest.mark.parametrize("gold", ["21", r"\sqrt{21}", "x+1", "(8,9)", "8.5", "[1,2)", "x^2=21"])
def test_hostile_answers_and_golds_return_soon_and_are_never_correct(gold: str) -> None:
    """A second of CPU time each. FOUND_BY_FUZZING are inputs that benchmarks/fuzz_answers.py met."""
    is_correct(*SQRT8)  # imports sympy
    for text in HOSTILE:
        start = time.process_time()
        assert not is_correct(boxed(text), gold), text[:60]
        assert {is_correct(boxed(text), text), is_correct(boxed(gold), text)} <= {True, False}
        assert parse_error(text) is None or isinstance(parse_error(text), str)
        assert time.process_time() - start < 1, text[:60]
    assert not Path("pwned").exists()


def test_long_responses_are_scanned_in_linear_time() -> None:
    for text in (r"\boxed{8} " * 20000, "The answer is 8. " * 20000, r"\[" * 50000, "$" * 99999, " " * 10**6,
                 "answer" * 50000, "A:" * 99999, "\\boxed{8}" + " " * 10**6 + "?\\boxed{8}", "1/2/" * 30000,
                 "####" * 50000, r"\boxed{8" * 20000):
        start = time.process_time()
        assert not is_correct(text, "7", loose=True)
        assert time.process_time() - start < 1, text[:20]


def test_checker_gives_the_same_answers_as_is_correct_from_any_thread() -> None:
    pairs = [(boxed(answer), gold) for gold, answer in (table(SAME) + table(DIFFERENT))[::3]]
    pairs += [("was $4$", "4"), ("none", "7"), (boxed(""), ""), ("\ud800", "\ud800"), (boxed("\ud800"), "e")]
    expected, results, checker = [is_correct(*pair) for pair in pairs], [], Checker()
    threads = [threading.Thread(target=lambda: results.append(checker.check(pairs))) for _ in range(2)]
    assert [thread.start() for thread in threads] == [thread.join() for thread in threads]
    assert results == [expected] * 2
    assert checker.check([]) == []


def test_easy_answers_load_nothing() -> None:
    easy = [("1/2", "0.5"), ("(1,2)", "(2,1)"), ("x^2-1", "(x-1)(x+1)"), (r"\text{B}", "C"), ("[0,1)", "0")]
    script = (f"import answers, sys; print(answers.Checker().check({[(boxed(a), g) for g, a in easy]}), "
              "{'torch', 'numpy', 'sympy', 'rewards'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600,
                          env=dict(os.environ, PYTHONPATH=str(Path(answers.__file__).parent)))
    assert done.stdout == "[True, False, True, False, False] set()\n", done.stderr


def test_refused_answers_are_counted() -> None:
    far = {"length": "7" * 2000, "depth": "(" * 40 + "7" + ")" * 40, "digits": "7" * 500, "size": "9^{9^{9}}",
           "exponent": "1e99999", "not read": "7+", "size of no fraction": r"\pi^{9^9}"}
    checker = Checker()
    for bound, answer in far.items():
        assert checker.check([(boxed(answer), "7"), (boxed("8"), "7"), ("none", "7")]) == [False] * 3
        assert checker.refused == 1, bound
        checker.refused = 0


def test_an_answer_that_takes_too_much_work_is_refused_and_the_next_one_is_checked() -> None:
    """Sixty roots in reverse order took 11 s of CPU time: each is compared with each."""
    is_correct(*SQRT8)  # imports sympy
    roots, checker, start = [rf"\sqrt{{{n}}}" for n in range(2, 62)], Checker(), time.process_time()
    slow = boxed(",".join(reversed(roots))), ",".join(roots)
    assert checker.check([(boxed("7"), "7"), slow, SQRT8]) == [True, False, True] and checker.refused == 1
    assert checker.check([(boxed(",".join(roots[9::-1])), ",".join(roots[:10]))]) == [True]
    assert time.process_time() - start < 3


def test_length_reward_is_equation_11() -> None:
    correct, lengths = [True, True, False, True], [100, 200, 300, 400]  # mean 250
    got = length_rewards(correct, lengths, alpha=0.01)
    assert got == pytest.approx([1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-0.5)), 0, 0.5])
    assert length_rewards(correct, lengths, alpha=0) == [1, 1, 0, 1]
    assert length_rewards([True, True], [0, 10**9], alpha=1.0) == [1.0, 0.5]
    assert length_rewards([], [], 1.0) == []
    with pytest.raises(ValueError, match="lengths"):
        length_rewards([True], [1, 2], 0.1)


ONE = data.Problem("1", "?", "1")


def test_the_reward_is_the_sum_of_its_parts() -> None:
    lengths, right, penalty = [10, 80, 85, 100], [True, True, False, True], pytest.approx([0, 0, -0.25, -1])
    assert [rewards.overlong_reward(n, 100, 20) for n in lengths] == penalty
    assert rewards.overlong_reward(130, 100, 20) == -1
    rule = rewards.RewardRule(Checker(), 100, 0.0, 2.0)  # from 80 tokens on
    assert rewards.reward(ONE, ["text"] * 4, lengths, right, rule) == (
        pytest.approx([1, 1, -0.5, -1]), {"overlong": penalty})
    rule = replace(rule, overlong_penalty=0)
    assert rewards.reward(ONE, ["text"] * 4, lengths, right, rule) == ([1, 1, 0, 1], {})


FORMER_OPTIONS = r"""
import math

def reward(problem, texts, lengths, correct):
    right = [n for n, ok in zip(lengths, correct) if ok]
    mean = sum(right) / len(right) if right else 0
    return {
        "weight": [2.0 * ok for ok in correct],  # 3 with the 1 that a correct response has
        "format": [0.5 * (text.count("\n</think>\n") == 1) for text in texts],
        "cosine": [0.25 * (1 + math.cos(math.pi * min(n / 100, 1))) + (0.5 if ok else -0.5)
                   for n, ok in zip(lengths, correct)],
        "reference": [ok * max(1 / (1 + math.exp(-0.01 * (mean - n))), 0.5)
                      for n, ok in zip(lengths, correct)]}
"""


def test_a_reward_file_can_weigh_accuracy_and_reward_format_cosine_and_length(tmp_path) -> None:
    """What were options once."""
    (tmp_path / "mine.py").write_text(FORMER_OPTIONS)
    own = rewards.RewardFile(str(tmp_path / "mine.py"))
    rule = rewards.RewardRule(Checker(), 100, 0.0, 0.0, own)
    texts = ["a\n</think>\nb", "a</think>b", "a\n</think>\nb\n</think>\nc", "a\n</think>\nb"]
    total, parts = rewards.reward(ONE, texts, [0, 50, 50, 150], [True, True, False, False], rule)
    short = 1 / (1 + math.exp(-0.25))  # the mean of the correct ones is 25
    assert parts == {"file/weight": [2, 2, 0, 0], "file/format": [0.5, 0, 0, 0.5],
                     "file/cosine": pytest.approx([1, 0.75, -0.25, -0.5]),
                     "file/reference": pytest.approx([short, 0.5, 0, 0])}
    assert total == pytest.approx([1 + 2 + 0.5 + 1 + short, 1 + 2 + 0.75 + 0.5, -0.25, 0])


@needs_shared
def test_labelled_answers() -> None:
    equal = [r for r in rows("verifier/equivalences.jsonl") if not r["policy"]]
    assert sum(is_correct(boxed(r["prediction"]), r["gold"]) == r["expected"] for r in equal) >= 540
    suite = [r for r in rows("verifier/math_verify_tests.jsonl") if not r.get("suspect")]
    right = sum(is_correct(r["prediction"], r["gold"], loose=True) == r["expected"] for r in suite)
    assert right >= 0.95 * len(suite)  # their formulas stand in no box
    gsm8k = rows("verifier/gsm8k_model_solutions.jsonl")
    assert [r for r in gsm8k if is_correct(r["solution"], r["gold"]) != r["is_correct"]] == []


@needs_shared
def test_pairs_that_other_graders_got_wrong() -> None:
    if not (SHARED / "cases" / "answers.jsonl").exists():
        pytest.skip("pairs not present")
    pairs = rows("cases/answers.jsonl")
    verdicts = [is_correct(r["response"], r["gold"]) for r in pairs]
    assert [r for r, ok in zip(pairs, verdicts) if ok and not r["expected"]] == []
    assert sum(ok == r["expected"] for r, ok in zip(pairs, verdicts)) >= 131


@needs_shared
def test_every_gold_equals_itself_or_is_reported() -> None:
    golds = {r["answer"] for path in (SHARED / "data").glob("*.jsonl") for r in rows(f"data/{path.name}")}
    unread = [g for g in golds if parse_error(g)]
    assert len(unread) <= 5 and "np.arcsin(10/13)" in unread
    assert [g for g in golds if not parse_error(g) and not is_correct(boxed(g), g)] == []


@needs_shared
def test_other_golds_are_no_false_positives() -> None:
    golds = sorted({r["answer"] for r in rows("data/math500.jsonl")})
    same = {("36", r"\$36"), (r"36^\circ", r"\$36"), ("36", r"36^\circ"), ("30", r"30^\circ"),
            ("90", r"90^\circ"), ("120", r"120^\circ"), (r"\frac14", r"\frac{1}{4}"), ("-2,1", "1,-2"),
            ("15", r"15\mbox{ cm}^2"), ("x=5", "5"), (r"2\sqrt{5}", r"2 \sqrt{5}"),
            (r"\pi", r"180^\circ"), ("10080", r"10,\!080")}
    pairs = [(a, b) for i, a in enumerate(golds) for k, b in enumerate(golds) if a != b and (i + k) % 20 == 0]
    verdicts = Checker().check([(boxed(a), b) for a, b in pairs])
    assert {frozenset(pair) for pair, ok in zip(pairs, verdicts) if ok} <= set(map(frozenset, same))


@needs_shared
def test_hostile_file_in_a_thread_without_hang_or_exception() -> None:
    """Each as it stands and in a box: 10 s of CPU time for all, 1 s for one."""
    cases, out = rows("verifier/hostile.jsonl"), []
    pairs = [(text, r["gold"]) for r in cases for text in (r["prediction"], boxed(r["prediction"]))]
    is_correct(*SQRT8)  # imports sympy

    def check_all() -> None:
        for pair in pairs:
            start = time.process_time()
            out.extend(Checker().check([pair]))
            assert time.process_time() - start < 1, pair

    start = time.process_time()
    (thread := threading.Thread(target=check_all, daemon=True)).start()
    thread.join(600)
    assert len(out) == len(pairs) and time.process_time() - start < 10
    twice = [r for r in cases for _ in range(2)]
    assert [r["id"] for r, ok in zip(twice, out) if ok and r["expected"] is False] == []


# ------------------------------------------------------------------------------------- data


def load(source: str) -> list[data.Problem]:
    return data.load_problems(source, "--data")


def write(path: Path, *records: object) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def test_problem_fields_and_answers_from_solutions(tmp_path, capsys):
    source = write(tmp_path / "p.jsonl",
                   {"problem": "a", "answer": "1"}, {"question": "b", "final_answer": 2},
                   {"prompt": "c", "solution": "so 3 - 1 = 2\n#### 1,450"},
                   {"problem": "d", "solution": r"hence \boxed{\frac{1}{2}} it is"},
                   {"question": "e", "answer": "5 + 5 = <<5+5=10>>10\n#### 10"},
                   {"problem": "f", "solution": "no answer here"}, {"problem": "a", "answer": "1"})
    problems = load(source)
    assert [(p.question, p.answer) for p in problems] == [("a", "1"), ("b", "2"), ("c", "1,450"),
                                                          ("d", r"\frac{1}{2}"), ("e", "10")]
    said = capsys.readouterr().out
    assert "dropped 1 of 7: no answer" in said and "dropped 1 of 7: duplicate" in said
    as_json = tmp_path / "p.json"
    as_json.write_text(json.dumps([{"problem": "a", "answer": "1"}]))
    assert load(str(as_json)) == problems[:1]  # same id in another file


def question(text: str, *turns: tuple[str, str]) -> data.Problem:
    return data.Problem("ab", text, "1", "", turns)


def test_prompt_follows_the_chat_template_and_ends_where_the_response_begins():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = data.encode_prompt(tokenizer, question("What?"), data.PromptStyle())
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n")
    ids = data.encode_prompt(tokenizer, question("What?"), data.PromptStyle("Think.", "user"))
    assert "user\nWhat?\n\nThink.<|im_end|>" in tokenizer.decode(ids)
    tokenizer.chat_template = None
    ids = data.encode_prompt(tokenizer, question("What?"), data.PromptStyle("Think."))
    assert tokenizer.decode(ids) == "Think.\n\nProblem: What?\n\nSolution:"


def test_chat_messages_of_a_data_set_are_turns(tmp_path):
    """Their Python repr became the question (prompt as a list of role and content, as in TRL and verl)."""
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 times 6?"}]
    source = write(tmp_path / "p.jsonl", {"prompt": own, "answer": "36"}, {"prompt": own[1:], "answer": "36"})
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with_system, bare = load(source)
    assert with_system.question == bare.question == "6 times 6?" and with_system.id != bare.id
    texts = [tokenizer.decode(data.encode_prompt(tokenizer, p, data.PromptStyle("Think.")))
             for p in (with_system, bare)]
    tail = "<|im_start|>user\n6 times 6?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [f"<|im_start|>system\n{system}<|im_end|>\n{tail}" for system in ("Be brief.", "Think.")]
    for bad in ([*own, {"role": "assistant", "content": "36"}], ["6 times 6?"],
                [{"role": "user", "content": ["parts"]}], json.dumps(own), str(own)):
        with pytest.raises(ValueError, match="chat messages"):
            load(write(tmp_path / "bad.jsonl", {"prompt": bad, "answer": "36"}))


def test_answers_stand_where_other_data_sets_keep_them(tmp_path, capsys):
    source = write(tmp_path / "p.jsonl", {"prompt": "a", "reward_model": {"ground_truth": "36"}},
                   {"problem": "b", "extra_info": {"answer": "7"}}, {"prompt": "c", "solution": "34"},
                   {"question": "d", "final_answer": ["$3$, $-3$"], "solution": ["words"]},
                   {"question": "e", "answer": [3, -3]}, {"problem": "f", "answer": {"value": 36}},
                   {"problem": "half \ud800 a pair", "answer": "1"},
                   {"problem": "g", "answer": "1", "solution": "\udc00"}, {"problem": "h", "answer": math.nan})
    problems = {p.question: p for p in load(source)}
    assert {q: p.answer for q, p in problems.items()} == {
        "a": "36", "b": "7", "c": "34", "d": "$3$, $-3$", "e": "3, -3"}
    assert problems["c"].solution == ""  # a bare answer is no worked solution
    assert is_correct(boxed("-3, 3"), problems["e"].answer)
    assert not is_correct(boxed("3"), problems["d"].answer)
    said = capsys.readouterr().out
    assert "dropped 2 of 9: no answer in answer, final_answer" in said and "2 of 9: broken characters" in said
    for number in ("[" * 9999 + "]" * 9999, "1" * 9999):  # met as a RecursionError, and without a line number
        with pytest.raises(ValueError, match="line 1 is not valid JSON"):
            load(write(tmp_path / "deep.jsonl", f'{{"question": "a", "answer": {number}}}'))


@needs_shared
@pytest.mark.slow
def test_shards_are_joined_and_weights_that_are_not_loaded_are_not_downloaded(tmp_path):
    hub, lines = tmp_path / "hub", (TINY / "train.jsonl").read_text().splitlines(True)
    for name, part in (("train-00000-of-00002", lines[:5]), ("train-00001-of-00002", lines[5:9]),
                       ("test", lines[:2])):
        path = hub / "datasets" / "o" / "shards" / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(part))
    shutil.copytree(TINY, hub / "Qwen" / "Qwen2.5-Tiny")
    for name in ("consolidated.safetensors", "original/x.safetensors"):
        (hub / "Qwen" / "Qwen2.5-Tiny" / name).parent.mkdir(exist_ok=True)
        (hub / "Qwen" / "Qwen2.5-Tiny" / name).write_bytes(b"not loaded")
    command = [sys.executable, SHARED / "hub_server.py", hub]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        endpoint = re.search(r"http://[\w.:]+", server.stdout.readline())[0]
        code = ("import data; print(len(data.load_problems('o/shards', '--data')), "
                "sorted(p.name for p in data.find_model('Qwen2.5-Tiny').rglob('*.safetensors')))")
        done = subprocess.run([sys.executable, "-c", code], cwd=TINY.parent, capture_output=True, text=True,
                              env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")})
    finally:
        server.kill()
    assert done.stdout.strip().endswith("9 ['model.safetensors']"), done.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_files_with_a_byte_order_mark_are_read(encoding, tmp_path):
    path, text = tmp_path / "p.json", json.dumps([{"problem": "½ + ½?", "answer": "1"}], ensure_ascii=False)
    path.write_bytes(("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding))
    assert [p.question for p in load(str(path))] == ["½ + ½?"]
    path.write_text('{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": "1"}\n')
    with pytest.raises(ValueError, match="must be named .jsonl"):
        load(str(path))


REFUSES = ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}"
           "{% endfor %}")
HARMONY = ("{% for m in messages %}<|im_start|>{{ m['role'] }}"
           "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")


def test_templates_of_other_models():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = REFUSES  # as Gemma's and Mistral's do
    ids = data.encode_prompt(tokenizer, question("What?"), data.PromptStyle("Think."))
    assert tokenizer.decode(ids) == "[user]Think.\n\nWhat?"
    with pytest.raises(ValueError, match="refuses the turns user, user"):
        data.encode_prompt(tokenizer, question("b", ("user", "a"), ("user", "b")), data.PromptStyle(""))
    # a response that BEGINS with a special token: it was taken for the end, every response had one token
    tokenizer.chat_template, tokenizer.eos_token = HARMONY, "<|im_start|>"
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert data.eos_ids(tokenizer, None) == tuple(sorted((start, end)))
    tokenizer.chat_template = "{{ 'on' if think else 'off' }}"
    style = data.PromptStyle(arguments=data.template_arguments('{"think": true}'))
    assert tokenizer.decode(data.encode_prompt(tokenizer, question("What?"), style)) == "on"
    for template, reason in (("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
                              "leaves the question out"), ("{{ messages[0].content + 1 }}", "refuses")):
        tokenizer.chat_template = template  # of parts, as multimodal models have; one that fails in Python
        with pytest.raises(ValueError, match=f"--model: its chat template {reason}"):
            data.encode_prompts([question("What?")], tokenizer, data.PromptStyle("Think."), 99)
    for text in ("{", "[1]", "true"):
        with pytest.raises(ValueError, match="--template-args"):
            data.template_arguments(text)


def test_model_folders_that_would_train_something_else_are_refused(tmp_path):
    """Missing weights were random and a tokenizer without files encoded nothing: both with exit code 0."""
    from safetensors.torch import load_file, save_file
    for name in ("missing", "truncated", "bare", "shape", "nan", "int8"):
        shutil.copytree(TINY, tmp_path / name)
    path = tmp_path / "missing" / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if ".layers.1." not in k}, path, {"format": "pt"})
    path = tmp_path / "truncated" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    norm = weights["model.norm.weight"]
    for name, odd in (("shape", norm[1:].clone()), ("nan", norm * math.nan), ("int8", norm.to(torch.int8))):
        save_file(weights | {"model.norm.weight": odd}, tmp_path / name / "model.safetensors", {"format": "pt"})
    for name, word in (("missing", "model.layers.1.input_layernorm"), ("truncated", "cannot be loaded"),
                       ("shape", "another shape: model.norm.weight"), ("nan", "logits are not finite"),
                       ("int8", "model.norm.weight is quantized")):
        with pytest.raises(ValueError, match=word):
            load_policy(tmp_path / name, VOCAB, torch.device("cpu"))
    with pytest.raises(ValueError, match="385 tokens but embeddings for 384: resize"):  # met as an IndexError
        load_policy(TINY, 385, torch.device("cpu"))
    with pytest.raises(ValueError, match="tokenizer"):
        data.load_tokenizer(tmp_path / "bare")


def test_frozen_weights_are_cast_and_rotary_frequencies_are_not():
    """bfloat16 frequencies are off by radians after 3,000 tokens: eval.py measured another policy."""
    policy = load_policy(TINY, VOCAB, torch.device("cpu"), torch.bfloat16, weights=torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in policy.buffers()} == {torch.float32}


def test_older_architectures_share_prefixes_too():
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
    sizes = dict(vocab_size=VOCAB, initializer_range=0.25, bos_token_id=None, eos_token_id=None)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
    neox = GPTNeoXConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         **sizes)
    for kind, config in ((GPT2LMHeadModel, gpt2), (GPTNeoXForCausalLM, neox)):
        torch.manual_seed(0)
        model, contexts = kind(config).eval(), token_lists(1, [5, 9])
        want = [greedy_by_generate(model, context, 12, ()) for context in contexts]
        requests = [rollout.Request(context, 12, [(0,), (1,)]) for context in contexts]
        how = rollout.Sampling((), VOCAB, temperature=0)
        got = rollout.generate(Policy(model, VOCAB), requests, how, 1.0)
        assert [[suffix.ids for suffix in row] for row in got] == [[ids] * 2 for ids in want]


def test_dropout_by_function_is_off_and_rope_that_depends_on_the_length_is_refused():
    """Seed-OSS: a dropout of 0.1 acted in the update. Phi-3.5: factors followed the longest path."""
    from transformers import Phi3Config, Phi3ForCausalLM, SeedOssConfig, SeedOssForCausalLM
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, initializer_range=0.25, vocab_size=VOCAB, pad_token_id=None,
                 bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    dropping = Policy(SeedOssForCausalLM(SeedOssConfig(**sizes, head_dim=8)), VOCAB)
    batch = pack([Tree([1, 2, 3], [[4, 5], [6, 7]])])
    with torch.no_grad():
        first, _ = dropping(batch)
        dropping.train()
        assert torch.equal(dropping(batch)[0], first)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4,
            "original_max_position_embeddings": 32}
    config = Phi3Config(**sizes, original_max_position_embeddings=32, max_position_embeddings=256,
                        rope_parameters=rope)
    with pytest.raises(ValueError, match="rotary"):
        Policy(Phi3ForCausalLM(config), VOCAB)


def test_every_end_token_ends_a_response():
    class Tokenizer:
        eos_token_id, chat_template = 7, None

    assert data.eos_ids(Tokenizer, [9, 7]) == (7, 9)
    assert data.eos_ids(Tokenizer, 3) == (3, 7)
    assert data.eos_ids(Tokenizer, None) == (7,)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    end, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    tokenizer.eos_token = "<|endoftext|>"  # as in a base model, whose chat turns end otherwise
    assert data.eos_ids(tokenizer, None) == tuple(sorted((end, turn_end)))


# ------------------------------------------------------------------------------------ train


QUICK = ["--model", str(TINY), "--device", "cpu", "--no-gradient-checkpointing", "--eval-problems", "6",
         *("--steps 3 --problems-per-step 3 --group-size 4 --max-prompt 120 --max-response 420 --max-cut 0.3 "
           "--cache-init-chunk 12 --lr 1e-3 --warmup-steps 3 --dynamic-rounds 2").split()]
PRESET = Path(train.__file__).with_name("presets") / "tiny.args"
TIMINGS = ("time/", "tokens/per_s", "memory/")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_with(out: Path, *options: str) -> list[dict]:
    assert train.main([*QUICK, "--eval-every", "0", "--out", str(out), *options]) == 0
    return lines_of(out / "metrics.jsonl")


def error_of(main: Callable, capsys, *arguments: str) -> str:
    """The one sentence with which a program ends with code 2."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and message.startswith(f"{Path(sys.modules[main.__module__].__file__).name}: error: ")
    return message


def expect_error(capsys, out: Path, *arguments: str) -> str:
    return error_of(train.main, capsys, *QUICK, "--out", str(out), *arguments)


def outcome(out: Path) -> tuple:
    """Everything that a run leaves and that must not depend on when it was stopped."""
    metrics = [{k: v for k, v in m.items() if not k.startswith((*TIMINGS, "reward/file"))}
               for m in lines_of(out / "metrics.jsonl")]
    return ((out / "policy" / "model.safetensors").read_bytes(), (out / "cache.jsonl").read_bytes(), metrics,
            (out / "samples.jsonl").read_bytes())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(a: Path, b: Path) -> bool:
    a, b = weights_of(a), weights_of(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def reward_file(path: Path, out: Path, body: str) -> list[str]:
    """The option for a reward file. Its body may use `step`: how many lines the run in `out` has logged."""
    path.write_text(f"""
import os, signal
log, done = {str(out / "metrics.jsonl")!r}, []

def reward(problem, texts, lengths, correct):
    step = open(log).read().count("\\n") if os.path.exists(log) else 0
    {body}
""")
    return ["--reward-file", str(path)]


RISING = "return [float(i) for i in range(len(texts))]"  # a spread in every group


def signals(step: int, count: int) -> str:
    return f"""if step == {step} and len(texts) > 1 and not done:
        done.append([os.kill(os.getpid(), signal.SIGTERM) for _ in range({count})])
    return [0.0] * len(texts)"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "GOOD", 0.0)  # prefixes from the first step on
        assert train.main([*QUICK, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_what_the_readme_says(finished):
    metrics = lines_of(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert "eval/accuracy" in metrics[0] and "eval/accuracy" in metrics[3]
    for m in metrics[1:]:
        assert all(math.isfinite(v) for v in m.values())
    trained = [m for m in metrics[1:] if m["group/trained"]]
    assert trained and all(m["policy/grad_norm"] > 0 for m in trained)
    # sampling forward (one token at a time, shared keys) and training forward (packed) are the same function
    assert all(m["policy/sampling_gap_mean"] < 1e-5 and m["policy/probs_diff_max"] < 1e-4 for m in trained)
    assert not same_weights(TINY, finished / "policy")
    assert {w.dtype for w in weights_of(finished / "policy").values()} == {torch.float32}
    assert not list(finished.rglob("*.bin"))
    assert AutoTokenizer.from_pretrained(finished / "policy").chat_template
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["accuracy_before"] == metrics[0]["eval/accuracy"]
    assert summary["accuracy_after"] == metrics[3]["eval/accuracy"]
    assert json.loads((finished / "config.json").read_text())["group_size"] == 4


def test_visits_are_counted_by_kind(finished):
    for m in lines_of(finished / "metrics.jsonl")[1:]:
        prefixed, whole = m["visits/prefix"], m["visits/whole"]
        assert prefixed + whole == m["group/sampled"]
        assert 3 <= prefixed + whole + m["visits/skipped"] <= 15  # 3, none of them sampled: then 4 * 3
        both = [m.get(f"reward/accuracy_{kind}", 0.0) for kind in ("prefix", "whole")]
        right = both[0] * prefixed + both[1] * whole
        assert right == pytest.approx(m["reward/accuracy"] * (prefixed + whole))
    metrics = lines_of(finished / "metrics.jsonl")[1:]
    kinds = json.loads((finished / "checkpoint-000003" / "state.json").read_text())["kinds"]
    assert sum(tokens for _, tokens in kinds.values()) == metrics[-1]["tokens/generated"]
    assert kinds["first_path"][0] == sum(m["visits/first_path"] for m in metrics)


def test_every_metric_is_explained(finished):
    glossary = (Path(train.__file__).parent / "docs" / "metrics.md").read_text()
    names = {name for m in lines_of(finished / "metrics.jsonl") for name in m}
    assert {name for name in names if f"`{name}`" not in glossary} == set()


def test_token_counts_agree_with_the_responses(tmp_path):
    finished = tmp_path / "run"
    metrics = run_with(finished, "--no-skip-certain", "--no-prefix-gate", "--steps", "2")
    summary = json.loads((finished / "summary.json").read_text())
    rows = [m["group/sampled"] * 4 for m in metrics]
    suffix = sum(n * m["response/suffix_length"] for n, m in zip(rows, metrics))
    whole = sum(n * m["response/length"] for n, m in zip(rows, metrics))
    assert summary["tokens_full_path"] == metrics[-1]["tokens/full_path"] == pytest.approx(whole)
    for m in metrics:
        prefix, suffix_length = m["response/prefix_length"], m["response/suffix_length"]
        assert m["response/length"] == pytest.approx(prefix + suffix_length)
    initialisation = summary["tokens_generated"] - suffix
    entries = metrics[-1]["cache/entries"]
    assert 150 * entries < initialisation < 421 * entries  # one whole path per entry, and nothing else
    visited = 2 * 3 * 2  # steps, problems, rounds at most; cached is what is visited and the chunk ahead
    assert entries <= visited + 12
    cached = lines_of(finished / "cache.jsonl")[1:]
    assert len(cached) == entries
    assert any(record["step"] > 0 for record in cached)


def test_the_learning_rate_by_hand(finished):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)
    config = train.parse_config([*QUICK, "--steps", "10", "--warmup-steps", "4", "--lr", "0.1"])
    assert [train.set_lr(optimizer, config, step) for step in (1, 3, 4, 10)] == pytest.approx(
        [0.025, 0.075, 0.1, 0.1])
    config = replace(config, lr_decay_steps=5)
    assert [train.set_lr(optimizer, config, step) for step in (1, 5, 10)] == pytest.approx(
        [0.025 / 1.2, 0.05, 0.1 / 3])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 3)
    # a warm-up of 3 steps to 1e-3
    assert [m["policy/lr"] for m in lines_of(finished / "metrics.jsonl")[1:]] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, 1e-3])


BRANCH = 7


class Sure:
    """A policy that is certain of every token but BRANCH, which it would never choose again."""

    device = torch.device("cpu")

    def whole(self):
        return self

    def __call__(self, batch, temperature):
        return torch.where(batch.targets == BRANCH, -99.0, 0.0), None


def cut_lengths(step: int, *options: str, branches: tuple[int, ...] = (150, 90, 150, 90),
                correct: bool = True, failed: int = 0) -> list[int | None]:
    """Tokens cut off each path, None where it is skipped. branches: the place of BRANCH from the end; 0:
    there is no path."""
    config = train.parse_config([*QUICK, "--max-cut", "100", *options])
    problems = [data.Problem(f"{i:x}", "?", "1") for i in range(len(branches))]
    paths = {p.id: cache.Entry([1] * (200 - n) + [BRANCH] + [1] * (n - 1), 1.0, correct, 200, 0) if n else
             replace(cache.NO_PATH, failed=failed) for p, n in zip(problems, branches)}
    prefixes, read = train.cut_paths(config, step, problems, paths, {p.id: [2, 3] for p in problems}, Sure())
    assert read in [200 * n for n in range(sum(map(bool, branches)) + 1)]
    for p, prefix in zip(problems, prefixes):
        assert prefix is None or prefix == paths[p.id].response_ids[:len(prefix)]
    return [None if prefix is None else 200 - len(prefix) for prefix in prefixes]


def near(count: int, tries: int, share: float) -> bool:
    return abs(count - tries * share) <= 3 * math.sqrt(tries * share * (1 - share))


def test_certain_problems_are_skipped():
    cuts = [cut_lengths(step) for step in range(200)]
    assert {n for row in cuts for n in row[1::2]} == {90}  # L is 100; so of 150 tokens only two thirds
    assert {n for row in cuts for n in row[::2]} == {None, 150}
    assert near(sum(row[::2].count(150) for row in cuts), 400, 2 / 3)
    assert {n for step in range(9) for n in cut_lengths(step, "--no-skip-certain")} == {150, 90}
    uniform = [cut_lengths(step, "--cut-position", "uniform") for step in range(60)]  # of the last 100
    assert {n for row in uniform for n in row[::2]} == {None} and all(
        1 <= n <= 100 for row in uniform for n in row[1::2]) and len({row[1] for row in uniform}) > 30
    paper = [n for step in range(60)
             for n in cut_lengths(step, "--cut-position", "uniform", "--no-skip-certain")]
    assert max(paper) in range(90, 101) and near(sum(n > 50 for n in paper), 240, 1 / 2)
    rows = [cut_lengths(step, "--max-cut", "1", branches=(150, 150)) for step in range(60)]
    assert [None, None] in rows and near(sum(row.count(150) for row in rows), 120, 1 / 150)
    assert cut_lengths(4, "--max-cut", "0.8") == [150, 90, 150, 90]  # of the shortest response


def test_wrong_paths_are_not_continued():
    """Continuing them made a mostly wrong policy worse: 17 % -> 9 % on chain sums."""
    for branches in ((90, 150, 90), (0, 0, 0)):  # wrong paths; none
        cuts = [n for step in range(400)
                for n in cut_lengths(step, branches=branches, correct=False, failed=6)]
        assert set(cuts) == {None, 200}  # from the bare prompt, unless it would fail again
        assert near(cuts.count(None), 1200, (1 / 2 if branches[0] else 7 / 8) ** 4)
    assert cut_lengths(4, branches=(0, 90, 0))[1] == 90  # a correct one
    assert None not in cut_lengths(4, "--no-skip-certain", branches=(0, 0), failed=99)
    assert [cut_lengths(step, "--no-prefix-gate", correct=False) for step in range(9)] == [
        cut_lengths(step) for step in range(9)]  # as if they were right


def solved(path: Path, count: int) -> tuple[list[str], list[dict]]:
    """Options for problems whose first path is a worked solution; of two problems, one is solved wrong."""
    problems = lines_of(TINY / "train.jsonl")[:count]
    for i, p in enumerate(problems):
        p["solution"] = f"So it is \\boxed{{{p['answer'] if i % 2 else 'wrong'}}}"
    return ["--data", write(path, *problems), "--cache-init", "solutions"], problems


def test_skipped_visits_count_as_full_paths_that_were_not_needed(tmp_path):
    """A policy that seems certain of all paths: a step without a group changes nothing."""
    options, problems = solved(tmp_path / "p.jsonl", 3)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    lengths = [len(tokenizer.encode(p["solution"])) + 1 for p in problems]
    with hooked(Policy, after=lambda out: None if torch.is_grad_enabled() else (out[0] * 0, out[1])):
        (metrics,) = run_with(tmp_path / "run", *options, "--steps", "1", "--dynamic-rounds", "1",
                              "--max-response", "60", "--no-prefix-gate")  # wrong ones are not skipped
    assert (metrics["group/sampled"], metrics["visits/skipped"], metrics["tokens/generated"]) == (0, 3, 0)
    assert metrics["tokens/full_path"] == 4 * sum(lengths)
    start, end = (load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "run" / "policy"))
    assert all(torch.equal(start[name], x) for name, x in end.items())


@pytest.mark.parametrize("seen, sampled, trained, visits", [
    (0, 0, 0, 8), (8, 8, 7, 2), (8, 8, 3, 8), (8, 8, 0, 8),  # none skipped: 8 at most
    (8, 2, 1, 24), (23, 7, 5, 12)])  # 9 * 7 / 2 = 31.5, of which 9 * 8 / 3 = 24; 24 * 3 / 6 of 24
def test_rounds_are_larger_where_visits_are_skipped(seen, sampled, trained, visits):
    assert train.round_size(8, seen, sampled, trained) == visits


def test_first_paths_from_worked_solutions(tmp_path, capsys):
    options, problems = solved(tmp_path / "p.jsonl", 4)
    del problems[0]["solution"]
    write(tmp_path / "p.jsonl", *problems)
    config = train.parse_config([*QUICK, "--eval-every", "0", "--max-response", "60", "--out",
                                 str(tmp_path / "run"), *options])
    _, (_, task, policy, _, _, rule, *_) = train.prepare(config)
    assert "1 of 4 problems have no worked solution" in capsys.readouterr().out
    how = rollout.Sampling((task.tokenizer.eos_token_id,), policy.vocab_size)
    given, fresh = train.first_paths(config, 1, task.problems, task, policy, how, rule, 1.0)
    assert fresh.keys() == {task.problems[0].id}
    paths = given | fresh
    assert [paths[p.id].correct for p in task.problems[1:]] == [True, False, True]
    for p in task.problems[1:]:
        assert task.tokenizer.decode(paths[p.id].response_ids) == p.solution + "<|im_end|>"
        assert paths[p.id].reward == paths[p.id].correct
        assert paths[p.id].shortest == len(paths[p.id].response_ids)
    assert len(paths[task.problems[0].id].response_ids) <= 60  # the only one that is sampled
    bare = write(tmp_path / "bare.jsonl", *({k: p[k] for k in ("problem", "answer")} for p in problems))
    message = expect_error(capsys, tmp_path / "no", "--data", bare, "--cache-init", "solutions")
    assert "--cache-init" in message and not (tmp_path / "no").exists()


@pytest.mark.parametrize("some", [True, False])
def test_one_right_suffix_is_enough(tmp_path, monkeypatch, some):
    """Half was asked for, and the hardest tokens of correct paths were not learned. Without any the path is
    given up: a wrong response, which is not continued, takes its place."""
    options, _ = solved(tmp_path / "p.jsonl", 8)
    monkeypatch.setattr(rewards, "grade", lambda responses, checker: [
        text == problem.solution or some and i % 4 == 0 for i, (problem, text) in enumerate(responses)])
    (metrics,) = run_with(tmp_path / "run", *options, "--steps", "1", "--dynamic-rounds", "1",
                          "--max-response", "60", "--problems-per-step", "8", "--group-size", "4",
                          "--max-cut", "1.0", "--cut-position", "uniform", "--no-skip-certain",
                          "--overlong-penalty", "0")
    assert metrics["visits/prefix"] > 0 and metrics["group/paying_fraction"] == some
    assert metrics["group/trained"] == some * metrics["group/sampled"]
    assert [r["correct"] for r in lines_of(tmp_path / "run" / "cache.jsonl")[1:]] == [some] * 8


def test_paths_found_by_whole_responses_are_continued_in_the_next_step(tmp_path):
    """On a weak policy an epoch is long: until then the few correct paths were of no use."""
    def group(name: str, prefix: list[int], *right: bool) -> rewards.Group:
        problem = data.Problem(name, "?", "1")
        return rewards.Group(problem, [1], prefix, 9, [[2]] * 2, [[-1.0]] * 2, [True] * 2, list(right),
                             [0.0, 0.0])
    groups = [group("a", [], True, False), group("b", [], True, True), group("c", [], False, False),
              group("d", [5], True, False), group("e", [], False, True)]
    config = train.parse_config([*QUICK, "--problems-per-step", "4"])
    state = train.State(pass_rate=1.0)
    assert train.found(config, state, groups) == ["a", "e"]
    assert train.found(replace(config, problems_per_step=3), state, groups) == ["a"]  # half of a step at most
    for other in (replace(config, prefix_gate=False), replace(config, rollout="full")):
        assert train.found(other, state, groups) == []
    assert train.found(config, replace(state, pass_rate=0.1), groups) == []  # all are whole again
    problems = [data.Problem(f"{i:x}", "?", "1") for i in range(10)]
    plain = [p.id for p in train.problems_of(problems, 0, range(5))]
    left = next(p.id for p in problems if p.id not in plain)
    assert [p.id for p in train.problems_of(problems, 0, range(5), [left, plain[1]])] == [
        left, plain[1], plain[0], *plain[2:]]  # none twice


def test_a_problem_of_this_step_always_gets_its_path():
    """With fewer problems than a step visits, that of a path given up was never among those ahead: the run
    looped for ever."""
    problems = [data.Problem(f"{i:x}", "?", "1") for i in range(10)]
    config = train.parse_config([*QUICK])
    for visits, missing in itertools.product(range(20), problems):
        paths = {p.id: entry(9, 9) for p in problems if p != missing}
        now = train.problems_of(problems, 0, range(visits, visits + 16))
        assert missing not in now or train.problems_ahead(config, problems, now, visits, paths) == [missing]


def test_the_seconds_of_a_run_count_its_last_evaluation(tmp_path, monkeypatch):
    """What the summary called training was short of one evaluation."""
    monkeypatch.setattr(train, "evaluate", lambda *_: {"eval/accuracy": 0.5, "time/eval_s": 7.0})
    monkeypatch.setattr(train.time, "perf_counter", lambda: 100.0)
    task, config = SimpleNamespace(held_out=[], tokenizer=None), train.parse_config(["--steps", "4"])
    state = train.State(step=4, seconds=50.0, eval_seconds=10.0, metrics={"step": 4})
    last = train.finish_step(config, tmp_path, task, None, (), None, 1.0, state, 40.0)
    assert (last.seconds, last.eval_seconds) == (60.0, 17.0)


def test_a_step_visits_no_problem_twice(tmp_path):
    """It drew the same responses again. Two problems are never solved: later rounds have none left."""
    problems = [{**p, "answer": "1/31337"} for p in lines_of(TINY / "train.jsonl")[:2]]
    (metrics,) = run_with(tmp_path / "run", "--data", write(tmp_path / "p.jsonl", *problems), "--rollout",
                          "full", "--steps", "1", "--dynamic-rounds", "3", "--problems-per-step", "2",
                          "--max-response", "30")
    assert metrics["group/sampled"] == 2 and metrics["group/missing"] == 2


def test_a_weak_policy_is_trained_as_by_full_paths(tmp_path, monkeypatch):
    """Right answers by luck got into the cache: SmolLM2 went from 33 % to 8 % on sums. Of 24 problems, 20
    cannot be solved: the metrics and the policy are those of full paths, to the bit."""
    problems = lines_of(TINY / "train.jsonl")[:24]
    problems = [p if i < 4 else {**p, "answer": "1/31337"} for i, p in enumerate(problems)]
    options = ["--data", write(tmp_path / "p.jsonl", *problems), "--steps", "2", "--problems-per-step", "12",
               "--group-size", "2", "--length-reward", "0", "--lr", "1e-4"]
    full, weak = (run_with(tmp_path / kind, *options, "--rollout", kind) for kind in ("full", "rpo"))
    assert full[0]["group/trained"] > 0 and same_weights(tmp_path / "full/policy", tmp_path / "rpo/policy")
    for ours, theirs in zip(weak, full):
        same = [name for name in theirs if not name.startswith((*TIMINGS, "cache/entries"))]
        assert [ours[name] for name in same] == [theirs[name] for name in same] and "reward/mean" in same
    monkeypatch.setattr(cache, "GOOD", 0.2)  # of the 24 visits of the first step, four can be right
    first, second = run_with(tmp_path / "weak", *options, "--no-skip-certain")
    assert first["visits/whole"] == 24 and second["visits/prefix"] == 0
    monkeypatch.setattr(cache, "GOOD", 0.02)
    first, second = run_with(tmp_path / "good", *options, "--no-skip-certain")
    assert first["visits/whole"] == 24 and first["cache/pass_rate"] < 0.2 and second["visits/prefix"] > 0
    monkeypatch.undo()
    config = train.parse_config(QUICK)
    for rollout_, gate, rate, goes_on in (("rpo", True, 0.49, False), ("rpo", True, 0.5, True),
                                          ("rpo", False, 0.0, True), ("full", False, 1.0, False)):
        config = replace(config, rollout=rollout_, prefix_gate=gate)
        assert train.continues(config, train.State(pass_rate=rate)) == goes_on


def test_visits_show_the_pass_rate_from_the_bare_prompt():
    """It was measured on problems that had failed before: 0.18 where 0.83 of whole responses were right.
    On average over the cuts of a correct path: the chance that the policy repeats it, and for each token
    where it may leave, that chance times the share that is right from there on."""
    follow, shares = np.array([0.9, 0.2, 0.5, 1.0, 0.4, 0.8]), (0.0, 0.25, 0.75, 0.5, 1.0, 0.25)
    path = cache.Entry([4] * 6, 1.0, True, 6, 0)
    leaves = np.cumprod([1, *follow])[:6] * (1 - follow)  # before each token
    truth = follow.prod() + leaves @ shares
    for max_cut in (2, 0.5, 1.0):
        chances = cache.branch_cuts(np.log(follow), cache.longest_cut(path, max_cut))
        rates = [cache.visit_rate(path, [4] * kept, [i < 4 * x for i in range(4)], max_cut)
                 for kept, x in enumerate(shares)]
        mean = chances @ rates + (1 - chances.sum()) * cache.visit_rate(path, None, [], max_cut)
        assert mean == pytest.approx(truth, abs=1e-9)
    wrong = replace(path, correct=False)
    assert cache.visit_rate(wrong, None, [], 2) == 0  # skipped because it would fail again
    for entry, prefix in ((wrong, [4]), (wrong, []), (path, [4] * 4), (cache.NO_PATH, [])):
        assert cache.visit_rate(entry, prefix, [True, False, False, False], 2) == 0.25


def test_the_pass_rate_counts_all_visits_of_a_step():
    config = train.parse_config([*QUICK, "--max-cut", "5"])
    path = cache.Entry([4] * 20, 1.0, True, 20, 0)
    problems = [data.Problem(name, "?", "1") for name in "ab"]
    groups = [rewards.Group(problems[0], [1], [4] * 10, 9, [[2]] * 4, [[-1.0]] * 4, [True] * 4,
                            [True, True, True, False], [0.0] * 4),  # 1 - 2 / 8: 10 tokens are left, L is 5
              rewards.Group(problems[1], [1], [], 9, [[2]] * 4, [[-1.0]] * 4, [True] * 4,
                            [True, False, False, False], [0.0] * 4)]  # 1 / 4
    cut, skipped = {"a": path}, [path, cache.NO_PATH]  # 1 and 0
    state = train.count_visits(config, train.State(visits=4, pass_rate=0.9), groups, skipped, [], cut)
    assert state.pass_rate == pytest.approx((0.5 + 0.25 + 1 + 0) / 4)  # 0.9 is of no visit
    state = train.count_visits(config, train.State(visits=1004, pass_rate=0.9), groups, skipped, [], cut)
    assert state.pass_rate == pytest.approx((64 * 0.9 + 1.75) / 68)
    state = train.count_visits(config, train.State(visits=4, pass_rate=0.1), groups, [], [], cut)
    assert state.pass_rate == pytest.approx((2 * 0.1 + 0.75 + 0.25) / 4)  # a whole step


def test_problems_are_drawn_by_the_seed():
    whole, _ = train.split_problems(config := train.parse_config([*QUICK, "--problems", "5"]), TINY)
    drawn = [{p.id for p in train.make_task(replace(config, seed=seed), whole, whole[:1], TINY).problems}
             for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and {len(x) for x in drawn} == {5}
    some = ["--data", str(TINY / "train.jsonl"), "--eval-problems"]  # in a folder without held-out ones
    assert len(train.split_problems(train.parse_config([*some, "7"]), TINY / "none")[1]) == 7
    with pytest.raises(ValueError, match="--eval-problems 0.*--eval-data"):
        train.split_problems(train.parse_config([*some, "0"]), TINY / "none")
    for count in (0, 4800):
        assert train.make_task(replace(config, problems=count), whole, whole[:1], TINY).problems == whole


def test_a_step_of_more_problems_than_first_paths_are_sampled_at_once(tmp_path):
    (metrics,) = run_with(tmp_path / "run", "--steps", "1", "--dynamic-rounds", "1", "--max-response", "200",
                          "--cache-init-chunk", "2", "--no-prefix-gate")  # none is given up
    assert metrics["cache/entries"] == 4  # two chunks of two


def test_the_cache_holds_responses_of_its_problem_with_their_end(finished):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    problems = {p.id: p for p in load(str(TINY / "train.jsonl"))}
    for record in [r for r in lines_of(finished / "cache.jsonl")[1:] if r["response_ids"]]:
        text = tokenizer.decode(record["response_ids"])
        assert record["response_ids"].count(tokenizer.eos_token_id) == text.endswith("<|im_end|>")
        assert len(record["response_ids"]) == 420 or text.endswith("<|im_end|>")
        answer = problems[record["id"]].answer
        assert record["correct"] == is_correct(text.removesuffix("<|im_end|>"), answer)
    samples = lines_of(finished / "samples.jsonl")
    assert any(sample["prefix"] for sample in samples)
    assert all(s["prompt"].endswith("<|im_start|>assistant\n") and s["suffix"] for s in samples)


def test_another_seed_gives_another_order_and_other_responses(tmp_path):
    source, records = write(tmp_path / "p.jsonl", *lines_of(TINY / "train.jsonl")[:3]), []
    for seed in "0123":
        run_with(tmp_path / seed, "--data", source, "--seed", seed, "--rollout", "full", "--steps", "1",
                 "--dynamic-rounds", "1", "--max-response", "30", "--temperature", "9")
        records += lines_of(tmp_path / seed / "samples.jsonl")
    assert len({r["id"] for r in records[::2]}) > 1
    assert len({r["suffix"] for r in records}) == len(records) == 8


def test_full_paths_are_the_same_loop_with_empty_prefixes(tmp_path):
    out = tmp_path / "full"
    metrics = run_with(out, "--rollout", "full", "--algo", "grpo", "--kl-coef", "0.05", "--steps", "2",
                       "--updates-per-rollout", "3", "--dynamic-rounds", "1", "--max-response", "60",
                       "--temperature", "2", *reward_file(tmp_path / "mine.py", out, RISING))
    assert all(m["response/prefix_length"] == 0 for m in metrics)
    assert all(m["tokens/generated"] == m["tokens/full_path"] for m in metrics)
    assert all(m["policy/approx_kl"] > 0 for m in metrics)  # off-policy from the second update on
    assert metrics[1]["policy/kl_ref"] > 0  # moved away from the start
    assert len(lines_of(out / "cache.jsonl")) == 1  # no path is kept


def test_out_of_memory_at_the_end_is_one_sentence(tmp_path, capsys):
    options, _ = solved(tmp_path / "p.jsonl", 3)
    with hooked(Policy, out_of_memory):
        assert train.main([*QUICK, *options, "--eval-every", "0", "--out", str(tmp_path / "run")]) == 1
    assert "--tokens-per-forward" in capsys.readouterr().err


@pytest.mark.parametrize("module, arguments", [
    (train, [*QUICK]), (evaluation, ["--model", str(TINY), "--data", str(TINY / "test.jsonl")])])
def test_out_of_memory_at_load_is_one_sentence(module, arguments, tmp_path, capsys, monkeypatch):
    """A card that is in use by others: a traceback before."""
    monkeypatch.setattr(module, "load_policy", lambda *_, **__: out_of_memory())
    assert module.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("error: out of memory") == 1


def run_of_one_verdict(out: Path, verdict: bool | Callable[[int], list[bool]], *options: str) -> list[dict]:
    """A run whose responses are all called right, or all wrong, or what a function of their number says."""
    class Always(Checker):
        def check(self, pairs):
            return [verdict] * len(pairs) if isinstance(verdict, bool) else verdict(len(pairs))
    config = train.parse_config([*QUICK, "--eval-every", "0", "--max-response", "60", "--out", str(out),
                                 *options])
    _, parts = train.prepare(config)
    parts = [replace(x, checker=Always()) if isinstance(x, rewards.RewardRule) else x for x in parts]
    out.mkdir()
    train.train(config, *parts, threading.Event())
    return lines_of(out / "metrics.jsonl")


def test_groups_without_spread_give_no_gradient_but_update_the_cache(tmp_path, capsys):
    metrics = run_of_one_verdict(tmp_path / "run", False, "--overlong-penalty", "0", "--no-prefix-gate")
    assert same_weights(TINY, tmp_path / "run" / "policy")
    assert {r["step"] for r in lines_of(tmp_path / "run" / "cache.jsonl")[1:]} >= {1, 2, 3}
    # dynamic sampling looked for three groups of mixed accuracy in two rounds
    assert [(m["group/missing"], m["group/trained"]) for m in metrics] == [(3, 0)] * 3
    said = capsys.readouterr().out
    assert said.count("group/missing is 3") == said.count("--dynamic-rounds") == 1 and "(said once)" in said


def test_further_rounds_ask_for_what_the_acceptance_so_far_says(tmp_path):
    mixed, rounds = iter([4, 1, 2]), []  # groups of mixed accuracy in each round

    def verdict(count: int) -> list[bool]:
        rounds.append(count // 2)
        good = next(mixed)
        return [True, False] * good + [False] * (count - 2 * good)
    (metrics,) = run_of_one_verdict(
        tmp_path / "run", verdict, *"--steps 1 --rollout full --group-size 2 --problems-per-step 6".split(),
        *"--dynamic-rounds 9 --max-response 9".split())
    # 2 missing after 4 of 6: 2 / (5 / 7) is 2.8; then 1 missing after 5 of 9: 1 / (6 / 10) is 1.7
    assert rounds == [6, 3, 2]
    assert (metrics["group/sampled"], metrics["group/trained"], metrics["group/missing"]) == (11, 6, 0)


@pytest.mark.parametrize("options, trains", [
    (["--dynamic-rounds", "1", "--length-reward", "0"], False),
    (["--dynamic-rounds", "1", "--length-reward", "0.1"], True),
    (["--dynamic-rounds", "2", "--length-reward", "0.1"], False)])
def test_an_all_correct_group_has_a_gradient_only_with_the_length_reward(options, trains, tmp_path):
    """Dynamic sampling leaves it out nevertheless: it looks at the accuracy (DAPO, eq. 11)."""
    options += ["--algo", "grpo", "--max-cut", "1.0", "--steps", "1"]
    (metrics,) = run_of_one_verdict(tmp_path / "run", True, *options, "--temperature", "9")  # ends at random
    assert (metrics["group/trained"] > 0) == trains and metrics["group/zero_std_fraction"] == 1


def test_own_reward_is_added_and_logged_apart(tmp_path):
    body = "return {'a': [2.0 if problem.answer else 0] * len(texts), 'b': [-ok for ok in correct]}"
    own = reward_file(tmp_path / "mine.py", tmp_path, body)
    (m,) = run_with(tmp_path / "run", *own, "--length-reward", "0", "--overlong-penalty", "0", "--steps", "1",
                    "--max-response", "300")
    assert (m["reward/file/a"], m["reward/file/b"]) == (2.0, pytest.approx(-m["reward/accuracy"]))
    assert m["reward/mean"] == pytest.approx(2) and m["reward/accuracy"] > 0


@pytest.mark.parametrize("text, word", [
    ("def reward(p, texts, n, ok):\n    return 1 / 0\n", "line 2"),
    ("def reward(problem):\n    return [1]\n", "reward()"), ("x = 1\n", "no function"),
    ("def reward(:\n", "cannot be loaded"), (None, "cannot be loaded"),
    ("def reward(p, texts, n, ok):\n    return [float('nan')]\n", "finite"),
    ("def reward(p, texts, n, ok):\n    return [1, 2]\n", "finite"),
    ("def reward(p, texts, n, ok):\n    return None\n", "None")])
def test_a_broken_reward_file_is_one_sentence(text, word, tmp_path, capsys):
    own = tmp_path / "mine.py"
    if text is not None:
        own.write_text(text)
    message = expect_error(capsys, tmp_path / "out", "--reward-file", str(own))
    assert "--reward-file" in message and word in message and not (tmp_path / "out").exists()


def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path, capsys, monkeypatch):
    """The checkpoint of a step was lost once: it was saved after an evaluation that failed."""
    monkeypatch.setattr(cache, "GOOD", 0.0)  # as in `finished`
    out = tmp_path / "run"
    for step in (1, 2):
        own = reward_file(tmp_path / "stop.py", out, signals(step, 1))
        assert train.main([*QUICK, *own, "--out", str(out)]) == 130
        assert f"--resume {out}" in capsys.readouterr().out and not (out / "summary.json").exists()
        assert [m["step"] for m in lines_of(out / "metrics.jsonl")] == list(range(step))
        assert [f.name for f in out.glob("checkpoint*")] == [f"checkpoint-00000{step}"]
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 99}\n')  # of a step after the checkpoint
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def fail() -> None:
        if not torch.is_grad_enabled() and (out / "checkpoint-000003").exists():
            raise OSError("the evaluation fails")
    with hooked(Qwen2Model, fail):
        assert train.main(["--resume", str(out)]) == 1
    assert train.main(["--resume", str(out)]) == 0
    assert outcome(out) == outcome(finished)
    assert len(list(out.glob("checkpoint*"))) == 1
    done = json.loads((out / "summary.json").read_text())
    assert done["tokens_generated"] == json.loads((finished / "summary.json").read_text())["tokens_generated"]


def test_a_second_signal_ends_the_run_at_once_and_it_begins_anew(tmp_path):
    out = tmp_path / "run"
    own = reward_file(tmp_path / "stop.py", out, signals(1, 2))
    assert train.main([*QUICK, *own, "--eval-every", "0", "--max-response", "60", "--out", str(out)]) == 130
    assert not list(out.glob("checkpoint*")) and len(lines_of(out / "metrics.jsonl")) == 1
    reward_file(tmp_path / "stop.py", out, signals(9, 1))
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    assert [m["step"] for m in lines_of(out / "metrics.jsonl")] == [1, 2]


def test_a_run_made_longer_ends_with_the_bits_of_a_long_one(finished, tmp_path, monkeypatch):
    """First paths were drawn ahead by the number of steps: --resume with more --steps gave other weights."""
    monkeypatch.setattr(cache, "GOOD", 0.0)  # as in `finished`
    out = tmp_path / "run"
    assert train.main([*QUICK, "--steps", "2", "--out", str(out)]) == 0
    assert train.main(["--resume", str(out), "--steps", "3"]) == 0
    assert outcome(out) == outcome(finished)
    assert train.main(["--resume", str(out), "--eval-every", "0"]) == 0  # was refused


def test_options_of_a_run_that_goes_on(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    for changed in (["--lr", "2e-3", "--seed", "4"], ["--algo", "grpo"]):
        message = expect_error(capsys, out, *changed, "--steps", "5")
        assert all(flag in message for flag in changed[::2]) and "--steps" not in message
    assert "holds no run" in error_of(train.main, capsys, "--resume", str(tmp_path / "nothing"))
    assert train.main(["--resume", str(out), "--steps", "4", "--save-every", "1", "--eval-every", "9",
                       "--keep-checkpoints", "2"]) == 0
    assert [m["step"] for m in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert sorted(f.name for f in out.glob("checkpoint*")) == ["checkpoint-000003", "checkpoint-000004"]
    with open(out / "lock") as file:
        train.fcntl.flock(file, train.fcntl.LOCK_EX)
        assert "another process" in expect_error(capsys, out)
    config = json.loads((out / "config.json").read_text())
    config["data"] = write(tmp_path / "other.jsonl", *lines_of(TINY / "train.jsonl")[:9])
    (out / "config.json").write_text(json.dumps(config))  # as if the file of the run had changed
    assert "problems" in error_of(train.main, capsys, "--resume", str(out))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    """A write error at every place of a save: the run goes on, and the save before still resumes."""
    config = train.parse_config([*QUICK, "--eval-every", "0", "--out", str(tmp_path)])
    _, (out, task, policy, _, optimizer, _, state, *_) = train.prepare(config)
    state = replace(state, step=1, paths={task.problems[0].id: entry(5, 5)})
    train.save_checkpoint(config, out, task, policy, optimizer, state)
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def full_for_torch(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    places = [(PreTrainedModel, "save_pretrained", full), (PreTrainedTokenizerBase, "save_pretrained", full),
              (Path, "write_text", full), (torch, "save", full_for_torch), (cache, "save", full),
              (os, "fsync", full), (os, "replace", full)]
    for owner, name, failure in places:
        with monkeypatch.context() as patch:  # there is no value that makes a disk full
            patch.setattr(owner, name, failure)
            train.save_checkpoint(config, out, task, policy, optimizer, replace(state, step=2))
        assert "step 2: the checkpoint could not be written" in capsys.readouterr().out
        assert {f: f.read_bytes() for f in out.rglob("*") if f.is_file()} == before
    assert train.load_state(out / "checkpoint-000001", task) == state
    record = json.loads((out / "checkpoint-000001" / "state.json").read_text())  # and of older code:
    (out / "checkpoint-000001" / "state.json").write_text(json.dumps(record | {"wrong_pays": 0.5}))
    assert train.load_state(out / "checkpoint-000001", task) == state
    train.save_checkpoint(config, out, task, policy, optimizer, replace(state, step=2))
    assert [f.name for f in out.glob("checkpoint*")] == ["checkpoint-000002"]
    assert (out / "policy").resolve() == (out / "checkpoint-000002" / "policy").resolve()


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path, capsys):
    """After ten, the first paths of the last step stayed in the cache once, their tokens not counted."""
    def run(out: Path, last: int, *options: str) -> int:
        """Rewards of 1e300 until the step `last`: their advantages are infinite in float32."""
        body = f"return [(1e300 if step < {last} else 1.0) * i for i in range(len(texts))]"
        options = (*options, *reward_file(tmp_path / f"{out.name}.py", out, body), "--out", str(out))
        return train.main([*QUICK, *options, "--algo", "dr_grpo", "--dynamic-rounds", "1", "--eval-every",
                           "0", "--cache-init-chunk", "3", "--no-skip-certain", "--max-response", "60",
                           "--no-prefix-gate"])
    out = tmp_path / "one"
    assert run(out, 1, "--steps", "2") == 0
    assert [m["policy/skipped_updates"] for m in lines_of(out / "metrics.jsonl")] == [1, 0]
    assert all(torch.isfinite(w).all() for w in weights_of(out / "policy").values())
    dumped = json.loads(next(out.glob("skipped-1*.json")).read_text())
    assert len(dumped) == 3 and {"prompt", "prefix", "suffixes", "rewards"} <= dumped[0].keys()
    assert not same_weights(TINY, out / "policy")
    out = tmp_path / "ten"  # three a step: the tenth is in the fourth step
    assert run(out, 99, "--steps", "5", "--updates-per-rollout", "3") == 1
    assert "ten updates in a row" in capsys.readouterr().err
    assert same_weights(TINY, out / "policy")
    metrics = lines_of(out / "metrics.jsonl")
    assert [m["policy/skipped_updates"] for m in metrics] == [3, 3, 3]
    assert len(list(out.glob("skipped-2*.json"))) == 3  # of each update
    assert [f.name for f in out.glob("checkpoint*")] == ["checkpoint-000003"]
    state = json.loads((out / "checkpoint-000003" / "state.json").read_text())
    assert sum(tokens for _, tokens in state["kinds"].values()) == metrics[-1]["tokens/generated"]
    assert state["skipped_in_a_row"] == 0
    assert len(lines_of(out / "cache.jsonl")) - 1 == metrics[-1]["cache/entries"] == 9  # three a step
    assert run(out, 0, "--steps", "5", "--updates-per-rollout", "3") == 0  # sound from the fourth step on
    assert [m["step"] for m in lines_of(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert {r["step"] for r in lines_of(out / "samples.jsonl")} == {1, 2, 3, 4, 5}
    assert not same_weights(TINY, out / "policy")


def test_collapse_is_named_once(capsys):
    warned = frozenset()
    for entropy in (0.1, 0.001, 0.001):
        warned = train.warn_once({"step": 3, "policy/entropy": entropy, "group/zero_std_fraction": 1.0,
                                  "response/finished_fraction": 0.5}, warned)
    said = capsys.readouterr().out
    assert said.count("policy/entropy") == 1 and said.count("zero_std") == 1 and "finished" not in said


def test_text_of_problems_never_reaches_the_screen_raw(tmp_path, capsys):
    nasty = "\x1b[2J{run.out}%s\x1b]0;owned\x07"
    problems = [{"problem": f"{nasty} {i}", "answer": "1"} for i in range(8)]
    problems.append({"problem": "?", "answer": nasty + "\\frac{"})
    source = write(tmp_path / "p.jsonl", *problems)
    run_with(tmp_path / "run", "--data", source, "--steps", "1", "--max-response", "30",
             "--max-prompt", "200")
    said = capsys.readouterr()
    assert "cannot be checked" in said.out and not set(said.out + said.err) & {"\x1b", "\x07"}


def test_code_and_pickles_in_a_model_folder_are_never_run(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    message = expect_error(capsys, tmp_path / "out", "--model", str(folder))
    assert "contains custom code" in message and not (tmp_path / "ran").exists()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights_of(TINY), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "no weights (*.safetensors)" in expect_error(capsys, tmp_path / "out", "--model", str(folder))


KILLED = [*QUICK, "--steps", "4", "--save-every", "1", "--eval-every", "2", "--eval-problems", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rpo", "full"])
@pytest.mark.parametrize("algo", ["grpo", "dapo"])
def test_killed_at_any_moment_it_ends_with_the_same_bits(method, algo, tmp_path):
    """SIGKILL at 5 random moments of each, in cache initialisation, rollout, update, save and evaluation."""
    def start(out: str) -> subprocess.Popen:
        code = "import torch, train; torch.set_num_threads(1); raise SystemExit(train.main())"
        options = [*KILLED, "--algo", algo, "--rollout", method, "--out", str(tmp_path / out)]
        return subprocess.Popen([sys.executable, "-c", code, *options], cwd=Path(train.__file__).parent,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin = time.monotonic()
    assert start("whole").wait() == 0
    whole, rng = time.monotonic() - begin, np.random.default_rng([len(method), len(algo), ord(algo[0])])
    for _ in range(5):
        process = start("killed")
        with contextlib.suppress(subprocess.TimeoutExpired):  # or it came to its end before
            process.wait(rng.uniform(0.2, 0.5) * whole)
        process.kill()
        process.wait()
    assert start("killed").wait() == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


SWITCHES = {  # what the pairs of options are made of
    "--algo": ["grpo", "dapo", "dr_grpo", "rloo", "gspo", "cispo"], "--rollout": ["rpo", "full"],
    "--max-cut": ["20", "0.5"], "--cut-position": ["uncertain", "uniform"],
    "--skip-certain": [False, True], "--epsilon": ["0.5", "1"], "--cache-init": ["policy", "solutions"],
    "--prefix-gate": [False, True], "--length-reward": ["0", "0.01"], "--overlong-penalty": ["0", "1"],
    "--updates-per-rollout": ["1", "2"], "--kl-coef": ["0", "0.01"], "--dynamic-rounds": ["1", "3"],
    "--lr-decay-steps": ["0", "2"], "--gradient-checkpointing": [False, True]}


def all_pairs() -> list[dict[str, object]]:
    """Rows in which every two values of different switches meet at least once: greedy, seeded."""
    rng, names = np.random.default_rng(0), list(SWITCHES)
    left = {(a, x, b, y) for i, a in enumerate(names) for b in names[i + 1:]
            for x in SWITCHES[a] for y in SWITCHES[b]}
    chosen = []
    while left:
        tries = [{n: SWITCHES[n][rng.integers(len(SWITCHES[n]))] for n in names} for _ in range(40)]
        a, x, b, y = min(left, key=str)
        tries = [row | {a: x, b: y} for row in tries]
        met = [{p for p in left if row[p[0]] == p[1] and row[p[2]] == p[3]} for row in tries]
        best = max(range(40), key=lambda i: len(met[i]))
        chosen.append(tries[best])
        left -= met[best]
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("row", all_pairs(), ids=lambda row: "-".join(str(v) for v in row.values()))
def test_every_pair_of_switches_runs_five_steps_with_finite_metrics(row, tmp_path):
    problems = [p | {"solution": f"It is \\boxed{{{p['answer']}}}"}
                for p in lines_of(TINY / "train.jsonl")[:4]]
    options = ["--data", write(tmp_path / "p.jsonl", *problems)]
    for name, value in row.items():
        flag = name if value else name.replace("--", "--no-", 1)
        options += [flag] if isinstance(value, bool) else [name, value]
    metrics = run_with(tmp_path / "run", *options, "--steps", "5", "--max-response", "200")
    assert len(metrics) == 5 and all(math.isfinite(v) for m in metrics for v in m.values())


def test_preset_options_can_be_overridden_by_later_ones(tmp_path):
    preset = tmp_path / "p.args"
    preset.write_text("# a comment\n--algo grpo --steps 7\n--instruction 'two words'  # and another\n")
    config = train.parse_config([f"@{preset}", "--steps", "9"])
    assert (config.algo, config.steps, config.instruction) == ("grpo", 9, "two words")
    assert (config.dynamic_rounds, config.overlong_penalty, config.length_reward) == (1, 0, 0.01)
    config = train.parse_config(["--overlong-penalty", "0.25", "--rollout", "full"])
    assert (config.algo, config.overlong_penalty, config.dynamic_rounds, config.length_reward) == (
        "dapo", 0.25, 10, 0)


@pytest.mark.parametrize("arguments, word", [
    (["--max-cuts", "3"], "--max-cuts"), (["--max-cut", "0"], "--max-cut"), (["--max-cut", "-3"], "-3"),
    (["--max-cut", "1.5"], "--max-cut"), (["--group-size", "1"], "--group-size"), (["--steps", "x"], "x"),
    (["--lr", "nan"], "--lr"), (["--temperature", "0"], "--temperature"), (["--epsilon", "1.1"], "--epsilon"),
    (["--data", "missing.jsonl"], "missing.jsonl"), (["--data", "."], "--data"), (["--device", "tpu"], "tpu"),
    (["--model", "Unheard-of"], "Unheard-of"), (["--updates-per-rollout", "4"], "--updates-per-rollout"),
    (["--max-prompt", "5"], "--max-prompt"), (["--max-response", "4000"], "--max-response"),
    (["--rollout-memory", "0.00001"], "--rollout-memory"), (["@nothing.args"], "nothing.args"),
    (["--algo", "ppo"], "ppo"), (["--grad-clip", "2"], "--grad-clip"),
    (["--optimizer", "adamw8bit"], "pip install bitsandbytes"),
    (["--optimizer", "adamw8bit", "--shard"], "cannot be spread")])
def test_bad_input_is_one_sentence_and_code_2(arguments, word, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no model of that name is asked for
    out = tmp_path / "out"
    assert word in expect_error(capsys, out, *arguments) and not out.exists()


def test_broken_data_folders_and_disks_are_named(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    six = [{"problem": str(i), "answer": "1"} for i in range(6)]
    broken = write(tmp_path / "broken.jsonl", *six, '{"problem": ')
    assert "line 7" in expect_error(capsys, out, "--data", broken)
    nameless = write(tmp_path / "nameless.jsonl", {"text": "?", "answer": "1"})
    assert "line 1" in expect_error(capsys, out, "--data", nameless)
    empty = write(tmp_path / "empty.jsonl", {"problem": "no answer"})
    assert "no problem left" in expect_error(capsys, out, "--data", empty)
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text("{}\n")
    assert "holds no run" in expect_error(capsys, other)
    assert os.listdir(other) == ["metrics.jsonl"]
    # there is no value that makes a disk small
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    assert "not enough disk" in expect_error(capsys, out)
    assert not out.exists()


def qwen_1_5b() -> PreTrainedModel:
    """The published sizes of Qwen2.5-1.5B, without weights: 1,543,714,304 parameters."""
    with torch.device("meta"):
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, vocab_size=151936,
            num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True))


def test_a_card_that_is_too_small_is_told_before_the_weights_are_loaded():
    """On 24 GB a run once ended with advice that could not help: 16 bytes per parameter are 24.7 GB."""
    n, config = 1_543_714_304, train.parse_config([])
    with pytest.raises(ValueError, match="24.7 GB.* 24.0.*--optimizer adamw8bit .15.4 GB.*--shard with 2"):
        train.check_fits(config, n, 24e9, 1)
    with pytest.raises(ValueError, match="24.7 GB.* 8.0: give --shard with 4 devices"):  # 24.7 / 8 > 3
        train.check_fits(config, n, 8e9, 1)
    train.check_fits(config, n, 80e9, 1)
    train.check_fits(config, n, 24e9, 2)
    train.check_fits(replace(config, optimizer="adamw8bit"), n, 24e9, 1)


def test_what_no_number_of_cards_can_load_is_refused():
    """Every rank loads the whole model in float32 before it is spread: 32B do not go through 80 GB."""
    config = train.parse_config([])
    with pytest.raises(ValueError, match="128.0, this device has 80.0: give a smaller model"):
        train.check_fits(config, int(32e9), 80e9, 64)
    train.check_fits(config, int(14e9), 80e9, 8)


@pytest.mark.parametrize("copies, states", [([], 10), (["whole"], 1)])  # 8 + 2; 8 / 8, and the copy is there
def test_the_rollout_leaves_free_what_the_optimiser_needs_on_one_card(copies, states, monkeypatch):
    """--shard reserved the states of all cards on each: 7B left nothing for keys and values."""
    monkeypatch.setattr(train, "ranks", lambda: (0, 8))
    monkeypatch.setattr(rollout, "default_memory", lambda device, reserved: reserved)
    policy = SimpleNamespace(copies=copies, device="cuda", model=SimpleNamespace(num_parameters=lambda: 100))
    assert train.rollout_memory(train.parse_config([]), policy) == 100 * states


def test_the_memory_plan_by_hand():
    n, config = 1_543_714_304, train.parse_config(["--rollout-memory", "4"])
    rolling, updating = memory.memory_plan(config, qwen_1_5b(), "cuda", 80e9)
    assert (updating["weights"], updating["gradients"], updating["optimiser states"]) == (4 * n, 4 * n, 8 * n)
    assert rolling["copy of the weights for decoding"] == 2 * n
    assert rolling["keys, values, logits"] == 4 * 2**30
    assert updating["activations"] == 16384 * 28 * 1536 * 4  # what goes from layer to layer, float32
    assert updating["gradient of the head"] == 151936 * 1536 * 6  # and the bfloat16 head
    shared, _ = memory.memory_plan(config, qwen_1_5b(), "cuda", 80e9, shards=8)
    assert (shared["weights"], shared["optimiser states"]) == (n / 2, n)
    for plan in memory.memory_plan(config, qwen_1_5b(), "cpu", 80e9):  # a tenth on top
        assert 10 * plan.pop("freed, kept by the allocator") == pytest.approx(sum(plan.values()))
    assert not rolling["freed, kept by the allocator"]


def test_the_plan_needs_no_weights_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    qwen_1_5b().config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert train.main(["--model", str(tmp_path / "model"), "--out", str(out), "--dry-run", "24"]) == 0
    text = capsys.readouterr().out
    assert "fits with --optimizer adamw8bit" in text and "| weights | 6.17 | 6.17 |" in text
    assert "about 76,800" in text and not out.exists()  # 64 problems, 8 suffixes of 150
    options = ["--dry-run", "24", "--optimizer", "adamw8bit", "--tokens-per-forward", "8192"]
    assert train.main(["--model", str(tmp_path / "model"), *options]) == 0  # without bitsandbytes, too
    assert "24.0 GB: fits\n" in capsys.readouterr().out
    options = ["--model", str(tmp_path / "model"), "--dry-run", "80", "--max-response", "99999"]
    assert train.main(options) == 2 and "positions" in capsys.readouterr().err
    transformers.MambaConfig().save_pretrained(tmp_path / "model")
    assert train.main(options[:4]) == 2 and "mamba model has no attention" in capsys.readouterr().err


FLOORS = [{"answers", "cache", "data"}, {"policy", "rewards"}, {"rollout", "rpo"}, {"eval"}, {"train"}]


def test_no_import_runs_up_a_floor_and_none_makes_a_circle():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert set(floor) == {p.stem for p in Path(train.__file__).parent.glob("*.py")} - {"test_rpo"}
    uses = {}
    for name in floor:
        tree = ast.parse(Path(train.__file__).with_name(f"{name}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                    for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        uses[name] = imported & set(floor)
        assert all(floor[used] <= floor[name] for used in uses[name]), name
    assert not any("train" in used for used in uses.values()) and "rpo" not in uses["rollout"]
    done: set[str] = set()
    while len(done) < len(uses):  # a circle would never become ready
        ready = {name for name in uses if uses[name] <= done} - done
        assert ready, f"a circle among {set(uses) - done}"
        done |= ready


def test_importing_a_module_has_no_side_effect_and_the_command_line_answers(tmp_path):
    done = subprocess.run([sys.executable, train.__file__, "--help"], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0 and "--max-cut" in done.stdout
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------- eval


def test_pass_at_k_by_hand_and_by_counting():
    # 4 samples, 2 of them right: of the 6 pairs one has none
    assert evaluation.pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert [evaluation.pass_at_k(5, c, 5) for c in (0, 1, 5)] == [0, 1, 1]
    assert evaluation.pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    samples = [1, 0, 0, 1, 0, 0, 0]
    for k in (2, 3, 6):
        subsets = list(itertools.combinations(samples, k))
        assert evaluation.pass_at_k(7, 2, k) == pytest.approx(np.mean([any(x) for x in subsets]))


def test_majority_and_its_ties_by_hand():
    assert evaluation.majority([0, 1, 1, 2], [True, False, False, True]) == 0
    assert evaluation.majority([0, 1, 1, 2], [False, True, True, False]) == 1
    assert evaluation.majority([0, 1, 1, 0], [False, True, True, False]) == 0.5  # two each
    assert evaluation.majority([-1, -1, -1, 3], [False, False, False, True]) == 1  # no answer is no vote
    assert evaluation.majority([-1, -1], [False, False]) == 0
    assert evaluation.majority([0, 1, 2], [True, False, False]) == pytest.approx(1 / 3)


def test_equal_answers_are_one_vote():
    given = ["1/2", None, r"\frac{1}{2}", "0.5", "3", None, "3.0"]
    got = evaluation.cluster(given, Checker())
    assert got == [0, -1, 0, 0, got[4], -1, got[4]] and got[4] > 0


def test_the_interval_is_that_of_a_normal_mean():
    # 400 problems, a quarter of them solved: standard error sqrt(1/4 * 3/4 / 400)
    half = 1.96 * math.sqrt(3 / 16 / 400)
    got = evaluation.interval([1.0] * 100 + [0.0] * 300)
    assert got == pytest.approx((0.25 - half, 0.25 + half), abs=0.003)
    assert evaluation.interval([0.5] * 9) == (0.5, 0.5)


def test_segment_figures_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(Path(train.__file__).with_name("benchmarks"))  # a script beside its common.py
    segments = pytest.importorskip("segments")

    def record(name, *correct):
        return {"id": name, "correct": [bool(c) for c in correct]}
    rows = {0.0: [record("a", 0, 0), record("b", 1, 0)], 0.5: [record("a", 1, 1), record("b", 1, 0)],
            0.9: [record("a", 1, 1), record("b", 0, 0)]}
    got = segments.segment_figures(rows, {"a": True, "b": False})
    assert [row["all"][0] for row in got["table"]] == [0.25, 0.75, 0.5]
    assert [row["right"][0] for row in got["table"]] == [0, 1, 1]
    assert [row["wrong"][0] for row in got["table"]] == [0.5, 0.5, 0]
    assert got["largest_fall"] == {"0.5-0.9": {"problems": 1, "mean_change": 0.5}}
    assert got["largest_rise"] == {"0-0.5": {"problems": 1, "mean_change": 1.0}}


EVAL = ["--model", str(TINY), "--max-response", "300", "--instruction", ""]


def evaluated(out: Path, *options: str) -> dict:
    assert evaluation.main([*EVAL, "--out", str(out), *options]) == 0
    return json.loads((out / "results.json").read_text())


def test_an_evaluation_states_its_protocol_and_goes_on_where_it_was_killed(tmp_path, capsys):
    source = write(tmp_path / "easy.jsonl", *lines_of(TINY / "test.jsonl")[:5])
    options = ["--data", source, "--samples", "4", "--temperature", "0.8", "--top-p", "0.95"]
    first = evaluated(tmp_path / "a", *options)
    figures, path = first["results"]["easy"], tmp_path / "a" / "responses-easy.jsonl"
    records = lines_of(path)[1:]
    assert figures["avg"] == pytest.approx(np.mean([r["correct"] for r in records]))
    assert figures["pass@4"] == pytest.approx(np.mean([any(r["correct"]) for r in records]))
    assert figures["tokens"] == sum(n for r in records for n in r["tokens"]) == figures["tokens_sampled"]
    for record in records:
        assert record["correct"] == [is_correct(t, record["answer"])
                                     for t in record["responses"]]
    for key in ("template", "checker", "commit", "seed", "top_p", "instruction", "max_response"):
        assert key in first["protocol"]
    assert first["protocol"]["data"]["easy"]["problems"] == 5
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:3]) + b"\n" + lines[3][:40])  # two records and a part of the third
    again = evaluated(tmp_path / "a", *options)["results"]["easy"]
    assert 0 < again["tokens_sampled"] < figures["tokens_sampled"]
    for key in ("avg", "maj", "tokens", "per_problem", "length"):
        assert again[key] == figures[key]
    changed = error_of(evaluation.main, capsys, *EVAL, "--out", str(tmp_path / "a"), *options[:-2])
    assert "other options" in changed
    greedy = evaluated(tmp_path / "b", "--data", source)
    assert evaluation.main(["--compare", *(str(tmp_path / x / "results.json") for x in "ab")]) == 0
    gap = greedy["results"]["easy"]["avg"] - figures["avg"]
    assert f"{gap:+.4f}" in capsys.readouterr().out


def test_an_evaluation_tells_weights_apart_that_lie_in_the_same_folder(tmp_path, monkeypatch):
    """runs/NAME/policy is a link: after more training the figures of the older policy were given again."""
    args = evaluation.parse(["--model", "policy", "--data", "x.jsonl"])
    tokenizer = SimpleNamespace(chat_template="")
    monkeypatch.setattr(shutil, "which", lambda name: None)  # no git here, which is no error
    found = []
    for text in ("a", "b", "a"):
        (tmp_path / "model.safetensors").write_text(text)
        found.append(evaluation.protocol_of(args, tmp_path, tokenizer, {}))
    assert found[0] == found[2] != found[1] and found[0]["commit"] == "unknown"


def test_every_sample_of_an_evaluation_has_its_own_seed():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    policy = policies.load_policy(TINY, len(tokenizer), torch.device("cpu"))
    how = rollout.Sampling((), len(tokenizer), temperature=9.0)  # nearly uniform: nothing alike by chance
    evaluator = evaluation.Evaluator(policy, tokenizer, how, Checker(), 1.0, 20, 7)
    problems = load(str(TINY / "test.jsonl"))[:3]

    def responses(*keys: tuple[int, ...]) -> list[str]:
        records = []
        evaluator.run([(p, [5, 6], [], key) for key in keys for p in problems], 4, records.append, "")
        return sorted(text for record in records for text in record["responses"])
    seen = responses((0,), (1,))
    assert len(set(seen)) == len(seen) == 24
    assert set(responses((1,))) < set(seen)  # and the same again


@pytest.mark.parametrize("arguments, word", [
    (["--model", str(TINY), "--data", f"{TINY}/test.jsonl,{TINY}/test.jsonl"], "test"),
    ([], "--model"), (["--model", "x", "--data", "y", "--samples", "0"], "--samples"),
    (["--model", "x", "--data", "y", "--top-p", "0"], "--top-p"),
    (["--model", "x", "--data", "y", "--samples", "4"], "greedy"), (["--compare", "a", "b"], "--compare a"),
    (["--model", str(TINY), "--data", "math500", "--data-dir", "nowhere"], "math500"),
    (["--model", str(TINY), "--data", str(TINY / "test.jsonl"), "--max-response", "2000"], "--max-response"),
    (["--model", str(TINY), "--data", str(TINY / "test.jsonl"), "--template-args", "{"], "--template-args")])
def test_bad_input_of_the_evaluation_is_one_sentence(arguments, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in error_of(evaluation.main, capsys, *arguments)


# ------------------------------------------------------------------------------------ ranks


def torchrun(count: int, *command: str) -> subprocess.Popen:
    """`count` processes on gloo, one thread each."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen([*start, *command], cwd=TINY.parent, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def train_on(count: int, folder: Path, **runs: list[str]) -> str:
    """Whole runs in folder/NAME, one after the other in the same `count` processes; the screen's text."""
    folder.mkdir(exist_ok=True)
    (folder / "runs.py").write_text(f"""
import sys
sys.path.insert(0, {str(TINY.parent)!r})
import train
for name, options in {runs!r}.items():
    assert train.main([*options, "--out", {str(folder)!r} + "/" + name]) == 0
train.end(0)
""")
    process = torchrun(count, str(folder / "runs.py"))
    text = "".join(process.communicate())
    assert process.returncode == 0, text
    return text


def assert_same_run(out: Path, whole: Path) -> None:
    """Up to rounding: metrics, cache, Adam's states, and the policy by the distance it was trained."""
    gaps = Counter()
    for got, want in zip(lines_of(out / "metrics.jsonl"), lines_of(whole / "metrics.jsonl"), strict=True):
        assert got.keys() == want.keys()
        gaps |= {n: abs(got[n] - want[n]) for n in got if not n.startswith(TIMINGS)}
    worst = max([0, *gaps.values()])
    assert worst < 1e-5
    for name in ("cache.jsonl", "samples.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    got, want, start = (load_file(folder / "model.safetensors")
                        for folder in (out / "policy", whole / "policy", TINY))
    assert got.keys() == want.keys()  # tied weights once

    def distance(a: dict, b: dict) -> float:
        return math.sqrt(sum(float((a[name].double() - b[name]).square().sum()) for name in a))
    far, moved = distance(got, want), distance(want, start)
    print(f"largest gap of a metric {worst:.1e}, of the policy {far / moved:.1e} of {moved:.2g}")
    assert moved > 0.01 and far < 1e-5 * moved
    got, want = (torch.load((folder / "policy").resolve().parent / "optimizer.pt")["state"]
                 for folder in (out, whole))
    assert all(relative_error(got[i][key], want[i][key]) < 1e-3
               for i in want for key in ("exp_avg", "exp_avg_sq"))


MODES = {"dapo": ["--algo", "dapo", "--dynamic-rounds", "3"],
         "grpo": ["--algo", "grpo", "--updates-per-rollout", "2", "--dynamic-rounds", "1"]}


def test_two_processes_sharded_or_not_train_as_one(tmp_path):
    """Two updates of 2 and 1 groups, so that a process has nothing to do in the second."""
    own = reward_file(tmp_path / "r.py", tmp_path / "none", RISING)
    options = [*QUICK, *MODES["grpo"], *own, "--no-prefix-gate", "--steps", "2", "--eval-every", "0",
               "--tokens-per-forward", "900"]
    assert train.main([*options, "--out", str(tmp_path / "one")]) == 0
    text = train_on(2, tmp_path / "two", plain=options, shard=[*options, "--shard"])
    assert text.count("problems, 0 held out") == 2  # only the first process prints
    for name in ("plain", "shard"):
        assert_same_run(tmp_path / "two" / name, tmp_path / "one")


def six_steps(folder: Path) -> list[str]:
    """Options of runs whose paths are all there in the first step, two of them from worked solutions."""
    problems = lines_of(TINY / "train.jsonl")[:12]
    problems[:2] = [{**p, "solution": f"So it is \\boxed{{{p['answer']}}}"} for p in problems[:2]]
    problems = write(folder / "problems.jsonl", *problems)
    held_out = str(TINY / "test.jsonl")
    return [*QUICK, "--data", problems, "--eval-data", held_out, "--eval-problems", "3", "--eval-every", "6",
            "--steps", "6", "--lr", "1e-4", "--cache-init", "solutions"]


@pytest.mark.slow
def test_any_number_of_processes_trains_as_one_and_takes_over_from_any_other(tmp_path):
    """A sharded run is stopped by a signal to one of its processes and goes on with 1 and with 4."""
    six, stop = six_steps(tmp_path), tmp_path / "stop"
    own = reward_file(tmp_path / "r.py", tmp_path / "2" / "stopped", f"""
    if step in (3, 4) and os.environ.get("RANK") == "1" and os.path.exists({str(stop)!r}):
        os.remove({str(stop)!r})
        os.kill(os.getpid(), signal.SIGTERM)
    {RISING}""")
    modes = {name: [*six, *own, *options] for name, options in MODES.items()}
    sharded = {f"{name}_shard": [*options, "--shard", "--gradient-checkpointing"]
               for name, options in modes.items()}
    train_on(1, tmp_path / "1", **modes)
    train_on(2, tmp_path / "2", **modes, **sharded)
    stop.write_text("")
    process = torchrun(2, "train.py", *sharded["dapo_shard"], "--out", str(tmp_path / "2" / "stopped"))
    text = "".join(process.communicate())
    assert process.returncode == 1 and text.count("stopped; go on with: python train.py --resume") == 1, text
    assert 2 < len(lines_of(tmp_path / "2" / "stopped" / "metrics.jsonl")) < 6 and not stop.exists()
    for count in ("1", "4"):
        (tmp_path / count).mkdir(exist_ok=True)
        shutil.copytree(tmp_path / "2" / "stopped", tmp_path / count / "resumed", symlinks=True)
    train_on(4, tmp_path / "4", **modes, resumed=sharded["dapo_shard"])
    train_on(1, tmp_path / "1", resumed=[*sharded["dapo_shard"], "--no-shard"])
    for run in ("2/dapo", "2/grpo", "2/dapo_shard", "2/grpo_shard", "4/dapo", "4/grpo", "4/resumed",
                "1/resumed"):
        print(run, end=": ")
        assert_same_run(tmp_path / run, tmp_path / "1" / ("grpo" if "grpo" in run else "dapo"))


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_within_a_minute_and_resume_goes_on(tmp_path):
    """At random moments after set-up, in rollout, update, save and evaluation."""
    options, rng = [*six_steps(tmp_path), *MODES["dapo"], "--save-every", "1"], np.random.default_rng(0)
    begin = time.monotonic()
    assert train.main([*options, "--out", str(tmp_path / "1")]) == 0
    whole = time.monotonic() - begin
    for _ in range(3):
        begin, config = time.time(), tmp_path / "2" / "config.json"
        process = torchrun(2, "train.py", *options, "--out", str(tmp_path / "2"))
        while not config.exists() or config.stat().st_mtime < begin:  # which set-up writes
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 0.4) * whole)
        ranks = ranks_of(process)
        os.kill(ranks[rng.integers(2)], signal.SIGKILL)
        killed = time.monotonic()
        text = "".join(process.communicate(timeout=60))
        print(f"ended {time.monotonic() - killed:.1f} s after one rank was killed")
        assert process.returncode == 1 and text.count("has ended early, and this one with it") == 1, text
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    train_on(2, tmp_path, **{"2": options})
    assert_same_run(tmp_path / "2", tmp_path / "1")


def ranks_of(process: subprocess.Popen) -> list[int]:
    command = ["pgrep", "-P", str(process.pid), "-f", "train.py"]
    return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("body, word", [(None, "--max-cut 0"), ("raise KeyError(1)", "--reward-file")])
def test_a_mistake_is_one_sentence_also_of_several_processes(body, word, tmp_path):
    wrong = ["--max-cut", "0"] if body is None else reward_file(
        tmp_path / "r.py", tmp_path / "none", f"if len(texts) > 1 and os.environ['RANK'] == '1': {body}\n"
        "    return [0.0] * len(texts)")
    process = torchrun(2, "train.py", *QUICK, "--eval-every", "0", *wrong, "--out", str(tmp_path / "run"))
    text = "".join(process.communicate())
    assert process.returncode == 1 and text.count("train.py: error: ") == 1 and word in text, text


@pytest.mark.slow
def test_an_evaluation_on_two_processes_gives_the_same_figures_and_goes_on(tmp_path):
    source = write(tmp_path / "easy.jsonl", *lines_of(TINY / "test.jsonl")[:7])
    options = ["--data", source, "--samples", "2", "--temperature", "0.8"]
    want = evaluated(tmp_path / "1", *options)["results"]["easy"]
    for lines in (None, 4):  # from the start, and from a file that lacks the last records
        path = tmp_path / "2" / "responses-easy.jsonl"
        if lines:
            path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:lines])[:-9])
        process = torchrun(2, "eval.py", *EVAL, *options, "--out", str(tmp_path / "2"))
        text = "".join(process.communicate())
        assert process.returncode == 0 and text.count("protocol, figures and responses") == 1, text
        got = json.loads((tmp_path / "2" / "results.json").read_text())["results"]["easy"]
        timed = ("seconds", "tokens_sampled", "tokens_per_s")
        assert [got[k] for k in want if k not in timed] == [want[k] for k in want if k not in timed]
        assert len({r["id"] for r in lines_of(path)[1:]}) == len(lines_of(path)) - 1 == 7


@pytest.mark.slow  # the headline of the README: minutes
def test_the_default_job_learns_and_generates_a_sixth_of_the_tokens(tmp_path):
    out = tmp_path / "run"
    assert train.main([f"@{PRESET}", "--model", str(TINY), "--seed", "1", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.25
    assert summary["tokens_generated"] <= summary["tokens_full_path"] / 6

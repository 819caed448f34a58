"""Tests: numbers by hand or by an independent path (a plain full-sequence forward, model.generate)."""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig,
                          LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import cache
import data
import eval as evaluation
import rewards
import rollout
import rpo
import train
from rewards import Checker, extract_answer, is_correct, length_rewards, parse_error

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
TINY = Path(__file__).parent / "tiny"
SHARED = Path(__file__).parent.parent / "shared"  # labelled answers, where they are at hand
needs_shared = pytest.mark.skipif(not (SHARED / "verifier").is_dir(), reason="labelled answers not present")
ARCHITECTURES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
                 "llama": (LlamaConfig, LlamaForCausalLM)}
VOCAB = 60


def random_model(kind: str, **sizes) -> torch.nn.Module:
    """A small random model with grouped-query attention; weights so large that its logits differ clearly."""
    config_class, model_class = ARCHITECTURES[kind]
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, vocab_size=VOCAB + 4, max_position_embeddings=256,
                 initializer_range=0.25, bos_token_id=None, eos_token_id=None, pad_token_id=None) | sizes
    torch.manual_seed(0)
    return model_class(config_class(**sizes)).eval()


def shared(model: torch.nn.Module) -> torch.nn.Module:
    assert rpo.use_shared_prefix(model) == "" and rpo.is_shared(model)
    return model


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
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


def plain_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """An ordinary forward over one whole sequence (sdpa: eager has its softmax in float32 always)."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"
    try:
        return model(torch.tensor([ids])).logits[0]
    finally:
        model.config._attn_implementation = before


# ---------------------------------------------------------------------------- rollout


def greedy_by_generate(model, context: list[int], budget: int, eos: tuple[int, ...]) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=budget, eos_token_id=list(eos), pad_token_id=0)
    ids = torch.tensor([context])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return out[0, len(context):].tolist()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("memory", [1.0, 0.0006])  # the second one lets in a few problems at a time
@pytest.mark.parametrize("fused", [("cpu",), ()])  # the second one is what other devices run
def test_greedy_equals_generate_for_ragged_prefixes(kind, memory, fused, monkeypatch):
    monkeypatch.setattr(rpo, "FUSED", fused)
    monkeypatch.setattr(rollout, "PACKED_FROM", 0)  # the weights of this small model, too
    contexts = token_lists(1, [3, 17, 1, 30, 9, 17, 25, 2])
    budgets = [12, 5, 20, 1, 9, 14, 7, 3]
    model = random_model(kind, vocab_size=VOCAB)
    free = [greedy_by_generate(model, c, b, ()) for c, b in zip(contexts, budgets)]
    eos = (free[0][4], free[5][2])  # ids that do come up, so that rows leave early and at different times
    expected = [greedy_by_generate(model, c, b, eos) for c, b in zip(contexts, budgets)]
    assert len({len(e) for e in expected}) > 3
    groups = [1, 3, 2, 1, 4, 2, 3, 1]
    requests = [rollout.Request(c, b, [(0,)] * g) for c, b, g in zip(contexts, budgets, groups)]
    how = rollout.Sampling(eos, VOCAB, temperature=0)
    results = rollout.generate(shared(model), requests, how, memory)
    for request, suffixes, want in zip(requests, results, expected):
        assert len(suffixes) == len(request.seeds)
        for suffix in suffixes:
            assert suffix.ids == want
            assert suffix.finished == (want[-1] in eos)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sampled_logprobs_are_those_of_a_plain_forward(kind):
    model = shared(random_model(kind))
    contexts = token_lists(2, [4, 21, 11])
    requests = [rollout.Request(c, b, [(7, i, row) for row in range(5)])
                for i, (c, b) in enumerate(zip(contexts, [9, 3, 14]))]
    how = rollout.Sampling((3, 5), VOCAB, temperature=0.7)
    for request, suffixes in zip(requests, rollout.generate(model, requests, how, 1.0)):
        assert len({tuple(s.ids) for s in suffixes}) > 1
        for suffix in suffixes:
            logits = plain_logits(model, request.context + suffix.ids)
            logits = logits[len(request.context) - 1:-1, :VOCAB] / 0.7
            want = logits.log_softmax(-1)[range(len(suffix.ids)), suffix.ids]
            assert torch.allclose(torch.tensor(suffix.logprobs), want, atol=1e-4)


def test_a_row_does_not_depend_on_what_else_is_in_the_batch():
    model = shared(random_model("qwen2"))
    requests = [rollout.Request(c, 12, [(3, i, row) for row in range(4)])
                for i, c in enumerate(token_lists(3, [5, 19, 8, 13]))]
    how = rollout.Sampling((1, 2), VOCAB)
    together = rollout.generate(model, requests, how, 1.0)
    alone = [rollout.generate(model, [r], how, 1.0)[0] for r in requests]
    assert [[s.ids for s in group] for group in together] == [[s.ids for s in group] for group in alone]


def test_sampled_frequencies_are_the_softmax():
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
    kept = rollout._truncate((logits - logits.amax(-1, keepdim=True)).exp(), 0.9, 1024, True) > 0
    for row, mask in zip(probabilities, kept):
        assert row[mask].sum() >= 0.9 - 1e-5 and row[mask].sum() - row[mask].min() < 0.9 + 1e-5
        assert row[mask].min() >= row[~mask].max() - 1e-12
    assert kept[0].sum() > 1024 > kept[4].sum()  # both ways were taken


def test_top_k_and_top_p_keep_the_crossing_token():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).expand(1000, -1)
    uniforms = torch.linspace(0, 1 - 2**-24, 1000)  # reaches both ends of the distribution

    def seen(**cut) -> dict[int, int]:
        ids, _ = rollout.sample(logits, uniforms, rollout.Sampling((), 4, **cut))
        return dict(Counter(ids.tolist()))

    assert set(seen()) == {0, 1, 2, 3}
    assert set(seen(top_k=2)) == {1, 2}
    assert seen(top_k=2)[1] == pytest.approx(1000 * 4 / 7, abs=2)
    assert set(seen(top_p=0.69)) == {1, 2}
    assert set(seen(top_p=0.71)) == {1, 2, 3}
    assert set(seen(top_p=0.01)) == {1}


def test_an_architecture_with_sliding_windows_takes_the_plain_path_and_stays_exact():
    sizes = dict(vocab_size=VOCAB, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    model = random_model("qwen2", **sizes)
    assert "sliding_attention" in model.config.layer_types
    contexts = token_lists(4, [3, 17, 9])
    free = [greedy_by_generate(model, c, 12, ()) for c in contexts]
    eos = (free[0][4],)
    expected = [greedy_by_generate(model, c, 12, eos) for c in contexts]
    assert "sliding_window" in rpo.use_shared_prefix(model) and not rpo.is_shared(model)
    requests = [rollout.Request(c, 12, [(0,)] * 3) for c in contexts]
    for memory in (1.0, 0.0006):
        results = rollout.generate(model, requests, rollout.Sampling(eos, VOCAB, temperature=0), memory)
        assert [[s.ids for s in group] for group in results] == [[want] * 3 for want in expected]
    how = rollout.Sampling(eos, VOCAB)  # rows of a group that part ways and leave at different times
    requests = [rollout.Request(c, 12, [(i, row) for row in range(8)]) for i, c in enumerate(contexts)]
    for group, context in zip(rollout.generate(model, requests, how, 1.0), contexts):
        for suffix in group:
            logits = plain_logits(model, context + suffix.ids)[len(context) - 1:-1]
            want = logits.log_softmax(-1)[range(len(suffix.ids)), suffix.ids]
            assert torch.allclose(torch.tensor(suffix.logprobs), want, atol=1e-4)
    loss = plain_loss(model, ITEMS, "dapo", 1.0)
    loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert loss_over(model, ITEMS, "dapo", 1.0, 40) == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, want[name]) < 1e-4


def test_a_model_whose_logits_are_more_than_its_output_layer_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM
    config = Gemma2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, vocab_size=VOCAB, final_logit_softcapping=2.0,
                          initializer_range=0.25, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="soft cap"):
        rpo.use_shared_prefix(Gemma2ForCausalLM(config).eval())


# ------------------------------------------------------------------- shared-prefix log-probs


def items_for(rows: list[list[int]], contexts: list[int], seed: int = 5) -> list[rpo.Item]:
    rng = np.random.default_rng(seed)
    items = []
    for i, (context, lengths) in enumerate(zip(token_lists(seed, contexts), rows)):
        advantages = rng.normal(size=len(lengths)).astype(np.float32).tolist()
        suffixes = token_lists(seed + i + 1, lengths)
        items.append(rpo.Item(context, suffixes, advantages, [[0.0] * n for n in lengths], budget=BUDGET - i))
    return items


BUDGET = 11  # of the first item: the longest suffix there could have been
# suffixes of one token, a context of one token
ITEMS = items_for([[4, 1, 7], [1, 1, 1], [5, 2, 9]], [6, 19, 1])


def plain_logprobs(model, item: rpo.Item, row: int, temperature: float, vocab: int) -> torch.Tensor:
    suffix = item.suffixes[row]
    logits = plain_logits(model, item.context + suffix)[len(item.context) - 1:-1, :vocab] / temperature
    return logits.log_softmax(-1)[range(len(suffix)), suffix]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def plain_loss(model, items, algo: str, temperature: float, old=None, ref=None, kl_coef=0.0) -> torch.Tensor:
    """The objective written out response by response, token by token, over full-sequence forwards."""
    settings = rpo.ALGORITHMS[algo]
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    total, tokens, responses = 0.0, 0, 0
    for i, item in enumerate(items):
        for row, advantage in enumerate(item.advantages):
            logprobs = plain_logprobs(model, item, row, temperature, VOCAB)
            terms = []
            diffs = [lp - (lp.detach() if old is None else old[i][row][t]) for t, lp in enumerate(logprobs)]
            for t, lp in enumerate(logprobs):
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


def loss_over(model, items, algo: str, temperature: float, tokens_per_forward: int, old=None, ref=None,
              kl_coef=0.0) -> float:
    """The loss of one update through micro-batches; leaves the gradient in the parameters."""
    settings = {k: rpo.ALGORITHMS[algo][k] for k in train.OBJECTIVE} | {"kl_coef": kl_coef}
    denominator = rpo.update_denominator(items, settings["aggregation"])
    model.zero_grad()
    total = 0.0
    for part in rpo.micro_batches(items, tokens_per_forward):
        batch = rpo.pack(part)
        for name, table in (("old_logprobs", old), ("ref_logprobs", ref)):
            if table is not None:
                values = torch.zeros(batch.mask.shape, dtype=torch.float64)
                for row, suffix in enumerate(s for item in part for s in item.suffixes):
                    values[row, :len(suffix)] = table_row(items, table, suffix)
                setattr(batch, name, values.to(next(model.parameters()).dtype))
        logprobs, _ = rpo.shared_logprobs(model, batch, temperature, VOCAB)
        loss, _ = rpo.policy_loss(logprobs, batch, denominator, **settings)
        loss.backward()
        total += loss.item()
    return total


def table_row(items, table, suffix) -> torch.Tensor:
    i, row = next((i, r) for i, x in enumerate(items) for r, s in enumerate(x.suffixes) if s is suffix)
    return table[i][row]


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_logprobs_and_gradients_equal_full_sequence_forwards(kind, dtype, bound):
    model = in_float64(random_model(kind)) if dtype == torch.float64 else random_model(kind)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        exact = [[plain_logprobs(model, item, row, 0.8, VOCAB) for row in range(3)] for item in ITEMS]
    old = [[x + 0.3 * torch.randn(x.shape, generator=noise, dtype=dtype) for x in rows] for rows in exact]
    ref = [[x + 0.3 * torch.randn(x.shape, generator=noise, dtype=dtype) for x in rows] for rows in exact]
    expected = {}
    for algo in rpo.ALGORITHMS:
        for kl_coef in (0.0, 0.1) if algo in ("grpo", "dapo") else (0.1,):
            model.zero_grad()
            loss = plain_loss(model, ITEMS, algo, 0.8, old, ref, kl_coef)
            loss.backward()
            expected[algo, kl_coef] = loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}
    shared(model)
    batch = rpo.pack(ITEMS)
    got, _ = rpo.shared_logprobs(model, batch, 0.8, VOCAB)
    want = torch.cat([x for rows in exact for x in rows])
    assert relative_error(got[batch.mask].detach(), want) < bound
    assert not got[~batch.mask].any()
    for (algo, kl_coef), (loss, grads) in expected.items():
        for checkpointing in (False, True) if algo in ("grpo", "dapo") else (False,):
            for tokens_per_forward in (1, 40, 10_000):  # row by row, about one problem, all at once
                if checkpointing:
                    model.activation_checkpointing_enable({"use_reentrant": False})
                    model.train()
                value = loss_over(model, ITEMS, algo, 0.8, tokens_per_forward, old, ref, kl_coef)
                model.activation_checkpointing_disable()
                model.eval()
                assert value == pytest.approx(loss, rel=bound * 10)
                for name, parameter in model.named_parameters():
                    assert relative_error(parameter.grad, grads[name]) < bound, (name, algo)


@pytest.mark.parametrize("bias", [False, True])
def test_logprobs_entropies_and_gradients_of_the_head_are_those_of_log_softmax(bias, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    states, weight, offset = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
                              for shape in ((13, 8), (20, 8), (20,)))
    targets, upstream = torch.arange(13), torch.randn(13, generator=generator, dtype=torch.float64)
    plain = ((states @ weight.T + (offset if bias else 0)) / 0.7).log_softmax(-1)
    want = torch.autograd.grad((plain[range(13), targets] * upstream).sum(),
                               (states, weight, offset)[:2 + bias])
    for rows in (1, 5, 100):
        monkeypatch.setattr(rpo, "LOGITS_PER_CHUNK", 20 * rows)
        got, entropy = rpo._TokenLogprobs.apply(states, weight, offset if bias else None, targets, 0.7)
        assert torch.allclose(got, plain[range(13), targets], rtol=1e-12)
        assert torch.allclose(entropy, -(plain.exp() * plain).sum(-1), rtol=1e-12)
        assert not entropy.requires_grad
        grads = torch.autograd.grad((got * upstream).sum(), (states, weight, offset)[:2 + bias])
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(grads, want))


def test_logits_in_chunks_give_the_same_gradient(monkeypatch):
    model = shared(random_model("qwen2"))
    loss_over(model, ITEMS, "dapo", 1.0, 10_000)
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(rpo, "LOGITS_PER_CHUNK", 5 * VOCAB)
    rows = []
    real = rpo._logits
    monkeypatch.setattr(rpo, "_logits", lambda x, *rest: rows.append(len(x)) or real(x, *rest))
    loss_over(model, ITEMS, "dapo", 1.0, 10_000)
    assert max(rows) == 5 and sum(rows) == 2 * sum(len(s) for item in ITEMS for s in item.suffixes)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, whole[name]) < 1e-5


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_attention_with_copies_of_the_context_is_the_same_function(kind, monkeypatch):
    """What other devices run: there the fused kernels give no log-sum-exp."""
    model = shared(random_model(kind))
    loss = loss_over(model, ITEMS, "grpo", 1.0, 10_000)
    split = {n: p.grad.clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(rpo, "FUSED", ())
    monkeypatch.setattr(rpo._SplitAttention, "apply", None)
    assert loss_over(model, ITEMS, "grpo", 1.0, 10_000) == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, split[name]) < 1e-5


def test_the_order_of_the_groups_does_not_change_the_gradient():
    model = shared(in_float64(random_model("qwen2")))
    for algo in rpo.ALGORITHMS:
        loss = loss_over(model, ITEMS, algo, 1.0, 40)
        grads = [p.grad.clone() for p in model.parameters()]
        assert loss_over(model, ITEMS[::-1], algo, 1.0, 60) == pytest.approx(loss, rel=1e-9)
        assert all(relative_error(p.grad, g) < 1e-9 for p, g in zip(model.parameters(), grads))


def test_micro_batches_keep_within_the_budget_and_lose_nothing():
    items = items_for([[4, 1, 7], [9, 9], [3, 2, 2, 2]], [6, 19, 2])
    for budget in (10, 27, 50, 1000):
        parts = rpo.micro_batches(items, budget)
        for part in parts:
            tokens = sum(item.packed_tokens for item in part)
            assert tokens == rpo.pack(part).input_ids.numel()
            assert tokens <= budget or len(part) == 1 and len(part[0].suffixes) == 1
        pieces = [x for part in parts for x in part]
        for aggregation in rpo.AGGREGATIONS:
            assert rpo.update_denominator(pieces, aggregation) == rpo.update_denominator(items, aggregation)
        for name in ("suffixes", "advantages"):
            assert sorted(v for x in pieces for v in getattr(x, name)) == \
                sorted(v for x in items for v in getattr(x, name))


# ------------------------------------------------------------------------------- objectives


def test_group_advantages_by_hand():
    # rewards 1 0 0 0: mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4, std 1/2
    assert rpo.group_advantages([1, 0, 0, 0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert rpo.group_advantages([0.1] * 6) == [0.0] * 6  # rounding of the mean must not become a direction
    assert rpo.group_advantages([1.0]) == [0.0]
    assert rpo.group_advantages([1, 0, 0, 0], "mean") == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert rpo.group_advantages([1, 0, 0, 0], "leave_one_out") == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def hand_batch(advantages: list[float], lengths: list[int]) -> rpo.Batch:
    items = [rpo.Item([1], [[2] * n], [a], [[0.0] * n]) for a, n in zip(advantages, lengths)]
    return rpo.pack(items)


def test_clipping_by_hand():
    # rows of one token, ratios 1.5, 1.5, 0.5, 0.5, 1.25 with advantages +1 -1 +1 -1 +1
    batch = hand_batch([1, -1, 1, -1, 1], [1] * 5)
    batch.old_logprobs = torch.zeros(5, 1)
    logprobs = torch.tensor([[1.5], [1.5], [0.5], [0.5], [1.25]]).log().requires_grad_()
    loss, stats = rpo.policy_loss(logprobs, batch, 5, clip_low=0.2, clip_high=0.28, aggregation="token")
    # 1.28 (clipped), -1.5, 0.5, -0.8 (clipped), 1.25
    assert loss.item() == pytest.approx(-(1.28 - 1.5 + 0.5 - 0.8 + 1.25) / 5, abs=1e-6)
    assert stats["clip_fraction"] == 2
    loss.backward()
    # d(ratio)/d(logprob) = ratio where not clipped
    assert logprobs.grad[:, 0].tolist() == pytest.approx([0, 0.3, -0.1, 0, -0.25], abs=1e-6)


def test_aggregation_by_hand():
    # on-policy, ratio 1: every token's objective is its advantage
    batch = hand_batch([2.0, -1.0], [1, 3])
    logprobs = torch.zeros(2, 3, requires_grad=True)
    settings = dict(clip_low=0.2, clip_high=0.2)
    by_token, _ = rpo.policy_loss(logprobs, batch, 4, aggregation="token", **settings)
    by_response, _ = rpo.policy_loss(logprobs, batch, 2, aggregation="response", **settings)
    assert by_token.item() == pytest.approx(-(2 - 1 - 1 - 1) / 4)
    assert by_response.item() == pytest.approx(-(2 - 1) / 2)
    by_response.backward()
    assert logprobs.grad.tolist() == [[-1, 0, 0], pytest.approx([1 / 6] * 3)]
    batch = hand_batch(rpo.group_advantages([1, 0, 0, 0]), [2, 1, 3, 2])  # they sum to 0
    logprobs = torch.zeros(4, 3, requires_grad=True)
    loss, _ = rpo.policy_loss(logprobs, batch, 4, aggregation="response", **settings)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)  # and still there is a gradient
    assert logprobs.grad[:, 0].tolist() == pytest.approx([-1.5 / 8, 0.5 / 4, 0.5 / 12, 0.5 / 8], abs=1e-5)


def test_the_six_algorithms_by_hand():
    # two responses of 1 and 3 tokens, advantages 2 and -1, every token's ratio 1.5, log pi = log 0.3
    batch = hand_batch([2.0, -1.0], [1, 3])
    batch.old_logprobs = torch.full((2, 3), math.log(0.2))
    items = [rpo.Item([1], [[2]], [2.0], [[0.0]], budget=6), rpo.Item([1], [[2] * 3], [-1.0], [[0.0] * 3])]
    losses = {}
    for algo, settings in rpo.ALGORITHMS.items():
        logprobs = torch.full((2, 3), math.log(0.3), requires_grad=True)
        denominator = rpo.update_denominator(items, settings["aggregation"])
        loss, stats = rpo.policy_loss(logprobs, batch, denominator,
                                      **{k: settings[k] for k in train.OBJECTIVE})
        loss.backward()
        losses[algo] = loss.item(), stats["clip_fraction"], logprobs.grad[:, 0].tolist()
    log = math.log(0.3)
    # the first response is clipped (no gradient), the second is not: its ratio counts against it, 1.5 * -1
    by_hand = {"grpo": (-(2.4 - 1.5) / 2, 1, [0, 1.5 / 6]), "dapo": (-(2.56 - 4.5) / 4, 1, [0, 1.5 / 4]),
               "dr_grpo": (-(2.4 - 4.5) / 12, 1, [0, 1.5 / 12]), "rloo": (-(2.4 - 4.5) / 2, 1, [0, 1.5 / 2]),
               "gspo": (-(2 * 1.0004 - 1.5) / 2, 1, [0, 1.5 / 6]),
               "cispo": (-(3 * log - 4.5 * log) / 4, 0, [-3 / 4, 1.5 / 4])}
    for algo, (loss, clipped, gradient) in by_hand.items():
        assert losses[algo][0] == pytest.approx(loss, abs=1e-6), algo
        assert losses[algo][1] == clipped and losses[algo][2] == pytest.approx(gradient, abs=1e-6), algo
    far = batch.old_logprobs - math.log(10)  # a ratio of 15: cispo's weight stops at 5
    batch.old_logprobs = far
    settings = {k: rpo.ALGORITHMS["cispo"][k] for k in train.OBJECTIVE}
    loss, stats = rpo.policy_loss(torch.full((2, 3), log), batch, 4, **settings)
    assert loss.item() == pytest.approx(-(10 * log - 15 * log) / 4) and stats["clip_fraction"] == 4


def test_kl_penalty_by_hand():
    batch = hand_batch([0.0], [2])
    batch.ref_logprobs = torch.tensor([[math.log(0.5), math.log(0.3)]])
    logprobs = torch.tensor([[math.log(0.25), math.log(0.4)]])
    loss, stats = rpo.policy_loss(logprobs, batch, 2, clip_low=0.2, clip_high=0.2, aggregation="token",
                                  kl_coef=0.1)
    k3 = (2 - math.log(2) - 1) + (0.75 - math.log(0.75) - 1)
    assert stats["kl_ref"] == pytest.approx(k3, abs=1e-6)
    assert loss.item() == pytest.approx(0.1 * k3 / 2, abs=1e-6)


# ------------------------------------------------------------------------------------ cache


def entry(tokens: int, shortest: int) -> cache.Entry:
    return cache.Entry(list(range(tokens)), 1.0, True, shortest, 0, limit=7.9)


@pytest.mark.parametrize("max_cut, tokens, shortest, limit", [
    (20, 50, 30, 20), (0.5, 50, 30, 15), (300, 50, 30, 50), (1.0, 40, 60, 40), (0.01, 50, 30, 1),
    ("adaptive", 50, 30, 7), ("adaptive", 5, 30, 5)])
def test_cut_lengths_are_uniform_from_1_to_L(max_cut, tokens, shortest, limit):
    rng = np.random.default_rng(0)
    draws = 400 * limit
    path = entry(tokens, shortest)
    kept = [cache.cut(path, np.ones(cache.longest_cut(path, max_cut)), rng) for _ in range(draws)]
    assert all(k == list(range(len(k))) for k in kept)
    counts = Counter(tokens - len(k) for k in kept)
    assert set(counts) == set(range(1, limit + 1))
    chi_square = sum((n - 400) ** 2 / 400 for n in counts.values())
    freedom = limit - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)


def test_the_stretch_of_a_step_is_pareto_distributed():
    rng, draws = np.random.default_rng(0), 10_000
    for tail in (1.0, 2.0):
        values = np.array([cache.stretch_of(tail, rng) for _ in range(draws)])
        assert values.min() >= 1
        for x in (1.5, 3.0, 9.0):
            share = x ** -tail
            assert abs((values > x).sum() - draws * share) < 3 * math.sqrt(draws * share * (1 - share))
    assert cache.stretch_of(0, rng) == 1
    path = entry(50, 30)
    assert [cache.longest_cut(path, m, 2.5) for m in (4, 0.2, 30, "adaptive")] == [10, 15, 50, 19]
    assert {cache.longest_cut(path, 4, cache.stretch_of(1e-6, rng)) for _ in range(20)} == {50}  # no overflow


def test_an_informed_cut_follows_the_chance_of_another_token():
    rng, draws, path = np.random.default_rng(0), 10_000, entry(8, 8)
    logprobs = np.log1p(-np.array([0.0, 0.3, 0.0, 0.1, 0.6])).tolist()
    turns = cache.turns(path, logprobs)
    assert turns.tolist() == pytest.approx([0.0, 0.3, 0.0, 0.1, 0.6])
    counts = Counter(len(cache.cut(path, turns, rng)) for _ in range(draws))
    for kept, share in {3: 0.0, 4: 0.3, 5: 0.0, 6: 0.1, 7: 0.6}.items():
        assert abs(counts.pop(kept, 0) - draws * share) <= 3 * math.sqrt(draws * share * (1 - share))
    assert not counts
    assert {len(cache.cut(path, np.zeros(3), rng)) for _ in range(99)} == {5, 6, 7}  # all certain: anywhere
    for dead_end, left in ((6, [0.0, 0.3, 0, 0, 0]), (4, [0.0, 0, 0, 0, 0]), (7, [0.0, 0.3, 0.0, 0.1, 0])):
        turns = cache.turns(dataclasses.replace(path, dead_end=dead_end), logprobs)
        assert turns.tolist() == pytest.approx(left)  # six tokens led nowhere: no use in seven


def test_a_visit_is_skipped_with_the_chance_of_repeating_the_path():
    rng, draws = np.random.default_rng(1), 10_000
    for turns, chance in (([0.2], 0.8), ([0.5, 0.0, 0.2], 0.4), ([0.9, 0.5, 0.0, 0.2], 0.04)):
        count = sum(cache.is_certain(np.array(turns), rng) for _ in range(draws))
        assert abs(count - draws * chance) < 3 * math.sqrt(draws * chance * (1 - chance))


@pytest.mark.parametrize("old, accuracy, keep, dead_end", [
    (False, [0, 0], True, 5), (False, [0, 1], True, 0), (True, [0, 0], False, 0), (True, [0, 0], True, 0)])
def test_a_prefix_of_a_wrong_path_without_a_right_suffix_is_a_dead_end(old, accuracy, keep, dead_end):
    before = cache.Entry([9] * 8, 0.0, old, 8, 0)
    after = cache.update(before, [[9] * 5 + [1], [9] * 5 + [2]], accuracy, accuracy, 5, 1,
                         np.random.default_rng(0), 1.0, keep)
    assert after.dead_end == dead_end


def test_cache_update_is_epsilon_greedy_and_reaches_every_other_response():
    rng = np.random.default_rng(0)
    rewards_of_group, epsilon, draws = [0.2, 0.9, 0.1, 0.9, 0.0], 0.3, 10_000
    counts = Counter(cache.choose(rewards_of_group, epsilon, rng) for _ in range(draws))
    for index, share in enumerate([0.175, 0.3, 0.175, 0.175, 0.175]):  # the best is the first of the two
        assert abs(counts[index] - draws * share) < 3 * math.sqrt(draws * share * (1 - share))


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "0.0", "many", "", "nan", "1e3"])
def test_max_cut_that_means_nothing_is_refused(text):
    with pytest.raises(ValueError, match="--max-cut"):
        cache.parse_max_cut(text)


def test_max_cut_tokens_and_fractions():
    assert [cache.parse_max_cut(t) for t in ("300", "1", "0.5", "1.0", "adaptive")] == [300, 1, 0.5, 1.0,
                                                                                       "adaptive"]
    assert isinstance(cache.parse_max_cut("1"), int) and isinstance(cache.parse_max_cut("1.0"), float)


def test_suffix_budget_by_hand():
    assert [cache.parse_max_suffix(t) for t in ("", "400", "1.5", "1.0")] == [None, 400, 1.5, 1.0]
    for text in ("0", "0.5", "-1", "inf", "x"):
        with pytest.raises(ValueError, match="--max-suffix"):
            cache.parse_max_suffix(text)
    # a cut of 30 tokens, 100 are left to --max-response
    assert [cache.suffix_budget(30, m, 100) for m in (None, 400, 40, 1.5, 9.9, 1.01)] == [
        100, 100, 40, 45, 100, 31]


def test_every_nth_visit_is_a_full_path():
    visits = [cache.is_full_visit(cache.Entry([1], 0.0, False, 1, 0, visits=v), 3) for v in range(7)]
    assert visits == [False, False, True, False, False, True, False]
    assert not cache.is_full_visit(entry(5, 5), 0)
    assert cache.is_full_visit(entry(5, 5), 1)


@pytest.mark.parametrize("keep, old, accuracy, allowed", [
    (False, True, [0, 0, 1], {0, 1, 2}), (True, True, [0, 0, 1], {2}), (True, True, [1, 0, 1], {0, 2}),
    (True, True, [0, 0, 0], {None}), (True, False, [0, 0, 1], {0, 1, 2}),
    (False, True, [0, 0, 0], {0, 1, 2})])
def test_a_correct_path_gives_way_to_correct_ones_only(keep, old, accuracy, allowed):
    before = cache.Entry([9, 9], 1.0, old, 2, 3, visits=4, limit=5.0)
    responses = [[0] * 7, [1] * 6, [2] * 8]
    seen = set()
    for seed in range(60):
        after = cache.update(before, responses, [0.1, 0.2, 0.9], accuracy, 0, 8, np.random.default_rng(seed),
                             0.5, keep)
        pick = None if after.response_ids == [9, 9] else after.response_ids[0]
        seen.add(pick)
        assert (after.visits, after.shortest, after.limit) == (5, 6, 5.0)
        assert (after.step, after.correct) == ((3, old) if pick is None else (8, accuracy[pick] > 0))
        assert after.reward == (1.0 if pick is None else [0.1, 0.2, 0.9][pick])
    assert seen == allowed and before.visits == 4


@pytest.mark.parametrize("start", [2.0, 900.0])
def test_the_adaptive_cut_converges_to_half_of_the_suffixes_succeeding(start):
    """A policy whose chance falls with cut m as exp(-m / 100): mean over m ~ U{1..L} is 1/2 at L = 160."""
    rng = np.random.default_rng(0)
    path = cache.Entry(list(range(1000)), 1.0, True, 1000, 0, limit=start)
    rates, limits = [], []
    for _ in range(600):
        m = 1000 - len(cache.cut(path, np.ones(cache.longest_cut(path, "adaptive")), rng))
        rates.append(float((rng.random(8) < math.exp(-m / 100)).mean()))
        path = cache.steer(path, rates[-1], 2, 0, 0.5)
        limits.append(path.limit)
    assert 0.4 < np.mean(rates[100:]) < 0.6
    assert 100 < np.median(limits[100:]) < 260


def test_the_adaptive_limit_starts_between_its_bounds_and_stays_there():
    fresh = cache.Entry(list(range(400)), 1.0, True, 400, 0)
    assert cache.steer(fresh, 0.5, 4, 0, 1.0).limit == pytest.approx(40)  # sqrt(4 * 400)
    assert cache.steer(fresh, 0.5, 4, 100, 1.0).limit == pytest.approx(20)
    assert cache.steer(fresh, 1.0, 4, 0, 1.0).limit == pytest.approx(40 * math.exp(0.5))
    grown, shrunk = fresh, fresh
    for _ in range(50):
        grown, shrunk = cache.steer(grown, 1.0, 4, 0, 1.0), cache.steer(shrunk, 0.0, 4, 0, 1.0)
    assert (grown.limit, shrunk.limit) == (400, 4)
    assert cache.steer(cache.Entry([1], 0.0, False, 1, 0), 1.0, 4, 0, 1.0).limit == 4


def test_cache_file_is_one_json_line_an_entry(tmp_path):
    path = tmp_path / "cache.jsonl"
    entries = {"a": cache.Entry([5, 7, 2], 1.0, True, 3, 4, 2, 6.5, 3),
               "b": cache.Entry([], 0.0, False, 1, 0)}
    cache.save(entries, path, "words")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("crc") for line in lines)
    assert lines == [{"tokenizer": "words"},
        {"id": "a", "response_ids": [5, 7, 2], "reward": 1.0, "correct": True, "shortest": 3, "step": 4,
         "visits": 2, "limit": 6.5, "dead_end": 3},
        {"id": "b", "response_ids": [], "reward": 0.0, "correct": False, "shortest": 1, "step": 0,
         "visits": 0, "limit": 0.0, "dead_end": 0}]
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


# ---------------------------------------------------------------------------------- rewards


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
    (r"\boxed{\boxed{8}}", r"\boxed{8}"), (r"\boxed{3} is cut off: \boxed{4", "3"), ("A\n#### 1,45", "1,45"),
    ("so the answer is 12.", "12"), ("**Answer:** $x=3$", "x=3"), ("She has 5.\nA: 99,000", "99,000"),
    ("The final answer is $28 \\%$. I hope it is correct.", "28 \\%"), ("Answer:\n$$\n5\n$$\nas 7 > 5", "5"),
    (r"<think>maybe \boxed{1}</think> It is \boxed{2}.", "2"), (r"<think>\boxed{1}</think> done", "1"),
    (r"\boxed{1} and \boxed{2}", "1, 2"), (r"\boxed{(1,2)}, \boxed{(3,4)}", "(1,2), (3,4)"),
    (r"not \boxed{1}. No: \boxed{2}", "2"), ("there are 5 of them", None), ("", None), ("\\boxed{", None),
    ("####", None), ("Answer:", None)]


@pytest.mark.parametrize("text, answer", COMMITTED)
def test_extract_answer_takes_the_committed_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_unmarked_answers_count_only_when_loose() -> None:
    text = "Adding up, the total is $12$ apples, not 3."
    assert extract_answer(text) is None and extract_answer(text, loose=True) == "3"
    assert is_correct("so $x = 4$ works", "4") and not is_correct("so $x = 4$ works", "4", loose=False)
    assert not is_correct("AZYUK2A", "2")


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
5.4\text{ cents} : 5.4\text{ dollars} | 5.4 \text{ euros}
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
    assert is_correct("4", r"A worked solution, so \boxed{4}.") and not is_correct("5", r"so \boxed{4}.")


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
    for text in HOSTILE:
        start = time.perf_counter()
        assert not is_correct(boxed(text), gold), text[:60]
        assert {is_correct(boxed(text), text), is_correct(boxed(gold), text)} <= {True, False}
        assert parse_error(text) is None or isinstance(parse_error(text), str)
        assert time.perf_counter() - start < 1, text[:60]
    assert not Path("pwned").exists()


def test_long_responses_are_scanned_in_linear_time() -> None:
    for text in (r"\boxed{8} " * 20000, "The answer is 8. " * 20000, r"\[" * 50000, "$" * 99999, " " * 10**6,
                 "answer" * 50000, "A:" * 99999, "\\boxed{8}" + " " * 10**6 + "?\\boxed{8}", "1/2/" * 30000,
                 "####" * 50000, r"\boxed{8" * 20000):
        start = time.perf_counter()
        assert not is_correct(text, "7")
        assert time.perf_counter() - start < 1, text[:20]


def test_checker_gives_the_same_answers_as_is_correct() -> None:
    pairs = [(boxed(answer), gold) for gold, answer in (table(SAME) + table(DIFFERENT))[::3]]
    pairs += [("is $4$", "4"), ("none", "7"), (boxed(""), ""), ("\ud800", "\ud800"), (boxed("\ud800"), "e")]
    expected = [is_correct(*pair) for pair in pairs]
    with Checker(workers=2) as checker:
        assert checker.check(pairs) == expected and checker.check([]) == []
        assert checker.timeouts == 0 and 0 < checker.check_ms_max < 1000
    assert Checker(workers=0).check(pairs) == expected
    for impossible in ({"workers": -1}, {"time_limit": 0}):
        with pytest.raises(ValueError, match=next(iter(impossible))):
            Checker(**impossible)


def test_easy_answers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process for an easy answer"))
    easy = [("1/2", "0.5"), ("(1,2)", "(2,1)"), ("x^2-1", "(x-1)(x+1)"), (r"\text{B}", "C"), ("[0,1)", "0")]
    assert Checker(workers=1).check([(boxed(a), g) for g, a in easy]) == [True, False, True, False, False]


def test_refused_answers_are_counted_also_by_a_worker() -> None:
    far = {"length": "7" * 2000, "depth": "(" * 40 + "7" + ")" * 40, "digits": "7" * 500, "size": "9^{9^{9}}",
           "exponent": "1e99999", "not read": "7+"}
    for workers in (0, 1):
        with Checker(workers) as checker:
            for bound, answer in far.items():
                checker.refused = 0
                assert checker.check([(boxed(answer), "7"), (boxed("8"), "7"), ("none", "7")]) == [False] * 3
                assert checker.refused == 1, bound
            checker.refused = 0  # the exponent is beyond the bound only once the worker knows it
            assert checker.check([(boxed(r"\pi^{9^9}"), "7")] * 2 + [SQRT8]) == [False, False, True]
            assert checker.refused == 2 and checker.timeouts == 0


def test_slow_answer_is_killed_counted_and_the_next_one_is_checked() -> None:
    with Checker(workers=1, time_limit=0.2) as checker:
        assert checker.check([SQRT8]) == [True] and checker.timeouts == 0
        stopped = checker._idle[0]
        os.kill(stopped.pid, signal.SIGSTOP)
        assert checker.check([(boxed("7"), "7"), (boxed(r"\sqrt{9\pi}"), r"3\sqrt{\pi}")]) == [True, False]
        assert checker.timeouts == 1 and 200 <= checker.check_ms_max < 400 and stopped.poll() is not None
        assert checker.check([SQRT8, (boxed(r"\sqrt{7}"), r"\sqrt{8}")]) == [True, False]  # no late verdict
        assert checker.timeouts == 1


def test_dead_worker_is_replaced() -> None:
    with Checker(workers=1) as checker:
        assert checker.check([SQRT8]) == [True]
        worker = checker._idle[0]
        worker.kill()
        worker.wait()
        assert checker.check([SQRT8]) == [True] and checker._idle[0].pid != worker.pid
        assert checker.timeouts == 0
        worker = checker._idle[0]
    assert worker.poll() is not None  # closed


def test_checker_works_in_other_threads() -> None:
    results: list = []
    with Checker(workers=1) as checker:
        pairs = [SQRT8, (boxed(r"\sqrt{9}"), r"2\sqrt{2}")]
        threads = [threading.Thread(target=lambda: results.append(checker.check(pairs))) for _ in range(2)]
        assert [thread.start() for thread in threads] == [thread.join() for thread in threads]
    assert results == [[True, False]] * 2


def test_checker_in_a_script_without_main_guard_neither_loads_torch_nor_runs_it_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import rewards\nprint('once')\nc = rewards.Checker(workers=1)\n"
        r"print(c.check([(r'\boxed{\sqrt{8}}', r'2\sqrt{2}')]))"
        "\nimport sys; print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60,
                          env=dict(os.environ, PYTHONPATH=str(Path(rewards.__file__).parent)))
    assert done.stdout.split("\n") == ["once", "[True]", "False", ""], done.stderr


def test_length_reward_is_equation_11() -> None:
    correct, lengths = [1, 1, 0, 1], [100, 200, 300, 400]  # mean 250
    got = length_rewards(correct, lengths, alpha=0.01)
    assert got == pytest.approx([1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-0.5)), 0, 0.5])
    assert length_rewards(correct, lengths, alpha=0) == correct == [1, 1, 0, 1]
    assert length_rewards([1, 1], [0, 10**9], alpha=1.0) == [1.0, 0.5] and length_rewards([], [], 1.0) == []
    with pytest.raises(ValueError, match="lengths"):
        length_rewards([1], [1, 2], 0.1)
    # mean of the correct ones: 700 / 3
    assert length_rewards(correct, lengths, 0.01, "correct")[1] == pytest.approx(1 / (1 + math.exp(-1 / 3)))
    assert length_rewards([0, 0], [3, 5], 0.01, "correct") == [0, 0]


def test_other_rewards_by_hand() -> None:
    cosine = [rewards.cosine_reward(c, n, 100) for c in (True, False) for n in (0, 50, 100, 170)]
    assert cosine == pytest.approx([1, 0.75, 0.5, 0.5, 0, -0.25, -0.5, -0.5])
    overlong = [rewards.overlong_reward(n, 100, 20) for n in (10, 80, 85, 100, 130)]
    assert overlong == pytest.approx([0, 0, -0.25, -1, -1])
    texts = ["a\n</think>\nb", "a</think>b", "a\n</think>\nb\n</think>\nc", ""]
    assert [rewards.format_reward(t) for t in texts] == [1, 0, 0, 0]


@needs_shared
def test_labelled_answers() -> None:
    equal = [r for r in rows("verifier/equivalences.jsonl") if not r["policy"]]
    assert sum(is_correct(boxed(r["prediction"]), r["gold"]) == r["expected"] for r in equal) >= 540
    suite = [r for r in rows("verifier/math_verify_tests.jsonl") if not r.get("suspect")]
    assert sum(is_correct(r["prediction"], r["gold"]) == r["expected"] for r in suite) >= 0.95 * len(suite)
    gsm8k = rows("verifier/gsm8k_model_solutions.jsonl")
    assert [r for r in gsm8k if is_correct(r["solution"], r["gold"], loose=False) != r["is_correct"]] == []


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
    with Checker(workers=1) as checker:
        verdicts = checker.check([(boxed(a), b) for a, b in pairs])
    assert {frozenset(pair) for pair, ok in zip(pairs, verdicts) if ok} <= set(map(frozenset, same))


@needs_shared
def test_hostile_file_in_a_thread_without_hang_or_exception() -> None:
    cases, out = rows("verifier/hostile.jsonl"), []
    with Checker(workers=1) as checker:
        pairs = [(r["prediction"], r["gold"]) for r in cases]
        (thread := threading.Thread(target=lambda: out.extend(checker.check(pairs)))).start()
        thread.join(60)
        assert len(out) == len(cases) and checker.check_ms_max < 1000 and checker.timeouts == 0
    assert [r["id"] for r, ok in zip(cases, out) if ok and r["expected"] is False] == []


# ------------------------------------------------------------------------------------- data


def load(source: str) -> list[data.Problem]:
    return data.load_problems(source, "--data", rewards.extract_answer, lambda gold: None)


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


def test_prompt_follows_the_chat_template_and_ends_where_the_response_begins():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = data.encode_prompt(tokenizer, "What?")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
        "<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n")
    ids = data.encode_prompt(tokenizer, "What?", "Think.", "user")
    assert "user\nWhat?\n\nThink.<|im_end|>" in tokenizer.decode(ids)
    tokenizer.chat_template = None
    ids = data.encode_prompt(tokenizer, "What?", "Think.")
    assert tokenizer.decode(ids) == "Think.\n\nProblem: What?\n\nSolution:"


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
           "--cache-init-chunk 6 --lr 1e-3 --warmup-steps 3 --dynamic-rounds 2").split()]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*QUICK, "--out", str(out)]) == 0
    return out


def test_a_run_leaves_what_the_readme_says(finished):
    metrics = lines_of(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert "eval/accuracy" in metrics[0] and "eval/accuracy" in metrics[3]
    glossary = Path(train.__file__).with_name("README.md").read_text()
    for key in {key for m in metrics for key in m}:
        assert f"`{key}`" in glossary, key
    for m in metrics[1:]:
        assert all(math.isfinite(v) for v in m.values())
    trained = [m for m in metrics[1:] if m["group/trained"]]
    assert trained and all(m["policy/grad_norm"] > 0 for m in trained)
    # sampling forward (one token at a time, shared keys) and training forward (packed) are the same function
    assert all(m["policy/sampling_gap_max"] < 1e-3 for m in trained)
    before = AutoModelForCausalLM.from_pretrained(TINY)
    after = AutoModelForCausalLM.from_pretrained(finished / "policy")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert AutoTokenizer.from_pretrained(finished / "policy").chat_template
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["accuracy_before"] == metrics[0]["eval/accuracy"]
    assert summary["accuracy_after"] == metrics[3]["eval/accuracy"]
    assert json.loads((finished / "config.json").read_text())["group_size"] == 4


def test_token_counts_agree_with_the_responses(tmp_path):
    finished = tmp_path / "run"
    assert train.main([*QUICK, "--out", str(finished), "--eval-every", "0", "--no-skip-certain"]) == 0
    metrics = lines_of(finished / "metrics.jsonl")
    summary = json.loads((finished / "summary.json").read_text())
    rows = [m["group/sampled"] * 4 for m in metrics]
    suffix = sum(n * m["response/suffix_length"] for n, m in zip(rows, metrics))
    whole = sum(n * m["response/length"] for n, m in zip(rows, metrics))
    assert summary["tokens_full_path"] == metrics[-1]["tokens/full_path"] == pytest.approx(whole)
    initialisation = summary["tokens_generated"] - suffix
    entries = metrics[-1]["cache/entries"]
    assert 150 * entries < initialisation < 421 * entries  # one whole path per entry, and nothing else
    visited = 3 * 3 * 2  # steps, problems, rounds at most; cached is what is visited and the chunk ahead
    assert entries <= visited + 6
    cached = lines_of(finished / "cache.jsonl")[1:]
    assert len(cached) == entries
    assert any(record["step"] > 0 for record in cached)


def test_the_learning_rate_by_hand(finished, tmp_path):
    config = train.parse_config([*QUICK, "--steps", "10", "--warmup-steps", "4", "--lr", "0.1"])
    assert [train.lr_of(config, step) for step in (1, 3, 4, 10)] == pytest.approx([0.025, 0.075, 0.1, 0.1])
    config = dataclasses.replace(config, lr_decay_steps=5)
    assert [train.lr_of(config, step) for step in (1, 5, 10)] == pytest.approx([0.025 / 1.2, 0.05, 0.1 / 3])
    # a warm-up of 3 steps to 1e-3
    assert [m["policy/lr"] for m in lines_of(finished / "metrics.jsonl")[1:]] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, 1e-3])
    endless = run_with(tmp_path / "endless", "--warmup-steps", str(10**30))  # the optimiser takes it: no step
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "endless" / "policy").parameters()
    assert all(map(torch.equal, AutoModelForCausalLM.from_pretrained(TINY).parameters(), after))
    assert any(m["group/trained"] for m in endless)


@pytest.fixture
def resumed(finished, tmp_path) -> train.Run:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    run = train.prepare(train.parse_config(["--resume", str(out), "--steps", "4"]))
    run.lock.close()
    return run


def test_the_logprobs_of_the_cached_paths_are_those_of_a_plain_forward(resumed):
    run, ids = resumed, sorted(resumed.entries)[:5]
    run.config = dataclasses.replace(run.config, temperature=0.8)
    run.progress.tokens_per_forward = 1000  # two or three a forward
    limits = [20, 100, 7, 150, len(run.entries[ids[4]].response_ids)]
    logprobs = train.path_logprobs(run, dict(zip(ids, limits)))
    for name, limit in zip(ids, limits, strict=True):
        prompt, path = run.prompts[name], run.entries[name].response_ids
        logits = plain_logits(run.model, prompt + path)[len(prompt) - 1:-1, :len(run.tokenizer)] / 0.8
        plain = logits.float().log_softmax(-1)[range(len(path)), path]
        assert logprobs[name] == pytest.approx(plain.tolist()[-limit:], abs=1e-4)
        assert min(plain) < -0.1


def test_certain_problems_are_skipped_but_not_all_of_a_step(resumed, monkeypatch):
    run, ids, config = resumed, list(resumed.entries), resumed.config
    run.problems = [p for p in run.problems if p.id in run.entries]
    run.entries = {name: dataclasses.replace(e, dead_end=0) for name, e in run.entries.items()}
    logprobs = {}
    for number, (name, path) in enumerate(run.entries.items()):
        logprobs[name] = [0.0] * len(path.response_ids)
        logprobs[name][-90 - 60 * (number % 2 == 0)] = -99.0  # within L for the odd ones, else before it
    monkeypatch.setattr(train, "path_logprobs", lambda run, limits: {
        name: logprobs[name][-limit:] for name, limit in limits.items()})

    def groups(**options) -> list[rollout.Group]:
        run.config = dataclasses.replace(config, **{"max_cut": "100", "cut_tail": 0} | options)
        run.progress.position = 0
        return train.next_groups(run, 4, len(ids))

    before = run.progress.tokens_full_path
    chosen = groups()
    assert {g.problem.id for g in chosen} == set(ids[1::2]) and {g.cut for g in chosen} == {90}
    skipped = sum(len(run.entries[name].response_ids) for name in ids[::2])
    assert run.progress.tokens_full_path - before == 4 * skipped
    assert {g.cut for g in groups(skip_certain=False)} > {90} and len(groups(skip_certain=False)) == len(ids)
    assert len({g.cut for g in groups(cut_position="uniform")}) > 1
    assert len(groups(max_cut="80")) == 1  # all are certain, but a step is never empty
    assert {g.cut for g in groups(cut_tail=1e-3)} == {90, 150}  # L many times as long
    run.entries = {name: dataclasses.replace(e, limit=80.0) for name, e in run.entries.items()}
    (sampled,) = groups(max_cut="adaptive")  # the others' limits grow, as if all suffixes had been right
    grown = [e.limit for name, e in run.entries.items() if name != sampled.problem.id]
    assert grown == pytest.approx([80 * math.exp(0.5)] * len(grown))
    draws = []
    monkeypatch.setattr(cache, "stretch_of", lambda tail, rng: draws.append(rng.random()) or 1.0)
    for step in (4, 5, 4):
        train.next_groups(run, step, 2)
    assert draws[0] == draws[2] != draws[1]  # one draw a step, the same after a resume


def test_the_cache_holds_responses_of_its_problem_with_their_end(finished):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    problems = {p.id: p for p in load(str(TINY / "train.jsonl"))}
    for record in lines_of(finished / "cache.jsonl")[1:]:
        text = tokenizer.decode(record["response_ids"])
        assert record["response_ids"].count(tokenizer.eos_token_id) == text.endswith("<|im_end|>")
        assert len(record["response_ids"]) == 420 or text.endswith("<|im_end|>")
        answer = problems[record["id"]].answer
        assert record["correct"] == is_correct(text.removesuffix("<|im_end|>"), answer, loose=False)
    sample = lines_of(finished / "samples.jsonl")[0]
    assert sample["prompt"].endswith("<|im_start|>assistant\n") and sample["prefix"] and sample["suffix"]


def test_same_seed_same_run_another_seed_another(tmp_path):
    once, again, other = (tmp_path / name for name in ("once", "again", "other"))
    for out, seed in ((once, "0"), (again, "0"), (other, "1")):
        run_with(out, "--seed", seed, "--steps", "1", "--cache-init-chunk", "0", "--algo", "grpo",
                 "--max-response", "200")
    assert outcome(once) == outcome(again)
    assert all(a != b for a, b in zip(outcome(once)[1:], outcome(other)[1:]))


def test_full_paths_are_the_same_loop_with_empty_prefixes(tmp_path):
    out = tmp_path / "full"
    assert train.main([*QUICK, "--rollout", "full", "--algo", "grpo", "--kl-coef", "0.05",
                       "--updates-per-rollout", "3", "--out", str(out), "--eval-every", "0"]) == 0
    metrics = lines_of(out / "metrics.jsonl")
    assert all(m["response/prefix_length"] == 0 for m in metrics)
    assert all(m["tokens/generated"] == m["tokens/full_path"] for m in metrics)
    # off-policy from the second update on
    assert any(m["policy/approx_kl"] > 0 for m in metrics if m["group/trained"] > 1)
    assert any(m.get("policy/kl_ref", 0) > 0 for m in metrics)  # moved away from the start
    assert len(lines_of(out / "cache.jsonl")) == 1  # no path is kept


def test_out_of_memory_halves_the_micro_batches_and_changes_nothing_else(tmp_path, monkeypatch, capsys):
    real, state = rpo.shared_logprobs, {"calls": 0}

    def scarce(model, batch, *rest):
        state["calls"] += torch.is_grad_enabled()
        if state["calls"] == 2:  # after the first micro-batch has left its gradient
            raise torch.OutOfMemoryError("scarce")
        return real(model, batch, *rest)

    out = tmp_path / "out"
    options = [*QUICK, "--steps", "1", "--eval-every", "0", "--tokens-per-forward", "500",
               "--max-cut", "1.0"]
    assert train.main([*options, "--out", str(out / "plenty")]) == 0
    monkeypatch.setattr(rpo, "shared_logprobs", scarce)
    assert train.main([*options, "--out", str(out / "scarce")]) == 0
    assert "halved to 250" in capsys.readouterr().out
    plenty, scarce = (lines_of(out / name / "metrics.jsonl")[-1] for name in ("plenty", "scarce"))
    assert scarce["policy/grad_norm"] == pytest.approx(plenty["policy/grad_norm"], rel=1e-4)
    assert scarce["tokens/trained"] == plenty["tokens/trained"] > 0

    def empty(*arguments):
        raise torch.OutOfMemoryError("empty")

    monkeypatch.setattr(rpo, "shared_logprobs", empty)
    assert train.main([*options, "--out", str(out / "none")]) == 1
    assert "--tokens-per-forward" in capsys.readouterr().err


def test_out_of_memory_while_sampling_halves_the_memory_and_goes_on(tmp_path, monkeypatch, capsys):
    real, calls = rollout.generate, []

    def scarce(model, requests, how, memory, label, *rest):
        calls.append(memory)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("scarce")
        return real(model, requests, how, memory, label, *rest)

    options = ["--steps", "1", "--max-response", "150", "--rollout-memory", "0.5"]
    monkeypatch.setattr(rollout, "generate", scarce)
    for failing in ((), (2,)):
        calls.clear()
        run_with(tmp_path / str(len(failing)), *options)
    assert calls[0] == calls[1] == 0.5 and set(calls[2:]) == {0.25}
    assert "--rollout-memory 0.5 is halved to 0.25" in capsys.readouterr().out
    assert outcome(tmp_path / "0") == outcome(tmp_path / "1")


def test_tensorboard_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in expect_error(capsys, tmp_path / "out", "--tensorboard")
    board = type("Board", (), {"add_scalar": lambda self, *args: shown.append(args)})
    shown = []
    monkeypatch.setattr(train, "find_board", lambda: lambda folder: board())
    metrics = run_with(tmp_path / "run", "--tensorboard", "--steps", "1", "--max-response", "150")
    assert shown == [(name, value, 1) for name, value in metrics[0].items()]


def test_groups_without_spread_give_no_gradient_but_update_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(train.rewards, "length_rewards", lambda correct, *rest: [0.0] * len(correct))
    monkeypatch.setattr(rewards.Checker, "check", lambda self, pairs: [False] * len(pairs))
    out = tmp_path / "run"
    assert train.main([*QUICK, "--out", str(out), "--eval-every", "0"]) == 0
    before = AutoModelForCausalLM.from_pretrained(TINY)
    after = AutoModelForCausalLM.from_pretrained(out / "policy")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert {r["step"] for r in lines_of(out / "cache.jsonl")[1:]} >= {1, 2, 3}
    assert json.loads((out / "summary.json").read_text())["accuracy_after"] is None


def run_with(out: Path, *options: str) -> list[dict]:
    assert train.main([*QUICK, "--eval-every", "0", "--out", str(out), *options]) == 0
    return lines_of(out / "metrics.jsonl")


def test_first_paths_from_worked_solutions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "update_cache", lambda *args: None)
    problems = lines_of(TINY / "train.jsonl")[:9]
    given = [p | {"solution": f"So it is \\boxed{{{p['answer'] if i % 2 else 'wrong'}}}"}
             for i, p in enumerate(problems)]
    del given[0]["solution"]
    source = write(tmp_path / "p.jsonl", *given)
    out = tmp_path / "run"
    run_with(out, "--data", source, "--steps", "1", "--cache-init", "solutions", "--cache-init-chunk", "0")
    assert "1 of 9 problems have no worked solution" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text_of = {p.id: p for p in load(source)}
    first = [r for r in lines_of(out / "cache.jsonl")[1:] if text_of[r["id"]].solution]
    assert len(first) >= 2
    for record in first:
        problem = text_of[record["id"]]
        assert tokenizer.decode(record["response_ids"]) == problem.solution + "<|im_end|>"
        assert record["correct"] == (problem.answer in problem.solution)
    bare = write(tmp_path / "bare.jsonl", *({k: p[k] for k in ("problem", "answer")} for p in problems))
    message = expect_error(capsys, tmp_path / "no", "--data", bare, "--cache-init", "solutions")
    assert "--cache-init" in message and not (tmp_path / "no").exists()


def test_a_step_of_more_problems_than_first_paths_are_sampled_at_once(tmp_path):
    (metrics,) = run_with(tmp_path / "run", "--steps", "1", "--dynamic-rounds", "1",
                          "--cache-init-chunk", "2")
    assert metrics["cache/entries"] == 3  # two, and what was still missing of the step


def test_full_visits_and_the_suffix_budget_in_the_loop(tmp_path):
    three = write(tmp_path / "p.jsonl", *lines_of(TINY / "train.jsonl")[:3])
    steps = run_with(tmp_path / "run", "--data", three, "--steps", "4", "--dynamic-rounds", "1",
                     "--full-every", "2", "--max-cut", "9", "--max-suffix", "5", "--overlong-penalty", "0")
    assert [m["response/cut_length"] == 0 for m in steps] == [False, True, False, True]
    assert [m["response/prefix_length"] == 0 for m in steps] == [False, True, False, True]
    assert all((m["response/suffix_length"] <= 5) == (m["response/cut_length"] > 0) for m in steps)


def test_the_adaptive_cut_in_the_loop_follows_the_accuracy(tmp_path, monkeypatch):
    options = ["--max-cut", "adaptive", "--adaptive-low", "4", "--adaptive-high", "64", "--no-skip-certain",
               "--dynamic-rounds", "1", "--steps", "2",
               "--data", write(tmp_path / "p.jsonl", *lines_of(TINY / "train.jsonl")[:3])]
    for right, factor in ((True, math.exp(0.5)), (False, math.exp(-0.5))):
        monkeypatch.setattr(rewards.Checker, "check", lambda self, pairs: [right] * len(pairs))
        steps = run_with(tmp_path / str(right), *options)
        # from sqrt(4 * 64)
        assert [m["cache/limit"] for m in steps] == pytest.approx([16 * factor, 16 * factor**2])
        entries = lines_of(tmp_path / str(right) / "cache.jsonl")[1:]
        dead_end = np.mean([e["dead_end"] for e in entries])  # no suffix of these prefixes was right
        assert dead_end == pytest.approx(0 if right else steps[-1]["response/prefix_length"])
    limits = [m["cache/limit"] for m in run_with(tmp_path / "full", *options, "--full-every", "2")]
    assert limits == pytest.approx([16 * factor] * 2)  # a full path says nothing about the cut


def test_own_reward_is_added_with_its_weight_and_logged_apart(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("def reward(problem, response_text):\n"
                   "    return {'a': 2.0 if problem.answer else 0, 'b': -1.0}\n")
    metrics = run_with(tmp_path / "run", "--reward-file", str(own), "--reward-file-weight", "0.5",
                       "--length-reward", "0", "--overlong-penalty", "0", "--accuracy-weight", "3",
                       "--steps", "1")
    for m in metrics:
        assert (m["reward/file/a"], m["reward/file/b"]) == (2.0, -1.0)
        assert m["reward/mean"] == pytest.approx(3 * m["reward/accuracy"] + 0.5)


@pytest.mark.parametrize("text, word", [
    ("def reward(problem, text):\n    return 1 / 0\n", "line 2"),
    ("def reward(problem):\n    return 1\n", "reward()"), ("x = 1\n", "no function"),
    ("def reward(:\n", "cannot be loaded"), (None, "cannot be loaded"),
    ("def reward(p, t):\n    return float('nan')\n", "finite"),
    ("def reward(p, t):\n    return None\n", "None")])
def test_a_broken_reward_file_is_one_sentence(text, word, tmp_path, capsys):
    own = tmp_path / "mine.py"
    if text is not None:
        own.write_text(text)
    message = expect_error(capsys, tmp_path / "out", "--reward-file", str(own))
    assert "--reward-file" in message and word in message and not (tmp_path / "out").exists()


def test_an_all_correct_group_has_a_gradient_only_with_the_length_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards.Checker, "check", lambda self, pairs: [True] * len(pairs))
    for alpha, trains in (("0", False), ("0.1", True)):
        metrics = run_with(tmp_path / alpha, "--algo", "grpo", "--dynamic-rounds", "1",
                           "--length-reward", alpha, "--max-cut", "1.0", "--temperature", "1.3",
                           "--steps", "1", "--max-response", "330")
        assert (sum(m["group/trained"] for m in metrics) > 0) == trains
        assert all(m["group/zero_std_fraction"] == 1 for m in metrics)


def test_print_config_names_every_value_and_its_source(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--algo", "gspo", "--clip-low", "0.1", "--rollout", "full", "--print-config"])
    assert end.value.code == 0
    said = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert said["--clip-low"] == ["0.1", "command", "line"] and said["--steps"] == ["300", "default"]
    assert said["--clip-high"] == ["0.0004", "--algo", "gspo"]
    assert said["--length-reward"] == ["0.0", "--rollout", "full"]
    assert len(said) == len(train.dataclasses.fields(train.Config))


TIMINGS = ("time/", "tokens/per_s", "memory/", "reward/check_ms_max")


def outcome(out: Path) -> tuple:
    """Everything that a run leaves and that must not depend on when it was stopped."""
    metrics = [{k: v for k, v in m.items() if not k.startswith(TIMINGS)}
               for m in lines_of(out / "metrics.jsonl")]
    return ((out / "policy" / "model.safetensors").read_bytes(), (out / "cache.jsonl").read_bytes(), metrics,
            (out / "samples.jsonl").read_bytes())


def during(monkeypatch, step: int, action) -> None:
    """Do something when that step begins."""
    real = train.train_step

    def train_step(run, number, *rest):
        if number == step:
            action()
        return real(run, number, *rest)
    monkeypatch.setattr(train, "train_step", train_step)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    for step, start in ((1, [*QUICK, "--out"]), (2, [*QUICK, "--out"])):
        with monkeypatch.context() as patch:
            during(patch, step, interrupt)
            assert train.main([*start, str(out)]) == 130
        assert f"--resume {out}" in capsys.readouterr().out and not (out / "summary.json").exists()
        assert [m["step"] for m in lines_of(out / "metrics.jsonl")] == list(range(step))
        assert len(list(out.glob("checkpoint*"))) == 1
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 99}\n')  # of a step after the checkpoint
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train.main(["--resume", str(out)]) == 0
    assert outcome(out) == outcome(finished)
    assert len(list(out.glob("checkpoint*"))) == 1
    done = json.loads((out / "summary.json").read_text())
    assert done["tokens_generated"] == json.loads((finished / "summary.json").read_text())["tokens_generated"]


def test_a_second_signal_ends_the_run_at_once_and_it_begins_anew(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        during(patch, 2, lambda: [interrupt(), interrupt()])
        assert train.main([*QUICK, "--eval-every", "0", "--max-response", "150", "--out", str(out)]) == 130
    assert not list(out.glob("checkpoint*")) and len(lines_of(out / "metrics.jsonl")) == 1
    assert train.main(["--resume", str(out), "--steps", "2"]) == 0
    assert [m["step"] for m in lines_of(out / "metrics.jsonl")] == [1, 2]


def test_options_of_a_run_that_goes_on(finished, tmp_path, capsys):
    out = tmp_path / "run"
    train.shutil.copytree(finished, out, symlinks=True)
    for changed in (["--lr", "2e-3", "--seed", "4"], ["--algo", "grpo"]):
        message = expect_error(capsys, out, *changed)
        assert changed[0] in message and "--resume-override" in message and "--steps" not in message
    # grpo's own values come with it
    config = train.parse_config(["--resume", str(out), "--algo", "grpo", "--resume-override", "--lr", "0.5"])
    assert (config.clip_high, config.aggregation, config.lr, config.max_cut) == (0.2, "response", 0.5, "0.3")
    assert train.main(["--resume", str(out), "--steps", "4", "--save-every", "1",
                       "--keep-checkpoints", "2"]) == 0
    assert [m["step"] for m in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert sorted(f.name for f in out.glob("checkpoint*")) == ["checkpoint-000003", "checkpoint-000004"]
    with open(out / "lock") as file:
        train.fcntl.flock(file, train.fcntl.LOCK_EX)
        assert "another process" in expect_error(capsys, out)
    other = write(tmp_path / "other.jsonl", *lines_of(TINY / "train.jsonl")[:9])
    message = expect_error(capsys, out, "--data", other, "--resume-override", "--keep-checkpoints", "2")
    assert "problems" in message
    with pytest.raises(SystemExit) as end:
        train.main(["--resume", str(tmp_path / "nothing")])
    assert end.value.code == 2 and "holds no run" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    """A write error at every place of a run's second save: it goes on, and the first save still resumes."""
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def full_for_torch(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    places = [(train.PreTrainedModel, "save_pretrained", full),
              (train.PreTrainedTokenizerBase, "save_pretrained", full), (Path, "write_text", full),
              (train.torch, "save", full_for_torch),
              (train.cache, "save", full), (train, "sync", full), (train.os, "replace", full)]
    problems = write(tmp_path / "p.jsonl", *lines_of(TINY / "train.jsonl")[:3])
    for number, (owner, name, failure) in enumerate(places):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            real = train.save_checkpoint

            def save(run, *rest):
                with monkeypatch.context() as inner:
                    if run.progress.step == 2:
                        inner.setattr(owner, name, failure)
                    real(run, *rest)
            patch.setattr(train, "save_checkpoint", save)
            options = ["--steps", "2", "--save-every", "1", "--data", problems, "--max-response", "150"]
            run_with(out, *options)
        assert "could not be written" in capsys.readouterr().out
        assert [f.name for f in out.glob("checkpoint*")] == ["checkpoint-000001"]
        assert train.main(["--resume", str(out), "--eval-every", "0"]) == 0
        assert sorted(f.name for f in out.glob("checkpoint*")) == ["checkpoint-000002"]


def test_a_gradient_that_is_not_finite_is_left_out(tmp_path, monkeypatch, capsys):
    real, calls = rpo.policy_loss, []

    def broken(*args, **kwargs):
        loss, sums = real(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) in bad else loss), sums

    monkeypatch.setattr(rpo, "policy_loss", broken)
    for bad, code, steps in (({1}, 0, "2"), (set(range(1, 99)), 1, "12")):
        calls.clear()
        out = tmp_path / str(code)
        options = ["--steps", steps, "--algo", "grpo", "--problems-per-step", "3", "--dynamic-rounds", "1",
                   "--eval-every", "0", "--temperature", "1.3", "--max-cut", "1.0", "--length-reward", "0.1",
                   "--max-response", "60"]
        monkeypatch.setattr(rewards.Checker, "check",
                            lambda self, pairs: [i % 2 == 0 for i, _ in enumerate(pairs)])
        assert train.main([*QUICK, *options, "--out", str(out)]) == code
        metrics = lines_of(out / "metrics.jsonl")
        assert sum(m["policy/skipped_updates"] for m in metrics) == (1 if code == 0 else 9)
        weights = AutoModelForCausalLM.from_pretrained(out / "policy").state_dict()
        start = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
        assert all(torch.isfinite(w).all() for w in weights.values())
        assert all(torch.equal(w, start[n]) for n, w in weights.items()) == (code == 1)
        dumped = json.loads((out / "skipped-1.json").read_text())
        assert {"context", "suffixes", "advantages"} <= dumped[0].keys()
    assert "ten updates in a row" in capsys.readouterr().err
    assert (out / "checkpoint-000009").is_dir()
    bad = set()  # the eleventh one is sound
    assert train.main(["--resume", str(out)]) == 0
    assert [m["step"] for m in lines_of(out / "metrics.jsonl")] == list(range(1, 13))
    assert {r["step"] for r in lines_of(out / "samples.jsonl")} == set(range(1, 13))


def test_collapse_is_named_once(tmp_path, capsys):
    run = type("Run", (), {"warned": set()})
    for entropy in (0.1, 0.001, 0.001):
        train.warn_of_collapse(run, {"step": 3, "policy/entropy": entropy, "group/zero_std_fraction": 1.0,
                                     "response/finished_fraction": 0.5})
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


def test_code_in_a_model_folder_needs_consent(tmp_path, capsys):
    folder = tmp_path / "model"
    train.shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    message = expect_error(capsys, tmp_path / "out", "--model", str(folder))
    assert "trust_remote_code" in message.replace("-", "_") and not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_run_with_one_gradient_that_is_not_finite_still_learns(tmp_path, monkeypatch):
    real, calls = rpo.policy_loss, []

    def broken(*args, **kwargs):
        loss, sums = real(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 3 else loss), sums

    monkeypatch.setattr(rpo, "policy_loss", broken)
    preset = Path(train.__file__).with_name("presets") / "tiny.args"
    out = tmp_path / "run"
    assert train.main([f"@{preset}", "--model", str(TINY), "--steps", "15", "--out", str(out)]) == 0
    metrics = lines_of(out / "metrics.jsonl")
    assert sum(m.get("policy/skipped_updates", 0) for m in metrics) == 1
    assert metrics[-1]["eval/accuracy"] > metrics[0]["eval/accuracy"] + 0.05


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
    "--max-cut": ["20", "0.5", "adaptive"], "--max-suffix": ["", "30", "2.0"], "--epsilon": ["0.5", "1"],
    "--cache-init": ["policy", "solutions"], "--cache-keep-correct": [False, True],
    "--full-every": ["0", "2"], "--length-reward": ["0", "0.01"], "--length-reference": ["all", "correct"],
    "--format-weight": ["0", "0.5"], "--cosine-weight": ["0", "1"], "--overlong-penalty": ["0", "1"],
    "--updates-per-rollout": ["1", "2"], "--kl-coef": ["0", "0.01"], "--dynamic-rounds": ["1", "3"],
    "--advantage": [None, "std", "mean", "leave_one_out"], "--aggregation": [None, "token", "budget"],
    "--gradient-checkpointing": [False, True]}


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
        options += [flag] if isinstance(value, bool) else [] if value is None else [name, value]
    metrics = run_with(tmp_path / "run", *options, "--steps", "5", "--max-response", "200")
    assert len(metrics) == 5 and all(math.isfinite(v) for m in metrics for v in m.values())


def test_preset_options_can_be_overridden_by_later_ones(tmp_path):
    preset = tmp_path / "p.args"
    preset.write_text("# a comment\n--algo grpo --steps 7\n--instruction 'two words'  # and another\n")
    config = train.parse_config([f"@{preset}", "--steps", "9"])
    assert (config.algo, config.steps, config.instruction) == ("grpo", 9, "two words")
    assert (config.clip_high, config.aggregation, config.dynamic_rounds) == (0.2, "response", 1)
    config = train.parse_config(["--clip-high", "0.25", "--rollout", "full"])
    assert (config.algo, config.clip_high, config.clip_low, config.length_reward) == ("dapo", 0.25, 0.2, 0)


@pytest.mark.parametrize("arguments, word", [
    (["--max-cuts", "3"], "--max-cuts"), (["--max-cut", "0"], "--max-cut"), (["--max-cut", "-3"], "-3"),
    (["--max-cut", "1.5"], "--max-cut"), (["--group-size", "1"], "--group-size"), (["--steps", "x"], "x"),
    (["--lr", "nan"], "--lr"), (["--temperature", "0"], "--temperature"), (["--epsilon", "1.1"], "--epsilon"),
    (["--data", "missing.jsonl"], "missing.jsonl"), (["--data", "."], "--data"), (["--device", "tpu"], "tpu"),
    (["--model", "Unheard-of"], "Unheard-of"), (["--updates-per-rollout", "4"], "--updates-per-rollout"),
    (["--max-prompt", "5"], "--max-prompt"), (["--max-response", "4000"], "--max-response"),
    (["--rollout-memory", "0.00001"], "--rollout-memory"), (["@nothing.args"], "nothing.args"),
    (["--max-suffix", "0.5"], "--max-suffix"), (["--algo", "ppo"], "ppo"),
    (["--overlong-buffer", "0"], "--overlong-buffer"), (["--adaptive-high", "3"], "--adaptive-high")])
def test_bad_input_is_one_sentence_and_code_2(arguments, word, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    try:
        code = train.main([*QUICK, "--out", str(out), *arguments])
    except SystemExit as exit:
        code = exit.code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert word in message and message.startswith("train.py: error: ")
    assert not out.exists()


def expect_error(capsys, out: Path, *arguments: str) -> str:
    assert train.main([*QUICK, "--out", str(out), *arguments]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_broken_data_folders_and_disks_are_named(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    six = [{"problem": str(i), "answer": "1"} for i in range(6)]
    broken = write(tmp_path / "broken.jsonl", *six, '{"problem": ')
    assert "line 7" in expect_error(capsys, out, "--data", broken)
    nameless = write(tmp_path / "nameless.jsonl", {"text": "?", "answer": "1"})
    assert "line 1" in expect_error(capsys, out, "--data", nameless)
    empty = write(tmp_path / "empty.jsonl", {"problem": "no answer"})
    assert "no problem left" in expect_error(capsys, out, "--data", empty)
    folder = tmp_path / "no_weights"
    folder.mkdir()
    (folder / "config.json").write_text((TINY / "config.json").read_text())
    assert "no weights" in expect_error(capsys, out, "--model", str(folder))
    assert not out.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text("{}\n")
    assert "holds no run" in expect_error(capsys, other)
    assert os.listdir(other) == ["metrics.jsonl"]
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    assert "not enough disk" in expect_error(capsys, out)
    assert not out.exists()


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
    with Checker(workers=0) as checker:
        answers = ["1/2", None, r"\frac{1}{2}", "0.5", "3", None, "3.0"]
        got = evaluation.cluster(answers, checker)
    assert got == [0, -1, 0, 0, got[4], -1, got[4]] and got[4] > 0


def test_the_interval_covers_the_mean_in_95_percent_of_simulations(monkeypatch):
    monkeypatch.setattr(evaluation, "BOOTSTRAP", 500)
    rng, hits = np.random.default_rng(0), 0
    for i in range(400):  # pass rates of 100 problems, drawn from a Beta(1, 2): mean 1/3
        low, high = evaluation.interval(rng.binomial(8, rng.beta(1, 2, 100)) / 8, seed=i)
        hits += low <= 1 / 3 <= high
    assert 0.92 <= hits / 400 <= 0.975  # 95 % +- 2.7 standard errors


def test_segment_figures_by_hand():
    def record(name, *correct):
        return {"id": name, "correct": [bool(c) for c in correct]}
    rows = {0.0: [record("a", 0, 0), record("b", 1, 0)], 0.5: [record("a", 1, 1), record("b", 1, 0)],
            0.9: [record("a", 1, 1), record("b", 0, 0)]}
    got = evaluation.segment_figures(rows, {"a": True, "b": False})
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
    records = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert figures["avg"] == pytest.approx(np.mean([r["correct"] for r in records]))
    assert figures["pass@4"] == pytest.approx(np.mean([any(r["correct"]) for r in records]))
    assert figures["tokens"] == sum(n for r in records for n in r["tokens"]) == figures["tokens_sampled"]
    for record in records:
        assert record["correct"] == [is_correct(t, record["answer"], loose=False)
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
    capsys.readouterr()
    assert evaluation.main([*EVAL, "--out", str(tmp_path / "a"), *options[:-2]]) == 2
    assert "other options" in capsys.readouterr().err
    greedy = evaluated(tmp_path / "b", "--data", source)
    assert evaluation.main(["--compare", *(str(tmp_path / x / "results.json") for x in "ab")]) == 0
    gap = greedy["results"]["easy"]["avg"] - figures["avg"]
    assert f"{gap:+.4f}" in capsys.readouterr().out


def test_every_sample_of_an_evaluation_has_its_own_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(rollout, "generate", lambda model, requests, *rest: seen.extend(
        seed for request in requests for seed in request.seeds))
    evaluator = evaluation.Evaluator(None, None, None, None, 1.0, 50, 7)
    for key in ((0,), (1,)):
        evaluator.run([(p, [1], [], key) for p in load(str(TINY / "test.jsonl"))[:3]], 4, print, "")
    assert len(seen) == len(set(seen)) == 24


def test_segments_of_worked_solutions_and_of_a_cache_file(finished, tmp_path, capsys):
    problems = lines_of(TINY / "train.jsonl")[:4]
    source = write(tmp_path / "p.jsonl", *problems)
    options = ["--data", source, "--segments", "0.5,0.98,1", "--samples", "3", "--temperature", "1.0",
               "--max-response", "420"]
    results = evaluated(tmp_path / "a", *options, "--paths", "solutions")["results"]["p"]
    assert [row["kept"] for row in results["table"]] == [0.5, 0.98, 1.0]
    assert results["table"][2]["all"][0] == 1.0  # only the end token is left
    assert results["table"][0]["wrong"] is None and results["table"][0]["right"][3] == 4
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for record in map(json.loads, (tmp_path / "a" / "responses-p.jsonl").read_text().splitlines()[1:]):
        solution = next(p["solution"] for p in problems if p["answer"] == record["answer"])
        kept = tokenizer.encode(solution, add_special_tokens=False)[:record["prefix_tokens"]]
        length = len(tokenizer.encode(solution, add_special_tokens=False)) + 1
        assert record["prefix_tokens"] == min(int(record["kept"] * length), length - 1)
        assert all(text.startswith(tokenizer.decode(kept)) for text in record["responses"])
    sampled = evaluated(tmp_path / "c", "--data", source, "--segments", "0.9", "--temperature", "1.0")
    assert sampled["results"]["p"]["problems"] == 4
    cached = evaluated(tmp_path / "b", "--max-response", "420", "--data", str(TINY / "train.jsonl"),
                       "--segments", "0.9",
                       "--temperature", "1.0", "--paths", str(finished / "cache.jsonl"))
    assert cached["results"]["train"]["problems"] == len(lines_of(finished / "cache.jsonl")) - 1


@pytest.mark.parametrize("arguments, word", [
    (["--model", str(TINY), "--data", f"{TINY}/test.jsonl,{TINY}/test.jsonl"], "test"),
    ([], "--model"), (["--model", "x", "--data", "y", "--samples", "0"], "--samples"),
    (["--model", "x", "--data", "y", "--segments", "0,2"], "--segments"),
    (["--model", "x", "--data", "y", "--samples", "4"], "greedy"), (["--compare", "a", "b"], "--compare a"),
    (["--model", str(TINY), "--data", "math500", "--data-dir", "nowhere"], "math500"),
    (["--model", str(TINY), "--data", str(TINY / "test.jsonl"), "--segments", "0.5", "--paths", "none.jsonl",
      "--out", "runs"], "none.jsonl")])
def test_bad_input_of_the_evaluation_is_one_sentence(arguments, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        code = evaluation.main(arguments)
    except SystemExit as end:
        code = end.code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and word in message and message.startswith("eval.py: error: ")


@pytest.mark.slow  # the headline of the README: minutes
def test_the_default_job_learns_and_generates_a_tenth_of_the_tokens(tmp_path):
    preset = Path(train.__file__).with_name("presets") / "tiny.args"
    out = tmp_path / "run"
    assert train.main([f"@{preset}", "--model", str(TINY), "--seed", "1", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.25
    assert summary["tokens_generated"] <= 0.1 * summary["tokens_full_path"]

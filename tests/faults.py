"""Faults for power.py to plant: what a change may get wrong, one line at a time."""

from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    old: str  # which is there once
    new: str
    tests: str  # the files of tests/ that reach it, without test_ and .py, the quickest first


OP = (
    "loss divergence token_divergence against_oracle family kernels logit_free trained_head head "
    "log_probs peers"
)
SPARSE = "top_k_trainers several_log_probs top_k_loss"
KERNELS = f"kernels {OP.replace(' kernels', '')} resources"
RUNS = "train_step train_opsd train_run train_failures evaluate train_demo"

FAULTS = [
    # The maths, in PyTorch.
    Fault(
        "opsd_kernels/schedules/rows.py",
        "x.clamp_(-HUGE, HUGE).sub_(teacher.top - student.top).sub_(teacher.rest - student.rest)",
        "x.clamp_(-HUGE, HUGE).sub_(teacher.top + teacher.rest - (student.top + student.rest))",
        f"divergence {OP}",
    ),
    Fault(
        "opsd_kernels/divergence.py",
        "scale = torch.maximum(P, Q * math.exp(-SATURATED))",
        "scale = P",
        f"divergence {OP}",
    ),
    Fault(
        "opsd_kernels/schedules/rows.py",
        "share = torch.where(whole.isinf(), 1, removed / whole)",
        "share = removed / whole",
        f"token_divergence {OP}",
    ),
    Fault(
        "opsd_kernels/schedules/rows.py",
        "z_S.sub_(advantages[:, None] * sampled)",
        "z_S.add_(advantages[:, None] * sampled)",
        f"family {OP}",
    ),
    Fault(
        "opsd_kernels/divergence.py",
        "kappa = w_p * beta - w_q * (1 - beta)",
        "kappa = w_p * (1 - beta) - w_q * beta",
        f"family {OP}",
    ),
    # Near agreement, which float64 does not see.
    Fault(
        "opsd_kernels/divergence.py",
        "    near = (t + 1).mul_(u).sub_(t)",
        "    near = (t + 1).mul_(u).sub_(t).mul_(u < -1e-4)",
        f"against_oracle {OP}",
    ),
    # Some entries of a token.
    Fault(
        "opsd_kernels/gathered.py",
        "return u.masked_fill_(_absent(ids, W), 0)",
        "return u",
        "gathered",
    ),
    Fault(
        "opsd_kernels/kernels/gathered.py",
        "sums += c_pair[:, None] * _rounded(h_pair, OPERAND)",
        "sums += c_pair[:, None] * h_pair",
        "gathered",
    ),
    Fault(
        "opsd_kernels/schedules/top_k.py",
        "m, s = _with_more(m, s, _logits(keys[:, k:]), temperature)",
        "pass",
        "top_k",
    ),
    Fault(
        "opsd_kernels/schedules/top_k.py",
        "bitwise_or_(~ids & 0xFFFFFFFF)",
        "bitwise_or_(ids)",
        "top_k",
    ),
    # The maths, in Triton.
    Fault(
        "opsd_kernels/kernels/pointwise.py",
        "forward = tl.where(near, p * (x * (x + e) - e), q * x - q_minus_p)",
        "forward = q * x - q_minus_p",
        KERNELS,
    ),
    Fault(
        "opsd_kernels/kernels/pointwise.py",
        "a = tl.where(clipped, -kappa * p, a)",
        "a = tl.where(clipped, kappa * p, a)",
        f"family {KERNELS}",
    ),
    Fault(
        "opsd_kernels/kernels/pointwise.py",
        "return (d - (top_T - top_S)) * inverse_temperature - log_sums",
        "return d * inverse_temperature - ((top_T - top_S) * inverse_temperature + log_sums)",
        KERNELS,
    ),
    # Kernels.
    Fault(
        "opsd_kernels/kernels/lse.py",
        "index = tl.min(tl.where(highest, indices, LAST), AXIS)",
        "index = tl.max(tl.where(highest, indices, -1), AXIS)",
        KERNELS,
    ),
    Fault(
        "opsd_kernels/kernels/lse.py",
        "E = tl.sum(scale * (Es + sum_Ss * moved), AXIS)",
        "E = tl.sum(scale * Es, AXIS)",
        KERNELS,
    ),
    Fault(
        "opsd_kernels/kernels/lse.py",
        "c, s_top = c - advantage, s_top + advantage * p_max",
        "c, s_top = c - advantage, s_top",
        f"family {KERNELS}",
    ),
    Fault(
        "opsd_kernels/kernels/pair.py",
        "s = terms[1] * scored.SCALE * slope",
        "s = terms[1] * scored.SCALE",
        f"head {KERNELS}",
    ),
    Fault(
        "opsd_kernels/kernels/pointwise.py",
        "f = tl.where((w_q != 0) & (d >= HUGE), limit, f)",
        "f = tl.where(d >= HUGE, limit, f)",
        f"family {KERNELS}",
    ),
    Fault(
        "opsd_kernels/kernels/finish.py",
        "g_top = s_top * (1.0 - p_top) - p_top * others",
        "g_top = s_top - p_top * others",
        KERNELS,
    ),
    Fault(
        "opsd_kernels/kernels/finish.py",
        "tl.store(at_dh, tl.where(used, dh * inverse_temperature, 0.0), mask=inside)",
        "tl.store(at_dh, tl.where(used, dh, 0.0), mask=inside)",
        KERNELS,
    ),
    Fault(
        "opsd_kernels/kernels/finish.py",
        "nothing = (removed == 0) & (loss == loss)  # not of NaN",
        "nothing = removed == 0",
        f"token_divergence {KERNELS}",
    ),
    Fault(
        "opsd_kernels/kernels/rows.py",
        "product = tl.where(factor == 0, 0.0, product)",
        "product = product * 1.0",
        f"trained_head {KERNELS}",
    ),
    Fault(
        "opsd_kernels/kernels/gradient.py",
        "g = tl.where(weight == 0, 0.0, g) * weighed.SCALE",
        "g = g * weighed.SCALE",
        f"trained_head {KERNELS}",
    ),
    Fault(
        "opsd_kernels/kernels/head.py",
        'u = tl.where(u == float("-inf"), u, t * softcap)  # a ban stays a ban',
        "u = t * softcap",
        f"head {KERNELS}",
    ),
    Fault(
        "opsd_kernels/kernels/tiles.py",
        "lse=Tile(64, 128, 64, 16, 4, 3),",
        "lse=Tile(64, 128, 64, 4, 4, 5),",
        "resources gpu_run logit_free",
    ),
    Fault(
        "opsd_kernels/kernels/tiles.py",
        "pair_wide=Tile(128, 64, 32, 8, 8, 3),",
        "pair_wide=Tile(128, 96, 32, 8, 8, 3),",
        "resources gpu_run logit_free",
    ),
    # Schedules.
    Fault(
        "opsd_kernels/products.py",
        "if operand_dtype == torch.float16 and not bounded:",
        "if operand_dtype == torch.float64 and not bounded:",
        OP,
    ),
    Fault(
        "opsd_kernels/schedules/planning.py",
        "return budget - 4 * problem.W.numel() - 4 * problem.W.shape[0]",
        "return budget - 2 * problem.W.numel() - 4 * problem.W.shape[0]",
        f"memory trained_head {OP}",
    ),
    Fault(
        "opsd_kernels/schedules/row_workspace.py",
        "h = h.masked_fill(~chunk.keep[:, None], 0)  # dropped tokens may hold NaN",
        "h = h * 1",
        f"trained_head {OP}",
    ),
    # The log-sum-exp of entries outside a set, and its gradient.
    Fault(
        "opsd_kernels/kernels/excluded.py",
        "word = tl.where(col >= i * BITS, later, word)",
        "word = tl.where(col > i * BITS, later, word)",
        "outside",
    ),
    Fault(
        "opsd_kernels/kernels/excluded.py",
        "inside = (col >= 0) & (col < columns) & (value != 0)",
        "inside = (col >= 0) & (col < columns)",
        "outside",
    ),
    Fault(
        "opsd_kernels/schedules/excluded.py",
        "value = u[:, :1].masked_fill(some >= 0, -torch.inf)",
        "value = torch.full_like(u[:, :1], -torch.inf)",
        "outside",
    ),
    Fault(
        "opsd_kernels/kernels/lse.py",
        "c, s_top = tl.where(nothing_left, 0.0, mean_d), p_max",
        "c, s_top = mean_d, p_max",
        "outside",
    ),
    Fault(
        "opsd_kernels/schedules/head_gradient.py",
        "exact = torch.cat([exact, problem.g_excluded], 1)",
        "exact = torch.cat([exact, 0 * problem.g_excluded], 1)",
        "outside",
    ),
    Fault(
        "opsd_kernels/rest.py",
        "dropped = (c_r == 0) & (c == 0).all(1)",
        "dropped = c_r == 0",
        "outside",
    ),
    Fault(
        "opsd_kernels/schedules/head_gradient.py",
        "taken = exact - exact.to(dtype).float()",
        "taken = 0 * exact",
        f"trained_head {OP}",
    ),
    Fault(
        "opsd_kernels/schedules/rows.py",
        "elsewhere = (all_tops[:, i] == top).int().argmax(0) != rank_in(group)",
        "elsewhere = all_tops[rank_in(group), i] != top",
        "vocabulary_parallel",
    ),
    Fault(
        "opsd_kernels/heads/vocabulary_parallel.py",
        "return local.masked_fill((local < 0) | (local >= own_rows), -1)",
        "return local.masked_fill(local < 0, -1)",
        "vocabulary_parallel",
    ),
    # The face and autograd.
    Fault(
        "opsd_kernels/autograd.py",
        "torch.mul(dh_S, factor, out=grad)",
        "grad = dh_S.mul_(factor).to(dtype)",
        f"peers {OP}",
    ),
    Fault(
        "opsd_kernels/autograd.py",
        'weights = grad_loss.masked_fill(kept["infinite"], 0)',
        "weights = grad_loss.clone()",
        f"trained_head {OP}",
    ),
    Fault(
        "opsd_kernels/loss.py",
        "return total / torch.where(weight > 0, weight, 1)",
        "return total / weight",
        OP,
    ),
    Fault(
        "opsd_kernels/loss.py",
        "advantage = advantage.clamp(-advantage_clip, advantage_clip)",
        "advantage = advantage.clamp(max=advantage_clip)",
        f"sampled_token {OP}",
    ),
    Fault(
        "opsd_kernels/checks.py",
        "if h.shape[:-1] != h_S.shape[:-1]:",
        "if h.shape[0] != h_S.shape[0]:",
        f"arguments {OP}",
    ),
    # A teacher of K tokens.
    Fault(
        "opsd_kernels/support.py",
        "repeats[:, 1:] = sorted_ids[:, 1:] == sorted_ids[:, :-1]",
        "repeats[:, 2:] = sorted_ids[:, 2:] == sorted_ids[:, :-2]",
        SPARSE,
    ),
    Fault(
        "opsd_kernels/support.py",
        "at_top = -log_p_top.expm1() * g_top - log_p_top.exp() * g_others",
        "at_top = (1 - log_p_top.exp()) * g_top - log_p_top.exp() * g_others",
        SPARSE,
    ),
    Fault(
        "opsd_kernels/support.py",
        ".masked_fill_((grad == 0)[:, None], 0)",
        "",
        SPARSE,
    ),
    Fault(
        "opsd_kernels/sparse.py",
        "absent = (ids < 0) | ~(log_q > ABSENT)",
        "absent = (ids < 0) | (log_q <= ABSENT)",
        SPARSE,
    ),
    Fault(
        "opsd_kernels/sparse.py",
        "z_T = with_rest(z_T, rest.masked_fill(L_r == -torch.inf, -torch.inf))",
        "z_T = with_rest(z_T, rest)",
        SPARSE,
    ),
    Fault(
        "opsd_kernels/sparse.py",
        "(1 - log_q.exp().sum(-1)).clamp(min=LEAST_REST)",
        "(1 - log_q.float().exp().sum(-1)).clamp(min=LEAST_REST)",
        SPARSE,
    ),
    Fault(
        "opsd_kernels/divergence.py",
        "given[:, -ignored:].fill_(0)",
        "given[:, -ignored:].mul_(1)",
        SPARSE,
    ),
    # Heads.
    Fault(
        "opsd_kernels/heads/head.py",
        "slope = torch.cosh(v).square_().reciprocal_() if needs_slope else None",
        "slope = 1 - torch.tanh(v).square_() if needs_slope else None",
        f"head {OP}",
    ),
    Fault(
        "opsd_kernels/heads/head_of_model.py",
        "scale = 1.0 if scale is None else float(scale) ** power",
        "scale = 1.0 if scale is None else float(scale)",
        "head_of_model head_check heads_of_others train_models trl",
    ),
    # TRL.
    Fault(
        "opsd_kernels/trl/hidden_states.py",
        "return pad(mask != 0, (length - 1 - mask.shape[1], 1))",
        "return pad(mask != 0, (length - mask.shape[1], 0))",
        "trl",
    ),
    Fault(
        "opsd_kernels/trl/heads.py",
        "full.register_hook(lambda gradient: gradient / mesh.size())",
        "full.register_hook(lambda gradient: gradient * 1)",
        "trl",
    ),
    Fault(
        "opsd_kernels/trl/self_distillation.py",
        "return mask * (torch.arange(mask.shape[1], device=mask.device) >= skipped)",
        "return mask * (torch.arange(mask.shape[1], device=mask.device) > skipped)",
        "trl",
    ),
    Fault(
        "opsd_kernels/trl/distillation.py",
        'temperature=given["temperature"],',
        "temperature=1.0,",
        "trl",
    ),
    Fault(
        "opsd_kernels/trl/self_distillation.py",
        "return loss if policy is None else (1 - weight) * policy + weight * loss",
        "return loss if policy is None else policy + weight * loss",
        "trl",
    ),
    Fault(
        "opsd_kernels/trl/iw_opd.py",
        "logits = T * log_p.new_zeros(*labels.shape, 2).masked_scatter(counts, log_p)",
        "logits = log_p.new_zeros(*labels.shape, 2).masked_scatter(counts, log_p)",
        "trl",
    ),
    Fault(
        "opsd_kernels/trl/iw_opd.py",
        "if k >= W.weight.shape[0]:",
        "if k > 1:",
        "trl",
    ),
    Fault(
        "opsd_kernels/trl/server.py",
        "at[:, begin - 1 : end - 1] = counts",
        "at[:, begin:end] = counts",
        "trl_server",
    ),
    Fault(
        "opsd_kernels/trl/server.py",
        'log_q = given["teacher_target_logps"].masked_fill(absent, -torch.inf)',
        'log_q = given["teacher_target_logps"]',
        "trl_server",
    ),
    Fault(
        "opsd_kernels/trl/trainers.py",
        "if _METHOD.search(found_class[0]) and _WORDS.search(found_class[0]):",
        "if _WORDS.search(found_class[0]):",
        "trl_routes",
    ),
    # The harness: data, models, sampling.
    Fault(
        "opsd_train/data/prompts.py",
        "return [ids if ids[: len(opening)] == opening else opening + ids for ids in bare]",
        "return [opening + ids for ids in bare]",
        "train_data train_opsd",
    ),
    Fault(
        "opsd_train/data/problems.py",
        "if n <= max_prompt_tokens]",
        "if n < max_prompt_tokens]",
        "train_data train_run",
    ),
    Fault(
        "opsd_train/models/head.py",
        "positions = (mask.cumsum(1) - 1).clamp(min=0)  # counted over real tokens",
        "positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)",
        "train_models train_opsd train_step",
    ),
    Fault(
        "opsd_train/models/adapter.py",
        "lora_alpha=config.lora_alpha,",
        "lora_alpha=config.lora_rank,",
        "train_models train_step train_run train_memory",
    ),
    Fault(
        "opsd_train/sampling/generate.py",
        "torch.Generator(device).manual_seed(seed) for seed in seeds",
        "torch.Generator(device).manual_seed(seeds[0]) for _ in seeds",
        "train_sampling train_opsd train_run",
    ),
    Fault(
        "opsd_train/sampling/generate.py",
        "next((i + 1 for i, token in enumerate(row) if token in ends), len(row))",
        "next((i for i, token in enumerate(row) if token in ends), len(row))",
        "train_sampling train_opsd",
    ),
    # The algorithm.
    Fault(
        "opsd_train/opsd/objective.py",
        'each = 1 / (rollouts * lengths) if mean == "rollout"',
        'each = 1 / (len(lengths) * lengths) if mean == "rollout"',
        f"train_opsd {RUNS}",
    ),
    Fault(
        "opsd_train/opsd/objective.py",
        'log_q / T,  # of "renormalize", if T is not 1',
        'log_q,  # of "renormalize", if T is not 1',
        "train_teacher_urls",
    ),
    Fault(
        "opsd_train/sampling/server.py",
        "return _top_k(places[len(prompt) :], completion, k)",
        "return _top_k([*places[len(prompt) + 1 :], places[-1]], completion, k)",
        "train_teacher_urls",
    ),
    Fault(
        "opsd_train/opsd/step.py",
        "(loss * accelerator.num_processes).backward()",
        "loss.backward()",
        RUNS,
    ),
    Fault(
        "opsd_train/opsd/step.py",
        "done = (step - rising) / (config.steps - rising + 1)",
        "done = (step - rising) / (config.steps - rising)",
        RUNS,
    ),
    Fault(
        "opsd_train/opsd/teachers.py",
        "self.weights[name].lerp_(w, 1 - self.decay)",
        "self.weights[name].lerp_(w, self.decay)",
        f"train_opsd {RUNS}",
    ),
    Fault(
        "opsd_train/opsd/teachers.py",
        "copied = copy.deepcopy(backbone, dict(frozen)).requires_grad_(False)",
        "copied = backbone",
        "train_full",
    ),
    Fault(
        "opsd_train/opsd/step.py",
        "return sum(prompts[i] + completions[i] for i in group)",
        "return sum(completions[i] for i in group)",
        f"train_opsd {RUNS}",
    ),
    # Runs.
    Fault(
        "opsd_train/run/checkpoint.py",
        "for old in _paths(run)[:-keep_last]:",
        "for old in _paths(run)[: -keep_last - 1]:",
        "train_run train_failures",
    ),
    Fault(
        "opsd_train/run/checkpoint.py",
        'all((path / name).stat().st_size == n for name, n in state["bytes"].items())',
        'all((path / name).exists() for name, n in state["bytes"].items())',
        "train_run train_failures",
    ),
    Fault(
        "opsd_train/run/folder.py",
        'takewhile(lambda row: row["step"] <= up_to,',
        'takewhile(lambda row: row["step"] < up_to,',
        "train_run train_failures",
    ),
    # Evaluation and report.
    Fault(
        "opsd_train/grading/scores.py",
        "return 1 - math.comb(n - c, k) / math.comb(n, k)",
        "return 1 - (1 - c / n) ** k",
        "train_evaluation evaluate",
    ),
    Fault(
        "opsd_train/grading/scores.py",
        'return most.count(("right", "")) / len(most) if most else 0.0',
        'return float(most[0] == ("right", "")) if most else 0.0',
        "train_evaluation evaluate",
    ),
    Fault(
        "opsd_train/report/__init__.py",
        '.replace("<", "\\\\u003c")',
        '.replace("</script", "\\\\u003c/script")',
        "report",
    ),
    Fault(
        "opsd_train/report/__init__.py",
        "steps = [steps[i * last // (STEPS_SHOWN - 1)] for i in range(STEPS_SHOWN)]",
        "steps = steps[:STEPS_SHOWN]",
        "report",
    ),
    # Benchmarks.
    Fault(
        "benchmarks/lib/allocations.py",
        "self.peak = max(self.peak, sum(size for _, size in self._alive))",
        "self.peak = sum(size for _, size in self._alive)",
        "benchmarks regression memory",
    ),
    Fault(
        "benchmarks/lib/report.py",
        "return [row for row in rows if results[row.method] == most > 0]",
        "return [row for row in rows if results[row.method] > 0]",
        "benchmarks",
    ),
    Fault(
        "benchmarks/token_efficiency/verdicts.py",
        "half = STUDENT[n - 1] * stdev(values) / math.sqrt(n)",
        "half = STUDENT[n] * stdev(values) / math.sqrt(n)",
        "token_efficiency",
    ),
    Fault(
        "benchmarks/history/record.py",
        "    if len(found) != 1:",
        "    if not found:",
        "history",
    ),
    Fault(
        "benchmarks/history/record.py",
        'return float(ran - skipped), float(suite.attrib["time"])',
        'return float(ran), float(suite.attrib["time"])',
        "history",
    ),
    Fault(
        "benchmarks/gpu/sass.py",
        "k_loops = [a for a in with_matrix if not any(b < a for b in with_matrix)]",
        "k_loops = with_matrix",
        "sass resources",
    ),
]

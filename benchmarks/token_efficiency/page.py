"""docs/token_efficiency.md, and what other pages say of it, out of what was recorded."""

import math
from collections.abc import Sequence
from statistics import fmean

from benchmarks.lib.report import table
from benchmarks.token_efficiency.memory import OWN, SEPARATE, Row
from benchmarks.token_efficiency.methods import GROUP
from benchmarks.token_efficiency.multiplication import LEVELS, MISCONCEPTION, SLIP, WRONG_PAIRS
from benchmarks.token_efficiency.plan import (
    BASELINES,
    LENGTHS,
    SELF_DISTILLATION,
    Result,
    best_rates,
)
from benchmarks.token_efficiency.results import Results, finals
from benchmarks.token_efficiency.rollouts import auc, bootstrap
from benchmarks.token_efficiency.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    Interval,
    accuracy_after,
    difference,
    interval,
    mean_accuracy,
    pass_at_ks,
    tokens_to,
)
from benchmarks.token_efficiency.warm_start import CHARACTERS, SPECIAL_TOKENS
from benchmarks.token_efficiency.words import (
    claim,
    claims,
    judged,
    listed,
    mib,
    of_levels,
    parameters,
    picture,
    points,
    reflowed,
    share,
    spread,
    thousands,
    wrapped,
)

ON_THE_WAY = (0.4, 0.5, 0.6, 0.7)


def page(results: Results) -> str:
    """All of it."""
    body = [
        main(results),
        length(results),
        size(results),
        temperature(results),
        mistakes(results),
        memory(results),
        method(results),
    ]
    parts = [introduction(results), in_short(results, " ".join(body)), the_world(results), *body]
    return reflowed("\n\n".join(filter(None, parts))) + "\n"


def introduction(results: Results) -> str:
    facts = results.setting
    minutes = facts["processor_s"] / 60
    return f"""# The paper's claims in miniature

<!-- Made by `python benchmarks/pages/readme.py` out of benchmarks/results/token_efficiency; not
to be edited. -->

Does on-policy self-distillation (OPSD) learn more from fewer generated tokens? This page compares
it with SFT, with GRPO and with distillation from a larger teacher, in a world that is small enough
for two cores. To repeat it, run `python benchmarks/token_efficiency/run.py --output
benchmarks/results/token_efficiency`: {minutes:.0f} minutes of one processor, about
{minutes / 2:.0f} on two cores. `--quick` takes three minutes. A run that was stopped goes on.
({facts["setting"]}; each worker has one thread; {results.source}.)"""


def in_short(results: Results, body: str) -> str:
    """The main figures, and how many claims of the page's `body` have which verdict."""
    of = {name: results.of(name) for name in results.methods}
    if not {SELF_DISTILLATION, "GRPO"} <= of.keys():
        return ""
    ratio = times_fewer(of[SELF_DISTILLATION], of["GRPO"])
    fewer = (
        "In some seed OPSD did not get there"
        if ratio is None
        else f"OPSD got there with {shown_ratio(ratio)} fewer tokens"
    )
    begin = results.beginning(results.plan["size"])["curve"][0]["accuracy"]
    tokens = {n: fmean(r["curve"][-1]["tokens"] for r in of[n]) / 1000 for n in of}
    ends = {name: f"{fmean(finals(cells)):.0%}" for name, cells in of.items()}
    verdicts = {v: body.count(f"**{v}**") for v in (HOLDS, FAILS, OPEN)}
    return (
        f"**In short.** OPSD ({SELF_DISTILLATION}) took held-out accuracy from {begin:.0%} to "
        f"{ends[SELF_DISTILLATION]} with {tokens[SELF_DISTILLATION]:.0f}k generated tokens. GRPO "
        f"reached {ends['GRPO']} with {tokens['GRPO']:.0f}k. {fewer}. Of "
        f"{sum(verdicts.values())} claims on this page {verdicts[HOLDS]} hold here, "
        f"{verdicts[FAILS]} do not, and {verdicts[OPEN]} cannot be told from the noise."
    )


def the_world(results: Results) -> str:
    plan, begin = results.plan, results.beginning(results.plan["size"])
    by_level = of_levels(begin["curve"][0]["solved"], begin["cell"]["samples"])
    start = begin["curve"][0]["accuracy"]
    return f"""## The world

```
problem     d3c8b4a7*6
solution    a7*6+0=42b4*6+4=28c8*6+2=50d3*6+5=23    the answer: 23082
reference   a42b28c50d23
```

A problem is a number of {", ".join(map(str, LEVELS[:-1]))} or {LEVELS[-1]} digits times one digit.
A solution works it out digit by digit, in {9 * LEVELS[0] + 1} to {9 * LEVELS[-1] + 1} tokens. The
reference solution has the values alone. The teacher sees it, and SFT trains on it.

The models are transformers' Qwen3 with two layers. In a warm start, before any method is run, they
are taught to multiply, with faults: {len(WRONG_PAIRS)} pairs of the times table have a wrong value
and a carry is lost at a zero, in {MISCONCEPTION:.0%} of the cases, and any step slips in
{SLIP:.0%}. With a reference in view they are taught to make no mistake. So a model that is alone
makes mistakes which greedy decoding does not remove. Before training the {plan["size"]} model
({parameters(results)} parameters)
solves {start:.0%} of the held-out problems when it samples,
{begin["greedy"]:.0%} when it decodes greedily, and
{begin["teacher"]:.0%} with the reference in view. Sampled, by digits:
{", ".join(f"{level}: {a:.0%}" for level, a in zip(LEVELS, by_level, strict=True))}.
No pair of numbers is in two of these: the warm start, training, the search of learning rates,
the held-out problems.

**What this can show:** how objectives compare. All else is the same code; the student is often
wrong, the teacher far less often, and the truth is known token by token.

**What it cannot show:** that real models behave alike. These have one skill, a vocabulary of
{len(SPECIAL_TOKENS) + len(CHARACTERS)} tokens,
and rollouts of about a hundred tokens. Their faults were put there. Their teacher was trained to
use a reference; a language model may or may not do so by itself. The larger teacher was taught the
truth. Look at orderings more than at sizes.

## The rule

Each method has {len(plan["seeds"])} seeds, which decide the adapter, the order of problems and all
draws. All start from the same model. Methods that are compared have the same seeds and
the same {plan["problems"]} held-out problems. A comparison gives the mean of the differences, one
for each seed, and Student's 95% interval. An ordering *holds here* if the interval is above 0,
*does not hold here* if it is below, and otherwise *cannot be told from the noise*.

"A over B" is A's accuracy less B's. Tables, figures and equations in brackets are the paper's; "no
claim" marks a comparison that the paper does not make."""


def main(results: Results) -> str:
    if not results.methods:
        return ""
    grpo = results.of("GRPO")
    target = fmean(finals(grpo))
    head = [
        "method",
        "learning rate",
        "after the last step",
        f"mean over {results.plan['steps']} steps",
        *(f"tokens to {a:.0%}" for a in ON_THE_WAY),
        "tokens, against GRPO's",
    ]
    lines = []
    for name in results.methods:
        cells = results.of(name)
        ratio = times_fewer(cells, grpo) if name not in BASELINES else None
        lines.append(
            [
                f"{name} ({cells[0]['cell']['steps']} steps)",
                f"{cells[0]['cell']['rate']:g}",
                spread(finals(cells)),
                f"{fmean(mean_accuracy(first_steps(r, results)) for r in cells):.0%}",
                *(thousands(cells, a) for a in ON_THE_WAY),
                "–" if ratio is None else shown_ratio(ratio),
            ]
        )
    return f"""## Accuracy over generated tokens

{picture("main", "Held-out accuracy over generated tokens and over steps, by method")}

{picture("methods", "Held-out accuracy after the last step, by method")}

{table(head, lines)}

The accuracy on the way is of one sample a problem at T = 1; after the last step it is of
{results.plan["samples"]} samples, with the lowest and highest seed in brackets. The mean is over
the first {results.plan["steps"]} steps, which all methods have. Tokens are thousands that were
generated to train, the mean of the seeds; a dash means that some seed never got there. The last
column says how many times fewer tokens than GRPO a method needed to reach GRPO's last accuracy
({target:.0%} on average), with its interval over seeds. The teacher's passes over these tokens are
not generated and not counted, and neither are SFT's solutions. Intervals are not corrected for
their number.

SFT on the references fails because of this world: the references leave out steps which a model of
two layers has to write down. Of real data it says only that a reference is not what the model would
write. The second SFT does not have that handicap, and generates no tokens. The clipped loss falls
behind; our guess is that misconceptions are the entries that it clips, and such an entry gets no
gradient but through the softmax.

{claims(main_claims(results))}"""


def main_claims(results: Results) -> list[str]:
    """The paper's orderings among methods."""
    of = {name: results.of(name) for name in results.methods}
    ours, made = of[SELF_DISTILLATION], []
    if "GRPO" in of:
        made.append(ratio_claim(times_fewer(ours, of["GRPO"])))
        made.append(
            claim(
                f"{SELF_DISTILLATION} over GRPO after as many tokens, accuracy (Table 2)",
                difference(finals(ours), at_step(of["GRPO"], results.plan["steps"])),
            )
        )
        made.append(
            claim(
                f"{SELF_DISTILLATION} over GRPO, which went on for "
                f"{of['GRPO'][0]['cell']['steps'] / results.plan['steps']:g} times as long",
                difference(finals(ours), finals(of["GRPO"])),
            )
        )
    for name, where in (("SFT", "Table 2"), ("SFT, own words", "no claim")):
        if name in of:
            steps = results.plan["steps"]
            made.append(
                claim(
                    f"{SELF_DISTILLATION} over {name}, after as many steps ({where})",
                    difference(finals(ours), at_step(of[name], steps)),
                )
            )
    pairs = [
        ("GRPO", "SFT", "Table 2"),
        (SELF_DISTILLATION, "sampled token", "Table 3"),
        ("forward KL", "sampled token", "Table 3, with another divergence"),
        ("reverse KL", "sampled token", "Table 3, with another divergence"),
        (SELF_DISTILLATION, "reverse KL", "no claim"),
        (SELF_DISTILLATION, "forward KL", "no claim"),
        ("forward KL, clipped", "forward KL", "the authors' later scripts clip"),
        (SELF_DISTILLATION, "larger teacher", "no claim"),
    ]
    made += [
        claim(
            f"{a} over {b}, after the last step ({where})", difference(finals(of[a]), finals(of[b]))
        )
        for a, b, where in pairs
        if a in of and b in of
    ]
    return made


def at_step(cells: Sequence[Result], step: int) -> list[float]:
    return [p["accuracy"] for result in cells for p in result["curve"] if p["step"] == step]


def first_steps(result: Result, results: Results) -> list[dict[str, float]]:
    return [p for p in result["curve"] if p["step"] <= results.plan["steps"]]


def times_fewer(cells: Sequence[Result], grpo: Sequence[Result]) -> Interval | None:
    """How many times fewer tokens to reach GRPO's last accuracy, seed by seed, as logarithms; None
    where a seed never reaches it, or GRPO has gained nothing."""
    logs = []
    for ours, theirs in zip(cells, grpo, strict=True):
        target = theirs["curve"][-1]["accuracy"]
        needed, spent = tokens_to(ours["curve"], target), tokens_to(theirs["curve"], target)
        if math.isinf(needed) or not needed or not spent:
            return None
        logs.append(math.log(spent / needed))
    return interval(logs)


def shown_ratio(ratio: Interval | None) -> str:
    if ratio is None:
        return "–"
    mean, low, high = (math.exp(x) for x in (ratio.mean, ratio.low, ratio.high))
    return f"{mean:.1f} times ({low:.1f} to {high:.1f})"


def ratio_claim(ratio: Interval | None) -> str:
    what = f"{SELF_DISTILLATION} needs fewer tokens than GRPO (Fig. 3: 4 to 8 times)"
    if ratio is None:
        return f"{what}: in a seed GRPO's last accuracy is never reached, or no gain: **{OPEN}**."
    low, high = math.exp(ratio.low), math.exp(ratio.high)
    reach = (
        "the paper's factor is above the interval"
        if high < 4
        else "the paper's factor is below the interval"
        if low > 8
        else "the interval and the paper's factor overlap"
    )
    return f"{what}: {shown_ratio(ratio)}: **{ratio.verdict}**; {reach}."


def length(results: Results) -> str:
    if not all(results.of(longest=n) for n in LENGTHS):
        return ""
    of = {n: results.of(longest=n) for n in LENGTHS}
    ks = {
        n: [pass_at_ks(r["curve"][-1]["solved"], r["cell"]["samples"]) for r in of[n]] for n in of
    }
    most = max(ks[LENGTHS[0]][0])
    head = ["rollouts of at most", "generated tokens", *(f"pass@{k}" for k in ks[LENGTHS[0]][0])]
    lines = [
        [
            f"{n} tokens",
            f"{fmean(r['curve'][-1]['tokens'] for r in of[n]) / 1000:.0f}k",
            *(spread([by_k[k] for by_k in ks[n]]) for k in ks[n][0]),
        ]
        for n in LENGTHS
    ]
    short, middle, long = LENGTHS
    at = {n: [by_k[most] for by_k in ks[n]] for n in LENGTHS}
    shortest = min(r["curve"][-1]["tokens"] for r in of[short])
    return f"""## Length of rollouts

{picture("length", "pass@k by the length of rollouts in training")}

{table(head, lines)}

After {results.plan["steps"]} steps of {SELF_DISTILLATION}. Held-out problems are always solved at
full length.

{
        claims(
            [
                claim(
                    f"{long} over {short} tokens, pass@{most} (Fig. 4)",
                    difference(at[long], at[short]),
                ),
                claim(
                    f"{long} over {middle} tokens, pass@{most} (Fig. 4)",
                    difference(at[long], at[middle]),
                ),
                claim(
                    f"{long} over {short} tokens, after as many generated tokens",
                    difference(
                        [accuracy_after(r["curve"], shortest) for r in of[long]],
                        [accuracy_after(r["curve"], shortest) for r in of[short]],
                    ),
                ),
                claim(
                    f"{long} over {short} tokens, pass@1",
                    difference(finals(of[long]), finals(of[short])),
                ),
            ]
        )
    }"""


def size(results: Results) -> str:
    sizes = [s for s in results.plan["sizes"] if results.of(size=s)]
    if len(sizes) < 2:
        return ""
    known = {m["size"]: m["parameters"] for m in results.setting["models"]}
    begin = {s: results.beginning(s) for s in sizes}
    gains = {
        s: [a - begin[s]["curve"][0]["accuracy"] for a in finals(results.of(size=s))] for s in sizes
    }
    head = ["size", "parameters", "learning rate", "before", "teacher", "after", "gain"]
    lines = [
        [
            s,
            f"{known[s]:,}",
            f"{results.of(size=s)[0]['cell']['rate']:g}",
            f"{begin[s]['curve'][0]['accuracy']:.0%}",
            f"{begin[s]['teacher']:.0%}",
            spread(finals(results.of(size=s))),
            points(interval(gains[s])),
        ]
        for s in sizes
    ]
    small, large = sizes[0], sizes[-1]
    return f"""## Size of the model

{picture("size", "Accuracy before and after self-distillation, by size")}

{table(head, lines)}

{
        SELF_DISTILLATION
    }, with a learning rate searched for each size. There is one warm start for each size, so the
intervals do not hold what differs between warm starts.

{
        claims(
            [
                claim(
                    f"the {large} model gains more than the {small} one (it needs capacity)",
                    difference(gains[large], gains[small]),
                ),
                claim(f"the {small} model gains at all", interval(gains[small])),
            ]
        )
    }"""


def temperature(results: Results) -> str:
    temperatures = [T for T in results.plan["temperatures"] if results.of(temperature=T)]
    if len(temperatures) < 2:
        return ""
    of = {T: results.of(temperature=T) for T in temperatures}
    head = ["temperature of the loss", "after the last step", "mean over the run"]
    means = {T: [mean_accuracy(r["curve"]) for r in of[T]] for T in temperatures}
    lines = [[f"{T:g}", spread(finals(of[T])), spread(means[T])] for T in temperatures]
    return f"""## Temperature of the loss

{picture("temperature", "Accuracy over steps by the loss's temperature")}

{table(head, lines)}

{
        SELF_DISTILLATION
    } at the learning rate that was found for T = 1. Rollouts are sampled at T = 1. (In
a run of the harness one `temperature` is that of the loss and of sampling.)

{
        claims(
            [
                claim(
                    f"T = {T:g} over 1, after the last step",
                    difference(finals(of[T]), finals(of[1.0])),
                )
                for T in temperatures
                if T != 1.0
            ]
        )
    }"""


def mistakes(results: Results) -> str:
    found = results.mistakes
    if not found:
        return ""
    could = [r for r in found if r.before_that_could_err]
    if not could:
        return ""

    def mean_auc(others: str) -> tuple[float, float, float]:
        return bootstrap([auc(r.divergence[r.first_mistake], getattr(r, others)) for r in could])

    peaks = bootstrap([float(r.peak_is_first_mistake) for r in found])
    chance = fmean(1 / len(r.divergence) for r in found)
    so_far = bootstrap([float(r.first_mistake_is_largest_so_far) for r in could])
    chance_so_far = fmean(1 / (len(r.before_that_could_err) + 1) for r in could)
    before, harder = mean_auc("before"), mean_auc("before_that_could_err")
    verdicts = [
        f"The largest divergence of a wrong rollout is at its first mistake: {share(peaks)} "
        f"of {len(found)}, by chance {chance:.1%}: **{judged(peaks, chance)}**. (Most rollouts "
        "have several mistakes, and the tokens after a mistake diverge as well.)",
        f"The first mistake's divergence is the largest so far: {share(so_far)} of {len(could)} "
        "rollouts that could have gone wrong before, by chance (a carry or value drawn at random) "
        f"{chance_so_far:.0%}: **{judged(so_far, chance_so_far)}**.",
        f"The first mistake's divergence is above that of a token before it: AUC {share(before)}, "
        f"by chance 50%: **{judged(before, 0.5)}**.",
        "The first mistake's divergence is above that of a carry or value before it, where a "
        f"mistake was possible and none was made: AUC {share(harder)}, by chance 50%: "
        f"**{judged(harder, 0.5)}**.",
    ]
    return f"""## Where the teacher disagrees

{picture("mistakes", "Divergence around the first mistake of wrong rollouts")}

The JSD between student and teacher at each token of wrong rollouts, which the student sampled
before any training. A mistake is a token that does not follow from the problem and the tokens
before it. Intervals are of a bootstrap over rollouts. The rule is the same, with chance in place of
0.

{claims(verdicts)}"""


def memory(results: Results) -> str:
    rows = [Row(**row) for row in results.rows("memory")]
    if not rows:
        return ""
    kinds = sorted(dict.fromkeys((r.model, r.tokens, r.how) for r in rows), reverse=True)
    lines, saved = [], []
    for model, tokens, how in kinds:
        own, other = (
            next(r for r in rows if (r.model, r.tokens, r.teacher) == (model, tokens, teacher))
            for teacher in (OWN, SEPARATE)
        )
        less = 1 - own.total / other.total
        lines.append(
            [
                f"{model}, {how}",
                f"{tokens:,}",
                *(mib(x) for x in (own.weights_mib, own.optimizer_mib, own.peak_mib)),
                mib(own.total),
                mib(other.total),
                f"{less:.0%}",
            ]
        )
        if how == "counted":
            saved.append(less)
    head = [
        "model",
        "tokens",
        "weights",
        "AdamW",
        "step",
        "in all",
        "separate teacher, in all",
        "less",
    ]
    within = sum(0.4 <= less <= 0.6 for less in saved)
    verdict = HOLDS if within == len(saved) else FAILS if within == 0 else "holds here in part"
    return f"""## Memory of a separate teacher

{table(head, lines)}

The teacher is the student with its adapter off, or another model of the same size. Of the small
world one step of the harness was measured: tensors alive at once as PyTorch's dispatcher sees them,
beside weights and AdamW's state. Of Qwen3 one rollout was counted as on a GPU by
[benchmarks/step.py](../benchmarks/step.py): LoRA of rank 64, bf16, checkpointed layers, the loss
without logits.

- Self-distillation takes 40 to 60% less (a survey's claim): {within} of {len(saved)} counted
  steps
  are within, from {min(saved):.0%} to {max(saved):.0%}: **{verdict}**. One copy of the
  weights is saved. That is a smaller part of the whole the longer the rollouts are, and nearly
  nothing in the small world, whose weights are small beside its activations."""


def method(results: Results) -> str:
    plan = results.plan
    rates = list(plan["rates"])
    searched = results.searched()
    best = best_rates(r for r in results.cells if r["cell"]["part"] == "validation")
    lines = [
        [
            f"{name}, {of_size}",
            *(
                f"**{found[r]:.0%}**" if r == best[name, of_size] else f"{found[r]:.0%}"
                for r in rates
            ),
        ]
        for (name, of_size), found in sorted(searched.items())
    ]
    edge = [f"{n}, {s}" for (n, s), rate in sorted(best.items()) if rate in (rates[0], rates[-1])]
    return f"""## What each method does

All methods train the same adapter (LoRA, rank 16, on every projection) with AdamW, a gradient norm
of at most 1, and a constant learning rate after four steps of warm-up. A step takes 32 rollouts, or
32 solutions. OPSD and on-policy distillation are the harness's own step
([opsd_train/opsd/step.py](../opsd_train/opsd/step.py)) with its options. Sampling, the held-out
problems and their evaluation are the same code for all. SFT and GRPO are in
[benchmarks/token_efficiency/methods.py](../benchmarks/token_efficiency/methods.py).

- **SFT**: cross-entropy on the reference solutions as they are.
- **SFT, own words**: cross-entropy on the same solutions as the model itself would write them, with
  every step. Nobody has these of real problems.
- **GRPO**: {GROUP} rollouts to each of four problems. The advantage of a rollout is its reward less
  the mean of its group, over the group's standard deviation. One on-policy update a batch, no KL
  term.
- **sampled token**: the paper's Eq. 8, a policy gradient with the teacher's log-ratio as advantage.
- **JSD 0.5**, **forward KL**, **forward KL, clipped** (entries at 0.05), **reverse KL**: over the
  whole vocabulary.
- **larger teacher**: JSD 0.5 towards a model of {parameters(results, "expert")} parameters that
  sees no reference{of_expert(results)}.

The same {len(rates)} learning rates were tried for each method, for {plan["search_steps"]} steps,
with a seed and problems that nothing else uses. The best is taken. The table has their accuracy
(two samples a problem, with a noise of three to four points). At an edge of the search, where
another rate may be better: {listed(edge)}.

{table(["", *(f"{rate:g}" for rate in rates)], lines)}"""


def of_expert(results: Results) -> str:
    """How well the larger teacher solves the problems by itself."""
    found = [r for r in results.cells if r["cell"]["size"] == "expert"]
    if not found:
        return ""
    return f" and solves {found[0]['curve'][0]['accuracy']:.1%} of the problems by itself"


def in_a_sentence(results: Results) -> str:
    """What the README says of it: ours, GRPO, and what it does not show."""
    of = {name: results.of(name) for name in (SELF_DISTILLATION, "GRPO")}
    begin = results.beginning(results.plan["size"])["curve"][0]["accuracy"]
    (ours, grpo), (spent, spent_by_grpo) = (
        [fmean(finals(cells)) for cells in of.values()],
        [fmean(r["curve"][-1]["tokens"] for r in cells) / 1000 for cells in of.values()],
    )
    return wrapped(
        f"In a toy world of long multiplication OPSD took held-out accuracy from {begin:.0%} to "
        f"{ours:.0%} with {spent:.0f}k generated tokens, GRPO to {grpo:.0%} with "
        f"{spent_by_grpo:.0f}k ({len(results.plan['seeds'])} seeds, {results.source}; "
        "[all methods](docs/token_efficiency.md))."
    )


def clip_in_a_sentence(results: Results) -> str:
    """How the divergences ended, and the clipped forward KL beside the unclipped one."""
    plain, clipped = (SELF_DISTILLATION, "reverse KL", "forward KL"), "forward KL, clipped"
    ends = {name: finals(results.of(name)) for name in (*plain, clipped)}
    listing = ", ".join(f"{fmean(ends[name]):.0%} with {name}" for name in plain)
    of = difference(ends[clipped], ends["forward KL"])
    low, high = sorted(abs(100 * x) for x in (of.low, of.high))
    return wrapped(
        f"In our toy world held-out accuracy ended at {listing}, and at "
        f"{fmean(ends[clipped]):.0%} with forward KL whose entries are clipped at 0.05. So the "
        f"clipped forward KL ended {100 * abs(of.mean):.0f} points "
        f"{'below' if of.mean < 0 else 'above'} the unclipped one (95% interval {low:.0f} to "
        f"{high:.0f}; {results.source})."
    )

"""How a loss is computed: the schedules, and all that they alone use.

choice.py         which schedule runs, and the operator that PyTorch's compiler sees
row_workspace.py  logits of some tokens at a time, in a bounded workspace
planning.py       how many rows of logits that workspace has
rows.py           rows of logits → ℓ and its gradient, in PyTorch
excluded.py       entries that rows are without, and the log-sum-exp of all others, in PyTorch
logit_free.py     logits in registers only
head_gradient.py  gradients of a head that is trained, in backward
top_k.py          the likeliest entries of each token, without a gradient
"""

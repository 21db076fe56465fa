"""On-policy self-distillation with `opsd_kernels`, from a problem to a trained adapter.

`python -m opsd_train` is __main__.py: command_line.py makes a `Config`, and run/ does the rest. One
step of Algorithm 1 is, top to bottom: run/loop.py, opsd/step.py, sampling/sampler.py, generate.py,
data/prompts.py, opsd/teachers.py and objective.py, models/head.py. Each folder is a room with one
door, its __init__.py, which says what lives there and what does not. What is listed below imports
only from what is above it.

errors.py        what any room may raise
files.py         files that are there whole, lines of JSON, config files
records.py       what is handed from one room to the next: Problem, Rollout, Scores
config.py        all options of a run
presets/         configs by name
data/            problems, and the two prompts of each
models/          models, adapters, LM heads, sharding
sampling/        rollouts, by one of several engines
opsd/            Algorithm 1: scores, teachers, objective, step
grading/         whether solutions are right, how many are, and whether that is more than before
evaluation.py    the former name of grading/
report/          a page that shows what runs did
run/             the life of a run: loop, checkpoints, folder, failures, console
demo.py          the demo's model and problems
command_line.py  from the command line to a config
evaluate.py      another command: what a run has learned, on benchmarks
export.py        another command: a run's adapter merged into a new model folder
from_gguf.py     another command: the model of a GGUF file as such a folder
"""

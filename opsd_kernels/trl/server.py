"""The losses of `ServerDistillationTrainer` and `AsyncDistillationTrainer`."""

_SERVER = "a teacher server gives some log-probabilities, not hidden states"
LOSSES: dict[str, dict[str, str | None]] = {
    "ServerDistillationTrainer": {"divergence": _SERVER},
    "AsyncDistillationTrainer": {"divergence": _SERVER},
}

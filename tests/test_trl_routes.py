"""No distillation trainer of TRL is passed by in silence: `explain` names it, and `routes` counts
whose losses were computed."""

import logging
from types import SimpleNamespace

import pytest
import trl
from trl_runs import TRAINERS, said

from opsd_kernels.trl import apply_opsd_kernels_to_trl, explain, losses, routes
from opsd_kernels.trl.route import took
from opsd_kernels.trl.trainers import HOOKS, LOSSES, trainers_of_trl

OFF = "apply_opsd_kernels_to_trl() is not in effect"


@pytest.fixture(autouse=True)
def counted_from_0():
    routes(clear=True)
    yield
    routes(clear=True)


def test_every_trainer_that_distils_is_known():
    found = dict(trainers_of_trl())
    assert found.keys() == LOSSES.keys() >= TRAINERS.keys()
    assert {hook.trainer: hook.module for hook in HOOKS}.items() <= found.items()


def test_explained_before_during_and_after():
    before = explain()
    assert {row.trainer for row in before} == set(LOSSES)
    assert {row.whose for row in before} == {"theirs"}
    with apply_opsd_kernels_to_trl():
        during = explain()
    assert explain() == before
    for off, on in zip(before, during, strict=True):
        assert on[:2] == off[:2]
        assert on[2:] == (("ours", "") if off.reason == OFF else ("theirs", off.reason))
        assert on.reason or off.reason == OFF
    assert {row.trainer for row in during if row.whose == "ours"} >= TRAINERS.keys()


def test_some_trainers_alone_are_ours():
    with apply_opsd_kernels_to_trl("GKDTrainer"):
        assert {row.trainer for row in explain() if row.whose == "ours"} == {"GKDTrainer"}


def test_half_of_what_is_replaced_is_not_ours(monkeypatch):
    with apply_opsd_kernels_to_trl("SDFTTrainer"):
        monkeypatch.setattr(TRAINERS["SDFTTrainer"][0], "_compute_rollout_logps", lambda *_: None)
        assert {row.whose for row in explain() if row.trainer == "SDFTTrainer"} == {"theirs"}
        monkeypatch.undo()


def test_a_table_is_read():
    lines = str(explain()).splitlines()
    assert lines[0].split() == ["trainer", "loss", "whose", "reason"]
    assert len(lines) == 1 + len(explain())
    starts = [line.index("theirs") for line in lines[1:]]
    assert set(starts) == {lines[0].index("whose")}
    assert str(routes()) == "(none)"


def test_a_trainer_of_another_trl_is_named_and_said_once(monkeypatch, caplog):
    """One that is new, and one that moved."""
    news = (("NewTrainer", "trl.experimental.new"), ("GKDTrainer", "trl.experimental.gkd2"))
    monkeypatch.setattr(losses, "trainers_of_trl", lambda: trainers_of_trl() + news)
    losses.say_what_stays_theirs.cache_clear()
    with caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        for _ in range(2):
            with apply_opsd_kernels_to_trl():
                rows = explain()[-2:]
    for row, (trainer, module) in zip(rows, news, strict=True):
        reason = f"opsd_kernels does not know {module}.{trainer}"
        assert row == (trainer, "any", "theirs", reason)
        assert f"{trainer} ({reason})" in caplog.text
    assert caplog.text.count("NewTrainer (") == 1
    losses.say_what_stays_theirs.cache_clear()


def test_trainers_are_found_in_the_sources(monkeypatch, tmp_path):
    package = tmp_path / "trl"
    (package / "new").mkdir(parents=True)
    (package / "new" / "__init__.py").write_text(
        "class OwnTrainer(\n    Base,\n):\n    def __init__(self): ...\n\n"
        "    def loss(self, teacher): ...\n\n\n"
        "class AliasTrainer(Base):\n    def __init__(self, teacher): ...\n\n\n"
        "class PlainTrainer(Base):\n    def loss(self): ...\n\n\n"
        "def a_teacher(): ...\n"
    )
    monkeypatch.setattr(trl, "__file__", str(package / "__init__.py"))
    assert trainers_of_trl.__wrapped__() == (("OwnTrainer", "trl.new"),)


def test_what_is_counted(caplog):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True))
    for given in (trainer, "GivenByNameTrainer"):
        for reason in (None, "why", "why", None):
            took(given, "some loss", reason)
    name = "SimpleNamespace"
    assert routes() == [
        (name, "some loss", "ours", "", 2),
        (name, "some loss", "theirs", "why", 2),
        ("GivenByNameTrainer", "some loss", "ours", "", 2),
        ("GivenByNameTrainer", "some loss", "theirs", "why", 2),
    ]
    assert [message.split()[0] for message in said(caplog)] == [name, "GivenByNameTrainer"]
    assert routes(clear=True)
    assert not routes()
    with pytest.raises(TypeError, match="clear must be a bool, got str"):
        routes(clear="no")

"""ChainerUI, chainer-jsonl-report and tensorboard-chainer, which watch a training."""

from __future__ import annotations

import json

import chainer_accum
import chainer
import numpy
import pytest
from chainer.optimizers import MomentumSGD
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from chainer_jsonl_report import JsonlReport
from chainerui.extensions import CommandsExtension
from chainerui.utils.command_item import CommandItem
from tb_chainer import SummaryWriter

from helpers import make_dataset, make_updater, serial


def make_trainer(updater_class, out, **kwargs):
    updater = make_updater(updater_class, serial(make_dataset(48), 16), MomentumSGD(0.1), **kwargs)
    return Trainer(updater, (2, "epoch"), out=str(out))


def accumulating(out):
    return make_trainer(chainer_accum.AccumulatingUpdater, out, micro_batch_size=4)


def test_jsonl_report_writes_the_means_of_the_large_batch(tmp_path):
    records = []
    for trainer in (make_trainer(StandardUpdater, tmp_path / "expected"), accumulating(tmp_path / "actual")):
        trainer.extend(JsonlReport())
        trainer.run()
        with open(f"{trainer.out}/log") as lines:
            records.append([json.loads(line) for line in lines])
    expected, actual = records
    assert [record["iteration"] for record in actual] == [record["iteration"] for record in expected] == [3, 6]
    for key in ("main/loss", "main/accuracy"):
        assert [record[key] for record in actual] == pytest.approx([record[key] for record in expected], rel=1e-5)


def test_commands_of_chainerui_reach_the_optimizer_and_the_snapshot(tmp_path):
    trainer = accumulating(tmp_path)
    trainer.extend(CommandsExtension())

    # Before the commands are read.
    @chainer.training.make_extension(priority=chainer.training.PRIORITY_WRITER)
    def command(trainer):
        if trainer.updater.iteration == 2:
            adjust = CommandItem(name="adjust_hyperparams")
            adjust.set_request(CommandItem.REQUEST_OPEN, {"optimizer": "MomentumSGD", "hyperparam": {"lr": 0.01}}, None)
            take = CommandItem(name="take_snapshot")
            take.set_request(CommandItem.REQUEST_OPEN, None, None)
            CommandItem.dump_commands([adjust, take], trainer.out)

    trainer.extend(command)
    trainer.run()
    assert trainer.updater.get_optimizer("main").lr == 0.01
    snapshot = numpy.load(tmp_path / "snapshot_iter_2")
    assert snapshot["updater/iteration"] == 2


def test_tensorboard_chainer_writes_scalars_histograms_and_the_graph(tmp_path):
    trainer = accumulating(tmp_path)
    writer = SummaryWriter(str(tmp_path / "events"))

    @trainer.extend
    def write(trainer):
        model = trainer.updater.get_optimizer("main").target
        loss = trainer.observation["main/loss"]
        writer.add_scalar("loss", float(chainer.as_array(loss)), trainer.updater.iteration)
        writer.add_all_parameter_histograms([model.loss], trainer.updater.iteration)
        if trainer.updater.iteration == 1:
            writer.add_graph([model.loss])

    trainer.run()
    writer.close()
    (events,) = (tmp_path / "events").iterdir()
    content = events.read_bytes()
    assert content.count(b"loss") >= trainer.updater.iteration and b"LinearFunction" in content

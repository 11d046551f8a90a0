"""Trains one character-level language model two ways, which should end in the same parameters.

(a) with the whole batch at once: many streams of text side by side, a few characters of each per update,
(b) with the streams in groups, one forward/backward pass each, and an optimizer that waits for all of them.

Training is truncated backpropagation through time, as in Chainer's example for the Penn Treebank. It has its own
updater, which AccumulatingUpdater cannot replace, so the optimizer is wrapped instead. The text is the documentation
that comes with Python. The program writes a table that compares the two, and a folder for each with its log.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.links as L
import numpy
from chainer.datasets import TupleDataset
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import largest_difference, make_parser, measure_peak_mib, positive, show_table

SEED = 0
TRAINING_SHARE = 0.95
N_UNITS = 128
N_REPORTS = 5  # lines of the log

State = Tuple[Optional[chainer.Variable], Optional[chainer.Variable]]


class CharacterLSTM(chainer.Chain):
    """A recurrent network that reads a character of each stream and scores the next one."""

    def __init__(self, n_characters: int) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(n_characters, N_UNITS)
            self.lstm = L.LSTM(N_UNITS, N_UNITS)
            self.scores = L.Linear(N_UNITS, n_characters)

    def forward(self, characters: Any) -> chainer.Variable:
        return self.scores(self.lstm(self.embed(characters)))

    @property
    def state(self) -> State:
        """The state after the characters read so far: cell and output of the LSTM, both ``None`` at the start."""
        return self.lstm.c, self.lstm.h

    @state.setter
    def state(self, state: State) -> None:
        cell, output = state
        if cell is None:
            self.lstm.reset_state()
        else:
            self.lstm.set_state(cell, output)


class BPTTUpdater(StandardUpdater):
    """Truncated backpropagation through time, for streams in groups.

    An update reads ``bprop_len`` steps of all streams. Each group has its own forward/backward pass, which starts from
    the state of its streams and ends with a call of ``optimizer.update()``. With one group, this is the updater of
    Chainer's example. With several, the optimizer must be an accumulating one.

    Args:
        iterator: Iterator whose batches are one step of all streams: pairs of a character and the one to predict.
        optimizer: Optimizer that has been set up with a classifier around a :class:`CharacterLSTM`.
        bprop_len (int): Number of steps between updates.
        n_groups (int): Number of groups. The number of streams must be a multiple of it.
        device (device specifier): Device to which the model and the data are sent.

    """

    def __init__(self, iterator: Any, optimizer: Any, bprop_len: int, n_groups: int, device: Any) -> None:
        super().__init__(iterator, optimizer, device=device)
        self._bprop_len = bprop_len
        self._group_size = iterator.batch_size // n_groups
        self._states: List[State] = [(None, None)] * n_groups

    def update_core(self) -> None:
        iterator, model = self.get_iterator("main"), self.get_optimizer("main").target
        steps = [iterator.next() for _ in range(self._bprop_len)]
        losses = []
        for group, state in enumerate(self._states):
            streams = slice(group * self._group_size, (group + 1) * self._group_size)
            model.predictor.state = state
            losses.append(self._update_with([step[streams] for step in steps]))
            self._states[group] = model.predictor.state
        # Replaces what the model reported, which is the loss of the last step alone.
        chainer.report({"loss": sum(losses) / len(losses) / self._bprop_len}, model)

    def _update_with(self, steps: Any) -> Any:
        """Runs one forward/backward pass and returns the loss, which is the sum over steps."""
        optimizer = self.get_optimizer("main")
        loss = 0
        for step in steps:
            loss += optimizer.target(*self.converter(step, self.input_device))
        optimizer.target.cleargrads()
        loss.backward()
        loss.unchain_backward()  # keeps the state, and drops the graph that led to it
        optimizer.update()
        return loss.array


# The two ways. They differ only in the line that wraps the optimizer and in the number of groups.


def full_batch(text: Text, args: argparse.Namespace) -> BPTTUpdater:
    """(a) All streams are one forward/backward pass and one update."""
    optimizer = chainer.optimizers.MomentumSGD(lr=args.lr)
    return make_updater(text, optimizer, 1, args)


def accumulated(text: Text, args: argparse.Namespace) -> BPTTUpdater:
    """(b) Each group of streams is one forward/backward pass; all groups are one update."""
    optimizer = chainer.optimizers.MomentumSGD(lr=args.lr)
    optimizer = chainer_accum.create_accumulating_optimizer(optimizer, args.groups)
    return make_updater(text, optimizer, args.groups, args)


class Text(NamedTuple):
    """The characters for training and for validation, as numbers."""

    n_characters: int  # number of different characters
    training: numpy.ndarray
    validation: numpy.ndarray


class Result(NamedTuple):
    """The outcome of one way of training."""

    title: str
    model: chainer.Chain
    log: List[Dict[str, float]]  # the log of LogReport
    seconds: float
    peak_mib: float


def main() -> None:
    args = parse_args()
    args.device.use()
    text = load_text()
    size = args.batch_size // args.groups
    results = [
        train_one_way(full_batch, f"(a) all {args.batch_size} at once", text, args),
        train_one_way(accumulated, f"(b) create_accumulating_optimizer, {args.groups} groups of {size}", text, args),
    ]
    show_table([make_row(result, results[0]) for result in results], args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser("Trains a language model with and without gradient accumulation and compares.")
    parser.add_argument("--updates", type=positive, default=50, help="number of updates")
    parser.add_argument("--batch-size", type=positive, default=128, help="streams per update (the effective batch)")
    parser.add_argument("--groups", type=positive, default=4, help="forward/backward passes per update in (b)")
    parser.add_argument("--bprop-len", type=positive, default=20, help="characters of each stream per update")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--grad-clip", type=float, default=5, help="largest norm of the gradient")
    args = parser.parse_args()
    if args.batch_size % args.groups:
        parser.error("--batch-size must be a multiple of --groups, for the groups to be of one size")
    return args


def load_text() -> Text:
    """Returns the documentation of Python: about half a million characters, depending on the version."""
    characters, text = numpy.unique(list("\n".join(topics[name] for name in sorted(topics))), return_inverse=True)
    training, validation = numpy.split(text.astype(numpy.int32), [int(TRAINING_SHARE * len(text))])
    return Text(len(characters), training, validation)


def make_iterator(text: numpy.ndarray, n_streams: int, repeat: bool = True) -> SerialIterator:
    """Returns an iterator that reads a text at ``n_streams`` places side by side, a character of each per batch."""
    length = (len(text) - 1) // n_streams
    inputs, targets = (
        text[start : start + n_streams * length].reshape(n_streams, length).T.ravel() for start in (0, 1)
    )
    return SerialIterator(TupleDataset(inputs, targets), n_streams, repeat=repeat, shuffle=False)


def make_updater(text: Text, optimizer: Any, n_groups: int, args: argparse.Namespace) -> BPTTUpdater:
    """Returns an updater with a new model, which always has the same initial parameters."""
    numpy.random.seed(SEED)
    optimizer.setup(L.Classifier(CharacterLSTM(text.n_characters)))
    optimizer.target.compute_accuracy = False
    optimizer.add_hook(
        chainer.optimizer_hooks.GradientClipping(args.grad_clip)
    )  # clips the gradient of the whole update
    return BPTTUpdater(make_iterator(text.training, args.batch_size), optimizer, args.bprop_len, n_groups, args.device)


def train_one_way(way: Callable[..., BPTTUpdater], title: str, text: Text, args: argparse.Namespace) -> Result:
    """Trains a new model with the updater that ``way`` makes."""
    print(title)
    updater = way(text, args)
    trainer = Trainer(updater, (args.updates, "iteration"), out=str(args.out / way.__name__))
    extend(trainer, text, args)
    trainer.run()
    print()
    peak_mib = measure_peak_mib(way(text, args).update, args.device)
    model = updater.get_optimizer("main").target
    return Result(title, model, trainer.get_extension("LogReport").log, trainer.elapsed_time, peak_mib)


def extend(trainer: Trainer, text: Text, args: argparse.Namespace) -> None:
    """Adds the usual extensions. None of them knows about accumulation."""
    reports = {args.updates * number // N_REPORTS for number in range(1, N_REPORTS + 1)}

    def is_due(trainer: Trainer) -> bool:
        return trainer.updater.iteration in reports

    model = trainer.updater.get_optimizer("main").target.copy()  # shares the parameters, but has its own state
    evaluator = extensions.Evaluator(
        make_iterator(text.validation, args.batch_size, repeat=False),
        model,
        device=args.device,
        eval_hook=lambda _: model.predictor.lstm.reset_state(),
    )
    trainer.extend(evaluator, trigger=is_due)
    trainer.extend(extensions.LogReport(trigger=is_due, postprocess=add_perplexities))
    columns = ["iteration", "epoch", "perplexity", "validation/perplexity", "elapsed_time"]
    trainer.extend(extensions.PrintReport(columns), trigger=is_due)
    if sys.stdout.isatty():
        trainer.extend(extensions.ProgressBar(update_interval=1))


def add_perplexities(entry: Dict[str, float]) -> None:
    """Adds the perplexities to an entry of the log."""
    for prefix in ("", "validation/"):
        entry[f"{prefix}perplexity"] = float(numpy.exp(entry[f"{prefix}main/loss"]))


def make_row(result: Result, reference: Result) -> Dict[str, str]:
    last = result.log[-1]
    return {
        "streams": result.title,
        "parameters differ from (a) by": f"{largest_difference(result.model, reference.model):.2g}",
        "perplexity": f"{last['perplexity']:.4f}",
        "validation perplexity": f"{last['validation/perplexity']:.4f}",
        "peak memory": f"{result.peak_mib:.1f} MiB",
        "time": f"{result.seconds:.1f} s",
    }


if __name__ == "__main__":
    main()

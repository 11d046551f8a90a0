"""Trains one tagger of variable-length sequences four ways, three of which should end in the same parameters.

(a) with StandardUpdater and the whole batch at once,
(b) with AccumulatingUpdater, which gathers as many batches of the iterator as make that batch,
(c) with AccumulatingUpdater, which splits that batch,
(d) as (b), but without weight_func, so with micro-batches weighted by sequences and not by tokens.

The sequences are lines of the standard library, cut into tokens; the tags are the kinds of token. Rare tokens are all
the same to the network, which has to tell a rare name from a rare string or number by what comes before. The loss is
the mean over all tokens of the batch, and some lines have many times the tokens of others. A table of what differs and
what does not goes to the folder given by --out; the log of each way to a folder of its own in it.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import inspect
import io
import keyword
import sys
import tokenize
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import chainer_accum  # before chainer, which it makes importable on current Python and NumPy
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
from chainer.iterators import SerialIterator, ShuffleOrderSampler
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater

SEED = 0
TRAINING_SHARE = 0.8
MODULES = ("argparse", "calendar", "configparser", "csv", "difflib", "heapq", "shlex", "string", "textwrap")
LAYOUT = (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)  # tokens without text of their own
N_WORDS = 200  # of which the first stands for all that are rare
N_UNITS = 64

Example = Tuple[numpy.ndarray, numpy.ndarray]  # words and tags of a line


# The four ways. All that differs is the updater and, in (b) and (d), the size of the iterator's batches.


def full_batch(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(a) Each batch of the iterator is one forward/backward pass and one update."""
    iterator = make_iterator(train, args.batch_size)
    return StandardUpdater(iterator, optimizer, converter=convert, device=args.device)


def gathered(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(b) Each batch of the iterator is one forward/backward pass; several are one update."""
    return chainer_accum.AccumulatingUpdater(
        make_iterator(train, args.micro_batch_size),
        optimizer,
        converter=convert,
        device=args.device,
        accumulation_steps=args.batch_size // args.micro_batch_size,
        weight_func=count_tokens,
    )


def split(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(c) Each batch of the iterator is several forward/backward passes and one update."""
    return chainer_accum.AccumulatingUpdater(
        make_iterator(train, args.batch_size),
        optimizer,
        converter=convert,
        device=args.device,
        micro_batch_size=args.micro_batch_size,
        weight_func=count_tokens,
    )


def gathered_by_sequences(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(d) As (b), but a token in a micro-batch of short lines counts for more than one among long lines."""
    return chainer_accum.AccumulatingUpdater(
        make_iterator(train, args.micro_batch_size),
        optimizer,
        converter=convert,
        device=args.device,
        accumulation_steps=args.batch_size // args.micro_batch_size,
    )


def count_tokens(examples: Sequence[Example]) -> int:
    """Returns what the loss of a micro-batch is divided by."""
    return sum(len(tags) for _, tags in examples)


@chainer.dataset.converter()
def convert(examples: Sequence[Example], device: Any) -> Tuple[List[Any], List[Any]]:
    """Returns the words and the tags of each line, as lists, since no two lines need have the same length."""
    return [device.send(words) for words, _ in examples], [device.send(tags) for _, tags in examples]


class Tagger(chainer.Chain):
    """A recurrent network that reads a line and tags each of its tokens as it goes."""

    def __init__(self, n_tags: int) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(N_WORDS, N_UNITS)
            self.lstm = L.NStepLSTM(1, N_UNITS, N_UNITS, dropout=0)
            self.scores = L.Linear(N_UNITS, n_tags)

    def forward(self, words: Sequence[Any], tags: Sequence[Any]) -> chainer.Variable:
        """Returns the mean over all tokens of all lines."""
        _, _, hidden = self.lstm(None, None, [self.embed(line) for line in words])
        scores, all_tags = self.scores(F.concat(hidden, axis=0)), F.concat(tags, axis=0)
        loss = F.softmax_cross_entropy(scores, all_tags)
        chainer.report({"loss": loss, "accuracy": F.accuracy(scores, all_tags)}, self)
        return loss


class Corpus(NamedTuple):
    """Lines with tags, in two parts."""

    n_tags: int  # different ones
    training: Sequence[Example]
    validation: Sequence[Example]


class Result(NamedTuple):
    """What one way of training led to."""

    title: str
    first: chainer.Chain  # the model after the first update
    model: chainer.Chain
    log: List[Dict[str, float]]  # of LogReport: one entry per epoch


def main() -> None:
    args = parse_args()
    args.device.use()
    corpus = load_corpus(args.lines)
    steps = args.batch_size // args.micro_batch_size
    results = [
        train_one_way(full_batch, f"(a) StandardUpdater, batches of {args.batch_size}", corpus, args),
        train_one_way(gathered, f"(b) AccumulatingUpdater, accumulation_steps={steps}", corpus, args),
        train_one_way(split, f"(c) AccumulatingUpdater, micro_batch_size={args.micro_batch_size}", corpus, args),
        train_one_way(gathered_by_sequences, "(d) as (b), without weight_func", corpus, args),
    ]
    table = make_table(results)
    print(table)
    (args.out / "table.md").write_text(table + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a tagger with and without gradient accumulation and compares.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epoch", type=int, default=2, help="number of epochs")
    parser.add_argument("--lines", type=int, default=1500, help="number of lines, of training and validation together")
    parser.add_argument("--batch-size", type=int, default=128, help="lines per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="lines per forward/backward pass")
    parser.add_argument("--lr", type=float, default=1, help="learning rate")
    parser.add_argument("--device", type=chainer.get_device, default="@numpy", help="device specifier, such as @cupy:0")
    parser.add_argument("--out", type=Path, default="result", help="folder for the results")
    args = parser.parse_args()
    if min(args.epoch, args.batch_size, args.micro_batch_size) < 1:
        parser.error("--epoch, --batch-size and --micro-batch-size must be 1 or more")
    if args.lines < 2:
        parser.error("--lines must be 2 or more, one to train with and one to validate with")
    if args.batch_size % args.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size, for (b) to gather whole batches")
    return args


def load_corpus(n_lines: int) -> Corpus:
    """Returns ``n_lines`` lines of the standard library. Which ones depends on the version of Python."""
    lines = [line for name in MODULES for line in read_lines(inspect.getsource(importlib.import_module(name)))]
    lines = [lines[i] for i in numpy.random.RandomState(SEED).permutation(len(lines))[:n_lines]]
    frequent = collections.Counter(word for line in lines for word, _ in line).most_common(N_WORDS - 1)
    numbers = {word: number for number, (word, _) in enumerate(frequent, start=1)}
    tags = sorted({tag for line in lines for _, tag in line})
    examples = [
        (
            numpy.array([numbers.get(word, 0) for word, _ in line], dtype=numpy.int32),
            numpy.array([tags.index(tag) for _, tag in line], dtype=numpy.int32),
        )
        for line in lines
    ]
    n_training = int(TRAINING_SHARE * len(examples))
    return Corpus(len(tags), examples[:n_training], examples[n_training:])


def read_lines(source: str) -> List[List[Tuple[str, str]]]:
    """Returns the tokens of each line that has any, each with its kind."""
    lines: List[List[Tuple[str, str]]] = [[]]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL):
            lines.append([])
        elif token.type not in LAYOUT:
            kind = "KEYWORD" if keyword.iskeyword(token.string) else tokenize.tok_name[token.type]
            lines[-1].append((token.string, kind))
    return [line for line in lines if line]


def make_iterator(train: Any, batch_size: int) -> SerialIterator:
    """Returns an iterator that gives the examples in the same order whatever the batch size."""
    order_sampler = ShuffleOrderSampler(numpy.random.RandomState(SEED))
    return SerialIterator(train, batch_size, order_sampler=order_sampler)


def make_optimizer(n_tags: int, lr: float) -> chainer.Optimizer:
    """Returns an optimizer with a new model, whose initial parameters are always the same."""
    numpy.random.seed(SEED)
    return chainer.optimizers.MomentumSGD(lr=lr).setup(Tagger(n_tags))


def train_one_way(way: Callable[..., StandardUpdater], title: str, corpus: Corpus, args: argparse.Namespace) -> Result:
    """Trains a new model with the updater that ``way`` makes, and another one for one update only."""
    print(title)
    first, last = (make_optimizer(corpus.n_tags, args.lr) for _ in range(2))
    way(corpus.training, first, args).update()
    trainer = Trainer(way(corpus.training, last, args), (args.epoch, "epoch"), out=str(args.out / way.__name__))
    extend(trainer, corpus.validation, args.device)
    trainer.run()
    print()
    return Result(title, first.target, last.target, trainer.get_extension("LogReport").log)


def extend(trainer: Trainer, validation: Any, device: Any) -> None:
    """Adds the usual extensions, which need to know nothing of accumulation."""
    model = trainer.updater.get_optimizer("main").target
    # One batch: Evaluator takes the mean over batches, in which one with few tokens would count as much as the others.
    iterator = SerialIterator(validation, len(validation), repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(iterator, model, converter=convert, device=device))
    trainer.extend(extensions.LogReport())
    columns = ["epoch", "iteration", "main/loss", "validation/main/loss", "validation/main/accuracy", "elapsed_time"]
    trainer.extend(extensions.PrintReport(columns))
    if sys.stdout.isatty():
        trainer.extend(extensions.ProgressBar(update_interval=1))


def largest_difference(model: chainer.Chain, reference: chainer.Chain) -> float:
    """Returns the largest absolute difference between two models' parameters."""
    cpu = chainer.get_device("@numpy")
    expected = {name: cpu.send(param.array) for name, param in reference.namedparams()}
    return max(float(abs(cpu.send(param.array) - expected[name]).max()) for name, param in model.namedparams())


def make_table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with one row per result."""
    rows = [
        [
            "updater",
            "differs from (a) after one update by",
            "after training by",
            "training loss per token",
            "validation loss per token",
            "validation accuracy",
        ]
    ]
    for result in results:
        last = result.log[-1]
        rows.append(
            [
                result.title,
                f"{largest_difference(result.first, results[0].first):.2g}",
                f"{largest_difference(result.model, results[0].model):.2g}",
                f"{last['main/loss']:.6f}",
                f"{last['validation/main/loss']:.6f}",
                f"{last['validation/main/accuracy']:.2%}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    lines = [
        [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()

"""Trains one tagger of variable-length sequences five ways, four of which should end in the same parameters.

(a) with StandardUpdater and the whole batch at once,
(b) with AccumulatingUpdater, which gathers smaller batches of the iterator until they make up that batch,
(c) with AccumulatingUpdater, which splits that batch,
(d) like (c), but sorted by length and with a limit on the tokens of a micro-batch,
(e) like (b), but without weight_func, so that micro-batches are weighted by sequences and not by tokens.

The sequences are lines of the standard library, cut into tokens; the tags are the kinds of token. The network sees all
rare tokens as the same word, and tells rare names, strings and numbers apart by what comes before. The loss is the mean
over all tokens of the batch, and some lines have many more tokens than others. The program writes a table that compares
the five, and a folder for each with its log.
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
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for what the examples share
from comparison import largest_difference, make_iterator, make_parser, positive, show_table

SEED = 0
TRAINING_SHARE = 0.8
MODULES = ("argparse", "calendar", "configparser", "csv", "difflib", "heapq", "shlex", "string", "textwrap")
LAYOUT = (tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)  # tokens without text
N_WORDS = 200  # size of the vocabulary; word 0 stands for all rare words
N_UNITS = 64

Example = Tuple[numpy.ndarray, numpy.ndarray]  # words and tags of a line


# The five ways. They differ only in the updater and, for (b) and (e), in the size of the iterator's batches.


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


def split_by_tokens(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(d) As many lines of similar length are one forward/backward pass as have so many tokens, padding included."""
    return chainer_accum.AccumulatingUpdater(
        make_iterator(train, args.batch_size),
        optimizer,
        converter=convert,
        device=args.device,
        micro_batch_size=chainer_accum.TokenBudget(args.max_tokens, lambda line: len(line[0])),
        weight_func=count_tokens,
    )


def gathered_by_sequences(train: Any, optimizer: Any, args: argparse.Namespace) -> StandardUpdater:
    """(e) Like (b), but a token in a micro-batch of short lines counts for more than one among long lines."""
    return chainer_accum.AccumulatingUpdater(
        make_iterator(train, args.micro_batch_size),
        optimizer,
        converter=convert,
        device=args.device,
        accumulation_steps=args.batch_size // args.micro_batch_size,
    )


def count_tokens(examples: Sequence[Example]) -> int:
    """Returns the number of tokens, by which the loss of a micro-batch is divided."""
    return sum(len(tags) for _, tags in examples)


@chainer.dataset.converter()
def convert(examples: Sequence[Example], device: Any) -> Tuple[List[Any], List[Any]]:
    """Returns a list of words and a list of tags, with one array per line, because lines differ in length."""
    return [device.send(words) for words, _ in examples], [device.send(tags) for _, tags in examples]


class Tagger(chainer.Chain):
    """A recurrent network that reads a line from left to right and tags each token."""

    def __init__(self, n_tags: int) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(N_WORDS, N_UNITS)
            self.lstm = L.NStepLSTM(1, N_UNITS, N_UNITS, dropout=0)
            self.scores = L.Linear(N_UNITS, n_tags)

    def forward(self, words: Sequence[Any], tags: Sequence[Any]) -> chainer.Variable:
        """Returns the mean loss over all tokens of all lines."""
        _, _, hidden = self.lstm(None, None, [self.embed(line) for line in words])
        scores, all_tags = self.scores(F.concat(hidden, axis=0)), F.concat(tags, axis=0)
        loss = F.softmax_cross_entropy(scores, all_tags)
        chainer.report({"loss": loss, "accuracy": F.accuracy(scores, all_tags)}, self)
        return loss


class Corpus(NamedTuple):
    """The tagged lines for training and for validation."""

    n_tags: int  # number of different tags
    training: Sequence[Example]
    validation: Sequence[Example]


class Result(NamedTuple):
    """The outcome of one way of training."""

    title: str
    first: chainer.Chain  # the model after the first update
    model: chainer.Chain
    log: List[Dict[str, float]]  # the log of LogReport, one entry per epoch


def main() -> None:
    args = parse_args()
    args.device.use()
    corpus = load_corpus(args.lines)
    steps = args.batch_size // args.micro_batch_size
    results = [
        train_one_way(full_batch, f"(a) StandardUpdater, batches of {args.batch_size}", corpus, args),
        train_one_way(gathered, f"(b) AccumulatingUpdater, accumulation_steps={steps}", corpus, args),
        train_one_way(split, f"(c) AccumulatingUpdater, micro_batch_size={args.micro_batch_size}", corpus, args),
        train_one_way(split_by_tokens, f"(d) AccumulatingUpdater, TokenBudget({args.max_tokens})", corpus, args),
        train_one_way(gathered_by_sequences, "(e) as (b), without weight_func", corpus, args),
    ]
    show_table([make_row(result, results[0]) for result in results], args.out)


def parse_args() -> argparse.Namespace:
    parser = make_parser("Trains a tagger with and without gradient accumulation and compares.")
    parser.add_argument("--epoch", type=positive, default=2, help="number of epochs")
    parser.add_argument("--lines", type=int, default=1500, help="number of lines, of training and validation together")
    parser.add_argument("--batch-size", type=positive, default=128, help="lines per update (the effective batch)")
    parser.add_argument("--micro-batch-size", type=positive, default=32, help="lines per forward/backward pass")
    parser.add_argument("--max-tokens", type=positive, default=256, help="tokens per forward/backward pass, for (d)")
    parser.add_argument("--lr", type=float, default=1, help="learning rate")
    args = parser.parse_args()
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


def make_optimizer(n_tags: int, lr: float) -> chainer.Optimizer:
    """Returns an optimizer with a new model, which always has the same initial parameters."""
    numpy.random.seed(SEED)
    return chainer.optimizers.MomentumSGD(lr=lr).setup(Tagger(n_tags))


def train_one_way(way: Callable[..., StandardUpdater], title: str, corpus: Corpus, args: argparse.Namespace) -> Result:
    """Trains a new model with the updater that ``way`` makes, and a second one for a single update."""
    print(title)
    first, last = (make_optimizer(corpus.n_tags, args.lr) for _ in range(2))
    way(corpus.training, first, args).update()
    trainer = Trainer(way(corpus.training, last, args), (args.epoch, "epoch"), out=str(args.out / way.__name__))
    extend(trainer, corpus.validation, args.device)
    trainer.run()
    print()
    return Result(title, first.target, last.target, trainer.get_extension("LogReport").log)


def extend(trainer: Trainer, validation: Any, device: Any) -> None:
    """Adds the usual extensions. None of them knows about accumulation."""
    model = trainer.updater.get_optimizer("main").target
    # A single batch: Evaluator averages over batches, and one with few tokens would count as much as the others.
    iterator = SerialIterator(validation, len(validation), repeat=False, shuffle=False)
    trainer.extend(extensions.Evaluator(iterator, model, converter=convert, device=device))
    trainer.extend(extensions.LogReport())
    columns = ["epoch", "iteration", "main/loss", "validation/main/loss", "validation/main/accuracy", "elapsed_time"]
    trainer.extend(extensions.PrintReport(columns))
    if sys.stdout.isatty():
        trainer.extend(extensions.ProgressBar(update_interval=1))


def make_row(result: Result, reference: Result) -> Dict[str, str]:
    last = result.log[-1]
    return {
        "updater": result.title,
        "differs from (a) after one update by": f"{largest_difference(result.first, reference.first):.2g}",
        "after training by": f"{largest_difference(result.model, reference.model):.2g}",
        "training loss per token": f"{last['main/loss']:.6f}",
        "validation loss per token": f"{last['validation/main/loss']:.6f}",
        "validation accuracy": f"{last['validation/main/accuracy']:.2%}",
    }


if __name__ == "__main__":
    main()

"""Chainer's example programs, and the change that makes each accumulate."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import made_data as data
import numpy


class Program(NamedTuple):
    """An example program.

    Attributes:
        name: What the table calls it.
        path: Its file, below ``examples``.
        arguments: Its command line, with ``{batch}`` for the size of a batch.
        make_data: Function that puts data where the program looks for them.
        change: Keyword arguments of :class:`~chainer_accum.AccumulatingUpdater`, which stands in for the program's
            updater. If empty, :func:`~chainer_accum.create_accumulating_optimizer` wraps each of its optimizers.
        plain: The same, without those that the loss requires. By default, it requires none.
        batch_size: Number of examples in a large batch.
        steps: Number of smaller batches that make up a large one. With an updater that splits batches, it is 1.
        updates: Number of updates.
        dtype: The float with which the program computes.
        absent: Modules that the program imports, and that it does not need here.
        drive: Function that stands in for the main function of the program, of which only a part can be compared. It
            is called with the program's namespace and the size of a batch.

    """

    name: str
    path: str
    arguments: str
    make_data: Callable[[data.Enter], None]
    change: str = "micro_batch_size=4"
    plain: Optional[str] = None
    batch_size: int = 11
    steps: int = 1
    updates: int = 3
    dtype: Any = numpy.float64
    absent: Tuple[str, ...] = ()
    drive: Optional[Callable[[Dict[str, Any], int], None]] = None


MNIST = functools.partial(data.labeled, name="get_mnist", n=48, shape=(784,))
CIFAR = functools.partial(data.labeled, name="get_cifar10", n=36, shape=(3, 32, 32))
NODES = "micro_batch_size=4, weight_func=lambda batch: sum(2 * len(tree['words']) - 1 for tree in batch)"
TOKENS = "micro_batch_size=4, weight_func=lambda batch: sum(len(caption) - 1 for _, caption in batch)"
WAVENET = "-b {batch} -i . --n_loop 1 --n_layer 2 --a_channels 16 --r_channels 8 --s_channels 16"


def word2vec(model: str, loss: str, option: str) -> Program:
    """Return the program with one of its models and losses, and one option in addition to those that all need."""
    return Program(
        f"word2vec, {model}, {loss}",
        "word2vec/train_word2vec.py",
        f"-b {{batch}} -u 8 -w 2 -m {model} -o {loss}",
        data.same_negatives,
        f"accumulation_steps=4, {option}, epoch_boundary='flush'",
        "accumulation_steps=4, weight_func=lambda batch: len(batch[0])",
        batch_size=20,
        steps=4,
        updates=6,
    )


def captioning(rnn: str) -> Program:
    """Return the program with one of its two recurrent networks."""
    return Program(
        f"image_captioning, {rnn}",
        "image_captioning/train.py",
        f"--batch-size {{batch}} --rnn {rnn}",
        data.captioned,
        TOKENS,
        "micro_batch_size=4",
        absent=("pycocotools", "pycocotools.coco"),
    )


def imagenet(arch: str) -> Program:
    """Return the program with one of its networks."""
    arguments = f"images images -B {{batch}} -a {arch}"
    return Program(
        f"imagenet, {arch}",
        "imagenet/train_imagenet.py",
        arguments,
        data.image_files,
        "micro_batch_size=2",
        batch_size=3,
        updates=2,
    )


def text_classification(encoder: str) -> Program:
    """Return the program with one of its encoders."""
    path = "text_classification/train_text_classifier.py"
    return Program(f"text_classification, {encoder}", path, f"-b {{batch}} -u 9 -model {encoder}", data.texts)


SUMS = "weight_func=lambda batch: len(batch[0]), loss_reduction='sum'"
PROGRAMS = [
    Program("mnist", "mnist/train_mnist.py", "-b {batch} -u 30", MNIST),
    Program("mnist, model parallel", "mnist/train_mnist_model_parallel.py", "-b {batch} -u 30 -d -1 -D -1", MNIST),
    Program(
        "mnist, custom loop",
        "mnist/train_mnist_custom_loop.py",
        "-b {batch} -u 30 -e 1",
        MNIST,
        "",
        batch_size=12,
        steps=3,
    ),
    Program("cifar", "cifar/train_cifar.py", "-b {batch}", CIFAR, batch_size=7),
    Program(
        "cifar, custom loop",
        "cifar/train_cifar_custom_loop.py",
        "-b {batch} -e 1",
        functools.partial(CIFAR, n=12),
        "",
        batch_size=6,
        steps=2,
    ),
    imagenet("nin"),
    imagenet("resnet50"),
    Program("glance", "glance/glance.py", "", data.mushrooms, "micro_batch_size=40", dtype=numpy.float32),
    Program(
        "optuna",
        "optuna/chainer_simple.py",
        "",
        functools.partial(MNIST, n=3000),
        "micro_batch_size=50",
        absent=("optuna", "optuna.integration"),
        drive=data.drive_optuna,
    ),
    Program("vae", "vae/train_vae.py", "-b {batch} --dim-h 30", MNIST),
    Program("memnn", "memnn/train_memnn.py", "stories stories -b {batch} -u 8", data.stories),
    Program("pos", "pos/postagging.py", "-b {batch}", data.tagged, absent=("nltk",)),
    Program("wavenet", "wavenet/train.py", WAVENET, data.recordings, absent=("librosa",)),
    text_classification("cnn"),
    text_classification("rnn"),
    text_classification("bow"),
    Program(
        "seq2seq",
        "seq2seq/seq2seq.py",
        "source target words words -b {batch} -u 8 -l 2",
        data.translations,
        absent=("progressbar", "nltk", "nltk.translate"),
    ),
    captioning("nsteplstm"),
    captioning("lstm"),
    Program(
        "sentiment",
        "sentiment/train_sentiment.py",
        "-b {batch} -u 8",
        data.trees,
        "micro_batch_size=4, loss_reduction='sum'",
        "micro_batch_size=4",
    ),
    Program(
        "sentiment, recursive_minibatch",
        "sentiment/train_recursive_minibatch.py",
        "-b {batch} -u 8",
        data.trees,
        NODES,
        "micro_batch_size=4",
    ),
    word2vec("skipgram", "hsm", SUMS),
    word2vec("skipgram", "ns", SUMS),
    word2vec("skipgram", "original", "weight_func=lambda batch: batch[1].size"),
    word2vec("cbow", "hsm", SUMS),
    word2vec("cbow", "ns", SUMS),
    word2vec("cbow", "original", "weight_func=lambda batch: batch[0].size"),
    Program("static graph, mnist", "static_graph_optimizations/mnist/train_mnist.py", "-b {batch} -u 30", MNIST),
    Program(
        "static graph, cifar",
        "static_graph_optimizations/cifar/train_cifar.py",
        "-b {batch} -d -1",
        CIFAR,
        batch_size=7,
    ),
    Program("ptb", "ptb/train_ptb.py", "-b {batch} -u 8 -l 3", data.ptb, "", batch_size=20, steps=4),
    Program(
        "ptb, custom loop",
        "ptb/train_ptb_custom_loop.py",
        "-b {batch} -u 8 -l 3 -e 1",
        data.ptb,
        "",
        batch_size=20,
        steps=4,
    ),
    Program(
        "static graph, ptb",
        "static_graph_optimizations/ptb/train_ptb_custom_loop.py",
        "-b {batch} -u 8 -l 3 -e 1 -d -1",
        data.ptb_for_static_graph,
        "",
        batch_size=20,
        steps=4,
    ),
    Program(
        "reinforcement_learning, dqn",
        "reinforcement_learning/dqn_cartpole.py",
        "",
        data.nothing,
        "",
        batch_size=16,
        steps=4,
        absent=("gym",),
        drive=data.drive_dqn,
    ),
    Program(
        "reinforcement_learning, ddpg",
        "reinforcement_learning/ddpg_pendulum.py",
        "",
        data.nothing,
        "",
        batch_size=16,
        steps=4,
        absent=("gym",),
        drive=data.drive_ddpg,
    ),
    Program("dcgan", "dcgan/train_dcgan.py", "-b {batch}", CIFAR, "", batch_size=6, steps=2, updates=2),
    Program(
        "pix2pix",
        "pix2pix/train_facade.py",
        "-b {batch}",
        data.facades,
        "",
        batch_size=2,
        steps=2,
        updates=2,
        dtype=numpy.float32,
    ),
]

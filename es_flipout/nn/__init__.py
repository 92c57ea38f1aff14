"""Layers with weight noise for gradient training: drop-in torch.nn layers with one weight sample per example.

    model = esf.nn.flipout(model, esf.nn.MultiplicativeGaussian(sigma=1.0))

or layer by layer: ``esf.nn.FlipoutLinear(784, 512, noise=esf.nn.AdditiveGaussian())``. ``model.eval()`` uses the mean
weights.
"""

from es_flipout.nn.conv import FlipoutConv1d, FlipoutConv2d, FlipoutConv3d
from es_flipout.nn.convert import flipout
from es_flipout.nn.layer import Estimator, NoisyLayer, ParameterSample, Sample, example_parameters, kl_divergence
from es_flipout.nn.linear import FlipoutLinear
from es_flipout.nn.noise import AdditiveGaussian, DropConnect, MultiplicativeGaussian, Noise
from es_flipout.nn.recurrent import FlipoutGRU, FlipoutLSTM, FlipoutRNN

__all__ = [
    "AdditiveGaussian",
    "DropConnect",
    "Estimator",
    "FlipoutConv1d",
    "FlipoutConv2d",
    "FlipoutConv3d",
    "FlipoutGRU",
    "FlipoutLSTM",
    "FlipoutLinear",
    "FlipoutRNN",
    "MultiplicativeGaussian",
    "Noise",
    "NoisyLayer",
    "ParameterSample",
    "Sample",
    "example_parameters",
    "flipout",
    "kl_divergence",
]

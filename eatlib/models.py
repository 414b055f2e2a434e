"""The paper's two networks at any width, and any torchvision classifier by name.

Inputs are normalised inside the network, as in the paper, so that it takes images as they are stored.
"""

import warnings
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Moments = tuple[float, ...]
"""A number for each channel, of pixels in [0, 1]."""

STEM_7X7_FROM = 64
"""Image side from which ResNet-18 starts with a 7x7 stride-2 convolution (the paper's CelebA network)."""


class ImageClassifier(nn.Module):
    """A classifier that normalises its input.

    Args:
        mean, std: per channel, for pixel values in [0, 1]; buffers, moved and saved with the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Moments, std: Moments) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images, uint8 in 0..255 or floating point in 0..1, to zero mean and unit variance."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016); every ReLU is a module of its own."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # None where the shortcut is the identity: an empty module would be charged for moving its input.
        self.shortcut = None
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.relu2(y)


class ResNet18(ImageClassifier):
    """ResNet-18 without the max-pool after the stem: 11.17 M parameters with 10 classes and width 1."""

    def __init__(self, classes: int, image_size: int, width: float, mean: Moments, std: Moments) -> None:
        super().__init__(mean, std)
        channels_in = _scaled(64, width)
        kernel, stride = (7, 2) if image_size >= STEM_7X7_FROM else (3, 1)
        self.conv1 = nn.Conv2d(len(mean), channels_in, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu = nn.ReLU(inplace=True)
        for stage in range(4):
            channels = _scaled(64 * 2**stage, width)
            first = BasicBlock(channels_in, channels, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, BasicBlock(channels, channels, stride=1)))
            channels_in = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels_in, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.normalize(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.flatten(self.avgpool(x)))


class VGG16(ImageClassifier):
    """VGG-16 with batch norm and one linear layer: 14.7 M parameters with 10 classes and width 1.

    2x2 max-pools bring the last map to one pixel: 5 at 32x32, a sixth at 64x64 (as the authors' code),
    four at 16x16.
    """

    def __init__(self, classes: int, image_size: int, width: float, mean: Moments, std: Moments) -> None:
        super().__init__(mean, std)
        self.features = nn.Sequential()
        channels_in = len(mean)
        pools = image_size.bit_length() - 1
        groups = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3), *[(512, 0)] * (pools - 5))
        for group, (channels, convolutions) in enumerate(groups, start=1):
            channels = _scaled(channels, width)
            for index in range(1, convolutions + 1):
                label = f"{group}_{index}"
                self.features.add_module(f"conv{label}", nn.Conv2d(channels_in, channels, 3, padding=1))
                self.features.add_module(f"bn{label}", nn.BatchNorm2d(channels))
                self.features.add_module(f"relu{label}", nn.ReLU(inplace=True))
                channels_in = channels
            if group <= pools:
                self.features.add_module(f"pool{group}", nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels_in, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.flatten(self.features(self.normalize(images))))


class TorchvisionClassifier(ImageClassifier):
    """A classifier of `torchvision.models`, with fresh weights and the input normalised in front."""

    def __init__(self, name: str, classes: int, mean: Moments, std: Moments) -> None:
        from torchvision.models import get_model  # a slow import that the paper's networks do without

        super().__init__(mean, std)
        options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        self.network = get_model(name, weights=None, num_classes=classes, **options)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images))


def build_model(
    name: str,
    *,
    classes: int,
    image_size: int = 32,
    width: float = 1.0,
    mean: Moments = (0.0, 0.0, 0.0),
    std: Moments = (1.0, 1.0, 1.0),
) -> ImageClassifier:
    """A network with freshly drawn weights, for (N, len(mean), image_size, image_size) images.

    Args:
        name: "resnet18" or "vgg16" (the paper's), or a classifier of `torchvision.models`.
        width: factor on the number of channels of every layer; only for the paper's networks.
        mean, std: of the training images, per channel, in [0, 1].

    Raises:
        ValueError: unknown name.
    """
    if name == "resnet18":
        return ResNet18(classes, image_size, width, mean, std)
    if name == "vgg16":
        return VGG16(classes, image_size, width, mean, std)
    return TorchvisionClassifier(name, classes, mean, std)


NO_ZEROS = (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.LeakyReLU, nn.PReLU)
NO_ZERO_FUNCTIONS = (F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.celu, F.selu, F.softplus, F.leaky_relu)
"""Activation functions that make no zeros, or few: what `with_relus` swaps."""


def with_relus(model: nn.Module) -> nn.Module:
    """Swap the model's activation functions that make no zeros, such as GELU, SiLU and Hardswish, for ReLU.

    Those of `NO_ZEROS`, modules of a library's own that have one's name (`QuickGELU`, `Swish`), and functions that a
    module keeps, as `nn.TransformerEncoderLayer(activation="gelu")` does. What a `forward` calls by itself, such as
    `F.gelu(x)`, stays: that takes a change of its code. Warns, as the network has to be fine-tuned.

    Returns:
        The same model.
    """
    swapped: Counter[str] = Counter()
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            kind = type(child).__name__
            named = any(part in kind.lower() for part in ("gelu", "silu", "swish", "mish"))
            if isinstance(child, NO_ZEROS) or (named and not [*child.children(), *child.parameters()]):
                parent._modules[name] = nn.ReLU(getattr(child, "inplace", False))
                swapped[kind] += 1
        for name, value in vars(parent).items():
            if any(value is function for function in NO_ZERO_FUNCTIONS):
                setattr(parent, name, F.relu)
                swapped[f"F.{value.__name__}"] += 1
        if isinstance(parent, nn.TransformerEncoderLayer) and parent.activation_relu_or_gelu == 2:
            parent.activation_relu_or_gelu = 1  # GELU was what its own kernel for evaluation applies
    what = ", ".join(f"{count} {kind}" for kind, count in swapped.items())
    then = f"{what} became ReLU: fine-tune; until then accuracy can be as low as chance"
    warnings.warn(
        then if what else "nothing to swap was found; calls such as F.gelu(x) are yours to change", stacklevel=2
    )
    return model


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have no children, by dotted path, in order of registration."""
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    }


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))

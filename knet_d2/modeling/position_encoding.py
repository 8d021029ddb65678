"""What tells identical objects at different places apart (paper, Sec. 3.3 and Tab. 4b)."""

import math

import torch

TEMPERATURE = 10000


def _normalised_positions(length: int, x: torch.Tensor) -> torch.Tensor:
    """Positions 1 .. length, scaled to (0, 2 pi]: [length]."""
    eps = 1e-6
    positions = torch.arange(1, length + 1, device=x.device, dtype=torch.float32)
    return positions / (length + eps) * (2 * math.pi)


def _sine_features(positions: torch.Tensor, num_features: int) -> torch.Tensor:
    """Interleaved sines and cosines of falling frequency: [length] -> [length, num_features]."""
    index = torch.arange(num_features, device=positions.device)
    exponent = 2 * index.div(2, rounding_mode="floor").to(positions.dtype) / num_features
    angles = positions[:, None] / TEMPERATURE**exponent
    return torch.where(index % 2 == 0, angles.sin(), angles.cos())


def sine_position_encoding(x: torch.Tensor) -> torch.Tensor:
    """Normalised sine encoding of a map's own size, computed in float32 for every type of map.

    Args:
        x: [B, C, H, W], C even; only shape, type and device are used.

    Returns:
        [1, C, H, W]: the first C / 2 channels depend on y, the others on x.
    """
    _, channels, height, width = x.shape
    y_features = _sine_features(_normalised_positions(height, x), channels // 2).T[:, :, None]
    x_features = _sine_features(_normalised_positions(width, x), channels // 2).T[:, None, :]
    encoding = torch.cat([y_features.expand(-1, height, width), x_features.expand(-1, height, width)])
    return encoding[None].to(x.dtype)


def coordinate_channels(x: torch.Tensor) -> torch.Tensor:
    """Two channels (x, y) that run from -1 to 1 over the map: [B, C, H, W] -> [B, 2, H, W]."""
    batch, _, height, width = x.shape
    ys = _coordinates(height, x)[:, None].expand(height, width)
    xs = _coordinates(width, x)[None, :].expand(height, width)
    return torch.stack([xs, ys]).expand(batch, -1, -1, -1)


def _coordinates(length: int, x: torch.Tensor) -> torch.Tensor:
    """Evenly from -1 to 1: [length]. Not by torch.linspace, which an exported graph would fix to one length."""
    index = torch.arange(length, device=x.device, dtype=x.dtype)
    # "dim" is there for the export to ONNX
    return 2 * index / index.amax(dim=0).clamp(min=1) - 1

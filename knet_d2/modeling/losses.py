"""The terms of K-Net's loss, as pure functions of tensors (paper, Sec. 3.4).

All of them return a sum or mean that is 0, and still part of the graph, where there is nothing to compare.
"""

import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

# Keeps the dice coefficient of two empty masks defined; part of the official numbers
DICE_EPS = 1e-3
# Different things cost something only where their cosine is above this
COSINE_MARGIN = 0.1
# At most this number of pairs of different things for each pair of the same thing
NEGATIVES_PER_POSITIVE = 3


def focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, *, alpha: float, gamma: float
) -> torch.Tensor:
    """Weighted sum of the sigmoid focal loss; all arguments broadcast to one shape."""
    return (sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma) * weights).sum()


def quality_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, *, alpha: float, gamma: float
) -> torch.Tensor:
    """Weighted sum of the focal loss for targets from 0 to 1 (GFL, arXiv:2006.04388, Eq. 5), with a focal alpha.

    All arguments broadcast to one shape. For targets of 0 and 1 it is :func:`focal_loss`.
    """
    focus = (targets - logits.sigmoid()).abs() ** gamma * torch.where(targets > 0, alpha, 1 - alpha)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (focus * entropy * weights).sum()


def mask_ious(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of masks with their targets, bool [P, h, w] each -> float [P]; 1 where the target has no pixel.

    An object that is too small for a pixel of its own is there all the same: its kernel must not learn that it is not.
    """
    masks, targets = masks.flatten(1), targets.flatten(1)
    ious = (masks & targets).sum(1) / (masks | targets).sum(1).clamp(min=1)
    return torch.where(targets.any(dim=1), ious, 1)


def dense_focal_loss(logits: torch.Tensor, labels: torch.Tensor, *, alpha: float, gamma: float) -> torch.Tensor:
    """Sum of the sigmoid focal loss against one class, or none, per pixel; no one-hot map is made.

    Args:
        logits: [B, K, h, w].
        labels: int64 [B, h, w], class of every pixel; K where all classes are negatives.
    """
    num_classes = logits.shape[1]
    index, labelled = labels.clamp(max=num_classes - 1).unsqueeze(1), (labels < num_classes).unsqueeze(1)
    own = logits.gather(1, index)
    own = torch.where(labelled, -own, own)
    # The loss of a negative logit x is (1 - alpha) f(x), that of a positive one alpha f(-x). So flip the sign of each
    # pixel's own class, sum f with weight 1 - alpha, and add the difference of the weights, 2 alpha - 1, for that class
    negatives = _focal_term(logits.scatter(1, index, own), gamma).sum()
    return (1 - alpha) * negatives + (2 * alpha - 1) * (_focal_term(own, gamma) * labelled).sum()


def _focal_term(logits: torch.Tensor, gamma: float) -> torch.Tensor:
    """-log(1 - p), weighted by p^gamma: the loss of a negative, and with -logits that of a positive."""
    return logits.sigmoid() ** gamma * -F.logsigmoid(-logits)


def center_focal_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of CenterNet's focal loss on a map of centres (arXiv:1904.07850, Eq. 1; exponents 2 and 4).

    Args:
        logits, targets: any one shape; targets are 1 at a centre and fall to 0 around it.
    """
    probs = logits.sigmoid()
    centers = (1 - probs).square() * -F.logsigmoid(logits)
    others = (1 - targets) ** 4 * probs.square() * -F.logsigmoid(-logits)
    return torch.where(targets == 1, centers, others).sum()


def mask_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy, mean over all pixels of all masks: both [P, h, w], soft targets allowed."""
    total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return total / max(logits.numel(), 1)


def dice_coefficient(intersection: torch.Tensor, area_a: torch.Tensor, area_b: torch.Tensor) -> torch.Tensor:
    """2 |a b| / (|a|^2 + |b|^2) from sums of products; areas are sums of squares."""
    return 2 * intersection / (area_a + DICE_EPS + area_b + DICE_EPS)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - dice, mean over the P masks: both [P, h, w]."""
    probs, targets = logits.sigmoid().flatten(1), targets.flatten(1)
    dice = dice_coefficient((probs * targets).sum(1), probs.square().sum(1), targets.square().sum(1))
    return (1 - dice).sum() / max(len(dice), 1)


def resized_to(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits at the targets' size, bilinear where that differs: [B, N, H, W] and [B, h, w] -> [B, N, h, w]."""
    if logits.shape[-2:] == targets.shape[-2:]:
        return logits
    return F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)


def kernel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, ignore_value: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross entropy over the kernels at every pixel: the rank loss, and the loss of semantic segmentation.

    Args:
        logits: [B, N, H, W]; resized bilinearly to the targets' size where that differs.
        targets: int64 [B, h, w], index of the kernel that owns the pixel, or ignore_value.
        ignore_value: such pixels cost 0, but count in the mean.
        weights: [N], factor on the cost of each kernel's pixels; None: 1.
    """
    logits = resized_to(logits, targets)
    total = F.cross_entropy(logits, targets, weights, ignore_index=ignore_value, reduction="sum")
    return total / max(targets.numel(), 1)


def lovasz_softmax_loss(logits: torch.Tensor, targets: torch.Tensor, ignore_value: int) -> torch.Tensor:
    """Lovász-Softmax loss (arXiv:1705.08790, Eq. 11): a surrogate of 1 - IoU, mean over the classes that are there.

    The pixels of all images are taken together. For probabilities of 0 and 1 it is 1 - IoU.

    Args:
        logits: [B, K, h, w].
        targets: int64 [B, h, w], class of every pixel, or ignore_value.
        ignore_value: such pixels cost nothing.
    """
    probs = logits.softmax(dim=1).movedim(1, 0).flatten(1)
    targets = targets.flatten()
    classes = torch.arange(len(probs), device=targets.device)
    labels = (targets == classes[:, None]).to(probs.dtype)
    # Without an error, ignored pixels come last, where they cost nothing and change nothing
    errors, order = ((labels - probs).abs() * (targets != ignore_value)).sort(dim=1, descending=True)
    labels = labels.gather(1, order)
    areas = labels.sum(dim=1, keepdim=True)
    unions = areas + (1 - labels).cumsum(dim=1)
    jaccard = 1 - (areas - labels.cumsum(dim=1)) / unions
    steps = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], dim=1)
    is_there = (areas > 0).to(probs.dtype)[:, 0]
    return ((errors * steps).sum(dim=1) * is_there).sum() / is_there.sum().clamp(min=1)


def contrastive_loss(
    key: torch.Tensor, reference: torch.Tensor, same: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-positive contrastive cross entropy on dot products (Video K-Net; QDTrack, arXiv:2006.06664, Eq. 5).

    Of a thing it is log(1 + sum over its negatives n and positives p of exp(n - p)).

    Args:
        key, reference: embeddings of the things of two frames, [P, E] and [R, E].
        same: bool [P, R], which of them are the same.

    Returns:
        Sum over the things of the key frame that are in both frames, and their number.
    """
    dots = key @ reference.T
    exponents = dots[:, :, None] - dots[:, None, :]
    exponents = exponents.masked_fill(same[:, :, None] | ~same[:, None, :], -torch.inf).flatten(1)
    costs = torch.cat([exponents.new_zeros(len(key), 1), exponents], dim=1).logsumexp(dim=1)
    found = same.any(dim=1)
    return (costs * found).sum(), found.sum()


def cosine_loss(key: torch.Tensor, reference: torch.Tensor, same: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distance of cosines to 1 (same thing) or 0 (another one, above COSINE_MARGIN), as in Video K-Net.

    Of the pairs of different things, the NEGATIVES_PER_POSITIVE most alike for each pair of the same thing count.

    Args:
        key, reference, same: see :func:`contrastive_loss`.

    Returns:
        Sum over the pairs that count, and their number; both 0 without a pair of the same thing.
    """
    cosines = F.normalize(key, dim=1) @ F.normalize(reference, dim=1).T
    positives = ((1 - cosines).square() * same).sum()
    negatives = (cosines - COSINE_MARGIN).clamp(min=0).square().masked_fill(same, -1).flatten()
    hardest = negatives.sort(descending=True).values
    number = same.sum()
    counts = (torch.arange(len(hardest), device=same.device) < NEGATIVES_PER_POSITIVE * number) & (hardest >= 0)
    return positives + (hardest * counts).sum(), number + counts.sum()

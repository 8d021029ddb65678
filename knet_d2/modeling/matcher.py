"""One-to-one matching of kernels and instances (paper, Sec. 3.4)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..errors import NonFiniteError
from .layers import send
from .losses import dice_coefficient
from .structures import Match

# By how much focal_cost differs between probabilities of 0.001 and 0.8, with the default alpha and gamma
FOCAL_RANGE = 2.5
# Of a kernel that is read at a place, as multiples of the range of the other costs, so that it prevails over them
CENTER_COST, OUTSIDE_COST = 2.0, 10.0


class Candidates(NamedTuple):
    """What one stage predicts for one image's matched kernels: the candidates for its instances.

    Attributes:
        mask_logits: [N, h, w], at the targets' resolution.
        class_logits: [N, T] for the T thing classes, or None where classes don't enter the cost.
        place_costs: [N, G], see :func:`place_cost`; or None.
        repeats: number of kernels that each instance is given.
        name: of the stage, for errors; "": its number.
    """

    mask_logits: torch.Tensor
    class_logits: torch.Tensor | None
    place_costs: torch.Tensor | None = None
    repeats: int = 1
    name: str = ""


def focal_cost(class_logits: torch.Tensor, classes: torch.Tensor, *, alpha: float, gamma: float) -> torch.Tensor:
    """What the focal loss would change if a kernel were given an instance's class: [N, T], [G] -> [N, G]."""
    eps = 1e-12
    probs = class_logits.sigmoid()
    positive = -(probs + eps).log() * alpha * (1 - probs) ** gamma
    negative = -(1 - probs + eps).log() * (1 - alpha) * probs**gamma
    return (positive - negative)[:, classes]


def mask_costs(probs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Negative pixel agreement ("mask") and negative dice ("dice"): [N, h, w], [G, h, w] -> [N, G] each."""
    probs, targets = probs.flatten(1), targets.flatten(1)
    intersection = probs @ targets.T
    num_pixels = probs.shape[1]
    # mean of p t + (1 - p)(1 - t), from sums that exist anyway
    agreement = 2 * intersection - probs.sum(1)[:, None] - targets.sum(1)[None, :] + num_pixels
    dice = dice_coefficient(intersection, probs.square().sum(1)[:, None], targets.square().sum(1)[None, :])
    return {"mask": -agreement / num_pixels, "dice": -dice}


def place_cost(probs: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Costs by which an instance takes a kernel inside of it, and of several rather the one with the surest centre.

    They are multiples of the range of the other costs, :attr:`HungarianMatcher.cost_range`: a place inside outweighs
    whatever the kernels predict, and so does a centre that is more probable by 1 / CENTER_COST.

    Args:
        probs: [N], probabilities that the kernels' places are centres.
        inside: bool [N, G], which place is in which instance.

    Returns:
        [N, G].
    """
    return torch.where(inside, -CENTER_COST * probs.nan_to_num()[:, None], OUTSIDE_COST)


class HungarianMatcher:
    """Minimise the sum of class, mask and dice costs over one-to-one assignments.

    To give each instance several kernels, it is repeated (hybrid matching, arXiv:2207.13080, Sec. 3.2).

    Attributes:
        cost_range: by how much the costs of an instance differ from kernel to kernel, at most about.
    """

    def __init__(
        self,
        *,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        focal_alpha: float,
        focal_gamma: float,
    ):
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.cost_range = FOCAL_RANGE * class_weight + mask_weight + dice_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    def cost_terms(self, prediction: Candidates, classes: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weighted cost terms of one image: name -> [N, G]."""
        terms = mask_costs(prediction.mask_logits.sigmoid(), masks)
        if prediction.class_logits is not None:
            terms["class"] = focal_cost(
                prediction.class_logits, classes, alpha=self.focal_alpha, gamma=self.focal_gamma
            )
        return {name: self.weights[name] * cost for name, cost in terms.items()}

    @torch.no_grad()
    def match(
        self, stages: Sequence[Sequence[Candidates]], classes: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
    ) -> list[list[Match]]:
        """Match all stages of all images, with one transfer to the CPU.

        Args:
            stages: per stage, per image: what is matched. Stage 0 are the static kernels.
            classes: per image: int64 [G].
            masks: per image: [G, h, w].

        Returns:
            per stage, per image: the matches, min(N, repeats x G) many.

        Raises:
            NonFiniteError: naming term, stage and image.
        """
        costs = [[self._costs(*arguments) for arguments in zip(images, classes, masks)] for images in stages]
        flat = torch.cat([cost.flatten() for images in costs for cost in images]).cpu()
        pairs = self._assign(flat, [(len(cost), cost.shape[1]) for images in costs for cost in images])
        if pairs is None:
            self._raise_non_finite(stages, classes, masks)
        counts = [len(x) for _ in stages for x in classes]
        pairs = [np.stack([kernels, repeated % max(count, 1)]) for (kernels, repeated), count in zip(pairs, counts)]
        # Back to the device in one piece as well
        moved = send(torch.from_numpy(np.concatenate(pairs, axis=1)), costs[0][0].device)
        matches = iter(moved.split([pair.shape[1] for pair in pairs], dim=1))
        return [[tuple(next(matches)) for _ in images] for images in costs]

    def _costs(self, prediction: Candidates, classes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Cost of each kernel for each repeated instance: [N, repeats G]."""
        costs = sum(self.cost_terms(prediction, classes, masks).values())
        if prediction.place_costs is not None:
            costs = costs + self.cost_range * prediction.place_costs
        return costs if prediction.repeats == 1 else costs.repeat(1, prediction.repeats)

    @staticmethod
    def _assign(costs: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray] | None:
        """Solve for each of the cost matrices [N, G] in a flat tensor on the CPU: int64 [2, min(N, G)] each.

        None where a cost is not finite.
        """
        if not costs.isfinite().all():
            return None
        pieces = costs.split([rows * columns for rows, columns in shapes])
        return [np.stack(linear_sum_assignment(x.numpy().reshape(shape))) for x, shape in zip(pieces, shapes)]

    def _raise_non_finite(self, stages, classes, masks) -> None:
        for s, images in enumerate(stages):
            for b, arguments in enumerate(zip(images, classes, masks)):
                for name, cost in self.cost_terms(*arguments).items():
                    if not cost.isfinite().all():
                        raise NonFiniteError(
                            f"The {name} cost of {arguments[0].name or f'stage {s}'} is not finite for image {b} of "
                            "the batch: the network's predictions are NaN or infinite. Lower SOLVER.BASE_LR, or check "
                            "that image."
                        )

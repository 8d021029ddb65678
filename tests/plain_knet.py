"""K-Net written down a second time, plainly and in the official parameters' names: explicit transforms and loops.

Nothing is shared with the implementation, which it is compared with in double precision, for any batch.
"""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


def bilinear(x, size):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def twice(x):
    return bilinear(x, [2 * side for side in x.shape[-2:]])


def paint(masks, background):
    """[(value, [h, w] mask)] in this order, each over the ones before where it is above 0."""
    labels = background
    for value, mask in masks:
        labels = torch.where(mask > 0, value, labels)
    return labels


def cross_entropy(logits, targets):
    return -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits))


def focal(logits, targets):
    alpha, missed = 0.75 - 0.5 * targets, (logits.sigmoid() - targets).abs()
    return alpha * missed**2 * cross_entropy(logits, targets)


def dice(p, t):
    return 2 * (p * t).sum() / ((p * p).sum() + 1e-3 + (t * t).sum() + 1e-3)


class PlainKNet:
    """The heads, from the FPN's levels (semantic: the decode head's feature) to losses and results."""

    def __init__(self, weights, num_things, num_stuff, num_stages, num_heads):
        """weights: official name -> tensor."""
        self.weights = weights
        self.num_things, self.num_stuff = num_things, num_stuff
        self.num_stages, self.num_heads = num_stages, num_heads

    # Layers

    def linear(self, x, name):
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def conv(self, x, name, stride=1):
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def conv_norm_relu(self, x, name, stride=1):
        x = self.conv(x, f"{name}.conv", stride)
        groups = x.reshape(len(x), 32, -1)
        deviation = (groups.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = ((groups - groups.mean(-1, keepdim=True)) / deviation).reshape(x.shape)
        weight, bias = (self.weights[f"{name}.gn.{part}"][:, None, None] for part in ("weight", "bias"))
        return (x * weight + bias).relu()

    # Static kernels

    def position(self, height, width, channels):
        """Return the position encoding in float32, which the official release also uses in a float64 model."""
        periods = 10000 ** (2 * (torch.arange(channels // 2) // 2) / (channels // 2))
        result = torch.zeros(2, channels // 2, height, width)
        for i, period in enumerate(periods):
            wave = torch.sin if i % 2 == 0 else torch.cos
            result[0, i] = wave(torch.arange(1, height + 1) / (height + 1e-6) * (2 * math.pi) / period)[:, None]
            result[1, i] = wave(torch.arange(1, width + 1) / (width + 1e-6) * (2 * math.pi) / period)
        return result.flatten(0, 1)

    def static_kernels(self, levels):
        """(F, M_0, S_0, K_0), M_0 and K_0 without stuff."""
        total = 0
        for i, (x, num_convs) in enumerate(zip(levels, (1, 1, 2, 3))):
            if i == 3:
                x = x + self.position(*x.shape[-2:], x.shape[1]).to(x.dtype)
            for j in range(num_convs):
                name = f"rpn_head.localization_fpn.convs_all_levels.{i}.conv{j}"
                x = self.conv_norm_relu(x, name, stride=2 if i == 0 else 1)
                x = twice(x) if j < i - 1 else x
            total = total + x
        branches = (("conv_pred", "loc_convs.0"), ("aux_convs.0", "seg_convs.0"))
        located, semantic = (
            self.conv_norm_relu(self.conv_norm_relu(total, f"rpn_head.localization_fpn.{a}"), f"rpn_head.{b}")
            for a, b in branches
        )
        feature, masks = located + semantic, self.conv(located, "rpn_head.init_kernels")
        sums = torch.einsum("bnhw,bchw->bnc", (masks.sigmoid() > 0.5).to(feature.dtype), feature)
        learned = self.weights["rpn_head.init_kernels.weight"].flatten(1)
        return feature, masks, self.conv(semantic, "rpn_head.conv_seg"), learned + sums

    # Stages

    def stage(self, name, feature, kernels, masks, soft):
        """(K_i, M_i, class logits or None)."""
        feature = self.conv(feature, f"{name}.feat_transform.conv")
        shares = masks.softmax(1) if soft else (masks.sigmoid() > 0.5).to(feature.dtype)
        group = torch.einsum("bnhw,bchw->bnc", shares, feature)
        updated = self.update(f"{name}.kernel_update_conv", group, kernels)
        kernels = self.interact(name, updated)
        hidden = self.norm(self.linear(kernels, f"{name}.mask_fcs.0"), f"{name}.mask_fcs.1").relu()
        dynamic = self.linear(hidden, f"{name}.fc_mask")
        classes = None
        if not soft:
            hidden = self.norm(self.linear(kernels, f"{name}.cls_fcs.0"), f"{name}.cls_fcs.1").relu()
            classes = self.linear(hidden, f"{name}.fc_cls")
        return kernels, torch.einsum("bnc,bchw->bnhw", dynamic, feature), classes

    def update(self, name, group, kernels):
        width = len(self.weights[f"{name}.fc_layer.weight"])
        a_in, a_out = self.linear(group.reshape(-1, width), f"{name}.dynamic_layer").split(width, -1)
        b_in, b_out = self.linear(kernels.reshape(-1, width), f"{name}.input_layer").split(width, -1)
        kept = self.norm(self.linear(a_in * b_in, f"{name}.input_gate"), f"{name}.input_norm_in").sigmoid()
        taken = self.norm(self.linear(a_in * b_in, f"{name}.update_gate"), f"{name}.norm_in").sigmoid()
        mixed = taken * self.norm(a_out, f"{name}.norm_out") + kept * self.norm(b_out, f"{name}.input_norm_out")
        return self.norm(self.linear(mixed, f"{name}.fc_layer"), f"{name}.fc_norm").relu().reshape(kernels.shape)

    def interact(self, name, x):
        weight, bias = (self.weights[f"{name}.attention.attn.in_proj_{part}"] for part in ("weight", "bias"))
        heads = []
        for q, k, v in zip(*(y.chunk(self.num_heads, -1) for y in (x @ weight.T + bias).chunk(3, -1))):
            heads.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        attended = self.linear(torch.cat(heads, -1), f"{name}.attention.attn.out_proj")
        x = self.norm(x + attended, f"{name}.attention_norm")
        hidden = self.linear(x, f"{name}.ffn.layers.0.0").relu()
        return self.norm(x + self.linear(hidden, f"{name}.ffn.layers.1"), f"{name}.ffn_norm")

    # Instance and panoptic

    def forward(self, levels):
        """(M_0 of the things, S_0, [(K_i, M_i, class logits)])."""
        feature, masks, semantic, kernels = self.static_kernels(levels)
        stuff = self.weights["rpn_head.conv_seg.weight"][self.num_things :].flatten(1)
        kernels = torch.cat([kernels, stuff.expand(len(kernels), -1, -1)], 1)
        outputs = [(kernels, torch.cat([masks, semantic[:, self.num_things :]], 1), None)]
        for i in range(self.num_stages):
            outputs.append(self.stage(f"roi_head.mask_head.{i}", feature, *outputs[-1][:2], soft=False))
        return masks, semantic, outputs[1:]

    def targets(self, example, padded):
        """Of one image: [(class, mask)] of its things, and of its stuff."""

        def resized(mask):
            mask = F.pad(mask.double(), (0, padded[1] - mask.shape[1], 0, padded[0] - mask.shape[0]))
            return bilinear(mask[None, None], [side // 4 for side in padded])[0, 0]

        instances, labels = example["instances"], example["sem_seg"]
        things = [(int(c), resized(m)) for c, m in zip(instances.gt_classes, instances.gt_masks.tensor)]
        present = [c for c in range(self.num_things, self.num_things + self.num_stuff) if (labels == c).any()]
        return things, [(c, resized(labels == c)) for c in present]

    def match(self, masks, logits, things):
        """[(kernel, instance)] of one image, by kernel."""
        cost = torch.zeros(len(masks), len(things), dtype=torch.float64)
        for n, p in enumerate(masks.detach().sigmoid()):
            for g, (c, t) in enumerate(things):
                cost[n, g] = -(p * t + (1 - p) * (1 - t)).mean() - 4 * dice(p, t)
                if logits is not None:
                    q = logits[n, c].detach().sigmoid()
                    cost[n, g] += 2 * 0.25 * (1 - q) ** 2 * -(q + 1e-12).log()
                    cost[n, g] -= 2 * 0.75 * q**2 * -(1 - q + 1e-12).log()
        return sorted(zip(*(indices.tolist() for indices in linear_sum_assignment(cost.numpy()))))

    def losses(self, levels, batch, padded):
        static, semantic, outputs = self.forward(levels)
        num_kernels, num_classes = static.shape[1], self.num_things + self.num_stuff
        targets = [self.targets(x, padded) for x in batch]
        matches = [self.match(m, None, things) for m, (things, _) in zip(twice(static), targets)]
        losses = self.mask_losses(twice(static), self.positives(matches, targets, False, num_kernels), 0)
        total, foreground = 0, 0
        for logits, (things, stuff), match in zip(twice(semantic), targets, matches):
            labels = torch.full(logits.shape[1:], num_classes)
            labels = paint([*stuff, *(things[g] for _, g in match)], labels)
            total = total + sum(focal(x, (labels == c).double()).sum() for c, x in enumerate(logits))
            foreground += int((labels < num_classes).sum())
        losses["loss_dense_s0"] = total / max(1, foreground)
        for i, (_, masks, logits) in enumerate(outputs, start=1):
            positives = self.positives(matches, targets, True, num_kernels)
            expected, answers = torch.zeros_like(logits), torch.zeros_like(logits)
            answers[:, :num_kernels, : self.num_things] = 1
            for c in range(self.num_stuff):
                answers[:, num_kernels + c, self.num_things + c] = 1
            for b, n, c, _ in positives:
                expected[b, n, c] = 1
            losses[f"loss_class_s{i}"] = 2 * (focal(logits, expected) * answers).sum() / max(1, len(positives))
            losses.update(self.mask_losses(twice(masks), positives, i))
            scores = logits[:, :num_kernels, : self.num_things]
            matches = [self.match(m[:num_kernels], s, t) for m, s, (t, _) in zip(twice(masks), scores, targets)]
        return losses

    def positives(self, matches, targets, with_stuff, num_kernels):
        """[(image, kernel, class, mask)], by image, then by kernel."""
        result = []
        for b, (match, (things, stuff)) in enumerate(zip(matches, targets)):
            result += [(b, n, *things[g]) for n, g in match]
            result += [(b, num_kernels + c - self.num_things, c, m) for c, m in stuff if with_stuff]
        return result

    def mask_losses(self, masks, positives, stage):
        """[B, N, h, w] logits; the rank loss only where there is stuff, as in the configs."""
        wrong, missed = masks.sum() * 0, masks.sum() * 0
        for b, n, _, t in positives:
            wrong = wrong + cross_entropy(masks[b, n], t).mean() / len(positives)
            missed = missed + (1 - dice(masks[b, n].sigmoid(), t)) / len(positives)
        losses = {f"loss_mask_s{stage}": wrong, f"loss_dice_s{stage}": 4 * missed}
        if self.num_stuff:
            rank = 0
            for b, logits in enumerate(masks):
                owners = paint([(n, t) for i, n, _, t in positives if i == b], torch.full(logits.shape[1:], -1))
                own = logits.gather(0, owners.clamp(min=0)[None])[0] - logits.logsumexp(0)
                rank = rank - (own * (owners >= 0)).mean() / len(masks)
            losses[f"loss_rank_s{stage}"] = 0.1 * rank
        return losses

    def results(self, levels, padded, image_sizes, output_sizes):
        """Per image: instances [(score, class, mask)], or a map of segments and [(class, score, area)]."""
        _, masks, logits = self.forward(levels)[2][-1]
        finish = self.panoptic if self.num_stuff else self.instances
        results = []
        for mask_logits, scores, image, output in zip(twice(masks), logits.sigmoid(), image_sizes, output_sizes):
            probs = bilinear(mask_logits.sigmoid()[None], padded)[..., : image[0], : image[1]]
            results.append(finish(bilinear(probs, output)[0], scores))
        return results

    def instances(self, probs, scores):
        pairs = [(float(s), c, probs[n] > 0.5) for n, row in enumerate(scores) for c, s in enumerate(row)]
        return sorted(pairs, key=lambda pair: -pair[0])[: len(probs)]

    def panoptic(self, probs, scores):
        best = []
        for n, row in enumerate(scores):
            c = self.num_things + n - (len(scores) - self.num_stuff)
            c = int(row[: self.num_things].argmax()) if c < self.num_things else c
            best.append((float(row[c]), c, n))
        owners = (torch.tensor([s for s, _, _ in best])[:, None, None].to(probs) * probs).argmax(0)
        segments, painted = [], torch.zeros(probs.shape[1:], dtype=torch.int64)
        for score, c, n in sorted(best, key=lambda kernel: -kernel[0]):
            won, own = int((owners == n).sum()), int((probs[n] >= 0.5).sum())
            if (c >= self.num_things or score >= 0.3) and won and own and won / own >= 0.6:
                segments.append((c, score, won))
                painted[owners == n] = len(segments)
        return painted, segments

    # Semantic

    def semantic_logits(self, feature, logits):
        """Those of the decode head and of every stage."""
        kernels = self.weights["decode_head.kernel_generate_head.conv_seg.weight"].flatten(1)
        kernels, all_logits = kernels.expand(len(feature), -1, -1), [logits]
        for i in range(self.num_stages):
            name = f"decode_head.kernel_update_head.{i}"
            kernels, logits, _ = self.stage(name, feature, kernels, all_logits[-1], soft=True)
            all_logits.append(logits)
        return all_logits

"""SSD's photometric distortion for images of bytes and of floats."""

import random

import cv2
import numpy as np
from detectron2.projects.point_rend import ColorAugSSDTransform


class ColorAugmentation(ColorAugSSDTransform):
    """Detectron2's for bytes, to the bit, and the same for floats from 0 to 255, which it would cut to bytes."""

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        if img.dtype == np.uint8:
            return super().convert(img, alpha, beta)
        return np.clip(img * np.float32(alpha) + np.float32(beta), 0, 255)

    def saturation(self, img: np.ndarray) -> np.ndarray:
        if img.dtype == np.uint8:
            return super().saturation(img)
        if random.randrange(2):
            hsv = cv2.cvtColor(np.ascontiguousarray(img), cv2.COLOR_BGR2HSV)  # hue in degrees, saturation from 0 to 1
            factor = random.uniform(self.saturation_low, self.saturation_high)
            hsv[:, :, 1] = np.minimum(hsv[:, :, 1] * np.float32(factor), 1)
            return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        return img

    def hue(self, img: np.ndarray) -> np.ndarray:
        if img.dtype == np.uint8:
            return super().hue(img)
        if random.randrange(2):
            hsv = cv2.cvtColor(np.ascontiguousarray(img), cv2.COLOR_BGR2HSV)
            # In images of 8 bits, one step of hue is two degrees
            hsv[:, :, 0] = (hsv[:, :, 0] + 2 * random.randint(-self.hue_delta, self.hue_delta)) % 360
            return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        return img
